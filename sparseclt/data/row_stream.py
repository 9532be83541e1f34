"""An endless, resumable stream of batches of rows."""

import torch
from torch import Tensor


class RowStream:
    """Batches [batch_rows, S] of shuffled rows [R, S], forever; a batch may run on into the next epoch.

    `position`, the number of rows given out so far, is the whole state: a stream made with another's position
    goes on exactly where that one is. An epoch's order depends on the seed and its number only.
    """

    def __init__(self, rows: Tensor, batch_rows: int, seed: int, position: int = 0):
        if rows.ndim != 2 or len(rows) == 0:
            raise ValueError(f"rows: expected at least one row, [R, S], got shape {tuple(rows.shape)}")
        if batch_rows < 1:
            raise ValueError(f"batch_rows: expected at least 1, got {batch_rows}")
        if position < 0:
            raise ValueError(f"position: expected a number of rows, got {position}")
        self.rows, self.batch_rows, self.seed, self.position = rows, batch_rows, seed, position
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __iter__(self) -> "RowStream":
        return self

    def __next__(self) -> Tensor:
        return self.rows[self.take()]

    def take(self) -> Tensor:
        """Which rows, [batch_rows], the next batch has: `__next__` without the rows themselves."""
        chosen, missing = [], self.batch_rows
        while missing:
            epoch, offset = divmod(self.position, len(self.rows))
            if epoch != self._epoch:
                self._epoch, self._order = epoch, permutation(len(self.rows), self.seed, epoch)
            chosen.append(self._order[offset : offset + missing])
            self.position += len(chosen[-1])
            missing -= len(chosen[-1])
        return torch.cat(chosen)


def permutation(length: int, *seeds: int) -> Tensor:
    """The numbers 0 to length - 1 in an order that follows from `seeds`."""
    import numpy as np

    return torch.from_numpy(np.random.default_rng(seeds).permutation(length))
