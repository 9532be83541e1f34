"""A CLT goes to the hub and comes back: its weights, its card, the hub's own cache of links."""

import os
from pathlib import Path

import pytest
import torch
from clts import language_model, random_clt
from local_hub import commit_of

import sparseclt
from sparseclt.formats import sparsify
from sparseclt.model.clt import SparseCLT
from sparseclt.storage.hub import local_directory

TABLE = "| module | FVU vanilla |\n| ------ | ----------: |\n| mlp_0  |      0.1000 |"


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def tokens_of(hub):
    """The tokens that requests about repositories came with."""
    return {token for path, token in hub.requests if path == "/api/repos/create" or "me/tiny" in path}


def test_what_is_pushed_comes_back_through_the_hubs_own_cache_of_links(hub, clt, tmp_path):
    url = clt.push_to_hub("me/tiny", table=TABLE, token="hf_secret", private=True)
    assert url.startswith(f"{hub.url}/me/tiny/commit/")
    (created,) = hub.created
    assert created["name"] == "tiny" and (created.get("private") or created.get("visibility") == "private")
    assert tokens_of(hub) == {"Bearer hf_secret"}
    loaded = SparseCLT.from_pretrained("me/tiny", cache_dir=tmp_path / "cache")
    assert same(loaded, clt)
    links = [file for file in (tmp_path / "cache").rglob("W_enc_0.safetensors") if file.is_symlink()]
    assert len(links) == 1 and links[0].parent.name == commit_of(hub.files["me/tiny", "main"])
    before = len(hub.requests)
    again = SparseCLT.from_pretrained("me/tiny", cache_dir=tmp_path / "cache", local_files_only=True)
    assert same(again, clt) and len(hub.requests) == before


def test_a_revision_is_passed_on(hub, clt, tmp_path):
    clt.push_to_hub("me/tiny", branch="second", token="hf_secret")
    assert list(hub.files) == [("me/tiny", "second")]
    assert same(SparseCLT.from_pretrained("me/tiny", revision="second", token="hf_secret"), clt)
    assert tokens_of(hub) == {"Bearer hf_secret"}
    with pytest.raises(ValueError, match="path: expected a directory, or a repository on the hub .* got me/tiny"):
        SparseCLT.from_pretrained("me/tiny", revision="third", token="hf_secret")


def test_a_folder_of_a_repository_is_fetched_without_the_rest(hub, clt, tmp_path):
    saved = clt.save_pretrained(tmp_path / "clt")
    files = {f"sets/one/{file.name}": file.read_bytes() for file in saved.iterdir()}
    hub.files["me/many", "main"] = files | {"sets/two/large.safetensors": b"not asked for"}
    assert same(SparseCLT.from_pretrained("me/many/sets/one"), clt)
    assert not any("large" in path for path, _ in hub.requests)


def test_a_file_changed_on_the_hub_is_noticed_but_a_card_may_be_edited(hub, clt):
    clt.push_to_hub("me/tiny", token="hf_secret")
    files = hub.files["me/tiny", "main"]
    files["README.md"] += b"More to read."
    assert same(SparseCLT.from_pretrained("me/tiny"), clt)
    content = bytearray(files["W_enc_0.safetensors"])
    content[-1] ^= 1
    files["W_enc_0.safetensors"] = bytes(content)
    with pytest.raises(ValueError, match="W_enc_0.safetensors has changed bytes"):
        SparseCLT.from_pretrained("me/tiny")


def test_the_card_says_what_the_clt_is_how_to_load_it_and_how_good_it_is(clt):
    from huggingface_hub import ModelCard

    card = clt.generate_model_card("me/tiny", TABLE)
    assert isinstance(card, ModelCard) and card.data.library_name == "sparseclt"
    assert TABLE in card.text and 'SparseCLT.from_pretrained("me/tiny")' in card.text
    assert "3 modules with 20 latents each, of which 5 are\nactive" in card.text
    assert "at most 4 upstream latents" in card.text
    assert "Evaluation" not in clt.generate_model_card("me/tiny").text


@pytest.mark.parametrize(
    ("activation", "attention", "runs"),
    [
        ("topk", "frozen", False),
        ("jumprelu", "frozen", True),
        ("batchtopk", "frozen", True),
        ("jumprelu", "latents", False),
    ],
)
def test_circuit_tracer_is_named_where_it_computes_the_same_latents(activation, attention, runs):
    clt = random_clt(language_model("gpt2", torch.float32), attention, activation=activation)
    card = clt.generate_model_card("me/tiny")
    assert ("circuit-tracer" in card.data.tags) == runs and "it has no connections" in card.text


def cache_of(saved: Path, folder: Path) -> Path:
    """The files of `saved` as the hub's cache holds them: links in a snapshot to files by digest."""
    snapshot, blobs = folder / "models--me--tiny" / "snapshots" / "0123abcd", folder / "models--me--tiny" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in saved.iterdir():
        (blobs / f"of-{file.name}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"of-{file.name}"))
    return snapshot


def test_links_of_a_snapshot_may_lead_to_its_own_blobs_only(clt, tmp_path):
    saved = clt.save_pretrained(tmp_path / "clt")
    snapshot = cache_of(saved, tmp_path / "cache")
    assert same(SparseCLT.from_pretrained(snapshot), clt)
    blob = snapshot.parents[1] / "blobs" / "of-W_enc_0.safetensors"
    outside = tmp_path / "W_enc_0.safetensors"
    blob.rename(outside)
    blob.symlink_to(outside)  # a link behind the link
    with pytest.raises(ValueError, match="W_enc_0.safetensors is a symbolic link"):
        SparseCLT.from_pretrained(snapshot)
    blobs = snapshot.parents[1] / "blobs"
    blob.unlink()
    outside.rename(blob)
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a symbolic link"):
        SparseCLT.from_pretrained(snapshot)


@pytest.mark.parametrize("name", ["runs/none", "/absent/clt", "./none", "none", "../a/b", "owner/na me", "a//b"])
def test_what_is_neither_here_nor_on_the_hub_is_one_clear_error(name, hub):
    with pytest.raises(ValueError, match=r"path: expected a directory, or a repository on the hub|is not a directory"):
        SparseCLT.from_pretrained(name)
    assert all(path.startswith("/api/models/runs/none") for path, _ in hub.requests)


def test_a_path_never_leads_to_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_directory(Path("me/tiny"), {}) == Path("me/tiny")
    os.makedirs("me/tiny")
    assert local_directory("me/tiny", {}) == Path("me/tiny")
    with pytest.raises(ValueError, match="revision: expected only with a name on the hub, .* got path me/tiny"):
        local_directory("me/tiny", {"revision": "main"})
    assert hub.requests == []


def test_a_repository_of_another_trainer_is_read_from_the_cache_of_links(hub, tmp_path):
    model = language_model("gpt2", torch.float32)
    theirs = sparsify.write(random_clt(model), model, tmp_path / "theirs")
    files = {str(file.relative_to(theirs)): file.read_bytes() for file in theirs.rglob("*") if file.is_file()}
    hub.files["other/clt", "main"] = files
    read = sparseclt.SparseCLT.from_pretrained("other/clt", language_model=model)
    assert same(read, sparseclt.SparseCLT.from_pretrained(theirs, language_model=model))
