"""The flags of each command, which becomes a piece of work: bad flags are reported before heavy imports."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sparseclt import commands
from sparseclt.commands import Split
from sparseclt.config import ConnectionConfig, DataConfig, ModelConfig, TrainConfig
from sparseclt.costs import Rates
from sparseclt.experiments.registry import find
from sparseclt.export import FormatName
from sparseclt.model.shape import ModelShape
from sparseclt.model.sites import Mode

Config = Annotated[TrainConfig, tyro.conf.arg(name="")]
Run = tyro.conf.Positional[Path]
Work = Callable[[], int | None]


def train(config: Config = TrainConfig()) -> Work:  # noqa: B008
    """Train a sparsely-connected CLT, evaluate it on held-out text, write tables and plots."""
    return partial(commands.train, config)


def resume(run: Run, config: Config = TrainConfig(), checkpoint: Path | None = None) -> Work:  # noqa: B008
    """Go on with a run exactly where its newest whole checkpoint stands. Options that do not change what is trained
    may get other values, more steps among them; they default to those of the run.

    Args:
        run: The run directory, wherever it lies now.
        config: The configuration of the run.
        checkpoint: One of its checkpoints, such as step_00000500, to go on from instead.
    """
    return partial(commands.resume, run, config, checkpoint)


def repeat(run: Run, out: Run) -> Work:
    """Train again with the configuration of a run directory, into a new one.

    Args:
        run: The run directory to repeat.
        out: The new run directory.
    """
    return partial(commands.repeat, run, out)


def import_clt(
    path: Run,
    out: Path,
    model: ModelConfig = ModelConfig(),  # noqa: B008
    data: DataConfig = DataConfig(),  # noqa: B008
    connections: ConnectionConfig = ConnectionConfig(),  # noqa: B008
    input_hook: Literal["mlp.hook_in", "ln2.hook_normalized"] | None = None,
    device: str = "auto",
) -> Work:
    """Make a run directory of a CLT, or of per-layer transcoders, that circuit-tracer, Gemma Scope 2, sparsify,
    clt-training or SAELens wrote: connections are chosen on your text, nothing is trained.

    Args:
        path: The directory of the other tool.
        out: The run directory.
        model: The language model that it was trained on.
        data: The text to choose connections on, and to evaluate on.
        connections: The connections.
        input_hook: Where its files leave open what its encoders read: the MLP's own input, or before the norm's gain.
        device: 'cpu', 'cuda', ... auto: CUDA if there is one, else the CPU.
    """
    config = TrainConfig(out=str(out), device=device, model=model, data=data, connections=connections)
    return partial(commands.import_clt, path, config, input_hook)


def evaluate(
    run: Run,
    device: str | None = None,
    checkpoint: Path | None = None,
    faithfulness: bool = False,
    interaction_sparsity: bool = False,
) -> Work:
    """Evaluate a finished run on its held-out text and print the table.

    Args:
        run: The run directory.
        device: 'cpu', 'cuda', ... None: that of the run.
        checkpoint: One of its checkpoints, such as step_00000500, to evaluate instead.
        faithfulness: Also measure whether connections matter: ablations, shuffled connections, KL, scores of graphs.
        interaction_sparsity: Also measure how few connections the predictions need: KL against connections kept.
    """
    return partial(commands.evaluate, run, device, checkpoint, faithfulness, interaction_sparsity)


def sweep(
    config: Config = TrainConfig(out="runs/sweep"),  # noqa: B008
    connections: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 64),
    random: bool = True,
) -> Work:
    """Train a vanilla baseline and one run for each number of connections: FVU against C.

    Args:
        config: The configuration of the runs.
        connections: The numbers of connections (C). 0: a run without any, which the others are compared with.
        random: Train another run for each C, with random connections.
    """
    return partial(commands.sweep, config, connections, random)


def experiment(
    name: tyro.conf.Positional[str] = "",
    seeds: int = 3,
    only: tuple[str, ...] = (),
    list: bool = False,
    config: Config = TrainConfig(out="runs/experiments/NAME"),  # noqa: B008
) -> Work:
    """Train the variants of a named experiment with several seeds each, and write one table of them. Goes on where it
    was stopped. The options of `train` are what all runs have in common.

    Args:
        name: The experiment.
        seeds: How many runs each variant has: with seeds 0, 1, ...
        only: Train only the variants with these labels.
        list: Only list the experiments and their questions, or, with a name, the labels of its variants.
        config: The configuration of the runs.
    """
    if list:
        return partial(commands.experiments, name)
    return partial(commands.experiment, find(name), config, seeds, only)


def atlas(
    run: Run, out: Path | None = None, tokens: int | None = None, port: int = 8137, split: Split = "held_out"
) -> Work:
    """Write pages that show the latents and connections of a finished run, and serve them on 127.0.0.1.

    Args:
        run: The run directory.
        out: Only write the pages, to this directory. None: to RUN/atlas, and serve them.
        tokens: Tokens of text to run over. None: as many as an evaluation does.
        port: The port to serve at. 0: any free one.
        split: The text that the examples come from.
    """
    return partial(commands.atlas, run, out, tokens, port, split)


def plan(
    config: Config = TrainConfig(),  # noqa: B008
    shape: ModelShape = ModelShape(),  # noqa: B008
    memory_gib: float | None = None,
    rates: Rates = Rates(),  # noqa: B008
) -> Work:
    """Show what a training run would hold in memory, term by term, and whether it fits; exit status 1 if it does not.
    With all three rates, also how long a step takes at least, by count, on this and on other numbers of ranks.

    Args:
        config: The configuration of the run.
        shape: The shape of the language model, if the model itself is not at hand.
        memory_gib: The memory of the device, in GiB. None: what is free on it now.
        rates: What a device does at best.
    """
    return partial(commands.plan, config, shape, memory_gib, rates)


def graph(
    run: Run,
    prompt: tyro.conf.Positional[str],
    mode: Mode = "sparse",
    error_nodes: bool = False,
    node_share: float = 0.8,
    edge_share: float = 0.98,
    max_logits: int = 10,
    special_tokens: bool = False,
    device: str | None = None,
    out: Path | None = None,
) -> Work:
    """Trace which latents made the next token likely on one prompt: the graph of sparsely-connected mode, exact.

    Args:
        run: The run directory.
        prompt: The prompt.
        mode: 'vanilla': the graph of vanilla mode, in which a latent reads all upstream latents. It is exact as well.
        error_nodes: Describe the language model's own run, with a node for what each module fails to reconstruct. Else:
            the sparse model.
        node_share: Keep the fewest nodes that have this share of all influence on the logits.
        edge_share: Keep the fewest edges between them that have this share.
        max_logits: The most next tokens to trace.
        special_tokens: Read text such as <|endoftext|> in the prompt as the special token, not as plain text.
        device: 'cpu', 'cuda', ... None: that of the run.
        out: The Graph JSON to write. None: graphs/NAME.json in the run directory, named after the prompt.
    """
    options: dict[str, Any] = {"mode": mode, "error_nodes": error_nodes, "node_share": node_share}
    options |= {"edge_share": edge_share, "max_logits": max_logits, "special_tokens": special_tokens}
    return partial(commands.graph, run, prompt, device, out, options)


def intervene(
    run: Run,
    prompt: tyro.conf.Positional[str],
    latents: tuple[str, ...],
    special_tokens: bool = False,
    device: str | None = None,
) -> Work:
    """Set latents to other values on one prompt: the change of the logits, and what the graph predicts.

    Args:
        run: The run directory.
        prompt: The prompt.
        latents: SITE/LATENT@POSITIONS=VALUE: mlp_2/137@5=0, mlp_2/137@5-8=x2 (twice its value), mlp_2/137@*=1.5.
        special_tokens: Read text such as <|endoftext|> in the prompt as the special token, not as plain text.
        device: 'cpu', 'cuda', ... None: that of the run.
    """
    return partial(commands.intervene, run, prompt, latents, special_tokens, device)


def export(
    run: Run,
    out: Run,
    format: FormatName = "circuit-tracer",
    finetune_steps: int = 0,
    device: str | None = None,
) -> Work:
    """Write the CLT of a run as another tool reads it, and print what that costs. For circuit-tracer TopK becomes one
    threshold per latent, calibrated on held-out text.

    Args:
        run: The run directory.
        out: The new directory.
        format: The tool.
        finetune_steps: Steps of further training, with thresholds, that make up for what they cost: half as many as the
            run had, say.
        device: 'cpu', 'cuda', ... None: that of the run.
    """
    return partial(commands.export, run, out, format, finetune_steps, device)


def push(
    run: Run,
    name: tyro.conf.Positional[str],
    dry_run: Path | None = None,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> Work:
    """Upload the CLT of a finished run to the Hugging Face hub, with its configuration and a card of its evaluation.

    Args:
        run: The run directory.
        name: OWNER/NAME on the hub; made if it does not exist.
        dry_run: Upload nothing, and write what would be uploaded to this directory.
        private: Make it private.
        revision: The branch, which must exist. None: main.
        token: The access token. None: that of `hf auth login` or of the variable HF_TOKEN.
    """
    return partial(commands.push, run, name, dry_run, private, revision, token)


def selftest(device: str = "auto", backends: tuple[str, ...] = ()) -> Work:
    """Compare every op, dtype, backend and gradient with float64 on this machine; print the errors.

    Args:
        device: 'cpu', 'cuda', ... auto: CUDA if there is one, else the CPU.
        backends: Backends by name. None given: all that run on the device.
    """
    return partial(commands.selftest, device, backends)


COMMANDS: dict[str, Callable[..., Work]] = {
    "train": train,
    "resume": resume,
    "repeat": repeat,
    "import": import_clt,
    "eval": evaluate,
    "sweep": sweep,
    "experiment": experiment,
    "atlas": atlas,
    "plan": plan,
    "graph": graph,
    "intervene": intervene,
    "export": export,
    "push": push,
    "selftest": selftest,
}
