"""JumpReLU with a fixed number of slots: the same latents, and nothing waits for the device."""

import pytest
import torch
from op_helpers import BACKENDS, dense, encoder_inputs, rows
from waits import Waits

from sparseclt.ops import jumprelu_encode, sparse_decode

N, F = 13, 37
BANDWIDTH = 0.4


def case(**changes):
    return encoder_inputs(threshold=rows(F, seed=4).float().abs() * 0.3 + 0.3) | changes


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_with_room_for_the_fullest_row_it_is_the_same(backend, bias):
    inputs = case() if bias else case(b_enc=None)
    values, indices, l0 = jumprelu_encode(**inputs, bandwidth=BANDWIDTH, backend=backend)
    S = values.shape[1] + 2
    found, ids, count = jumprelu_encode(**inputs, bandwidth=BANDWIDTH, slots=S, backend=backend)
    assert found.shape == ids.shape == (N, S) and torch.equal(count, l0)
    torch.testing.assert_close(dense(found, ids, F), dense(values, indices, F))
    kept, same = (torch.zeros(N, F + 1).scatter(1, i.cpu() % (F + 1), 1)[:, :F] for i in (indices, ids))
    assert torch.equal(kept, same), "latents near their threshold keep their slot"
    assert not (ids >= 0).all(1).any()


def test_with_less_room_rows_are_cut_and_counted_without_waiting():
    values, indices, _ = jumprelu_encode(**case(), bandwidth=0.0, backend="torch")
    with Waits() as waits:
        found, ids, _ = jumprelu_encode(**case(), bandwidth=0.0, slots=3, backend="torch")
        full = (ids >= 0).all(1).sum()
    assert set(waits.by_module) <= {"sparseclt.ops._encode"}
    wanted = (indices >= 0).sum(1)
    assert int(full) == int((wanted >= 3).sum()) > 0 and (wanted > 3).any()
    assert torch.equal((ids >= 0).sum(1), wanted.clamp_max(3))


def test_its_gradients_are_the_same():
    grads = []
    for slots in (None, F):
        inputs = {n: t.clone().requires_grad_() if isinstance(t, torch.Tensor) else t for n, t in case().items()}
        values, indices, l0 = jumprelu_encode(**inputs, bandwidth=BANDWIDTH, slots=slots, backend="torch")
        decoded = sparse_decode(values, indices, rows(F, 7, seed=5).float(), backend="torch")
        (decoded.square().sum() + 0.1 * l0.sum()).backward()
        grads.append([inputs[name].grad for name in ("x", "W_enc", "b_enc", "threshold")])
    for whole, fixed in zip(*grads, strict=True):
        torch.testing.assert_close(fixed, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slots", [0, F + 1])
def test_slots_out_of_range(slots):
    with pytest.raises(ValueError, match="slots: expected from 1 to"):
        jumprelu_encode(**case(), slots=slots)
