"""Run by our environment: an export for circuit-tracer, and all that circuit-tracer is expected to find in it.

    python tests/circuit_tracer/prepare.py OUT [--run RUN] [--finetune-steps N]

Without a run a short one is trained on the embedded model and text.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from linearised import linearised_graph
from safetensors.torch import save_file
from torch import Tensor

from sparseclt import runs
from sparseclt.config import CheckpointConfig, CLTConfig, DataConfig, LoggingConfig, TrainConfig
from sparseclt.evaluation.metrics import evaluate
from sparseclt.export import circuit_tracer
from sparseclt.export.calibration import with_thresholds
from sparseclt.export.fine_tuning import fine_tune
from sparseclt.export.stages import stage_table
from sparseclt.graph.explain import prompt_graph
from sparseclt.graph.graph_json import write_graph
from sparseclt.graph.influence import scores
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.clt import SparseCLT
from sparseclt.runs import measurement
from sparseclt.storage.run_config import read_config

PROMPTS, PROMPT_TOKENS, ROWS = 20, 16, 24
GRAPHS = 3


def short_run(out: Path) -> Path:
    """A run of a minute."""
    config = TrainConfig(
        out=str(out), steps=200, clt=CLTConfig(latents=256, active=16), data=DataConfig(held_out_tokens=16_384),
        checkpoints=CheckpointConfig(keep=1), logging=LoggingConfig(progress=False),
    )  # fmt: skip
    runs.train(config)
    return out


@torch.no_grad()
def with_room(clt: SparseCLT, model: LanguageModel, prompts: Tensor) -> Tensor:
    """Whether every token of each prompt [R, S] has room for all latents that it may want, which circuit-tracer does
    not limit: [R] bool."""
    latents = clt(model.capture(prompts), "vanilla").latents
    full = torch.stack([(z.values > 0).all(1) for z in latents]).any(0)
    return ~full.view(prompts.shape).any(1)


def main(out: Path, run: Path | None, steps: int) -> None:
    out.mkdir(parents=True)
    run = run or short_run(out / "run")
    config, (clt, model) = read_config(run), runs.load_run(run)
    rows = measurement.held_out_rows(config, model)
    calibrated = with_thresholds(clt, model, rows[::2])
    tuned = fine_tune(calibrated, model, config, steps)
    circuit_tracer.write(tuned, model, rows[1::2], "test", out / "export")
    measured_rows = rows[1::2][:ROWS]
    stages = {"as trained": clt, "calibrated": calibrated, "fine-tuned": tuned}
    measured = {name: evaluate(c, model, measured_rows, cross_entropy=False).to_dict() for name, c in stages.items()}
    for mode in ("vanilla", "sparse"):
        print(f"{mode} mode\n\n{stage_table(measured, mode)}\n")
    candidates = rows[1::2, :PROMPT_TOKENS].contiguous().long()
    room = with_room(tuned, model, candidates)
    prompts = candidates[room][:PROMPTS]
    print(f"prompts on which a module has no room for all its latents: {int((~room).sum())} of {len(room)}")
    latents = tuned(model.capture(prompts), "vanilla").latents
    tensors = {"prompts": prompts, "rows": measured_rows.long().contiguous()}
    for layer, z in enumerate(latents):
        tensors[f"latents_{layer}"] = z.dense(tuned.architecture.latents).view(PROMPTS, PROMPT_TOKENS, -1)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "expected.safetensors")
    for number, prompt in enumerate(prompts[:GRAPHS]):
        text = model.tokenizer.decode(prompt[1:])
        write_graph(prompt_graph(clt, model, text), out / "graphs" / f"{number}.json")
    found = [scores(linearised_graph(tuned, model, prompt)) for prompt in prompts]
    expected = {
        "uncalibrated": str(clt.save_pretrained(out / "clt").resolve()),
        "slots": tuned.architecture.slots,
        "texts": [model.tokenizer.decode(prompt[1:]) for prompt in prompts],
        "fvu_topk": [m["fvu_vanilla"] for m in measured["as trained"]["modules"]],
        "fvu": [m["fvu_vanilla"] for m in measured["fine-tuned"]["modules"]],
        "replacement": [score.replacement for score in found],
        "completeness": [score.completeness for score in found],
    }
    (out / "expected.json").write_text(json.dumps(expected, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--finetune-steps", type=int, default=200)
    torch.set_num_threads(1)
    arguments = parser.parse_args()
    sys.exit(main(arguments.out, arguments.run, arguments.finetune_steps))
