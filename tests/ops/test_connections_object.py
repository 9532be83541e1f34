import dataclasses

import pytest
import torch
from op_helpers import distinct_ids

from sparseclt.ops import Connections


def test_it_knows_its_sizes_and_is_immutable():
    connections = Connections(distinct_ids(5, 3, count=7), 7)
    assert (connections.F, connections.C, connections.upstream) == (5, 3, 7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        connections.upstream = 8  # type: ignore[misc]


def test_its_transposed_order_is_sorted_once_and_stable():
    indices = torch.tensor([[2, -1, 0], [0, 2, 3]])
    connections = Connections(indices, 4)
    order, starts = connections.transposed
    assert order.tolist() == [1, 2, 3, 0, 4, 5]
    assert starts.tolist() == [0, 1, 3, 3, 5]
    assert connections.transposed is connections.transposed


def test_no_upstream_means_empty_slots_only():
    assert Connections(torch.full((5, 3), -1), 0).C == 3
    with pytest.raises(ValueError, match=r"connections: .*0 upstream latents.*got 0..0"):
        Connections(torch.zeros(5, 3).long(), 0)


@pytest.mark.parametrize(
    ("indices", "upstream", "error", "match"),
    [
        (torch.full((5, 3), 7), 7, ValueError, r"connections: expected ids from -1 \(empty\) to 6 .* got 7..7"),
        (torch.full((5, 3), -2), 7, ValueError, r"connections: .* got -2..-2"),
        (torch.tensor([[1, -1, -1], [2, 6, 2]]), 7, ValueError, r"distinct ids.* got 2 twice in row 1; add up"),
        (torch.zeros(5).long(), 7, ValueError, r"connections: expected shape \[F, C\], got \(5,\)"),
        (torch.zeros(5, 3), 7, TypeError, r"connections: expected int32 or int64, got torch.float32"),
        ([[1]], 7, TypeError, r"connections: expected a torch.Tensor, got list"),
        (torch.full((5, 3), -1), -1, ValueError, r"upstream: expected .*got -1"),
    ],
)
def test_bad_input_is_named(indices, upstream, error, match):
    with pytest.raises(error, match=match):
        Connections(indices, upstream)
