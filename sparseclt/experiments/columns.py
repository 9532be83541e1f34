"""The columns that the table of an experiment may have."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from sparseclt.evaluation.frontier import explained
from sparseclt.evaluation.report import loss_recovered

Measurement = Literal["cross_entropy", "interaction", "faithfulness"]

Record = Mapping[str, Any]
"""What an experiment keeps of one run: its "evaluation" (`Evaluation.to_dict`), its "seconds", and, or None, its
"interaction" (`InteractionSparsity.to_dict`) and its "faithfulness" (`runs.faithfulness_of_run`)."""


class References(NamedTuple):
    """The runs, of the same seed, that a run is compared with; None: the variant names none, or it is not finished."""

    vanilla: Record | None = None
    unconnected: Record | None = None


@dataclass(frozen=True)
class Column:
    """One column: how a run's number is found, and how it is shown."""

    title: str
    format: str
    value: Callable[[Record, References], float | None]
    needs: Measurement | None = None
    """What is measured for it besides an evaluation without cross-entropies. All three take runs of the language model
    with replaced outputs, which cost most of an evaluation's time."""


def _mean(name: str, run: Record, references: References) -> float | None:
    """A mean over modules."""
    value: float | None = run["evaluation"]["mean"].get(name)
    return value


def _worst(name: str, run: Record, references: References) -> float | None:
    """The largest of the modules."""
    values = [module.get(name) for module in run["evaluation"]["modules"]]
    return max((value for value in values if value is not None), default=None)


def _excess_over_vanilla(run: Record, references: References) -> float | None:
    sparse = _mean("fvu_sparse", run, references)
    vanilla = None if references.vanilla is None else _mean("fvu_vanilla", references.vanilla, references)
    return None if sparse is None or vanilla is None else sparse - vanilla


def _explained(run: Record, references: References) -> float | None:
    without = None if references.unconnected is None else _mean("fvu_sparse", references.unconnected, references)
    return explained(without, _mean("fvu_sparse", run, references), _mean("fvu_all_open", run, references))


def _loss_recovered(mode: str, run: Record, references: References) -> float | None:
    entropies = run["evaluation"]["cross_entropy"]
    return None if entropies is None else loss_recovered(entropies, mode)


def _total_l0(run: Record, references: References) -> float | None:
    return sum(module["l0_vanilla"] for module in run["evaluation"]["modules"])


def _seconds(run: Record, references: References) -> float | None:
    return run["seconds"]  # type: ignore[no-any-return]


def _interaction(name: str, run: Record, references: References) -> float | None:
    return run["interaction"][name]  # type: ignore[no-any-return]


def _kl_at(kept: int, run: Record, references: References) -> float | None:
    return next(point["kl"] for point in run["interaction"]["curve"] if point["kept"] == kept)


def _agreement(model: str, name: str, run: Record, references: References) -> float | None:
    return run["faithfulness"]["agreement"][model][name]  # type: ignore[no-any-return]


def _carried(name: str, run: Record, references: References) -> float | None:
    """A mean over modules."""
    shares = [ablation[name] for ablation in run["faithfulness"]["ablations"]]
    return sum(shares) / len(shares) if shares else None


def _faithfulness(name: str, run: Record, references: References) -> float | None:
    return run["faithfulness"][name]  # type: ignore[no-any-return]


def _score(name: str, run: Record, references: References) -> float | None:
    return run["faithfulness"]["graphs"][name]  # type: ignore[no-any-return]


def _of_modules(title: str, format: str, name: str) -> Column:
    return Column(title, format, partial(_mean, name))


COLUMNS: dict[str, Column] = {
    "fvu_vanilla": _of_modules("FVU vanilla", ".4f", "fvu_vanilla"),
    "fvu_sparse": _of_modules("FVU sparse", ".4f", "fvu_sparse"),
    "excess": _of_modules("excess FVU", "+z.4f", "excess_fvu"),
    "excess_over_vanilla": Column("excess over vanilla run", "+z.4f", _excess_over_vanilla),
    "propagated_error": _of_modules("propagated error", "+z.4f", "propagated_error"),
    "cost_of_sparsity": _of_modules("cost of sparsity", "+z.4f", "cost_of_sparsity"),
    "explained": Column("explained by connections", ".1%", _explained),
    "worst_fvu_vanilla": Column("FVU vanilla, worst module", ".4f", partial(_worst, "fvu_vanilla")),
    "worst_fvu_sparse": Column("FVU sparse, worst module", ".4f", partial(_worst, "fvu_sparse")),
    "dead_vanilla": _of_modules("dead vanilla", ".1%", "dead_vanilla"),
    "dead_sparse": _of_modules("dead sparse", ".1%", "dead_sparse"),
    "worst_dead_vanilla": Column("dead vanilla, worst module", ".1%", partial(_worst, "dead_vanilla")),
    "worst_dead_sparse": Column("dead sparse, worst module", ".1%", partial(_worst, "dead_sparse")),
    "splitting": _of_modules("decoder cosine > 0.9", ".1%", "splitting"),
    "splitting_near": _of_modules("decoder cosine > 0.7", ".1%", "splitting_near"),
    "cofiring_twins": _of_modules("co-firing twins", ".1%", "cofiring_twins"),
    "connections": _of_modules("connections in effect", ".1f", "connections_in_effect"),
    "connections_mean": _of_modules("mean connections", ".1f", "connections_mean"),
    "l0_vanilla": _of_modules("L0 vanilla", ".1f", "l0_vanilla"),
    "l0_sparse": _of_modules("L0 sparse", ".1f", "l0_sparse"),
    "total_l0": Column("L0 vanilla, all modules", ".1f", _total_l0),
    "recovered_vanilla": Column("loss recovered, vanilla", ".1%", partial(_loss_recovered, "vanilla"), "cross_entropy"),
    "recovered_sparse": Column("loss recovered, sparse", ".1%", partial(_loss_recovered, "sparse"), "cross_entropy"),
    "area": Column("area under KL, nats", ".4f", partial(_interaction, "area"), "interaction"),
    "relative_area": Column("relative area", ".3f", partial(_interaction, "relative_area"), "interaction"),
    "kl_vanilla": Column("KL vanilla mode", ".4f", partial(_interaction, "kl_vanilla"), "interaction"),
    "kl_all": Column("KL all edges", ".4f", partial(_interaction, "kl_all"), "interaction"),
    **{f"kl_{kept}": Column(f"KL {kept} kept", ".4f", partial(_kl_at, kept), "interaction") for kept in (0, 2, 8, 32)},
    **{
        f"agreement_{model}": Column(f"KL {title}", ".4f", partial(_agreement, model, "kl"), "faithfulness")
        for model, title in (("vanilla", "vanilla"), ("sparse", "sparse"), ("shuffled", "shuffled connections"))
    },
    "top1": Column("same top token, sparse", ".1%", partial(_agreement, "sparse", "top1"), "faithfulness"),
    "fvu_shuffled": Column("FVU shuffled", ".4f", partial(_faithfulness, "fvu_shuffled"), "faithfulness"),
    "carried": Column("carried by the connected", ".1%", partial(_carried, "carried"), "faithfulness"),
    "carried_random": Column("carried by random ones", ".1%", partial(_carried, "carried_random"), "faithfulness"),
    "replacement": Column("replacement score", ".3f", partial(_score, "replacement"), "faithfulness"),
    "completeness": Column("completeness score", ".3f", partial(_score, "completeness"), "faithfulness"),
    "seconds": Column("seconds of training", ".0f", _seconds),
}
