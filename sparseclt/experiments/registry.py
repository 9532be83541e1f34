"""The experiments that `sparseclt experiment NAME` knows."""

from sparseclt.experiments.experiment import Experiment, Variant

FVU = ("fvu_vanilla", "fvu_sparse", "excess")
PARTS = ("excess_over_vanilla", "propagated_error", "cost_of_sparsity", "explained")
DEAD = ("dead_vanilla", "worst_dead_vanilla", "dead_sparse", "worst_dead_sparse")
TWINS = ("splitting", "splitting_near", "cofiring_twins")
FAITHFUL = (
    "fvu_sparse", "fvu_shuffled", "agreement_vanilla", "agreement_sparse", "agreement_shuffled", "top1", "carried",
    "carried_random", "replacement", "completeness",
)  # fmt: skip
KL = ("kl_vanilla", "kl_all", "kl_0", "kl_2", "kl_8", "kl_32", "area", "relative_area")
RECOVERED = ("recovered_vanilla", "recovered_sparse")
VANILLA = ("fvu_vanilla", "worst_fvu_vanilla", "dead_vanilla", "worst_dead_vanilla")

WIDTHS = (256, 512, 1024, 2048, 4096)
RANDOM = "--connections.policy random --connections.per-latent"
SHARED = "--connections.budget module --connections.per-latent"
LEARNED = "--connections.policy learned --connections.per-latent"
PENALTIES = ("0.1", "1")
ONLY_VANILLA = "--connections.policy none"
SMALL = "--clt.latents 512 --clt.active 16 --steps 500"  # a third of the demonstration's time


def _connected(Cs: tuple[int, ...]) -> tuple[Variant, ...]:
    """A run for each C, and the two that they are compared with: without sparsely-connected mode, and with C = 0."""
    runs = (Variant(f"C_{C}", f"--connections.per-latent {C}", "vanilla", "C_0") for C in Cs)
    return (Variant("vanilla", ONLY_VANILLA), *runs)


def _penalised(label: str, options: str) -> tuple[Variant, ...]:
    """The same with weak and strong penalties on the Jacobian between latents."""
    return tuple(
        Variant(f"{label}_penalty_{weight}", f"{options} --loss.interaction-weight {weight}") for weight in PENALTIES
    )


EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "demonstration",
            "What does the demonstration reach, and how far do its figures scatter over seeds?",
            (
                Variant("vanilla", ONLY_VANILLA),
                Variant("C_0", "--connections.per-latent 0", "vanilla"),
                Variant("default", "", "vanilla", "C_0"),
            ),
            (*FVU, *PARTS, *DEAD, "connections", "l0_vanilla", "l0_sparse", *RECOVERED, "seconds"),
        ),
        Experiment(
            "width",
            "What do more latents bring in vanilla mode, and are they alive?",
            tuple(Variant(f"F_{F}", f"--clt.latents {F}") for F in WIDTHS),
            (*VANILLA, *TWINS, "seconds"),
            f"{ONLY_VANILLA} --steps 800",
        ),
        Experiment(
            "learning-rate",
            "Which learning rate suits which width, and which batch at equal tokens, in vanilla mode?",
            (
                *(
                    Variant(f"F_{F}_lr_{rate}", f"--clt.latents {F} --optimizer.learning-rate {rate}")
                    for F in (256, 1024, 4096)
                    for rate in ("1e-3", "2e-3", "4e-3", "8e-3")
                ),
                *(
                    Variant(
                        f"rows_{rows}_lr_{rate}",
                        f"--batch-rows {rows} --steps {1600 // rows} --optimizer.learning-rate {rate}",
                    )
                    for rows, rates in ((1, ("1e-3", "2e-3", "4e-3")), (16, ("4e-3", "8e-3", "1.6e-2")))
                    for rate in rates
                ),
            ),
            VANILLA,
            f"{ONLY_VANILLA} --steps 400",
        ),
        Experiment(
            "connections",
            "How few connections are enough, and how much do they explain?",
            (*_connected((0, 2, 4, 8, 32)), Variant("random_C_8", f"{RANDOM} 8", "vanilla", "C_0")),
            (*FVU, *PARTS, "dead_vanilla", "dead_sparse", "connections"),
            SMALL,
        ),
        Experiment(
            "learned-connections",
            "Are learned connections better than the most important ones, at an equal number?",
            (
                *(Variant(f"top_{C}", f"--connections.per-latent {C}") for C in (16, 32)),
                Variant("learned", f"{LEARNED} 64"),
                Variant("learned_128", f"{LEARNED} 128"),
                Variant("learned_16", f"{LEARNED} 64 --connections.open-per-latent 16"),
                Variant("dense", "--connections.policy dense-learned"),
            ),
            (*FVU, "propagated_error", "cost_of_sparsity", "connections_mean", "connections", *DEAD),
            SMALL,
        ),
        Experiment(
            "attention",
            "What do connections explain where attention has latents, and should those of a module share them?",
            (
                *_connected((0, 8)),
                *(Variant(f"shared_{C}", f"{SHARED} {C}", "vanilla", "C_0") for C in (8, 32)),
            ),
            (*FVU, *PARTS, "worst_fvu_sparse", *DEAD, "connections_mean"),
            f"{SMALL} --clt.attention latents",
        ),
        Experiment(
            "dead-latents",
            "Are latents dead, and what keeps them alive: encoders that rest without a gradient, or biases that rise?",
            tuple(
                Variant(f"F_{F}_{label}", f"--clt.latents {F} --clt.active {K} {options}".strip())
                for F, K in ((512, 16), (2048, 32))
                for label, options in (
                    ("adam", "--optimizer.rows all --optimizer.revival-rate 0"),
                    ("rising", "--optimizer.rows all"),
                    ("resting", "--optimizer.revival-rate 0"),
                    ("default", ""),
                )
            ),
            (*FVU, *DEAD, "cofiring_twins"),
            SMALL,
        ),
        Experiment(
            "active-ratio",
            "Should early layers have more active latents than late ones, at the same number in all?",
            tuple(Variant(f"ratio_{ratio}", f"--clt.active-ratio {ratio}") for ratio in (1, 2, 4)),
            (*FVU, "propagated_error", "worst_fvu_vanilla", "worst_fvu_sparse", *DEAD, "total_l0"),
            SMALL,
        ),
        Experiment(
            "splitting",
            "Do latents split into near twins, and does that depend on C and on F?",
            (
                *(Variant(f"C_{C}", f"--connections.per-latent {C}") for C in (0, 2, 8, 32)),
                *(Variant(f"F_{F}", f"--clt.latents {F}") for F in (256, 1024, 2048)),
            ),
            (*TWINS, "fvu_vanilla", "fvu_sparse", "dead_vanilla", "dead_sparse"),
            SMALL,
        ),
        Experiment(
            "faithfulness",
            "Do the connections carry what latents read, and would others do as well?",
            (
                Variant("C_2", "--connections.per-latent 2"),
                Variant("C_8", "--connections.per-latent 8"),
                Variant("C_32", "--connections.per-latent 32"),
                Variant("random_C_8", f"{RANDOM} 8"),
            ),
            FAITHFUL,
            SMALL,
        ),
        Experiment(
            "per-layer",
            "What do latents gain that write to all later layers, over per-layer transcoders?",
            (
                Variant("cross_layer_vanilla", ONLY_VANILLA),
                Variant("cross_layer", "", "cross_layer_vanilla"),
                Variant("per_layer_vanilla", f"--clt.targets own {ONLY_VANILLA}"),
                Variant("per_layer", "--clt.targets own", "per_layer_vanilla"),
            ),
            (*FVU, "excess_over_vanilla", "propagated_error", "dead_vanilla", "dead_sparse", "total_l0", *RECOVERED),
            SMALL,
        ),
        Experiment(
            "interaction-sparsity",
            "How few connections between latents do predictions need, and does a penalty on the Jacobian do as well?",
            (
                Variant("connected", ""),
                Variant("connected_C_32", "--connections.per-latent 32"),
                Variant("cross_layer", ONLY_VANILLA),
                *_penalised("cross_layer", ONLY_VANILLA),
                Variant("per_layer", f"--clt.targets own {ONLY_VANILLA}"),
                *_penalised("per_layer", f"--clt.targets own {ONLY_VANILLA}"),
            ),
            ("fvu_vanilla", "fvu_sparse", "dead_vanilla", *KL),
            SMALL,
        ),
    )
}


def find(name: str) -> Experiment:
    """The experiment of that name. Raises ValueError for one that does not exist."""
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment: expected one of {', '.join(EXPERIMENTS)}; got {name}")
    return EXPERIMENTS[name]


def listing(name: str = "") -> str:
    """Every experiment with its question and the number of its runs per seed; of experiment `name` its variants, with
    their options."""
    if name:
        variants = find(name).variants
        width = max(len(variant.label) for variant in variants)
        return "\n".join(f"{variant.label:<{width}}  {variant.options}".rstrip() for variant in variants)
    width = max(map(len, EXPERIMENTS))
    return "\n".join(
        f"{name:<{width}}  {e.question} ({len(e.variants)} runs per seed)" for name, e in EXPERIMENTS.items()
    )
