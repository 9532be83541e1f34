"""Every number on a latent's page is what weights and text give, by the plain formulas on dense tensors."""

import pytest
import torch
from atlases import DEAD, LENGTH, make_atlas

from sparseclt.atlas.build import TOKEN_SHARD
from sparseclt.atlas.folder import read
from sparseclt.atlas.latents import SHARD
from sparseclt.model.attention import attention_write, centre, head_rows

CASES = [
    ("gpt2", "frozen", "topk"),
    ("pythia", "frozen", "topk"),
    ("llama", "latents", "topk"),
    ("Olmo2", "latents", "topk"),
    ("gpt2", "frozen", "batchtopk"),
    ("gpt2", "frozen", "jumprelu"),
    ("llama", "latents", "jumprelu"),
]


@pytest.fixture(scope="module", params=CASES, ids=[" ".join(case) for case in CASES])
def case(request, tmp_path_factory):
    family, attention, activation = request.param
    atlas = make_atlas(tmp_path_factory.mktemp("figures") / "atlas", family, attention, activation=activation)
    attention = attention == "latents"
    atlas.activations = atlas.language_model.capture(atlas.rows.long(), attention=attention)
    atlas.z = {mode: dense(atlas, mode) for mode in ("vanilla", "sparse")}
    return atlas


def dense(atlas, mode):
    """Latents [M, N, F], position 0 left out."""
    F, forward = atlas.clt.architecture.latents, atlas.clt(atlas.activations, mode)
    z = torch.stack([latents.dense(F) for latents in forward.latents]).detach()
    z.unflatten(1, (-1, LENGTH))[:, :, 0] = 0
    return z


