"""The loss gradient of recent latents in sparsely-connected mode: from it follows what opening a connection would gain.

In sparsely-connected mode latent i has, at token t, the pre-activation ... + V_ij w(t) z_j(t) + ..., with w the inverse
of the scale of the reader's norm. The gradient of the loss with respect to V_ij is therefore the sum over tokens of
dL/dpre_i(t) w(t) z_j(t), whether the connection is open or not, and only tokens on which both latents are active count.
So it is enough to keep the active latents of recent tokens with their gradients: nothing of size F x U.

An attention reader at t reads w z_j at the tokens up to t, weighted by the pattern of each head. Of these tokens one is
drawn for each head, with a probability that is its share of the pattern: on average over tokens the sums are right, and
a head costs as much as an MLP reader.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseclt.connections.ring import Ring
from sparseclt.model.activations import Activations
from sparseclt.model.modules import Latents
from sparseclt.model.sites import Site
from sparseclt.ops.rows import add_outer_products_
from sparseclt.parallel.collectives import gather_rows
from sparseclt.parallel.group import ALONE, Group

SAVED = ("values", "indices", "gradients", "sources", "weights", "seen", "batch")


class RecentGradients(Ring):
    """The latents of sparsely-connected mode on the last `tokens` tokens.

    `gradients` [M, tokens, K]: the gradient of the loss with respect to the active latents. `sources`, `weights`
    [M, tokens, H]: the place in the ring from which each module reads upstream latents, and what it multiplies them by;
    one per head of an attention module.
    """

    def __init__(self, sites: Sequence[Site], active: int, tokens: int, heads: int, device: str | torch.device = "cpu"):
        super().__init__(len(sites), active, tokens, device)
        self.sites = list(sites)
        M, H = len(self.sites), heads if any(site.kind == "attn" for site in self.sites) else 1
        self.gradients = torch.zeros(M, tokens, active, device=device)
        self.sources = torch.zeros(M, tokens, H, dtype=torch.int32, device=device)
        self.weights = torch.zeros(M, tokens, H, device=device)
        self.batch = torch.zeros((), dtype=torch.int64)  # tokens of the last batch

    @property
    def batches(self) -> float:
        """How many batches the ring holds."""
        return min(int(self.seen), self.values.shape[1]) / max(1, int(self.batch))

    @torch.no_grad()
    def add(
        self,
        latents: Sequence[Latents],
        gradients: Sequence[Tensor],
        activations: Activations,
        data: Group = ALONE,
    ) -> None:
        """Put the latents of a batch and their gradients [N, K] in place of the oldest, except tokens that do not
        count. With `data` those of the rows of all its ranks, while `activations` are of this rank's own."""
        counted = activations.counted_flat
        counted = None if counted is None else gather_rows(counted, data)
        taken, places = self.take(latents, counted)
        self.batch.fill_(len(latents[0].values) if counted is None else int(counted.sum()))
        place_of = torch.full((len(latents[0].values),), -1, device=places.device)
        place_of[taken] = places
        for m, (site, gradient) in enumerate(zip(self.sites, gradients, strict=True)):
            self.gradients[m, places, : gradient.shape[1]] = gradient[taken].float()
            if site.kind == "mlp":
                scale = gather_rows(activations.scale[site.layer].flatten(), data)
                sources, weights = place_of[:, None], 1 / scale[:, None].float()
            else:
                own = place_of[data.part(len(place_of), "tokens")]
                drawn = self._drawn(activations.mix(site.layer).float(), own, data)
                sources, weights = (gather_rows(part, data) for part in drawn)
            heads = slice(sources.shape[1])
            self.sources[m, places, heads], self.weights[m, places, heads] = sources[taken].int(), weights[taken]
        self.seen += len(taken)

    def _drawn(self, mix: Tensor, place_of: Tensor, data: Group) -> tuple[Tensor, Tensor]:
        """One key for each query and head, drawn with the probability of its share of `mix` [B, H, S, S]: its place in
        the ring, and the sum of the shares, [N, H] each. Keys that have no place have no share. Ranks of `data` draw
        what one with all their rows would."""
        B, H, S, _ = mix.shape
        mix = mix * (place_of.view(B, 1, 1, S) >= 0)
        up_to = mix.cumsum(-1)
        generator = torch.Generator().manual_seed(int(self.seen))
        drawn = torch.rand(data.size, B, H, S, 1, generator=generator)[data.rank].to(mix.device) * up_to[..., -1:]
        key = (up_to <= drawn).sum(-1).clamp_max(S - 1)
        first = torch.arange(B, device=mix.device).view(B, 1, 1) * S
        place = place_of[first + key].clamp_min(0)
        return place.transpose(1, 2).flatten(0, 1), up_to[..., -1].transpose(1, 2).flatten(0, 1)

    def gradient(self, module: int, rows: slice, upstream: int, F: int, head: int = 0) -> Tensor:
        """The gradient of the loss of a batch with respect to V [rows, U], the mean over the recent ones, for the
        latents `rows` of a module as readers of the F latents of each of the first `upstream` modules. Only active
        latents are met: K x (upstream x K) pairs per token."""
        return self.gradient_with(module, rows, slice(0, upstream * F), F, head)

    def gradient_with(self, module: int, rows: slice, ids: slice, F: int, head: int = 0) -> Tensor:
        """The same [rows, ids] for the upstream latents `ids` among all modules side by side."""
        readers, source = self.indices[module], self.sources[module, :, head].long()
        here = (self.values[module] > 0) & (readers >= rows.start) & (readers < rows.stop)
        readers = torch.where(here, readers - rows.start, -1)
        capacity = self.values.shape[1]
        age = (int(self.seen) - 1 - torch.arange(capacity, device=readers.device)) % capacity
        still_there = age[source] >= age  # a source that is younger than its reader has been overwritten
        gradient = self.gradients[module] * (self.weights[module, :, head] * still_there)[:, None]
        sums = self.values.new_zeros(rows.stop - rows.start, ids.stop - ids.start)
        for values, read in self.at(source, ids, F):
            add_outer_products_(sums, gradient, readers, values, read)
        return sums.div_(max(self.batches, 1e-9))

    def state(self) -> dict[str, Tensor]:
        """The tensors by name, to be saved, or copied into."""
        return {f"recent_{name}": getattr(self, name) for name in SAVED}
