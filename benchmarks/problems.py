"""The ops as benchmark problems: inputs, contenders, differentiable inputs, and the results that the gate compares."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from types import SimpleNamespace as Inputs
from typing import Any

import baseline_costs
import baselines
import torch
from peers import peers
from torch import Tensor

from sparseclt import costs, ops
from sparseclt.costs import Cost, Passes, Widths, direction
from sparseclt.ops import backend as backends

Sizes = dict[str, int]


def seed_inputs() -> None:
    torch.manual_seed(0)


def active(N: int, K: int, F: int, device: str) -> tuple[Tensor, Tensor]:
    """Positive values [N, K] of distinct latents [N, K], some much more frequent than others, as in training."""
    popularity = (1 + torch.arange(F, device=device, dtype=torch.float32)).pow(-0.5)
    popularity = popularity[torch.randperm(F, device=device)]
    indices = torch.multinomial(popularity.expand(N, -1), K)
    return torch.rand(N, K, device=device) + 0.1, indices


def random_connections(F: int, C: int, U: int, device: str) -> ops.Connections:
    """C distinct upstream latents for each of F; a twentieth of the slots empty."""
    start = torch.randint(U, (F, 1), device=device)
    stride = max(1, U // C)
    jitter = torch.randint(stride, (F, C), device=device)
    ids = (start + torch.arange(C, device=device) * stride + jitter) % U
    if U < C * stride + stride:  # wrapped around: the last block may meet the first
        ids[:, -1] = -1
    return ops.Connections(ids.masked_fill(torch.rand(F, C, device=device) < 0.05, -1), U)


def encoder(i: Inputs, N: int, D: int, F: int, K: int, device: str) -> None:
    """One token in sixteen is zero and biases are negative: such a token has fewer than K positive pre-activations,
    which gradients must respect."""
    i.k = K
    i.x = torch.randn(N, D, device=device)
    i.x[::16] = 0
    i.W_enc = torch.randn(F, D, device=device) / D**0.5
    i.b_enc = -0.02 * torch.rand(F, device=device)


def decode_inputs(device: str, N: int, D: int, F: int, K: int) -> Inputs:
    i = Inputs(W_dec=torch.randn(F, D, device=device) / D**0.5)
    i.values, i.indices = active(N, K, F, device)
    return i


def encode_inputs(device: str, N: int, D: int, F: int, K: int) -> Inputs:
    i = Inputs()
    encoder(i, N, D, F, K, device)
    return i


def jumprelu_inputs(device: str, N: int, D: int, F: int, K: int) -> Inputs:
    """Thresholds that about K of F pre-activations, which are about standard normal, pass."""
    i = encode_inputs(device, N, D, F, K)
    i.threshold = NormalDist().inv_cdf(1 - K / F) * (0.9 + 0.2 * torch.rand(F, device=device))
    i.bandwidth = 0.1
    return i


def upstream_inputs(device: str, D: int, F: int, C: int, U: int, N: int, S: int) -> Inputs:
    i = Inputs(W_enc=torch.randn(F, D, device=device) / D**0.5, E=torch.randn(U, D, device=device) / D**0.5)
    i.connections = random_connections(F, C, U, device)
    i.z_values, i.z_indices = active(N, S, U, device)
    filled = i.connections.indices
    i.mask = torch.zeros(F, U + 1, device=device).scatter_(1, filled.where(filled >= 0, U), 1.0)[:, :U].contiguous()
    return i


def weights_inputs(device: str, **sizes: int) -> Inputs:
    i = upstream_inputs(device, **sizes, N=1, S=1)
    return Inputs(W_enc=i.W_enc, E=i.E, connections=i.connections)


def matmul_inputs(device: str, **sizes: int) -> Inputs:
    i = upstream_inputs(device, **sizes, D=1)
    i.V = torch.randn(i.connections.F, i.connections.C, device=device) * (i.connections.indices >= 0)
    return Inputs(V=i.V, z_values=i.z_values, z_indices=i.z_indices, connections=i.connections)


def connected_inputs(device: str, N: int, D: int, F: int, K: int, C: int, U: int, S: int) -> Inputs:
    i = upstream_inputs(device, D=D, F=F, C=C, U=U, N=N, S=S)
    W_enc = i.W_enc
    encoder(i, N, D, F, K, device)
    i.W_enc, i.r0, i.scale = W_enc, i.x, 1 + torch.rand(N, device=device)
    return i


def select_inputs(device: str, D: int, F: int, C: int, U: int) -> Inputs:
    i = Inputs(W_enc=torch.randn(F, D, device=device), E=torch.randn(U, D, device=device), C=C)
    i.importance = torch.rand(U, device=device)
    return i


def latents(i: Inputs, result: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    values, indices = result
    return {
        "values": values.sort(dim=1, descending=True).values,
        "latents": values.new_zeros(len(values), len(i.W_enc)).scatter_add_(1, indices.clamp_min(0), values),
    }


def spread(i: Inputs, result: tuple[Tensor, Tensor] | Tensor) -> dict[str, Tensor]:
    """Latents of an encode in which tokens differ in how many are active: padded slots, or a matrix [N, F]."""
    return {"latents": latents(i, result)["latents"] if isinstance(result, tuple) else result}


def tensor(i: Inputs, result: Tensor) -> dict[str, Tensor]:
    return {"result": result}


def some_rows(i: Inputs) -> slice:
    """About 256 downstream latents: what the gate of select_connections looks at."""
    return slice(0, None, max(1, len(i.W_enc) // 256))


def choice(i: Inputs, result: Tensor) -> dict[str, Tensor]:
    """Scores of the chosen, best first: of two near-equal ones either may have been taken."""
    return _scores(i, result[some_rows(i)])


def choice_by_reference(i: Inputs) -> dict[str, Tensor]:
    rows = i.W_enc[some_rows(i)]
    return _scores(i, ops.select_connections(rows, i.E, i.importance, i.C, backend="reference"))


def _scores(i: Inputs, chosen: Tensor) -> dict[str, Tensor]:
    rows = i.W_enc[some_rows(i)]
    scores = [(w @ i.E[c].T).abs() * i.importance[c] for w, c in zip(rows, chosen, strict=True)]
    return {"scores": torch.stack(scores).sort(dim=1, descending=True).values}


def _ours_virtual(i: Inputs, backend: str) -> Tensor:
    V = ops.virtual_weights(i.W_enc, i.E, i.connections, backend=backend)
    return ops.virtual_matmul(i.z_values, i.z_indices, V, i.connections, backend=backend)


def _ours_connected(i: Inputs, backend: str) -> tuple[Tensor, Tensor]:
    V = ops.virtual_weights(i.W_enc, i.E, i.connections, backend=backend)
    z = (i.z_values, i.z_indices)
    return ops.connected_encode(i.r0, i.W_enc, i.b_enc, *z, V, i.connections, i.scale, i.k, backend=backend)


@dataclass(frozen=True)
class Problem:
    """An op. `ours(i, backend)`, `baselines[name](i)`: contenders; `cost` and `dense_cost`: their costs by pass.

    `differentiable`: names of the inputs with a gradient. `results`: the tensors that the gate compares. `loose`:
    whether top-k or a threshold may take either of two near-equal latents, as GEMMs of different order round them.
    `sparse_ways`: contenders besides ours that work as ours do, and have its cost.
    """

    inputs: Callable[..., Inputs]
    ours: Callable[[Inputs, str], Any]
    baselines: dict[str, Callable[[Inputs], Any]]
    cost: Callable[..., Passes]
    dense_cost: Callable[..., Passes]
    differentiable: tuple[str, ...] = ()
    results: Callable[[Inputs, Any], dict[str, Tensor]] = tensor
    loose: bool = False
    truth: Callable[[Inputs], dict[str, Tensor]] | None = None  # None: the result of the reference backend
    sparse_ways: tuple[str, ...] = ("torch", "eai-sparsify", "openai")


PROBLEMS = {
    "sparse_decode": Problem(
        decode_inputs,
        lambda i, b: ops.sparse_decode(i.values, i.indices, i.W_dec, backend=b),
        {"dense": baselines.decode_dense, "torch": baselines.decode_torch},
        costs.sparse_decode, baseline_costs.decode, ("values", "W_dec"),
    ),
    "topk_encode": Problem(
        encode_inputs,
        lambda i, b: ops.topk_encode(i.x, i.W_enc, i.b_enc, i.k, backend=b),
        {"dense": baselines.encode_dense, "gemm+topk": baselines.encode_gemm_topk, "torch": baselines.encode_torch},
        costs.topk_encode, baseline_costs.encode, ("x", "W_enc", "b_enc"), latents, loose=True,
        sparse_ways=("torch",),
    ),
    "batchtopk_encode": Problem(
        encode_inputs,
        lambda i, b: ops.batchtopk_encode(i.x, i.W_enc, i.b_enc, i.k, backend=b),
        {"dense": baselines.batchtopk_dense},
        costs.topk_encode, baseline_costs.encode, ("x", "W_enc", "b_enc"), spread, loose=True,
    ),
    "jumprelu_encode": Problem(
        jumprelu_inputs,
        lambda i, b: ops.jumprelu_encode(i.x, i.W_enc, i.b_enc, i.threshold, bandwidth=i.bandwidth, backend=b)[:2],
        {"dense": baselines.jumprelu_dense},
        costs.jumprelu_encode, baseline_costs.encode, ("x", "W_enc", "b_enc", "threshold"), spread, loose=True,
    ),
    "virtual_weights": Problem(
        weights_inputs,
        lambda i, b: ops.virtual_weights(i.W_enc, i.E, i.connections, backend=b),
        {"dense": baselines.weights_dense, "torch": baselines.weights_torch},
        costs.virtual_weights, baseline_costs.weights, ("W_enc", "E"),
    ),
    "virtual_matmul": Problem(
        matmul_inputs,
        lambda i, b: ops.virtual_matmul(i.z_values, i.z_indices, i.V, i.connections, backend=b),
        {"dense": baselines.matmul_dense, "torch": baselines.matmul_torch},
        costs.virtual_matmul, baseline_costs.matmul, ("z_values", "V"),
    ),
    "virtual_weights+virtual_matmul": Problem(
        upstream_inputs, _ours_virtual,
        {"dense": baselines.virtual_dense, "torch": baselines.matmul_torch},
        baseline_costs.our_virtual, baseline_costs.virtual, ("W_enc", "E", "z_values"),
    ),
    "connected_encode": Problem(
        connected_inputs, _ours_connected,
        {"dense": baselines.connected_dense, "torch": baselines.connected_torch},
        baseline_costs.our_connected, baseline_costs.connected, ("r0", "W_enc", "b_enc", "E", "z_values"), latents,
        loose=True, sparse_ways=("torch",),
    ),
    "select_connections": Problem(
        select_inputs,
        lambda i, b: ops.select_connections(i.W_enc, i.E, i.importance, i.C, backend=b),
        {"dense": baselines.select_dense, "torch": baselines.select_torch},
        costs.select_connections, baseline_costs.select, (), choice, truth=choice_by_reference,
    ),
}  # fmt: skip


def cost(op: str, contender: str, backward: bool, number: int, **sizes: int) -> Cost:
    """Of one direction of an op, as a contender of that name computes it; `number`: bytes of a number."""
    problem = PROBLEMS[op]
    sparse = contender.startswith("ours: ") or contender in problem.sparse_ways
    passes = problem.cost if sparse else problem.dense_cost
    return direction(passes(Widths(number), **sizes), backward)


def our_backends(device: str) -> list[str]:
    """Every backend of ours that runs on `device` in float32, except the reference."""
    probe = torch.empty(0, device=device)
    found = []
    for name in ops.backends():
        try:
            if name != "reference" and backends.choose("sparse_decode", name, probe) == name:
                found.append(name)
        except (ImportError, ValueError, TypeError):
            continue
    return [name for name in found if not (name == "triton" and device == "cpu")]  # the interpreter is not timed


def _call(ours: Callable[[Inputs, str], Any], backend: str, i: Inputs) -> Any:
    return ours(i, backend)


def contenders(op: str, device: str) -> dict[str, Callable[[Inputs], Any]]:
    """By name, "ours: torch", "dense", ...: functions of the inputs."""
    problem = PROBLEMS[op]
    ours = {f"ours: {name}": partial(_call, problem.ours, name) for name in our_backends(device)}
    return ours | problem.baselines | peers(op)
