"""Running statistics of the latents of one mode: which are dead, how large they are, which fire together."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparseclt.connections.attended import KEYS, Attended, RecentlyAttended, attended
from sparseclt.connections.ring import Ring
from sparseclt.model.activations import Activations
from sparseclt.model.modules import Latents
from sparseclt.model.sites import Site
from sparseclt.ops.rows import add_at_, add_outer_products_
from sparseclt.parallel.collectives import gather_rows
from sparseclt.parallel.group import ALONE, Group

HORIZON = 50_000  # tokens after which a running mean has forgotten half
RARE = 4  # a latent that fired on fewer of the recent tokens says too little of what fires with it


class Activity:
    """Per module and latent, [M, F] each: tokens since it last fired, and running means over tokens.

    `mean` is E[z], `square` is E[z^2], exponential averages over `horizon` tokens, bias-corrected by `weight`.
    `recent` keeps the latents of the last tokens, where co-activation is asked for.
    """

    def __init__(
        self,
        modules: int,
        latents: int,
        horizon: int = HORIZON,
        device: str | torch.device = "cpu",
        recent: "RecentLatents | None" = None,
    ):
        self.horizon, self.recent = horizon, recent
        self.tokens_since_fired = torch.zeros(modules, latents, dtype=torch.int64, device=device)
        self.mean = torch.zeros(modules, latents, device=device)
        self.square = torch.zeros(modules, latents, device=device)
        self.weight = torch.zeros((), dtype=torch.float64)

    def observe(self, latents: list[Latents], activations: Activations, data: Group = ALONE) -> None:
        """Take in the latents of all modules on `activations`; with `data` those on the activations of all its ranks,
        of which this one has its own."""
        layers = [] if self.recent is None else self.recent.attention_layers
        keys = [Attended(*(gather_rows(part, data) for part in attended(activations, layer))) for layer in layers]
        counted = activations.counted_flat
        self.update(latents, None if counted is None else gather_rows(counted, data), keys)

    @torch.no_grad()
    def update(self, latents: list[Latents], counted: Tensor | None = None, keys: Sequence[Attended] = ()) -> None:
        """Take in the latents of N more tokens. `counted` [N]: those that count; None: all. The others have no latents
        (values 0). `keys`: what each attention module attends to there."""
        tokens = len(latents[0].values) if counted is None else int(counted.sum())
        decay = 0.5 ** (tokens / self.horizon)
        for m, (values, indices) in enumerate(latents):
            values = values.detach().flatten().float()
            ids = indices.flatten().clamp_min(0)
            mean, square = torch.zeros_like(self.mean[m]), torch.zeros_like(self.mean[m])
            add_at_(mean, ids, values / tokens)
            add_at_(square, ids, values.square() / tokens)
            self.mean[m].mul_(decay).add_(mean, alpha=1 - decay)
            self.square[m].mul_(decay).add_(square, alpha=1 - decay)
            self.tokens_since_fired[m] += tokens
            self.tokens_since_fired[m][mean > 0] = 0
        self.weight = 1 - (1 - self.weight) * decay
        if self.recent is not None:
            self.recent.add(latents, counted, keys)

    def magnitude(self, statistic: str) -> Tensor:
        """s [M, F]: the running 'mean' or root mean square ('rms') of every latent."""
        corrected = 1 / self.weight.clamp_min(1e-12).float()
        return self.mean * corrected if statistic == "mean" else (self.square * corrected).sqrt()

    def coactivation(self, module: int, rows: slice, upstream: int) -> Tensor:
        """E[z_j | z_i > 0], [rows, U]: how large the latents j of the first `upstream` modules are, side by side,
        when latent i (one of `rows` of `module`) fires; for an attention module, how large they are at the tokens that
        it attends to then, mixed as it mixes them. Their plain means where i fires too rarely to tell."""
        return self.coactivation_with(module, rows, slice(0, upstream * self.mean.shape[1]))

    def coactivation_with(self, module: int, rows: slice, ids: slice) -> Tensor:
        """The same [rows, ids] for the latents `ids` among all modules side by side."""
        assert self.recent is not None
        sums, fired = self.recent.sums_when_active(module, rows, ids, self.mean.shape[1])
        means = self.magnitude("mean").flatten()[ids] * self.recent.mixed(module)
        return torch.where(fired[:, None] < RARE, means, sums.div_(fired.clamp_min(1)[:, None]))

    def firings(self, module: int) -> Tensor:
        """On how many of the recent tokens each latent of a module fired, [F]."""
        assert self.recent is not None
        fired = self.recent.indices[module][self.recent.values[module] > 0]
        return torch.bincount(fired, minlength=self.mean.shape[1])

    def dead(self, after_tokens: int | Tensor) -> Tensor:
        """Boolean [M, F]: latents that have not fired for `after_tokens` tokens, of which each module may have its own
        number [M, 1]."""
        return self.tokens_since_fired >= after_tokens

    def state(self) -> dict[str, Tensor]:
        """The statistics by name, to be saved, or copied into."""
        state = {
            "tokens_since_fired": self.tokens_since_fired,
            "mean": self.mean,
            "square": self.square,
            "weight": self.weight,
        }
        return state | (self.recent.state() if self.recent is not None else {})


class RecentLatents(Ring):
    """The active latents of the last `tokens` tokens of every module, and what the attention modules among `sites`
    attended to there."""

    def __init__(self, sites: Sequence[Site], active: int, tokens: int, device: str | torch.device = "cpu"):
        super().__init__(len(sites), active, tokens, device)
        attention = {m: site.layer for m, site in enumerate(sites) if site.kind == "attn"}
        self.attention_layers = list(attention.values())
        self.attended = RecentlyAttended(list(attention), tokens, device)

    def add(self, latents: Sequence[Latents], counted: Tensor | None = None, keys: Sequence[Attended] = ()) -> None:
        """Put the latents of N more tokens in place of the oldest, except tokens that are not `counted` [N].
        `keys`: what each attention module attends to there."""
        taken, places = self.take(latents, counted)
        self.attended.add(keys, taken, places)
        self.seen += len(taken)

    def sums_when_active(self, module: int, rows: slice, upstream: slice, F: int) -> tuple[Tensor, Tensor]:
        """Sums [rows, U] of the latents `upstream`, numbered over all modules side by side with F each, over the tokens
        on which each of `rows` fired, and how many those were [rows]. Only active latents are met: K x (upstream
        modules x K) pairs per token, and as many for an attention module, which has `KEYS` keys on each of a fraction
        of the tokens."""
        places = self._places(module)
        ids = self.indices[module, places]
        here = (self.values[module, places] > 0) & (ids >= rows.start) & (ids < rows.stop)
        ids = torch.where(here, ids - rows.start, -1)
        ones = torch.ones_like(ids, dtype=self.values.dtype)
        n, U = rows.stop - rows.start, upstream.stop - upstream.start
        sums = self.values.new_zeros(n, U)
        for at, weights in self._read_by(module, places):
            for values, of_these in self.at(at, upstream, F):
                add_outer_products_(sums, ones, ids, values * weights, of_these)
        return sums, torch.bincount(ids[here], minlength=n)

    def mixed(self, module: int) -> float:
        """The weights with which a token reads upstream latents, summed: of an attention module those of its keys."""
        if module not in self.attended.modules:
            return 1.0
        return self.attended.of(module).weights[self._places(module)].sum(1).mean().item()

    def _places(self, module: int) -> Tensor:
        """The places of the tokens that co-activation is taken over: for an attention module the newest ones only."""
        capacity = self.values.shape[1]
        if module not in self.attended.modules:
            return torch.arange(capacity, device=self.values.device)
        newest = torch.arange(min(max(1, capacity // KEYS), int(self.seen)), device=self.values.device)
        return (int(self.seen) - 1 - newest) % capacity

    def _read_by(self, module: int, places: Tensor) -> Iterator[tuple[Tensor, Tensor | float]]:
        """Where the tokens at `places` read upstream latents, and with which weights: an MLP where it stands."""
        if module not in self.attended.modules:
            yield places, 1.0
            return
        capacity = self.values.shape[1]
        age = (int(self.seen) - 1 - places) % capacity
        for back, weight in zip(*(part[places].unbind(1) for part in self.attended.of(module)), strict=True):
            kept = age + back < min(capacity, int(self.seen))  # or newer tokens are there by now
            yield (places - back) % capacity, (weight * kept)[:, None]

    def state(self) -> dict[str, Tensor]:
        own = {"recent_values": self.values, "recent_indices": self.indices, "recent_seen": self.seen}
        return own | (self.attended.state() if self.attention_layers else {})