def pages(atlas, m):
    """The data of every latent of module m."""
    shards = range(-(-atlas.clt.architecture.latents // SHARD))
    return [latent for s in shards for latent in read(atlas.folder / "data" / "latents" / str(m) / f"{s}.json.gz")]


def near(a, b, tolerance=1e-5):
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def virtual_weights(atlas, m):
    """[U, F] of an MLP module, from the definition."""
    clt, site, E = atlas.clt, atlas.clt.sites[m], []
    for u in range(clt.upstream[m]):
        writer = clt.transcoder(u)
        E.append(
            writer.W_dec[:, : site.layer - writer.site.layer].sum(1)
            if writer.site.kind == "mlp"
            else writer.W_dec[:, 0]
        )
    rows = clt.transcoder(m).W_enc
    return torch.cat(E) @ (centre(rows) if clt.architecture.model.centred else rows).T


def test_activity(case):
    for m in range(len(case.clt.sites)):
        for i, page in enumerate(pages(case, m)):
            for mode, z in case.z.items():
                values, shown = z[m, :, i], page["modes"][mode]
                assert shown["fired"] == int((values > 0).sum())
                near(shown["largest"], values.max())
                near(shown["mean"] * shown["fired"], values.sum())
                if shown["fired"]:
                    bins = torch.histc(values[values > 0].float(), len(shown["histogram"]), 0, float(values.max()))
                    assert sum(shown["histogram"]) == shown["fired"]
                    assert (bins - torch.tensor(shown["histogram"])).abs().sum() <= 2  # a value on an edge of two bins


def test_examples_are_windows_of_the_text_with_the_latents_own_values(case):
    for m in range(len(case.clt.sites)):
        for i, page in enumerate(pages(case, m)):
            for mode, z in case.z.items():
                values, shown = z[m, :, i].view(-1, LENGTH), page["modes"][mode]
                for example in shown["examples"]:
                    window = slice(example["start"], example["start"] + len(example["tokens"]))
                    near(example["value"], values[example["row"], example["position"]])
                    assert example["tokens"] == case.rows[example["row"], window].tolist()
                    near(example["values"], values[example["row"], window])
                    assert window.start <= example["position"] < window.start + len(example["tokens"])
                top = [e for e in shown["examples"] if e["group"] == 0]
                best = values.max(1).values.sort(descending=True).values
                near([e["value"] for e in top], best[best > 0][:10])
                assert len({e["row"] for e in top}) == len(top)
                for quarter in range(1, 5):
                    ordered = values[values > 0].sort(descending=True).values
                    bounds = [len(ordered) * q // 4 for q in (quarter - 1, quarter)]
                    found = [e["value"] for e in shown["examples"] if e["group"] == quarter]
                    if len(ordered) >= 16:
                        assert len(found) == 4
                    if found:
                        part = ordered[bounds[0] : bounds[1] + 1]
                        assert min(found) >= part.min() * (1 - 1e-5) and max(found) <= part.max() * (1 + 1e-5)


def test_connections_have_their_weights_means_and_coactivation_in_both_directions(case):
    F, sites, outgoing = case.clt.architecture.latents, case.clt.sites, {}
    z = case.z["sparse"]
    for m, site in enumerate(sites):
        if not case.clt.upstream[m]:
            assert all(page["upstream"] is None for page in pages(case, m))
            continue
        V = virtual_weights(case, m).detach() if site.kind == "mlp" else None
        for i, page in enumerate(pages(case, m)):
            on, up = z[m, :, i] > 0, page["upstream"]
            fired = max(int(on.sum()), 1)
            assert up["latent"] == case.clt.transcoder(m).connection_indices[i].tolist()
            for c, j in enumerate(up["latent"]):
                if j < 0:
                    assert up["mean"][c] == up["together"][c] == 0
                    continue
                outgoing.setdefault(j, []).append((m * F + i, up["V"][c], up["mean"][c], up["together"][c]))
                if V is not None:
                    z_up = z[j // F, :, j % F]
                    near(up["V"][c], V[j, i])
                    near(
                        up["mean"][c], (V[j, i] * z_up / case.activations.scale[site.layer].flatten())[on].sum() / fired
                    )
                    near(up["together"][c], (z_up[on] > 0).sum() / fired)
    for m in range(len(sites)):
        for i, page in enumerate(pages(case, m)):
            down = page["downstream"]
            assert down["count"] == len(outgoing.get(m * F + i, []))
            shown = zip(down["latent"], down["V"], down["mean"], down["together"], strict=True)
            for (a, *numbers), (b, *expected) in zip(sorted(shown), sorted(outgoing.get(m * F + i, [])), strict=True):
                assert a == b
                near(numbers, expected)


def test_contributions_bias_and_unmasked_part_are_the_preactivation(case):
    clt, activations, F = case.clt, case.activations, case.clt.architecture.latents
    checked = 0
    for m, site in enumerate(clt.sites):
        if not clt.upstream[m] or site.kind != "mlp":
            continue
        module, V = clt.transcoder(m), virtual_weights(case, m).detach()
        unmasked = activations.r_0.clone()
        for layer in range(site.layer + (not clt.architecture.model.parallel)):
            if clt.architecture.attention == "frozen":
                unmasked += activations.attn_out[layer]
        for u in range(clt.upstream[m]):
            unmasked += clt.transcoder(u).b_dec
        rows = centre(module.W_enc) if clt.architecture.model.centred else module.W_enc
        unmasked = (unmasked @ rows.T / activations.scale[site.layer][..., None]).detach()
        for i, page in enumerate(pages(case, m)):
            near(page["bias"], module.b_enc[i].item())
            for example in page["modes"]["sparse"]["examples"]:
                r, p = example["row"], example["position"]
                near(example["rest"], unmasked[r, p, i])
                near(sum(example["contributions"]) + example["rest"] + page["bias"], example["value"])
                for j, value in zip(page["upstream"]["latent"], example["contributions"], strict=True):
                    z_up = case.z["sparse"][j // F, r * LENGTH + p, j % F] if j >= 0 else 0.0
                    near(value, V[j, i] * z_up / activations.scale[site.layer][r, p] if j >= 0 else 0.0)
                checked += 1
    assert checked > 100


def test_an_attention_latents_largest_values_are_made_of_their_contributions(case):
    clt, activations, F = case.clt, case.activations, case.clt.architecture.latents
    if clt.architecture.attention == "frozen":
        assert all(site.kind == "mlp" for site in clt.sites)
        return
    z, checked = case.z["sparse"].unflatten(1, (-1, LENGTH)), 0
    for m, site in enumerate(clt.sites):
        if site.kind == "mlp" or not clt.upstream[m]:
            continue
        module, weights, stream, E = clt.transcoder(m), clt.attention_of(site), activations.r_0.clone(), []
        for u in range(clt.upstream[m]):
            writer = clt.transcoder(u)
            real = activations.output(writer.site).view_as(stream)
            stream[:, 1:] += writer.b_dec
            stream[:, 0] += real[:, 0]  # position 0 does not count: it keeps the model's own outputs
            targets = site.layer - writer.site.layer if writer.site.kind == "mlp" else 1
            E.append(writer.W_dec[:, :targets].sum(1))
        mix = activations.attn_pattern[site.layer] / activations.attn_scale[site.layer][:, None, None, :]
        post_scale = activations.attn_post_scale[site.layer] if activations.attn_post_scale else None
        if post_scale is not None:
            mix = mix / post_scale[:, None, :, None]
        unmasked = (attention_write(stream, mix, weights, post_scale) @ module.W_enc.T).detach()
        V = torch.stack([torch.cat(E) @ head_rows(module.W_enc, weights, h).T for h in range(len(mix[0]))]).detach()
        for i, page in enumerate(pages(case, m)):
            for example in page["modes"]["sparse"]["examples"]:
                r, p = example["row"], example["position"]
                if example["group"] == 0:
                    near(example["rest"], unmasked[r, p, i])
                    near(sum(example["contributions"]) + example["rest"] + page["bias"], example["value"])
                    for j, value in zip(page["upstream"]["latent"], example["contributions"], strict=True):
                        expected = (V[:, j, i] * (mix[r, :, p] @ z[j // F, r, :, j % F])).sum() if j >= 0 else 0.0
                        near(value, expected)
                    checked += 1
    assert checked > 50


def test_logits_of_the_decoders(case):
    hf, name = case.language_model.bridge.original_model, case.language_model.shape.name
    norm = hf.get_submodule(
        {"gpt2": "transformer.ln_f", "pythia": "gpt_neox.final_layer_norm", "llama": "model.norm"}.get(
            name, "model.norm"
        )
    )
    W_U = (norm.weight[:, None] * hf.get_output_embeddings().weight.T).detach()
    for m in range(len(case.clt.sites)):
        W_dec = case.clt.transcoder(m).W_dec.detach()
        for i, page in enumerate(pages(case, m)):
            if not any(mode["fired"] for mode in page["modes"].values()):
                assert "logits" not in page
                continue
            for entry in page["logits"]:
                layer, first = entry["layer"], case.clt.sites[m].layer
                row = W_dec[i].sum(0) if layer is None else W_dec[i, layer - first]
                logits = (centre(row) if case.clt.architecture.model.centred else row) @ W_U
                logits = logits - logits.mean()
                near(entry["top_values"], logits.topk(10).values)
                near(entry["bottom_values"], -(-logits).topk(10).values)
                near(logits[entry["top"]], entry["top_values"])
                near(logits[entry["bottom"]], entry["bottom_values"])


def test_a_token_names_the_latents_that_it_activates(case):
    for token in (7, 8, 20):
        shard = read(case.folder / "data" / "tokens" / f"{token // TOKEN_SHARD}.json.gz")[str(token)]
        here = (case.rows == token).flatten()
        for mode, z in case.z.items():
            shares = z[:, here].sum(1) / z.sum(1)
            for m, i, share in shard[mode]:
                near(share, shares[m, i], 1e-4)
            assert shard[mode] == sorted(shard[mode], key=lambda entry: -entry[2])
            strongest = (
                z.new_zeros(50, *shares.shape).index_add_(0, case.rows.flatten().long(), z.transpose(0, 1)).argmax(0)
            )
            live = z.sum(1) > 0
            own = {(m, i) for m, i in (live & (strongest == token)).nonzero().tolist()}
            assert own <= {(m, i) for m, i, _ in shard[mode]}


def test_a_dead_latent_has_no_examples(case):
    page = pages(case, DEAD[0])[DEAD[1]]
    assert all(shown["fired"] == 0 and shown["examples"] == [] for shown in page["modes"].values())


def test_a_clt_without_connections_has_vanilla_pages(tmp_path):
    atlas = make_atlas(tmp_path / "atlas", connected=False)
    assert read(atlas.folder / "data" / "run.json.gz")["modes"] == ["vanilla"]
    page = pages(atlas, 2)[0]
    assert list(page["modes"]) == ["vanilla"] and page["upstream"] is None and page["downstream"]["count"] == 0


def test_latents_in_several_ranges_give_the_same_files(tmp_path, monkeypatch, atlas):
    monkeypatch.setattr("sparseclt.observations.gather.MOST_FIRINGS", 50)
    monkeypatch.setattr("sparseclt.observations.gather.SCAN_TOKENS", 64)
    monkeypatch.setattr("sparseclt.observations.gather.DENSE_ENTRIES", 1)
    monkeypatch.setattr("sparseclt.atlas.connections.DENSE_ENTRIES", 1)
    monkeypatch.setattr("sparseclt.observations.logits.ENTRIES", 1)
    other = make_atlas(tmp_path / "again")
    names = [f.relative_to(atlas.folder) for f in (atlas.folder / "data").rglob("*.gz")]
    assert len(names) > 5
    assert all(read(other.folder / name) == read(atlas.folder / name) for name in names if "latents" in str(name))


def test_a_bf16_clt_has_pages_too(tmp_path):
    atlas = make_atlas(tmp_path / "atlas", dtype=torch.bfloat16)
    page = pages(atlas, 2)[0]
    assert page["modes"]["sparse"]["fired"] > 0 and any(page["upstream"]["mean"])
