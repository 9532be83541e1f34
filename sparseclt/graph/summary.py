"""A graph and an intervention, as text."""

import heapq
from dataclasses import dataclass

from sparseclt.graph.explain import PromptGraph
from sparseclt.graph.graph import INPUTS, Graph
from sparseclt.graph.influence import Pruned
from sparseclt.graph.intervention import Effects
from sparseclt.model.sites import MODE_NAMES

PATHS = 8  # that the summary shows
INPUT_NAMES = {
    "embedding": "embeddings",
    "attention": "frozen attention",
    "error": "errors",
    "layers": "layers not covered",
}


@dataclass(frozen=True)
class Path:
    """A chain of edges from an input to a logit, and what it adds to that logit."""

    nodes: tuple[int, ...]
    contribution: float


def strongest_paths(graph: Graph, pruned: Pruned, logit: int, most: int = PATHS) -> list[Path]:
    """The `most` paths from an input to the node `logit`, along kept edges, that add most to it or take most from it.

    A path adds the value of its input times the coefficients along it; all paths (those from the bias included) add up
    to the logit.
    """
    incoming: dict[int, list[tuple[int, float]]] = {}
    for edge in pruned.edges.nonzero()[:, 0].tolist():
        step = int(graph.source[edge]), graph.coefficient[edge].item()
        incoming.setdefault(int(graph.target[edge]), []).append(step)
    best: dict[int, list[Path]] = {logit: [Path((logit,), 1.0)]}  # from each node on, strongest first
    order = sorted(incoming, key=lambda number: int(graph.stage[number]), reverse=True)
    for target in order:
        for source, coefficient in incoming[target]:
            onward = [Path((source, *p.nodes), coefficient * p.contribution) for p in best.get(target, [])]
            best[source] = heapq.nlargest(most, best.get(source, []) + onward, key=lambda path: abs(path.contribution))
    found = [path for number, paths in best.items() if graph.nodes[number].kind in INPUTS for path in paths]
    return heapq.nlargest(most, found, key=lambda path: abs(path.contribution))


def graph_summary(explained: PromptGraph) -> str:
    """What a graph says, in a screenful."""
    graph, pruned, a, s = explained.graph, explained.pruned, explained.agreement, explained.scores
    model = "sparse model" if explained.mode == "sparse" else "replaced model, vanilla mode,"
    described = "the language model's own run, with error nodes" if explained.error_nodes else f"the {model.strip(',')}"
    shares = ", ".join(f"{INPUT_NAMES[kind]} {share:.1%}" for kind, share in s.input_shares.items() if share)
    lines = [
        f"Graph of {described}, {len(graph.tokens)} tokens",
        f"  nodes kept      {int(pruned.nodes.sum())} of {len(graph.nodes)}",
        f"  edges kept      {int(pruned.edges.sum())} of {len(pruned.edges)}",
        f"{model.capitalize()} against the language model",
        f"  KL divergence   {a.kl_last:.4f} nats behind the last token, {a.kl_mean:.4f} on average",
        f"  same top token  {'yes' if a.top1_last else 'no'} behind the last token, {a.top1_mean:.1%} of all tokens",
        "With error nodes",
        f"  replacement     {s.replacement:.3f}",
        f"  completeness    {s.completeness:.3f}",
        f"  influence of    {shares}",
        "Likeliest next tokens",
    ]
    numbers = graph.numbers("logit").tolist()
    for probability, token in zip(graph.probabilities.tolist(), explained.logit_strings, strict=True):
        lines.append(f"  {probability:6.1%}  {token!r}")
    lines.append(f"Strongest paths to {explained.logit_strings[0]!r} (what each adds to its logit)")
    for path in strongest_paths(graph, pruned, numbers[0]):
        steps = [_step(explained, number) for number in path.nodes[:-1]]
        lines.append(f"  {path.contribution:+8.3f}  {' > '.join(steps)}")
    return "\n".join(lines)


def _step(explained: PromptGraph, number: int) -> str:
    node = explained.graph.nodes[number]
    return f"{explained.token_strings[node.position]!r}@{node.position}" if node.kind == "embedding" else str(node)


def effects_table(effects: Effects) -> str:
    """The change of each logit, as the graph predicts it and as it is, in each mode."""
    width = max(len(repr(token)) for token in effects.token_strings)
    modes = list(effects.before)
    lines = [
        " " * width + "   predicted" + "".join(f"   {MODE_NAMES[mode]:<26}" for mode in modes).rstrip(),
        " " * width + "       logit" + ("   " + f"{'logit':>9}   {'probability':<14}") * len(modes),
    ]
    for i, token in enumerate(effects.token_strings):
        line = f"{token!r:<{width}}   {effects.predicted[i]:+9.3f}"
        for mode in modes:
            before, after = effects.before[mode], effects.after[mode]
            change = (after.logits - before.logits)[i].item()
            line += f"   {change:+9.3f}   {before.probabilities[i]:.3f} to {after.probabilities[i]:.3f}"
        lines.append(line)
    return "\n".join(lines)
