"""Trainers of tiny CLTs on random activations, without a language model, and what a step makes of them, to be computed
on any number of ranks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sparseclt.config import (
    CLTConfig,
    ConnectionConfig,
    DataConfig,
    LoggingConfig,
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from sparseclt.model.activations import Activations, all_but_first
from sparseclt.model.attention import AttentionWeights
from sparseclt.model.shape import ModelShape
from sparseclt.model.sites import MODES
from sparseclt.training.optimizer import RowAdam
from sparseclt.training.trainer import Trainer
from sparseclt.training.update import add_up

L, D, H, B, S, F, K, C = 3, 8, 2, 4, 6, 16, 5, 4


def model(attention: str, centred: bool = True, parallel: bool = False) -> Any:
    def weights(layer: int) -> AttentionWeights:
        g = torch.Generator().manual_seed(layer)
        parts = [torch.randn(*size, dtype=torch.float64, generator=g) for size in ((H, D, 4), (H, 4, D), (D,))]
        return AttentionWeights(*parts, centred)

    shape = ModelShape(layers=L, d_model=D, heads=H, vocab=1, centred=centred, parallel=parallel)
    return SimpleNamespace(shape=shape, tokenizer=None, attention_weights=weights, dtype=torch.float64, digest=str)


def batch(seed: int) -> Activations:
    g = torch.Generator().manual_seed(seed)

    def vectors() -> list[Tensor]:
        return [torch.randn(B, S, D, dtype=torch.float64, generator=g) for _ in range(L)]

    def scales() -> list[Tensor]:
        return [0.5 + torch.rand(B, S, dtype=torch.float64, generator=g) for _ in range(L)]

    tokens = torch.zeros(B, S, dtype=torch.int64)
    patterns = [torch.rand(B, H, S, S, dtype=torch.float64, generator=g).tril() for _ in range(L)]
    return Activations(
        tokens, vectors()[0], vectors(), scales(), vectors(), vectors(),
        [p / p.sum(-1, keepdim=True) for p in patterns], scales(), counted=all_but_first(tokens),
    )  # fmt: skip


def trainer(attention: str = "frozen", parallel: dict[str, int] | None = None, **changes: Any) -> Trainer:
    groups: dict[str, dict[str, Any]] = {name: {} for name in ("clt", "connections", "loss", "optimizer", "compute")}
    plain = {}
    for name, value in changes.items():
        group, _, field = name.partition("__")
        if field:
            groups.setdefault(group, {})[field] = value
        else:
            plain[name] = value
    config = TrainConfig(
        out="nowhere", steps=20, batch_rows=plain.pop("batch_rows", B), data=DataConfig(row_tokens=S),
        clt=CLTConfig(**{"latents": F, "active": K, "attention": attention, **groups["clt"]}),
        connections=ConnectionConfig(**{"per_latent": C, "refresh_steps": 3, "recent_tokens": 64,
                                        **groups["connections"]}),
        loss=LossConfig(**{"sparse_start_share": 0.0, "sparse_ramp_share": 0.1, **groups["loss"]}),
        optimizer=OptimizerConfig(**{"dead_after_tokens": 25, **groups["optimizer"]}),
        compute=type(TrainConfig().compute)(**groups["compute"]),
        logging=LoggingConfig(progress=False), parallel=ParallelConfig(**(parallel or {})),
        **plain,
    )  # fmt: skip
    t = Trainer(config, language_model=model(attention), rows=torch.zeros(B, S, dtype=torch.int64))
    t.clt.double()
    t.optimizer = RowAdam(t.clt, config.optimizer, ranks=t.ranks)
    return t


def with_random_weights(t: Trainer, connected: bool = True) -> Trainer:
    """Weights and connections that are the same whatever the ranks."""
    clt, F, D = t.clt, t.clt.architecture.latents, t.clt.architecture.model.d_model
    g = torch.Generator().manual_seed(1)

    def draw(*size: int) -> Tensor:
        return 0.3 * torch.randn(*size, dtype=torch.float64, generator=g)

    with torch.no_grad():
        for module in clt:
            T = module.W_dec.shape[1]
            module.W_enc.copy_(draw(F, D)[module.rows])
            module.b_enc.copy_(draw(F)[module.rows])
            module.W_dec.copy_(draw(F, T, D)[..., module.columns])
            module.b_dec.copy_(draw(D))
            if module.threshold is not None:
                module.threshold.copy_(draw(F).abs()[module.rows])
            if module.upstream and connected:
                ids = torch.rand(F, module.upstream, generator=g).argsort(1)[:, :C]
                ids = ids.masked_fill(torch.rand(F, C, generator=g) < 0.2, -1)
                module.connect(ids[module.rows])
                if module.logits is not None:
                    module.logits.data = draw(F, C)[module.rows]
    return t


def own_rows(t: Trainer, activations: Activations) -> Activations:
    part = t.ranks.data.part(B, "batch_rows")
    return activations.rows(part.start, part.stop - part.start)


def place(t: Trainer) -> tuple[int, int]:
    return t.ranks.data.rank, t.ranks.latents.rank


def gradients(attention: str, parallel: dict[str, int], changes: dict[str, Any], modes: str = "both") -> dict[str, Any]:
    """Loss, terms, latents and gradients of one batch."""
    t = with_random_weights(trainer(attention, parallel, **changes), connected=modes == "both")
    found = t.objective.backward(own_rows(t, batch(0)), rho=0.7, check=lambda total, terms: None)
    add_up(t.clt)
    found.gradients.add_to_encoders()
    grads = {}
    for index, module in enumerate(t.clt):
        chunks = list(found.gradients.chunks(index))
        grads[f"{module.site.name}/W_dec"] = torch.cat([chunk.gradient for chunk in chunks])
        for name in ("W_enc", "b_enc", "b_dec", "logits", "threshold"):
            parameter = getattr(module, name)
            if isinstance(parameter, torch.nn.Parameter) and parameter.grad is not None:
                grads[f"{module.site.name}/{name}"] = parameter.grad
    latents = {mode: [tuple(z) for z in zs] for mode, zs in found.latents.items()}
    terms = {name: float(value) for name, value in found.terms.items()}
    return {"terms": terms, "grads": grads, "latents": latents, "place": place(t)}


def run_of_steps(
    attention: str, parallel: dict[str, int], changes: dict[str, Any], steps: int, random: bool = False
) -> dict[str, Any]:
    """The metrics of some steps, with connections chosen on the way, and the state that they leave. `random`: from
    random weights and connections."""
    t = trainer(attention, parallel, **changes)
    if random:
        with_random_weights(t)
    metrics = [t.train_step(own_rows(t, batch(step))) for step in range(steps)]
    state = {f"{m.site.name}/{n}": p.detach() for m in t.clt for n, p in m.named_parameters()}
    state |= {f"{m.site.name}/connections": m.connection_indices for m in t.clt if m.upstream}
    activity = {mode: t.activity[mode].state() for mode in MODES}
    if t.policy:
        activity["policy"] = t.policy.state()
    return {"metrics": metrics, "state": state, "activity": activity, "place": place(t), "sent": t.ranks.world.sent}


def joined(results: list[dict[str, Any]], key: str) -> dict[str, Tensor]:
    """The whole tensors of which ranks have their parts; parts that ranks should have alike must be equal."""
    whole = {}
    of_first = [r[key] for r in results if r["place"][0] == 0]
    for result in results:
        for name, tensor in result[key].items():
            assert torch.equal(tensor, of_first[result["place"][1]][name]), f"{name} differs between data ranks"
    for name in of_first[0]:
        parts = [own[name] for own in of_first]
        if name.endswith("b_dec"):
            assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between ranks"
            whole[name] = parts[0]
        else:
            whole[name] = torch.cat(parts, -1 if name.endswith("W_dec") else 0)
    return whole


__all__ = ["MODES", "Path", "gradients", "joined", "run_of_steps"]
