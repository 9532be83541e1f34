"""Evaluations and sweeps as Markdown tables, aligned so that a terminal shows them well too."""

from collections.abc import Mapping, Sequence
from typing import Any

from sparseclt.evaluation.statistics import TRAINING_TOKENS
from sparseclt.model.sites import MODE_NAMES

# key -> (column title, format); a missing key, None or NaN prints as "-".
_EVALUATION = {
    "name": ("module", ""),
    "fvu_vanilla": ("FVU vanilla", ".4f"),
    "fvu_sparse": ("FVU sparse", ".4f"),
    "excess_fvu": ("excess FVU", "+z.4f"),
    "connections_in_effect": ("connections in effect", ".1f"),
    "l0_vanilla": ("L0 vanilla", ".1f"),
    "l0_sparse": ("L0 sparse", ".1f"),
    "dead_vanilla": ("dead vanilla", ".1%"),
    "dead_sparse": ("dead sparse", ".1%"),
}
_EXCESS = {
    "name": ("module", ""),
    "excess_fvu": ("excess FVU", "+z.4f"),
    "propagated_error": ("propagated error", "+z.4f"),
    "cost_of_sparsity": ("cost of sparsity", "+z.4f"),
    "fvu_all_open": ("FVU all open", ".4f"),
    "fvu_disconnected": ("FVU disconnected", ".4f"),
}
_LATENTS = {
    "name": ("module", ""),
    "dead_in_training_vanilla": ("dead in training, vanilla", ".1%"),
    "dead_in_training_sparse": ("dead in training, sparse", ".1%"),
    "splitting": ("decoder cosine > 0.9", ".1%"),
    "splitting_near": ("decoder cosine > 0.7", ".1%"),
    "cofiring_twins": ("co-firing twins", ".1%"),
}
_SWEEP = {
    "C": ("C", "d"),
    "fvu_vanilla": ("FVU vanilla", ".4f"),
    "fvu_sparse": ("FVU sparse", ".4f"),
    "excess_fvu": ("excess FVU", "+z.4f"),
    "excess_over_baseline": ("excess over baseline", "+z.4f"),
    "propagated_error": ("propagated error", "+z.4f"),
    "cost_of_sparsity": ("cost of sparsity", "+z.4f"),
    "explained_by_connections": ("explained by connections", ".1%"),
    "fvu_pruned": ("FVU pruned only", ".4f"),
    "fvu_random": ("FVU random connections", ".4f"),
}
_SWEEP_LATENTS = {
    "C": ("C", "d"),
    "dead_vanilla": ("dead vanilla", ".1%"),
    "dead_sparse": ("dead sparse", ".1%"),
    "splitting": ("decoder cosine > 0.9", ".1%"),
    "splitting_near": ("decoder cosine > 0.7", ".1%"),
    "cofiring_twins": ("co-firing twins", ".1%"),
}
_AGREEMENT = {
    "run": ("replaced model", ""),
    "kl": ("KL, nats per token", ".4f"),
    "top1": ("same top token", ".1%"),
    "fvu": ("FVU sparse", ".4f"),
}
_ABLATIONS = {
    "name": ("module, all connections open", ""),
    "connected": ("effect of ablating the C connected", ".4f"),
    "unconnected": ("all others", ".4f"),
    "random": ("C random ones", ".4f"),
    "carried": ("carried by the connected", ".1%"),
    "carried_random": ("carried by the random", ".1%"),
}
_INTERACTION = {
    "kept": ("connections kept per latent", "d"),
    "edges": ("edges", ",d"),
    "kl": ("KL, nats per token", ".4f"),
    "top1": ("same top token", ".1%"),
}
_CROSS_ENTROPY = {
    "model": "the model itself",
    "vanilla": "replaced, vanilla mode",
    "sparse": "replaced, sparsely-connected mode",
    "zero_ablated": "zero-ablated",
}


def evaluation_table(evaluation: Mapping[str, Any]) -> str:
    """An evaluation (see `evaluation.evaluate`) as Markdown: one row per module and their mean, with what dead means;
    cross-entropies; the parts of the excess; and the latents.

    FVU is a fraction, excess FVU sparse minus vanilla, "dead" a share of latents, cross-entropy in nats per
    token. "loss recovered" is the share of the way from zero ablation (0 %) to the model itself (100 %). What
    was not measured prints as "-".
    """
    mean, entropies = evaluation.get("mean", {}), evaluation.get("cross_entropy")
    rows = [*evaluation.get("modules", []), {**mean, "name": "mean"}]
    parts = [markdown_table(rows, _EVALUATION)]
    if entropies:
        parts.append(_cross_entropy_table(entropies))
    if mean.get("propagated_error") is not None:
        parts.append(markdown_table(rows, _EXCESS))
    if mean.get("splitting") is not None:
        measured = {key: spec for key, spec in _LATENTS.items() if key == "name" or mean.get(key) is not None}
        parts.append(markdown_table(rows, measured))
    if "tokens" in evaluation:
        parts.append(_meaning_of_dead(evaluation["tokens"], mean.get("dead_in_training_vanilla") is not None))
    return "\n\n".join(parts)


