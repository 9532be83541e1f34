"""Run by circuit-tracer's environment: whether it computes from an export what `prepare.py` says.

.venv-circuit-tracer/bin/python tests/circuit_tracer/compare.py OUT
"""

import contextlib
import gzip
import io
import json
import sys
import warnings
import zlib
from pathlib import Path

import torch
from circuit_tracer import ReplacementModel, attribute
from circuit_tracer.frontend import feature_models, graph_models
from circuit_tracer.graph import compute_graph_scores
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
from circuit_tracer.utils.hf_utils import load_transcoders
from safetensors.torch import load_file
from transformer_lens import loading_from_pretrained

CPU = torch.device("cpu")


def load(folder: str):
    """The model with the export in place of its MLPs, as the README.md of an export says."""
    clt = load_clt(
        folder, feature_input_hook="mlp.hook_in", feature_output_hook="hook_mlp_out", scan=folder, device=CPU,
        dtype=torch.float32,
    )  # fmt: skip
    loading_from_pretrained.OFFICIAL_MODEL_NAMES.append(f"{folder}/model")
    return ReplacementModel.from_pretrained_and_transcoders(f"{folder}/model", clt, device=CPU, dtype=torch.float32)


def latents_agree(model, expected) -> str:
    """The same latents are active with the same values, except where ours had no room for more."""
    worst, active = 0.0, 0
    for number, prompt in enumerate(expected["prompts"]):
        _, found = model.get_activations(prompt)
        for layer, here in enumerate(found):
            ours = expected[f"latents_{layer}"][number]
            whole = (ours > 0).sum(1) < expected["slots"]
            differ = ((here > 0) != (ours > 0)) & whole[:, None]
            close = (here - ours).abs() <= 1e-4 + 1e-4 * ours.abs()
            at_threshold = (here - model.transcoders.activation_function.threshold[layer][0]).abs() < 1e-4
            assert not (differ & ~at_threshold & ~close).any(), f"prompt {number}, layer {layer}: other latents"
            same = (here > 0) & (ours > 0)
            error = ((here - ours).abs() / (1 + ours.abs()))[same].max().item() if same.any() else 0.0
            worst, active = max(worst, error), active + int(same.sum())
    assert worst < 1e-4, worst
    return f"{active} active latents, largest relative error {worst:.1e}"


@torch.no_grad()
def fvu_agrees(model, rows, ours, topk) -> str:
    """FVU per layer without position 0: that which we measured, and within 10 % of TopK's."""
    L = model.cfg.n_layers
    names = [f"blocks.{layer}.{hook}" for layer in range(L) for hook in ("mlp.hook_in", "hook_mlp_out")]
    _, cache = model.run_with_cache(rows, names_filter=lambda name: name in names)
    x = torch.stack([cache[f"blocks.{layer}.mlp.hook_in"][:, 1:].flatten(0, 1) for layer in range(L)])
    y = torch.stack([cache[f"blocks.{layer}.hook_mlp_out"][:, 1:].flatten(0, 1) for layer in range(L)])
    z = torch.stack([model.transcoders.encode_layer(x[layer], layer) for layer in range(L)])
    error = (y - model.transcoders.decode(z)).square().sum((1, 2))
    fvu = (error / (y - y.mean(1, keepdim=True)).square().sum((1, 2))).tolist()
    for layer, value in enumerate(fvu):
        assert abs(value - ours[layer]) < 0.02 * ours[layer] + 1e-4, (layer, value, ours[layer])
        assert value <= 1.1 * topk[layer], f"layer {layer}: FVU {value:.4f}, TopK's is {topk[layer]:.4f}"
    return "FVU " + " ".join(f"{value:.4f}" for value in fvu) + ", TopK's " + " ".join(f"{value:.4f}" for value in topk)


def scores_agree(model, prompts, replacement, completeness) -> str:
    """Replacement and completeness of each prompt's graph."""
    worst = 0.0
    for prompt, *ours in zip(prompts, replacement, completeness, strict=True):
        graph = attribute(prompt, model, batch_size=256)
        found = compute_graph_scores(graph)
        errors = [abs(a - b) for a, b in zip(found, ours, strict=True)]
        assert max(errors) < 0.01, (found, ours)
        worst = max(worst, *errors)
    mean = sum(replacement) / len(replacement)
    return f"{len(prompts)} prompts, mean replacement score {mean:.3f}, largest difference {worst:.1e}"


