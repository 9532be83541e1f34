"""Models whose circuits are known, and how many of their edges a CLT's connections find."""

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from tiny_models import tokenizer
from torch import Tensor

from sparseclt.config import (
    CLTConfig,
    ComputeConfig,
    ConnectionConfig,
    DataConfig,
    OptimizerConfig,
    TrainConfig,
)
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.activations import Activations
from sparseclt.model.clt import SparseCLT
from sparseclt.model.shape import ModelShape
from sparseclt.training.trainer import Trainer


@dataclass(frozen=True)
class Circuit:
    """What a model computes: variables, each written by one MLP (layer -1: before any) along a direction [D] of its
    own, and the pairs (read, reading) of variables that MLPs compute."""

    directions: Tensor  # [n, D], of length 1
    layers: tuple[int, ...]
    edges: frozenset[tuple[int, int]]


class TwoHops:
    """A language model without attention and norms, whose two MLPs compute o = (a XOR b) AND (c XOR d) for all pairs of
    XORs. A token is `bits` input bits.

    From the bits alone it takes four latents for each o, more than a CLT of as many latents as there are gates has. So
    one that explains both MLPs has to use both hops.
    """

    device, dtype, tokenizer = torch.device("cpu"), torch.float32, None

    def __init__(self, bits: int = 8):
        self.bits, self.pairs = bits, list(combinations(range(bits // 2), 2))
        first = bits + bits // 2  # of the second hop
        D = first + len(self.pairs)
        self.shape = ModelShape(layers=2, d_model=D, centred=False, vocab=2**bits, name="two hops")
        edges = frozenset((bits + x, first + o) for o, pair in enumerate(self.pairs) for x in pair)
        layers = (-1,) * bits + (0,) * (bits // 2) + (1,) * len(self.pairs)
        self.circuit = Circuit(torch.eye(D), layers, edges)

    def capture(self, tokens: Tensor, attention: bool = False) -> Activations:
        bits = (tokens[..., None] >> torch.arange(self.bits) & 1).float()
        xor = (bits[..., ::2] - bits[..., 1::2]).abs()
        both = torch.stack([(xor[..., i] + xor[..., j] - 1).relu() for i, j in self.pairs], -1)
        parts = [bits, xor, both]
        nothing = [torch.zeros_like(part) for part in parts]
        written = [torch.cat([*nothing[:i], part, *nothing[i + 1 :]], -1) for i, part in enumerate(parts)]
        one, zero = torch.ones(tokens.shape), torch.zeros_like(written[0])
        return Activations(
            tokens, written[0], x=[written[0], written[0] + written[1]], scale=[one, one], mlp_out=written[1:],
            attn_out=[zero, zero],
        )  # fmt: skip


Gate = tuple[int, int, str]  # the two variables that it reads, and "xor" or "and"
CONSTANT, PLACE = 4.0, 1.0  # sizes of the constant and of a position's code


def compiled(bits: int = 4, context: int = 16) -> tuple[LanguageModel, Circuit]:
    """A GPT-2 with weights written by hand: attention fetches the previous token's bits, the first MLP computes XORs of
    a bit of each token, the second ANDs of two XORs.

    A variable v is a pair of dimensions, +v and -v. A large constant keeps the scale of the LayerNorms nearly the same
    on all tokens, so that gates read through them linearly.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    first = 2 * bits
    pairs = list(combinations(range(first, first + bits), 2))
    layers: list[list[Gate]] = [
        [(i, bits + i, "xor") for i in range(bits)],
        [(i, j, "and") for i, j in pairs],
    ]
    gates = [gate for layer in layers for gate in layer]
    n = first + len(gates)
    D = 2 * n + 2 + context
    sizes = {"n_embd": D, "n_layer": 2, "n_head": 1, "n_positions": context, "vocab_size": 2**bits, "n_inner": 16}
    model = GPT2LMHeadModel(GPT2Config(activation_function="relu", bos_token_id=0, eos_token_id=0, **sizes)).eval()
    directions = torch.zeros(n, D)
    for v in range(n):
        directions[v, 2 * v], directions[v, 2 * v + 1] = 1, -1
    scale = ((2 * CONSTANT**2 + PLACE**2 + n / 2) / D) ** 0.5  # what a LayerNorm divides by, nearly
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(float(".ln_" in name and name.endswith("weight")))
        _write_embedding(model.transformer, directions[:bits], n)
        _fetch_previous(model.transformer.h[0].attn, directions, bits, context, scale)
        number = first
        for block, layer in zip(model.transformer.h, layers, strict=True):
            _write_gates(block.mlp, layer, directions, number, scale)
            number += len(layer)
    layer_of = (-1,) * first + tuple(index for index, layer in enumerate(layers) for _ in layer)
    edges = frozenset((v, first + i) for i, gate in enumerate(gates) for v in gate[:2] if v >= first)
    return LanguageModel.from_hf(model, tokenizer(), name="compiled"), Circuit(directions / 2**0.5, layer_of, edges)


def _write_embedding(transformer: Any, directions: Tensor, variables: int) -> None:
    tokens = torch.arange(2 ** len(directions))[:, None] >> torch.arange(len(directions)) & 1
    transformer.wte.weight.copy_(tokens.float() @ directions)
    positions = transformer.wpe.weight
    positions[:, -len(positions) :] = PLACE * torch.eye(len(positions))
    positions[:, 2 * variables], positions[:, 2 * variables + 1] = CONSTANT, -CONSTANT


def _fetch_previous(attention: Any, directions: Tensor, bits: int, context: int, scale: float) -> None:
    """Each position looks at the one before it, and copies its bits into variables of its own."""
    query, key, value = attention.c_attn.weight.chunk(3, dim=1)
    query[-context:, :context] = 120 * torch.eye(context).roll(-1, 1)
    key[-context:, :context] = 120 * torch.eye(context)
    value[:, :bits] = scale / 2 * directions[:bits].T
    attention.c_proj.weight[:bits] = directions[bits : 2 * bits]


def _write_gates(mlp: Any, gates: list[Gate], directions: Tensor, number: int, scale: float) -> None:
    """XOR as relu(a - b) + relu(b - a), AND as relu(a + b - 1); the first writes variable `number`."""
    unit = 0
    for i, (a, b, kind) in enumerate(gates):
        signs = [(1, -1), (-1, 1)] if kind == "xor" else [(1, 1)]
        for sign_a, sign_b in signs:
            mlp.c_fc.weight[:, unit] = scale / 2 * (sign_a * directions[a] + sign_b * directions[b])
            mlp.c_fc.bias[unit] = -float(kind == "and")
            mlp.c_proj.weight[unit] = directions[number + i]
            unit += 1


def trained(
    model: Any, rows: Tensor, latents: int, active: int, out: Any, *, C: int = 4, steps: int = 700
) -> SparseCLT:
    """A CLT trained on `rows` [R, S] in both modes. Where half of the latents fire on every token, two steps make one
    dead by default."""
    config = TrainConfig(
        out=str(out), steps=steps, batch_rows=8, clt=CLTConfig(latents=latents, active=active),
        connections=ConnectionConfig(per_latent=C, refresh_steps=10), data=DataConfig(row_tokens=rows.shape[1]),
        optimizer=OptimizerConfig(learning_rate=2e-2, dead_after_tokens=2000), compute=ComputeConfig(backend="torch"),
    )  # fmt: skip
    trainer = Trainer(config, language_model=model, rows=rows)
    for activations in trainer.batches.from_step(0):
        trainer.train_step(activations)
    return trainer.clt.eval()


def written(clt: SparseCLT, module: int, circuit: Circuit) -> Tensor:
    """The variable that each latent of a module writes into its own site, [F]; -1 where it is none of that layer's."""
    share = (torch.nn.functional.normalize(clt.transcoder(module).W_dec[:, 0], dim=1) @ circuit.directions.T).abs()
    best = share.max(1)
    own = torch.tensor([layer == clt.sites[module].layer for layer in circuit.layers])[best.indices]
    return torch.where(own & (best.values > 0.7), best.indices, -1)


def precision_and_recall(
    clt: SparseCLT, circuit: Circuit, least: float = 0.2, shuffle: int | None = None
) -> tuple[float, float]:
    """Of the connections of latents that write a variable: the share that are edges of the circuit; and the share of
    the circuit's edges that are among them. Connections below `least` of a latent's strongest |V| do not count.
    `shuffle`: a seed with which the upstream latents change places, while V stays: what chance would find."""
    F, variables = clt.architecture.latents, [written(clt, m, circuit) for m in range(len(clt.sites))]
    found: list[tuple[int, int]] = []
    for m, (module, V) in enumerate(zip(clt, clt.virtual_weights("torch"), strict=True)):
        if V is None or module.connection_indices is None:
            continue
        upstream = torch.cat(variables[: module.upstream // F])
        if shuffle is not None:
            upstream = upstream[torch.randperm(len(upstream), generator=torch.Generator().manual_seed(shuffle))]
        strong = (V.abs() > least * V.abs().amax(1, keepdim=True)) & (module.connection_indices >= 0)
        for latent, slot in (strong & (variables[m] >= 0)[:, None]).nonzero().tolist():
            found.append((int(upstream[module.connection_indices[latent, slot]]), int(variables[m][latent])))
    hits = [edge for edge in found if edge in circuit.edges]
    return len(hits) / max(len(found), 1), len(set(hits)) / len(circuit.edges)
