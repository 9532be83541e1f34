"""The resumable stream of batches of rows."""

from itertools import islice

import pytest
import torch

from sparseclt.data.row_stream import RowStream


def numbered(rows: int) -> torch.Tensor:
    return torch.arange(rows, dtype=torch.int32)[:, None].repeat(1, 3)


def taken(stream: RowStream, batches: int) -> list[int]:
    return torch.cat(list(islice(stream, batches)))[:, 0].tolist()


@pytest.mark.parametrize("batch_rows", [1, 4, 7, 25])
def test_every_epoch_is_all_rows_in_an_order_of_its_own(batch_rows):
    order = taken(RowStream(numbered(10), batch_rows, seed=3), 50)
    epochs = [order[i : i + 10] for i in range(0, len(order) - 9, 10)]
    assert len(epochs) >= 5 and all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(10))


def test_the_order_depends_on_the_seed_alone():
    order = taken(RowStream(numbered(10), 4, seed=3), 10)
    torch.manual_seed(7)
    assert taken(RowStream(numbered(10), 8, seed=3), 5) == order
    assert taken(RowStream(numbered(10), 4, seed=4), 10) != order


@pytest.mark.parametrize("consumed", range(8))
def test_a_stream_goes_on_at_anothers_position(consumed):
    stream = RowStream(numbered(10), 4, seed=3)
    list(islice(stream, consumed))
    resumed = RowStream(numbered(10), 4, seed=3, position=stream.position)
    assert stream.position == 4 * consumed
    assert taken(resumed, 9) == taken(stream, 9) and resumed.position == stream.position


def test_a_batch_is_whole_rows_of_the_same_dtype():
    batch = next(RowStream(numbered(5), 8, seed=0))
    assert batch.shape == (8, 3) and batch.dtype == torch.int32 and (batch == batch[:, :1]).all()


def test_row_stream_refuses_what_cannot_work():
    with pytest.raises(ValueError, match=r"rows: expected at least one row, .*\(0, 3\)"):
        RowStream(numbered(0), 4, seed=0)
    with pytest.raises(ValueError, match="batch_rows: expected at least 1, got 0"):
        RowStream(numbered(5), 0, seed=0)
    with pytest.raises(ValueError, match="position: .*got -1"):
        RowStream(numbered(5), 1, seed=0, position=-1)
