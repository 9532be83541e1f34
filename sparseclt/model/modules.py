"""One module of a CLT: an encoder with its decoders, and the latents that it yields."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparseclt import ops
from sparseclt.model.sites import Mode, Site
from sparseclt.ops.rows import accumulation_dtype, chunks
from sparseclt.parallel.group import ALONE, Group
from sparseclt.parallel.virtual_weights import gathered

INITIAL_BYTES = 16 << 20  # of random weights that are drawn at a time


class Latents(NamedTuple):
    """The active latents of one module: `values` [N, K] (0 in an empty slot) and their `indices` [N, K] (-1 in some
    empty slots). With another activation than TopK there are `Architecture.slots` of them instead of K."""

    values: Tensor
    indices: Tensor

    def dense(self, latents: int) -> Tensor:
        """[N, F]: only for tests and small models."""
        dense = self.values.new_zeros(len(self.values), latents)
        return dense.scatter_add(1, self.indices.clamp_min(0), self.values)


class Transcoder(nn.Module):
    """The module at one site.

    `W_enc` [F, D], `b_enc` [F], `W_dec` [F, T, D] (T = targets: layers l..L-1 for an MLP, or its own; 1 for attention),
    `b_dec` [D]: the bias of this site's own reconstruction. In sparsely-connected mode each latent reads the
    upstream latents named by `connections` ([F, C], ids in 0..U-1 over all earlier modules side by side, or
    None before any were chosen). With learned connections `logits` [F, C] decides which of them are open.

    `threshold` [F] decides which latents are active: a trained parameter (JumpReLU), or a buffer that stands for the
    batch outside training (BatchTopK: 0 before any training; `threshold_sparse` [F] is that of sparsely-connected
    mode), or None (TopK). Training keeps thresholds in fp32 at least.

    In a `group` of n ranks, this one has the rows `rows` of W_enc, b_enc, connections, logits and thresholds, F/n of
    them, and the columns `columns` of W_dec, [F, T, D/n]; b_dec is the same on all. Ids are those of all latents.

    Connections are a buffer of the module, `connection_indices`: they move with `.to(device)`, are copied by
    `copy.deepcopy`, and are part of `state_dict()`; `load_state_dict` takes those of any C.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    logits: nn.Parameter | None
    threshold: Tensor | None
    threshold_sparse: Tensor | None
    connection_indices: Tensor | None

    def __init__(
        self,
        site: Site,
        d_model: int,
        latents: int,
        targets: int,
        upstream: int,
        activation: str = "topk",
        group: Group = ALONE,
    ):
        super().__init__()
        self.site, self.latents, self.upstream, self.group = site, latents, upstream, group
        self.rows = group.part(latents, "clt.latents")
        self.columns = group.part(d_model, "d_model of the language model")
        self.W_enc = nn.Parameter(_uniform(latents, d_model, self.rows))
        self.b_enc = nn.Parameter(torch.zeros(len(self.W_enc)))
        self.W_dec = nn.Parameter(torch.zeros(latents, targets, self.columns.stop - self.columns.start))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.register_parameter("logits", None)
        self._make_thresholds(activation)
        self.register_buffer("connection_indices", None)
        self._connections: ops.Connections | None = None
        self._all_connections: tuple[ops.Connections, ops.Connections] | None = None  # this rank's, and all

    def _make_thresholds(self, activation: str) -> None:
        if activation == "jumprelu":
            self.threshold = nn.Parameter(torch.zeros(len(self.b_enc)))
            self.register_buffer("threshold_sparse", None)
            return
        for name in ("threshold", "threshold_sparse"):
            self.register_buffer(name, torch.zeros(len(self.b_enc)) if activation == "batchtopk" else None)

    @property
    def connections(self) -> ops.Connections | None:
        """The buffer `connection_indices`, checked, with its order by upstream latent once that was needed."""
        if self.connection_indices is None:
            return None
        if self._connections is None or self._connections.indices is not self.connection_indices:
            self._connections = ops.Connections(self.connection_indices, self.upstream)
        return self._connections

    @connections.setter
    def connections(self, connections: ops.Connections | None) -> None:
        self._connections = connections
        self.connection_indices = None if connections is None else connections.indices

    @property
    def all_connections(self) -> ops.Connections | None:
        """The connections of all ranks' rows, [F, C]; gathered, by all ranks together, when they are first asked for
        after a change, and then kept."""
        own = self.connections
        if own is None or self.group.alone:
            return own
        if self._all_connections is None or self._all_connections[0] is not own:
            self._all_connections = own, gathered(own, self.group)
        return self._all_connections[1]

    def connect(self, connections: Tensor) -> None:
        """Take `connections` [F, C] (ids 0..U-1, -1 for an empty slot)."""
        if connections.shape[0] != len(self.b_enc):
            raise ValueError(
                f"connections of {self.site.name}: expected {len(self.b_enc)} rows, got {tuple(connections.shape)}"
            )
        self.connections = ops.Connections(connections, self.upstream)

    def mask(self) -> Tensor | None:
        """Learned connections: hard 0/1 [F, C] with the sigmoid's gradient (straight-through), else None."""
        if self.logits is None:
            return None
        probability = torch.sigmoid(self.logits)
        return (self.logits > 0).to(probability.dtype) - probability.detach() + probability

    def open_connections(self) -> Tensor | None:
        """Boolean [F, C]: slots that are filled and, when learned, switched on."""
        if self.connection_indices is None:
            return None
        filled = self.connection_indices >= 0
        return filled if self.logits is None else filled & (self.logits > 0)

    def keep_wide_thresholds(self) -> None:
        """Thresholds in fp32 at least, whatever the dtype of the weights."""
        for threshold in (self.threshold, self.threshold_sparse):
            if threshold is not None:
                threshold.data = threshold.data.to(accumulation_dtype(threshold.dtype))

    def threshold_of(self, mode: Mode) -> Tensor:
        """The threshold [F] of a mode: only BatchTopK has one for each."""
        threshold = self.threshold if mode == "vanilla" or self.threshold_sparse is None else self.threshold_sparse
        assert threshold is not None
        return threshold

    def own_columns(self, vectors: Tensor) -> Tensor:
        """This rank's columns of vectors [..., D]."""
        return vectors if self.group.alone else vectors[..., self.columns]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Makes room for connections and logits, whose number C only the loaded state knows."""
        device = self.W_enc.device
        if (indices := state_dict.get(prefix + "connection_indices")) is not None:
            self.connections = None
            self.connection_indices = torch.empty_like(indices, device=device)
        logits = state_dict.get(prefix + "logits")
        if logits is not None and (self.logits is None or self.logits.shape != logits.shape):
            self.logits = nn.Parameter(torch.empty_like(logits, device=device))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _uniform(latents: int, d_model: int, rows: slice) -> Tensor:
    """Rows of an encoder [F, D] at random: those that a rank by itself would have, without ever holding the others."""
    bound, kept = 1 / math.sqrt(d_model), torch.empty(rows.stop - rows.start, d_model)
    for part in chunks(latents, d_model * kept.element_size(), INITIAL_BYTES):
        drawn = torch.empty(part.stop - part.start, d_model).uniform_(-bound, bound)
        first, last = max(part.start, rows.start), min(part.stop, rows.stop)
        if first < last:
            kept[first - rows.start : last - rows.start] = drawn[first - part.start : last - part.start]
    return kept
