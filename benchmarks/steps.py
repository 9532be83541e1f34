"""A whole training step: forward, backward and Adam, on the same parameters for every contender.

Ours is the Trainer's own loss on a SparseCLT; "train_step" includes everything that the Trainer does besides (finite
checks, gradient clipping, statistics, metrics). Adam runs with a learning rate of 0, so that all its arithmetic is done
and weights do not change. No latent is dead, so that AuxK takes no part.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace as Inputs
from typing import Any

import baselines
import torch
from baseline_costs import Mode, Way, training_step
from baselines import Pair
from compare import Comparison, Contender
from problems import our_backends, random_connections, seed_inputs
from torch import Tensor

from sparseclt import ops
from sparseclt.config import (
    CLTConfig,
    ComputeConfig,
    ConnectionConfig,
    DataConfig,
    LoggingConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
)
from sparseclt.costs import CLTSize, Cost, Widths, dense_training_bytes
from sparseclt.model.activations import Activations
from sparseclt.model.modules import Latents
from sparseclt.model.shape import ModelShape
from sparseclt.training.losses import latent_fvu
from sparseclt.training.trainer import Trainer

NEVER = 10**9


def make_trainer(mode: str, device: str, L: int, D: int, F: int, K: int, C: int, N: int) -> Trainer:
    """A Trainer whose language model never runs: it is given activations."""
    row = min(N, 128)
    config = TrainConfig(
        out="unused", batch_rows=N // row, device=device, steps=NEVER, logging=LoggingConfig(progress=False),
        clt=CLTConfig(active_ratio=1.0, latents=F, active=K), data=DataConfig(row_tokens=row),
        connections=ConnectionConfig("top" if mode == "both" else "none", C, refresh_steps=NEVER),
        loss=LossConfig(sparse_start_share=0.0, sparse_ramp_share=0.0),
        optimizer=OptimizerConfig(learning_rate=0.0),
    )  # fmt: skip
    shape = ModelShape(layers=L, d_model=D, heads=1, vocab=1)
    rows = torch.zeros(N // row, row, dtype=torch.int64)
    trainer = Trainer(config, language_model=Inputs(shape=shape, tokenizer=None), rows=rows)  # type: ignore[arg-type]
    trainer.step = 1  # the ramp is over
    with torch.no_grad():
        for m in trainer.clt:
            m.W_dec.normal_(0, 0.25 / D**0.5)  # gradient norm 0.38: as in a run, nothing is clipped
            m.b_enc.normal_(0, 0.02)
            m.b_dec.normal_(0, 0.02)
            if mode == "both" and m.upstream:
                m.connect(random_connections(F, min(C, m.upstream), m.upstream, device).indices)
    return trainer


def make_adam(parameters: list[torch.nn.Parameter]) -> torch.optim.Adam:
    """Adam that changes nothing, with moments that exist before memory is measured."""
    adam = torch.optim.Adam(parameters, lr=0.0, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    adam.step()
    adam.zero_grad(set_to_none=True)
    return adam


def make_activations(L: int, D: int, N: int, device: str, **_: int) -> Activations:
    shape = (N // min(N, 128), min(N, 128))

    def layers(*last: int) -> list[Tensor]:
        return [torch.randn(*shape, *last, device=device) for _ in range(L)]

    scale = [1 + torch.rand(shape, device=device) for _ in range(L)]
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    return Activations(tokens, layers(D)[0], layers(D), scale, layers(D), [a / L for a in layers(D)])


def dense_masks(trainer: Trainer) -> list[Tensor | None]:
    masks: list[Tensor | None] = []
    for m in trainer.clt:
        if m.connections is None:
            masks.append(None)
            continue
        ids = m.connections.indices
        mask = torch.zeros(m.latents, m.upstream + 1, device=ids.device)
        masks.append(mask.scatter_(1, ids.where(ids >= 0, m.upstream), 1.0)[:, :-1].contiguous())
    return masks


def residual_loss(i: Inputs, backend: str) -> Tensor:
    """The loss of both modes without a mask in sparsely-connected mode, through our ops: shows the cost of masking."""
    total = torch.zeros((), device=i.activations.r_0.device)
    latents: list[list[Pair]] = []
    for unmasked in (False, True):
        written: list[Tensor | float] = [0.0] * i.layers
        stream, of_mode = i.activations.r_0.flatten(0, 1), []
        for layer, m in enumerate(i.clt):
            read, rows = i.activations.x[layer].flatten(0, 1), m.W_enc
            if unmasked:
                stream = stream + i.activations.attn_out[layer].flatten(0, 1)
                rows = m.W_enc - m.W_enc.mean(1, keepdim=True)
                read = stream / i.activations.scale[layer].flatten()[:, None]
            z = ops.topk_encode(read, rows, m.b_enc, i.k, backend=backend)
            of_mode.append(z)
            for target, part in enumerate(ops.sparse_decode(*z, m.W_dec, backend=backend).unbind(1)):
                written[layer + target] = written[layer + target] + part
            stream = stream + m.b_dec + written[layer]
        latents.append(of_mode)
        total = total + baselines.sum_of_fvu(i, written)
    pairs = zip(latents[1], latents[0], strict=True)
    agreement = torch.stack([latent_fvu(Latents(*z), Latents(*t), len(i.clt[0].W_enc)) for z, t in pairs]).sum()
    return total + i.agreement_weight * agreement


def step_comparison(mode: Mode, sizes: dict[str, int], device: str, strict: bool, scaling: bool = False,
                    dense: bool = True, labels: dict[str, Any] | None = None) -> Comparison:  # fmt: skip
    """Contenders of one step; `scaling`: only the best of ours, and dense (`dense`: whether it takes part).

    The dense baseline shares no code with ours, and its loss and gradients are the truth of the gate.
    """
    seed_inputs()
    trainer = make_trainer(mode, device, **sizes)
    i = Inputs(
        clt=list(trainer.clt), activations=make_activations(device=device, **sizes), k=sizes["K"], layers=sizes["L"],
        agreement_weight=trainer.config.loss.latent_agreement_weight,
    )  # fmt: skip
    parameters = dict(trainer.clt.named_parameters())
    adam = make_adam(list(parameters.values()))
    if mode == "both" and dense:
        i.masks = dense_masks(trainer)

    def stepping(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def step() -> Tensor:
            adam.zero_grad(set_to_none=True)
            total = loss()
            total.backward()
            adam.step()
            return total.detach()

        return step

    backends = our_backends(device)[-1:] if scaling else our_backends(device)
    # Built once: a configuration checks itself, which is no part of a step.
    configs = {b: replace(trainer.config, compute=ComputeConfig(backend=b)) for b in backends}  # type: ignore[arg-type]

    def ours(backend: str) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            trainer.config = trainer.objective.config = configs[backend]
            return trainer.loss(i.activations, 1)[0]

        return loss

    def whole(backend: str) -> Callable[[], Any]:
        def step() -> Tensor:
            trainer.config = trainer.objective.config = configs[backend]
            return torch.tensor(trainer.train_step(i.activations)["loss"])

        return step

    def prepared(run: Callable[[], Any]) -> Callable[[], Callable[[], Any]]:
        def prepare() -> Callable[[], Any]:
            adam.zero_grad(set_to_none=True)
            return run

        return prepare

    def named(result: Tensor) -> dict[str, Tensor]:
        gradients = {f"gradient of {name}": p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        return {"loss": result, **gradients}

    def dense_truth() -> dict[str, Tensor]:
        return named(stepping(lambda: baselines.loss(i, mode))())

    def cost(way: Way, mode: Mode) -> Cost:
        return training_step(way, mode, Widths(), **sizes)

    sparse, full = cost("sparse", mode), cost("dense", mode)
    truth = "dense" if dense else None
    entries = {f"ours: {b}": Contender(prepared(stepping(ours(b))), sparse, truth) for b in backends}
    truths: dict[str, Callable[[], dict[str, Tensor]]] = {}
    if dense:
        truths["dense"] = dense_truth
        entries["dense"] = Contender(prepared(stepping(lambda: baselines.loss(i, mode))), full, truth)
    if not scaling:
        entries |= {f"ours: {b}, train_step": Contender(prepared(whole(b)), sparse, "loss only") for b in backends}
        truths["loss only"] = lambda: {"loss": baselines.loss(i, mode).detach()}
        if mode == "vanilla":
            torch_form = stepping(lambda: baselines.loss(i, mode, sparse_decoder=True))
            entries["torch"] = Contender(prepared(torch_form), sparse, truth)
            i.pre_activations = torch.empty(sizes["N"], sizes["F"], device=device)
            floor = partial(baselines.encode_floor, i)
            entries["floor: encode GEMMs"] = Contender(lambda: floor, cost("floor", mode), None)
        else:
            unmasked = cost("dense", "residual")
            residual = stepping(lambda: baselines.loss(i, "residual"))
            entries["unmasked: dense"] = Contender(prepared(residual), unmasked, "unmasked")
            for b in backends:
                run = stepping(partial(residual_loss, i, b))
                entries[f"unmasked: ours, {b}"] = Contender(prepared(run), cost("sparse", "residual"), "unmasked")

            def all_open() -> dict[str, Tensor]:
                everything = Inputs(**vars(i) | {"masks": [1.0] * i.layers})
                with torch.no_grad():
                    return {"loss": baselines.loss(everything, "both")}

            truths["unmasked"] = all_open
    tolerance = {"": 1e-3 if strict else 5e-2, "loss": 1e-4 if strict else 1e-3}
    case = f"training step, {'vanilla mode' if mode == 'vanilla' else 'both modes'}"
    return Comparison(
        case, "step", sizes, device, entries, truths, named, tolerance,
        lambda: list(parameters.values()), labels or {},
    )  # fmt: skip


def state_bytes(sizes: dict[str, int]) -> int:
    """What every contender holds: parameters, gradients and Adam's two moments."""
    size = CLTSize.of_mlps(sizes["L"], sizes["D"], sizes["F"])
    return dense_training_bytes(size, sizes["N"], modes=1)["states"]


def step_contenders(mode: Mode, device: str) -> list[str]:
    """The names of the contenders, without building anything."""
    backends = our_backends(device)
    ours = [f"ours: {b}" for b in backends] + ["dense"] + [f"ours: {b}, train_step" for b in backends]
    if mode == "vanilla":
        return [*ours, "torch", "floor: encode GEMMs"]
    return [*ours, "unmasked: dense", *(f"unmasked: ours, {b}" for b in backends)]
