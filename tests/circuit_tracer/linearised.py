"""The graph of one prompt as circuit-tracer defines it, from our own weights and captures, without a backward pass.

Vanilla latents and their errors; attention patterns and norm scales are constants, and what passes through attention
counts: an edge may lead from one token to another. The first token has no latents and no errors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseclt.graph.attribution import top_logits
from sparseclt.graph.graph import Graph, Node
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.language_model.unembedding import logit_directions, recorded_final_stream
from sparseclt.model.attention import AttentionWeights, centre, head_rows
from sparseclt.model.clt import SparseCLT

Target = tuple[int, int, Tensor]  # layer, position, direction [D] in which it reads the stream


class Sources:
    """The nodes so far with what each writes: at the output of an MLP, or (layer -1) as an embedding."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.written: dict[int, list[tuple[int, int, Tensor]]] = {}  # layer -> node, position, vector [D]

    def add(self, node: Node, written: dict[int, Tensor]) -> None:
        for layer, vector in written.items():
            self.written.setdefault(layer, []).append((len(self.nodes), node.position, vector))
        self.nodes.append(node)

    def edges(self, layer: int, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Node numbers [e] and weights [n, e] for `cotangent` [n, S, D], which is behind what was written there."""
        numbers, positions, vectors = zip(*self.written.get(layer, []), strict=True)
        return torch.tensor(numbers), torch.einsum("ned,ed->ne", cotangent[:, list(positions)], torch.stack(vectors))


@torch.no_grad()
def linearised_graph(clt: SparseCLT, language_model: LanguageModel, tokens: Tensor) -> Graph:
    """That of `tokens` [S], in float64."""
    L, S = clt.architecture.model.layers, len(tokens)
    activations = language_model.capture(tokens[None], attention=True)
    with recorded_final_stream(language_model) as final:
        logits = language_model.replaced_logits(tokens[None])[0, -1].double()
    latents = clt(activations, "vanilla").latents
    sources, targets = Sources(), []
    for layer, (values, indices) in enumerate(latents):
        W_dec, W_enc = (getattr(clt.transcoder(layer), name).double() for name in ("W_dec", "W_enc"))
        for position, slot in (values > 0).nonzero().tolist():
            latent, value = int(indices[position, slot]), values[position, slot].double()
            targets.append((layer, position, centre(W_enc[latent]) / activations.scale[layer][0, position].double()))
            written = {layer + t: value * W_dec[latent, t] for t in range(L - layer)}
            sources.add(Node("latent", position, latent, clt.sites[layer]), written)
    reconstructed = [clt.transcoder(layer).b_dec.double().repeat(S, 1) for layer in range(L)]
    for layer, parts in sources.written.items():
        for _, position, vector in parts:
            reconstructed[layer][position] += vector
    for layer, site in enumerate(clt.sites):
        for position in range(1, S):
            error = activations.mlp_out[layer][0, position].double() - reconstructed[layer][position]
            sources.add(Node("error", position, site=site), {layer: error})
    embedded = language_model.bridge.embed.W_E.double()[tokens]
    for position, token in enumerate(tokens.tolist()):
        sources.add(Node("embedding", position, token), {-1: embedded[position]})
    chosen = top_logits(logits, 10)
    directions, _ = logit_directions(language_model, chosen)
    targets += [(L, S - 1, direction / final.scale[0, -1].double()) for direction in directions]
    weights = [language_model.attention_weights(layer) for layer in range(L)]
    mixes = [activations.mix(layer)[0].double() for layer in range(L)]
    edges = _edges(sources, targets, weights, mixes, S)
    nodes = (*sources.nodes, *(Node("logit", S - 1, token) for token in chosen.tolist()))
    numbers = [*range(sum(layer < L for layer, _, _ in targets)), *range(len(sources.nodes), len(nodes))]
    stage = torch.full((len(nodes),), -1)
    stage[numbers] = torch.tensor([layer for layer, _, _ in targets])
    source, target, weight = (torch.cat(parts) for parts in zip(*edges, strict=True))
    # A latent may lead to another one through the outputs of several layers: that is one edge.
    pairs, place = torch.unique(torch.stack([source, target]), dim=1, return_inverse=True)
    source, target = pairs
    weight = torch.zeros(len(source), dtype=torch.float64).index_add_(0, place, weight)
    return Graph(
        tokens=tokens,
        nodes=nodes,
        values=torch.ones(len(nodes), dtype=torch.float64),
        source=source,
        target=torch.tensor(numbers)[target],
        coefficient=weight,
        stage=stage,
        probabilities=logits.softmax(-1)[chosen],
    )


def _edges(
    sources: Sources, targets: Sequence[Target], weights: Sequence[AttentionWeights], mixes: Sequence[Tensor], S: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Source, number in `targets`, weight. A latent reads behind its layer's attention, a logit behind all layers."""
    found = []
    for start in sorted({layer for layer, _, _ in targets}):
        own = [number for number, (layer, _, _) in enumerate(targets) if layer == start]
        cotangent = torch.zeros(len(own), S, len(targets[0][2]), dtype=torch.float64)
        for row, number in enumerate(own):
            cotangent[row, targets[number][1]] = targets[number][2]
        for layer in range(start, -1, -1):
            if layer < len(weights):
                cotangent = cotangent + _through_attention(cotangent, weights[layer], mixes[layer])
            numbers, weight = sources.edges(layer - 1, cotangent)
            found.append(
                (numbers.repeat(len(own)), torch.tensor(own).repeat_interleave(len(numbers)), weight.flatten())
            )
    return found


def _through_attention(cotangent: Tensor, weights: AttentionWeights, mix: Tensor) -> Tensor:
    """What `cotangent` [n, S, D] behind attention is before it, without the part that goes past it."""
    double = AttentionWeights(weights.W_V.double(), weights.W_O.double(), weights.bias.double(), weights.centred)
    back = torch.zeros_like(cotangent)
    for head, pattern in enumerate(mix):
        rows = head_rows(cotangent.flatten(0, 1), double, head).view_as(cotangent)
        back += torch.einsum("qk,nqd->nkd", pattern, rows)
    return back
