"""Running statistics of the latents of one mode: which are dead, how large they are, which fire together."""

import torch
from torch import Tensor

from sparseclt.model.modules import Latents
from sparseclt.ops.rows import add_at_

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

    @torch.no_grad()
    def update(self, latents: list[Latents], counted: Tensor | None = None) -> None:
        """Take in the latents of N more tokens. `counted` [N]: those that count; None: all. The others have no latents
        (values 0)."""
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
            self.recent.add(latents, counted)

    def magnitude(self, statistic: str) -> Tensor:
        """s [M, F]: the running 'mean' or root mean square ('rms') of every latent."""
        corrected = 1 / self.weight.clamp_min(1e-12).float()
        return self.mean * corrected if statistic == "mean" else (self.square * corrected).sqrt()

    def coactivation(self, module: int, rows: slice, upstream: int) -> Tensor:
        """E[z_j | z_i > 0], [rows, U]: how large the latents j of the first `upstream` modules are, side by side,
        when latent i (one of `rows` of `module`) fires. Their plain means where i fires too rarely to tell."""
        assert self.recent is not None
        sums, fired = self.recent.sums_when_active(module, rows, upstream, self.mean.shape[1])
        means = self.magnitude("mean")[:upstream].flatten()
        return torch.where(fired[:, None] < RARE, means, sums.div_(fired.clamp_min(1)[:, None]))

    def dead(self, after_tokens: int) -> Tensor:
        """Boolean [M, F]: latents that have not fired for `after_tokens` tokens."""
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


class RecentLatents:
    """The active latents of the last `tokens` tokens of every module, a ring: values and ids [M, tokens, K]."""

    def __init__(self, modules: int, active: int, tokens: int, device: str | torch.device = "cpu"):
        self.values = torch.zeros(modules, tokens, active, device=device)
        self.indices = torch.zeros(modules, tokens, active, dtype=torch.int32, device=device)
        self.seen = torch.zeros((), dtype=torch.int64)  # tokens in all; the next one's place is seen % tokens

    def add(self, latents: list[Latents], counted: Tensor | None = None) -> None:
        """Put the latents of N more tokens in place of the oldest, except tokens that are not `counted` [N]."""
        device, capacity = self.values.device, self.values.shape[1]
        every = torch.arange(len(latents[0].values), device=device)
        taken = (every if counted is None else every[counted])[-capacity:]
        places = (int(self.seen) + torch.arange(len(taken), device=device)) % capacity
        for m, (values, indices) in enumerate(latents):
            self.values[m, places] = values.detach()[taken].float()
            self.indices[m, places] = indices[taken].clamp_min(0).int()
        self.seen += len(taken)

    def sums_when_active(self, module: int, rows: slice, upstream: int, F: int) -> tuple[Tensor, Tensor]:
        """Sums [rows, U] of the upstream latents over the tokens on which each of `rows` fired, and how many those
        were [rows]. Only the tokens' own active latents are met: K x (upstream x K) pairs a token."""
        ids = self.indices[module]
        here = (self.values[module] > 0) & (ids >= rows.start) & (ids < rows.stop)
        token, slot = here.nonzero(as_tuple=True)
        row = ids[token, slot].long() - rows.start
        n, U = rows.stop - rows.start, upstream * F
        sums = self.values.new_zeros(n * U)
        for u in range(upstream):
            places = (row * U + u * F)[:, None] + self.indices[u, token]
            add_at_(sums, places.flatten(), self.values[u, token].flatten())
        return sums.view(n, U), torch.bincount(row, minlength=n)

    def state(self) -> dict[str, Tensor]:
        return {"recent_values": self.values, "recent_indices": self.indices, "recent_seen": self.seen}
