"""What the exports say of each latent, against a plain pass over the same text."""

import gzip
import json
import zlib

import numpy as np
import pytest
import torch
from clts import F, connect_random, random_clt
from tiny_models import CONTEXT, VOCAB, hf_model, tokenizer, tokens

from sparseclt.export import neuronpedia
from sparseclt.export.latent_files import write_latents
from sparseclt.language_model.language_model import LanguageModel

ROWS = tokens(rows=30, length=CONTEXT - 4)
DEAD = (1, 3)


@pytest.fixture(scope="module")
def made():
    """A CLT with a dead latent, its model, and the values of all latents on ROWS: [L, N, F]."""
    model = LanguageModel.from_hf(hf_model("gpt2", dtype=torch.float32), tokenizer(), name="some/Tiny_model")
    clt = random_clt(model)
    connect_random(clt, 4)
    with torch.no_grad():
        clt.transcoder(DEAD[0]).b_enc[DEAD[1]] = -1e6
    latents = clt.eval()(model.capture(ROWS), "vanilla").latents
    return clt, model, torch.stack([z.dense(F) for z in latents]).detach().numpy()


def logits_of(clt, model, layer, latent):
    """What a latent's decoders add to the logits, over their mean, by plain matrices."""
    hf = model.bridge.original_model.state_dict()
    gain = next(v for k, v in hf.items() if "ln_f" in k and k.endswith("weight"))
    W_U = model.bridge.unembed.W_U.detach()
    direction = clt.transcoder(layer).W_dec[latent].sum(0).detach()
    logits = ((direction - direction.mean()) * gain) @ W_U
    return logits - logits.mean()


def read_circuit_tracer(folder):
    """[layer][latent], as the page reads them."""
    found = []
    for layer in json.loads(gzip.decompress((folder / "index.json.gz").read_bytes())):
        content = (folder / layer["filename"]).read_bytes()
        parts = [content[a:b] for a, b in zip(layer["offsets"], layer["offsets"][1:], strict=False)]
        found.append([json.loads(zlib.decompress(p[4 : 4 + int.from_bytes(p[:4], "little")])) for p in parts])
    return found


def check_window(values, strings, position, tokens_of_rows, shown):
    """That a window of text, with a value for each token, is in the text, and that those are the latent's values."""
    S, row_values = ROWS.shape[1], values.reshape(ROWS.shape)
    for row in range(len(ROWS)):
        for start in range(S - len(strings) + 1):
            here = slice(start, start + len(strings))
            if tokens_of_rows[row][here] == strings and np.allclose(row_values[row, here], shown, atol=1e-6):
                return row * S + start + position
    raise AssertionError("no such window in the text")


def test_circuit_tracer_finds_every_latent(made, tmp_path):
    clt, model, values = made
    write_latents(clt, model, ROWS, "run", tmp_path / "features")
    found, counted = read_circuit_tracer(tmp_path / "features"), ROWS.numel() - len(ROWS)
    texts = [[model.tokenizer.decode(t).strip() for t in row] for row in ROWS.tolist()]
    assert [len(layer) for layer in found] == [F] * 3
    for m, layer in enumerate(found):
        for j, latent in enumerate(layer):
            own = values[m, :, j]
            fires = own[own > 0]
            assert latent["index"] == j and latent["activation_frequency"] == pytest.approx(len(fires) / counted)
            assert latent["act_max"] == pytest.approx(own.max()) and sum(latent["histogram"]) == len(fires)
            if len(fires):
                assert latent["quantile_values"][49] == pytest.approx(np.median(fires), rel=1e-5)
                top = latent["examples_quantiles"][0]
                assert top["quantile_name"] == "Top activations"
                assert max(top["examples"][0]["tokens_acts_list"]) == pytest.approx(own.max())
            logits = logits_of(clt, model, m, j)
            assert [t.strip() for t in latent["top_logits"]] == [
                model.tokenizer.decode(int(t)).strip() for t in logits.topk(10).indices
            ]
    example = found[2][5]["examples_quantiles"][1]["examples"][0]
    strings = [t.strip() for t in example["tokens"]]
    place = check_window(values[2, :, 5], strings, example["train_token_ind"], texts, example["tokens_acts_list"])
    assert values[2, place, 5] > 0
    dead = found[DEAD[0]][DEAD[1]]
    assert dead["examples_quantiles"] == [] and dead["act_max"] == 0 and dead["quantile_values"] == []


def test_neuronpedia_gets_its_folders_and_columns(made, tmp_path, monkeypatch):
    monkeypatch.setattr(neuronpedia, "BATCH", 8)
    clt, model, values = made
    neuronpedia.write(clt, model, ROWS, "My Run", tmp_path / "out")
    folder = tmp_path / "out" / "tiny-model" / "2-my-run"
    heads = {
        kind: json.loads((folder / f"{kind}.jsonl").read_text()) for kind in ("release", "model", "sourceset", "source")
    }
    assert heads["source"] == {
        "creatorId": "sparseclt", "id": "2-my-run", "modelId": "tiny-model", "setName": "my-run",
        "num_prompts": len(ROWS), "num_tokens_in_prompt": ROWS.shape[1],
    }  # fmt: skip
    assert heads["model"]["id"] == "tiny-model" and heads["model"]["layers"] == 3
    assert heads["sourceset"]["releaseName"] == heads["release"]["name"] == "my-run"

    def lines(kind):
        files = sorted((folder / kind).iterdir(), key=lambda file: int(file.name.split("-")[1].split(".")[0]))
        assert [file.name for file in files] == [f"batch-{i}.jsonl.gz" for i in range(3)]
        return [json.loads(line) for file in files for line in gzip.decompress(file.read_bytes()).decode().splitlines()]

    features, activations = lines("features"), lines("activations")
    assert [feature["index"] for feature in features] == [str(j) for j in range(F)]
    assert len({line["id"] for line in activations}) == len(activations)
    for j, feature in enumerate(features):
        own, logits = values[2, :, j], logits_of(clt, model, 2, j)
        assert (feature["modelId"], feature["layer"]) == ("tiny-model", "2-my-run")
        assert feature["maxActApprox"] == pytest.approx(own.max())
        assert feature["frac_nonzero"] == pytest.approx((own > 0).sum() / (ROWS.numel() - len(ROWS)))
        for sign, largest in (("pos", True), ("neg", False)):
            expected = logits.topk(10, largest=largest).values.tolist()
            assert feature[f"{sign}_values"] == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert sum(feature["freq_hist_data_bar_heights"]) == (own > 0).sum()
        assert sum(feature["logits_hist_data_bar_heights"]) == VOCAB
        mine = [line for line in activations if line["index"] == str(j)]
        assert bool(mine) == bool((own > 0).any())
        for line in mine:
            assert len(line["tokens"]) == len(line["values"]) and line["maxValue"] == max(line["values"])
            assert line["values"][line["maxValueTokenIndex"]] == line["maxValue"]
            qualifying = line["values"][line["qualifyingTokenIndex"]]
            assert line["binMin"] <= qualifying <= line["binMax"] and line["binContains"] in (0, 0.25)