def _meaning_of_dead(tokens: int, in_training: bool) -> str:
    training = f"; dead in training: on none of the last {TRAINING_TOKENS:,} training tokens" if in_training else ""
    return f"Dead: fired on none of {tokens:,} held-out tokens{training}."


def faithfulness_table(result: Mapping[str, Any]) -> str:
    """A `Faithfulness` as Markdown, with the "graphs" of `graph.prompt_scores` where they were measured."""
    labels = {str(mode): name for mode, name in MODE_NAMES.items()} | {"shuffled": "shuffled connections"}
    fvu = {"sparse": result["fvu_sparse"], "shuffled": result["fvu_shuffled"]}
    rows = [{"run": label, **result["agreement"][k], "fvu": fvu.get(k)} for k, label in labels.items()]
    parts = [markdown_table(rows, _AGREEMENT), markdown_table(result["ablations"], _ABLATIONS)]
    if graphs := result.get("graphs"):
        parts.append(
            f"Graphs of {graphs['prompts']} prompts of {graphs['prompt_tokens']} tokens, mean and standard deviation: "
            f"replacement {graphs['replacement']:.3f} ({graphs['replacement_std']:.3f}), "
            f"completeness {graphs['completeness']:.3f} ({graphs['completeness_std']:.3f})."
        )
    return "\n\n".join(parts)


def interaction_table(result: Mapping[str, Any]) -> str:
    """An `InteractionSparsity` as Markdown."""
    edges = {"own": "its connections", "all": "all pairs of a latent with an upstream one"}[result["edges"]]
    relative = "-" if result["relative_area"] is None else f"{result['relative_area']:.3f}"
    return (
        f"{markdown_table(result['curve'], _INTERACTION)}\n\n"
        f"Edges: {edges}. Area under the KL divergence {result['area']:.4f} nats, relative {relative}; all edges "
        f"{result['kl_all']:.4f}, vanilla mode {result['kl_vanilla']:.4f}; {result['tokens']:,} held-out tokens."
    )


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A sweep over C as a Markdown table, one row per C in rising order.

    rows: {"C": int, and any of "fvu_vanilla", "fvu_sparse", "excess_fvu" (sparse minus vanilla of the same
        run), its parts "propagated_error" and "cost_of_sparsity", "excess_over_baseline" (sparse minus vanilla of the
        run without connections), "explained_by_connections" (`frontier.with_explained`), "fvu_pruned" (the baseline,
        pruned to C and not trained on), "fvu_random" (sparse FVU of a run with random connections), and, in a second
        table, dead latents and twins}, means over modules. What is missing prints "-".

    Raises ValueError if a row has no "C".
    """
    for row in rows:
        if not isinstance(row.get("C"), int):
            raise ValueError(f'rows must each have an int "C", got {dict(row)}')
    rows = sorted(rows, key=lambda row: row["C"])
    return f"{markdown_table(rows, _SWEEP)}\n\n{markdown_table(rows, _SWEEP_LATENTS)}"


def _cross_entropy_table(entropies: Mapping[str, float | None]) -> str:
    rows = [
        {"run": label, "nats": entropies.get(key), "recovered": loss_recovered(entropies, key)}
        for key, label in _CROSS_ENTROPY.items()
    ]
    columns = {
        "run": ("next-token cross-entropy", ""),
        "nats": ("nats per token", ".4f"),
        "recovered": ("loss recovered", ".1%"),
    }
    return markdown_table(rows, columns)


def loss_recovered(entropies: Mapping[str, float | None], model: str) -> float | None:
    """The share of the way from zero ablation (0) to the model itself (1) at which the cross-entropy of `model` is, one
    of the fields of `metrics.CrossEntropies`; None if it was not measured."""
    value, best, worst = (entropies.get(key) for key in (model, "model", "zero_ablated"))
    if value is None or best is None or worst is None or worst == best:
        return None
    return (worst - value) / (worst - best)


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> str:
    """A Markdown table, text to the left and numbers to the right, every column padded to one width.

    columns: by key of `rows`, the title and the format of the numbers ("": text). A missing key, None or NaN prints
        as "-".
    """
    titles = [title for title, _ in columns.values()]
    body = [[_cell(row.get(key), spec) for key, (_, spec) in columns.items()] for row in rows]
    widths = [max(2, *map(len, column)) for column in zip(titles, *body, strict=True)]  # a rule needs two characters
    left = [not spec for _, spec in columns.values()]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(cells, widths, left, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if is_left else "-" * (width - 1) + ":" for width, is_left in zip(widths, left, strict=True)]
    return "\n".join([line(titles), line(rule), *(line(cells) for cells in body)])


def _cell(value: Any, spec: str) -> str:
    return "-" if value is None or value != value else format(value, spec)