def text_is_read_alike(model, prompts, texts) -> str:
    """A prompt given as text, with the BOS token in front, becomes the same tokens."""
    bos = model.tokenizer.bos_token or model.tokenizer.eos_token
    read = [model.ensure_tokenized(bos + text).tolist() for text in texts]
    same = sum(a == b.tolist() for a, b in zip(read, prompts, strict=True))
    assert same == len(texts), f"{same} of {len(texts)}"
    return f"{same} prompts"


def latent_pages_are_read(folder: Path, latents: int) -> str:
    """Every latent of every layer, as the page finds it, is one of its pydantic models."""
    index = json.loads(gzip.decompress((folder / "index.json.gz").read_bytes()))
    count = 0
    for layer in index:
        content, offsets = (folder / layer["filename"]).read_bytes(), layer["offsets"]
        assert len(offsets) == latents + 1 and offsets[-1] == len(content)
        for number, (start, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
            length = int.from_bytes(content[start : start + 4], "little")
            assert start + 4 + length == end
            page = feature_models.Model(**json.loads(zlib.decompress(content[start + 4 : end])))
            assert page.index == number
            for quantile in page.examples_quantiles:
                assert all(len(e.tokens) == len(e.tokens_acts_list) > e.train_token_ind for e in quantile.examples)
            count += 1
    return f"{count} latents"


def graphs_are_read(folder: Path) -> str:
    """Our graphs are its pydantic models, with edges between nodes that are there."""
    files = [file for file in folder.glob("*.json") if file.name != "graph-metadata.json"]
    assert files
    for file in files:
        graph = graph_models.Model(**json.loads(file.read_text()))
        nodes = {node.node_id for node in graph.nodes}
        assert all(link["source"] in nodes and link["target"] in nodes for link in graph.links)
    listed = json.loads((folder / "graph-metadata.json").read_text())["graphs"]
    assert len([graph_models.Metadata(**entry) for entry in listed]) == len(files)
    return f"{len(files)} graphs"


def uncalibrated_is_refused(folder: str) -> str:
    """A TopK CLT as it was trained is not run as ReLU, neither by its folder nor by its configuration."""
    try:
        load_clt(folder, device=CPU)
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
    else:
        raise AssertionError(f"{folder} was loaded")
    lines = (line.split(": ", 1) for line in (Path(folder) / "config.yaml").read_text().splitlines() if line[0] != "#")
    try:
        load_transcoders({**dict(lines), "repo_id": "", "scan": ""}, device=CPU)
    except ValueError as error:
        return f"{reason}; {error}"
    raise AssertionError(f"the configuration of {folder} was accepted")


def readme_runs(folder: Path) -> str:
    """The Python in the export's README.md traces a prompt."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "README.md", "exec"), {})
    graph = graph_models.Model(**json.loads((folder / "graphs" / "cat.json").read_text()))
    return f"{len(graph.nodes)} nodes"


def main(out: Path) -> None:
    warnings.filterwarnings("ignore")
    figures, expected = json.loads((out / "expected.json").read_text()), load_file(out / "expected.safetensors")
    model = load(str(out / "export"))
    checks = {
        "latents": lambda: latents_agree(model, {**expected, "slots": figures["slots"]}),
        "fvu": lambda: fvu_agrees(model, expected["rows"], figures["fvu"], figures["fvu_topk"]),
        "text": lambda: text_is_read_alike(model, expected["prompts"], figures["texts"]),
        "scores": lambda: scores_agree(model, expected["prompts"], figures["replacement"], figures["completeness"]),
        "latent pages": lambda: latent_pages_are_read(out / "export" / "features", model.transcoders.d_transcoder),
        "graphs": lambda: graphs_are_read(out / "graphs"),
        "readme": lambda: readme_runs(out / "export"),
        "uncalibrated": lambda: uncalibrated_is_refused(figures["uncalibrated"]),
    }
    failed = 0
    for name, check in checks.items():
        try:
            print(f"ok      {name}: {check()}", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAILED  {name}: {type(error).__name__}: {error}", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]).resolve())
