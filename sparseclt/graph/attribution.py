"""From a run to its graph: every edge is a product of weights and activations; nothing is differentiated."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseclt.graph.graph import Graph, Node
from sparseclt.graph.run import PromptRun, linear_logits
from sparseclt.model.attention import AttentionWeights, rows_of_heads
from sparseclt.model.sites import Site, model_sites, upstream_modules
from sparseclt.ops import Connections

LOGIT_SHARE = 0.95  # the probability that a graph's logits have together, as in circuit-tracer
Edges = tuple[Tensor, Tensor, Tensor]  # source, target, coefficient
Place = tuple[Site, int, int]  # site, position, latent


@torch.no_grad()
def attribute(
    run: PromptRun, *, max_logits: int = 10, logits: Tensor | None = None, also: Collection[Place] = ()
) -> Graph:
    """The graph of a run: all its active latents, and what leads to its top logits, at most `max_logits`.

    `logits` [k]: tokens to explain in place of the likeliest. `also`: latents that become nodes although they are not
    active; nothing leads to them.
    """
    nodes = _Nodes(run, also)
    edges = [part for module in range(len(run.clt.sites)) for part in _module_edges(run, nodes, module)]
    chosen = top_logits(run.logits[-1], max_logits) if logits is None else logits
    first = len(nodes.nodes)
    edges += _logit_edges(run, nodes, chosen, first)
    last, final = len(run.tokens) - 1, run.logits[-1].double().cpu()
    source, target, coefficient = (torch.cat(parts).cpu() for parts in zip(*edges, strict=True))
    kept = coefficient != 0
    return Graph(
        tokens=run.tokens.cpu(),
        nodes=(*nodes.nodes, *(Node("logit", last, token) for token in chosen.tolist())),
        values=torch.cat([nodes.values, final[chosen.cpu()] - final.mean()]),
        source=source[kept],
        target=target[kept],
        coefficient=coefficient[kept],
        stage=torch.cat([nodes.stage, torch.full((len(chosen),), len(run.clt.sites))]),
        probabilities=final.softmax(-1)[chosen.cpu()],
    )


def top_logits(logits: Tensor, most: int) -> Tensor:
    """The fewest tokens [k] whose probabilities add up to LOGIT_SHARE, likeliest first, at most `most` of them."""
    if most < 1:
        raise ValueError(f"max_logits: expected at least 1, got {most}")
    top = logits.double().softmax(-1).topk(min(most, len(logits)))
    return top.indices[: int((top.values.cumsum(0) < LOGIT_SHARE).sum()) + 1]


@dataclass(frozen=True)
class _Given:
    """Nodes that nothing leads to, one for each position of a stream: `number` [S], `written` [S, D] in float64.
    What is zero has no node, and the number -1."""

    site: Site | None
    number: Tensor
    written: Tensor


class _Nodes:
    """All nodes but the logits, and the vectors that the given ones write."""

    def __init__(self, run: PromptRun, also: Collection[Place]):
        self.run = run
        self.nodes: list[Node] = []
        self.positions: list[Tensor] = []  # of each module's latents, [A]
        self.indices: list[Tensor] = []  # [A]
        self.active: list[int] = []  # how many of them are active; those of `also` follow
        values: list[Tensor] = []
        for module, site in enumerate(run.clt.sites):
            values.append(self._add_latents(module, site, [place for place in also if place[0] == site]))
        latents = len(self.nodes)
        self._keys, self._order = self._lookup()
        self.embedding = self._add_given("embedding", None, run.forward.activations.r_0[0].double())
        self.given = []
        for site, written in run.given().items():
            kind = "error" if site in run.clt.sites else "attention"
            self.given.append(self._add_given(kind, site, written))
        self.layers = self._add_layers()
        self.bias = len(self.nodes)
        self.nodes.append(Node("bias", 0))
        rest = len(self.nodes) - latents
        self.values = torch.cat([*values, torch.ones(rest, dtype=torch.float64)])
        stages = [torch.full((len(indices),), module) for module, indices in enumerate(self.indices)]
        self.stage = torch.cat([*stages, torch.full((rest,), -1)])

    def _add_latents(self, module: int, site: Site, also: list[Place]) -> Tensor:
        latents = self.run.forward.latents[module]
        slots = latents.values > 0
        positions, indices = slots.nonzero()[:, 0], latents.indices[slots]
        known = set(zip(positions.tolist(), indices.tolist(), strict=True))
        new = [(position, latent) for _, position, latent in also if (position, latent) not in known]
        extra = torch.tensor(new, dtype=torch.int64, device=positions.device).view(-1, 2)
        self.active.append(len(positions))
        self.positions.append(torch.cat([positions, extra[:, 0]]))
        self.indices.append(torch.cat([indices, extra[:, 1]]))
        places = zip(self.positions[-1].tolist(), self.indices[-1].tolist(), strict=True)
        self.nodes += [Node("latent", position, latent, site) for position, latent in places]
        return torch.cat([latents.values[slots].double().cpu(), torch.zeros(len(new), dtype=torch.float64)])

    def _add_given(self, kind: str, site: Site | None, written: Tensor) -> _Given:
        number = torch.full((len(written),), -1)
        for position in written.any(1).nonzero()[:, 0].tolist():
            number[position] = len(self.nodes)
            token = int(self.run.tokens[position]) if kind == "embedding" else -1
            self.nodes.append(Node(kind, position, token, site))  # type: ignore[arg-type]
        return _Given(site, number.to(written.device), written)

    def _add_layers(self) -> _Given | None:
        if self.run.covers_all_layers:
            return None
        beyond = self.run.beyond()
        written = torch.zeros_like(beyond)
        written[-1] = beyond[-1]  # only there do logits read it
        return self._add_given("layers", None, written)

    def _lookup(self) -> tuple[Tensor, Tensor]:
        width = len(self.indices) * self.run.clt.architecture.latents
        keys = [
            positions * width + module * self.run.clt.architecture.latents + indices
            for module, (positions, indices) in enumerate(zip(self.positions, self.indices, strict=True))
        ]
        return torch.cat(keys).sort()

    def of_module(self, module: int) -> Tensor:
        """Node numbers of a module's latents, [A]."""
        before = sum(len(indices) for indices in self.indices[:module])
        return before + torch.arange(len(self.indices[module]), device=self.indices[module].device)

    def find(self, positions: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of upstream ids at positions: the numbers of their nodes, and whether there are such nodes."""
        if not len(self._keys):
            return torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        wanted = positions * len(self.indices) * self.run.clt.architecture.latents + ids
        place = torch.searchsorted(self._keys, wanted).clamp_max(len(self._keys) - 1)
        return self._order[place], (self._keys[place] == wanted) & (ids >= 0)

    def upstream(self, module: int) -> tuple[Tensor, Tensor, Tensor]:
        """The nodes of all latents upstream of a module: numbers [n], positions [n], and what each writes into the
        stream that the module reads per unit of its value, [n, D] in float64."""
        clt, parts = self.run.clt, []
        for index in range(clt.upstream[module]):
            writer = clt.transcoder(index)
            targets = clt.sites[module].layer - writer.site.layer if writer.site.kind == "mlp" else 1
            written = writer.W_dec[self.indices[index], :targets].double().sum(1)
            parts.append((self.of_module(index), self.positions[index], written))
        numbers, positions, written = (torch.cat(part) for part in zip(*parts, strict=True))
        return numbers, positions, written

    def before(self, site: Site) -> tuple[list[_Given], Tensor]:
        """What is given in the stream that `site` reads, and the biases written into it, [S, D]."""
        clt = self.run.clt
        order = model_sites(clt.architecture.model.layers, attention=True)
        earlier = order[: upstream_modules(order, order.index(site), clt.architecture.model.parallel)]
        return [self.embedding, *(given for given in self.given if given.site in earlier)], self.biases(earlier)

    def biases(self, sites: Collection[Site]) -> Tensor:
        """Decoder biases that these sites write, [S, D] in float64."""
        clt = self.run.clt
        written = torch.zeros_like(self.embedding.written)
        for module in clt:
            if module.site in sites:
                written = written + self.run.counted()[:, None] * module.b_dec.double()
        return written


def _module_edges(run: PromptRun, nodes: _Nodes, module: int) -> Iterator[Edges]:
    """The edges that lead to the active latents of a module."""
    parts = nodes.of_module(module), nodes.positions[module], nodes.indices[module]
    target, positions, latents = (part[: nodes.active[module]] for part in parts)
    edges = _mlp_edges if run.clt.sites[module].kind == "mlp" else _attention_edges
    yield from edges(run, nodes, module, target, positions, latents)


def _mlp_edges(
    run: PromptRun, nodes: _Nodes, module: int, target: Tensor, positions: Tensor, latents: Tensor
) -> Iterator[Edges]:
    site, weights = run.clt.sites[module], run.clt.transcoder(module)
    rows = run.clt.reading_rows(module)[latents].double()
    scale = run.forward.activations.scale[site.layer][0, positions].double()
    given, biases = nodes.before(site)
    for stream in given:
        number = stream.number[positions]
        yield from _known(number, target, (rows * stream.written[positions]).sum(1) / scale, number >= 0)
    bias = (rows * biases[positions]).sum(1) / scale + weights.b_enc[latents].double()
    yield torch.full_like(target, nodes.bias), target, bias
    if run.forward.mode == "vanilla" and run.clt.upstream[module]:
        number, at, written = nodes.upstream(module)
        for position in positions.unique().tolist():
            here, there = positions == position, at == position
            effect = rows[here] @ written[there].T / scale[here, None]
            yield from _known(number[there].expand_as(effect), target[here, None], effect, effect != 0)
    V, connections = _connections(run, module)
    if V is not None and connections is not None:
        source, found = nodes.find(positions[:, None], connections.indices[latents].long())
        yield from _known(source, target[:, None], V[latents].double() / scale[:, None], found)


def _connections(run: PromptRun, module: int) -> tuple[Tensor | None, Connections | None]:
    """The virtual weights of a module's connections, in sparsely-connected mode."""
    if run.forward.mode == "vanilla":
        return None, None
    return run.forward.virtual_weights[module], run.clt.transcoder(module).connections


def _attention_edges(
    run: PromptRun, nodes: _Nodes, module: int, target: Tensor, positions: Tensor, latents: Tensor
) -> Iterator[Edges]:
    """As `_mlp_edges`, between tokens: each head carries what it reads at a key to the query, by its frozen pattern
    over the key's scale."""
    site, weights = run.clt.sites[module], run.clt.transcoder(module)
    attention = run.clt.attention_of(site)
    assert attention is not None
    activations = run.forward.activations
    at_query = activations.mix(site.layer)[0].double()[:, positions]  # [H, A, S]
    heads = _head_rows(weights.W_enc[latents], attention)
    given, biases = nodes.before(site)
    for stream in given:
        read = torch.einsum("had,sd,has->as", heads, stream.written, at_query)
        number = stream.number.expand_as(read)
        yield from _known(number, target[:, None], read, number >= 0)
    own = weights.W_enc[latents].double() @ attention.bias.double()
    if activations.attn_post_scale:
        own = own / activations.attn_post_scale[site.layer][0, positions].double()
    bias = torch.einsum("had,sd,has->a", heads, biases, at_query) + own + weights.b_enc[latents].double()
    yield torch.full_like(target, nodes.bias), target, bias
    if run.forward.mode == "vanilla" and run.clt.upstream[module]:
        number, at, written = nodes.upstream(module)
        parts = [rows @ written.T * pattern[:, at] for rows, pattern in zip(heads, at_query, strict=True)]
        effect = torch.stack(parts).sum(0)
        yield from _known(number.expand_as(effect), target[:, None], effect, effect != 0)
    V, connections = _connections(run, module)
    if V is not None and connections is not None:
        ids, through = connections.indices[latents].long(), V[:, latents].double()  # [A, C], [H, A, C]
        for key in range(int(positions.max()) + 1 if len(positions) else 0):
            source, found = nodes.find(torch.full_like(ids, key), ids)
            yield from _known(source, target[:, None], torch.einsum("hac,ha->ac", through, at_query[..., key]), found)


def _head_rows(W_enc: Tensor, attention: AttentionWeights) -> Tensor:
    """Encoder rows [A, D] through each head's OV circuit: [H, A, D] in float64."""
    doubled = AttentionWeights(
        attention.W_V.double(), attention.W_O.double(), attention.bias.double(), attention.centred
    )
    return rows_of_heads(W_enc.double(), doubled)


def _logit_edges(run: PromptRun, nodes: _Nodes, chosen: Tensor, first: int) -> Iterator[Edges]:
    """The edges that lead to the logits of the last token, numbered from `first` on."""
    directions, offsets = linear_logits(run, chosen)
    target, last = first + torch.arange(len(chosen), device=chosen.device), len(run.tokens) - 1
    streams = [nodes.embedding, *nodes.given, *([nodes.layers] if nodes.layers else [])]
    for stream in streams:
        number = stream.number[last].expand_as(target)
        yield from _known(number, target, directions @ stream.written[last], number >= 0)
    bias = directions @ nodes.biases(run.clt.sites)[last] + offsets
    yield torch.full_like(target, nodes.bias), target, bias
    for module, weights in enumerate(run.clt):
        here = nodes.positions[module] == last
        written = weights.W_dec[nodes.indices[module][here]].double().sum(1)  # [A, D], over all targets
        source = nodes.of_module(module)[here]
        effect = written @ directions.T
        yield from _known(source[:, None].expand_as(effect), target, effect, torch.ones_like(effect, dtype=torch.bool))


def _known(source: Tensor, target: Tensor, coefficient: Tensor, known: Tensor) -> Iterator[Edges]:
    """The edges whose source is a node, flattened."""
    yield source[known], target.expand_as(source)[known], coefficient[known]
