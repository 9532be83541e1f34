import pytest
import torch
from op_helpers import ids, rows

from sparseclt.ops import pad_rows, unpad_rows


def ragged(lengths):
    M = sum(lengths)
    pointers = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    return rows(M), ids(M, count=9, empty=0.0), pointers.to(rows(1).device)


@pytest.mark.parametrize("lengths", [[3, 0, 5, 1], [0, 0], [4], [0]])
def test_padding_and_back(lengths):
    values, indices, pointers = ragged(lengths)
    padded, slots = pad_rows(values, indices, pointers)
    assert padded.shape == slots.shape == (len(lengths), max(lengths))
    for n, length in enumerate(lengths):
        at = slice(int(pointers[n]), int(pointers[n + 1]))
        assert torch.equal(padded[n, :length], values[at]) and torch.equal(slots[n, :length], indices[at])
        assert (padded[n, length:] == 0).all() and (slots[n, length:] == -1).all()
    assert all(torch.equal(a, b) for a, b in zip(unpad_rows(padded, slots), (values, indices, pointers), strict=True))


def test_no_rows():
    padded, slots = pad_rows(*ragged([]))
    assert padded.shape == slots.shape == (0, 0)
    assert unpad_rows(padded, slots)[2].tolist() == [0]


def test_int32_pointers_and_indices():
    values, indices, pointers = ragged([3, 0, 5])
    padded, slots = pad_rows(values, indices.int(), pointers.int())
    assert slots.dtype == torch.int32 and torch.equal(padded, pad_rows(values, indices, pointers)[0])


def test_gradcheck():
    values, indices, pointers = ragged([3, 0, 5])
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: pad_rows(v, indices, pointers)[0], values)
    padded, slots = (t.detach() for t in pad_rows(values, indices, pointers))
    assert torch.autograd.gradcheck(lambda v: unpad_rows(v, slots)[0], padded.requires_grad_())


@pytest.mark.parametrize(
    ("pointers", "match"),
    [([0, 2], "from 0 to M=3, got .*0, 2"), ([1, 3], "got .*1, 3"), ([0, 2, 1, 3], "expected to rise"), ([], "rise")],
)
def test_bad_pointers_are_named(pointers, match):
    values, indices, like = ragged([3])
    with pytest.raises(ValueError, match=match):
        pad_rows(values, indices, like.new_tensor(pointers))
