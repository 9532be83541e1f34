"""BatchTopK with a fixed number of slots: the same latents, and nothing waits for the device."""

import pytest
import torch
from op_helpers import BACKENDS, encoder_inputs
from waits import Waits

from sparseclt.ops import batchtopk_encode

N, F, K = 13, 37, 5


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_with_room_for_the_fullest_row_it_is_the_same(backend):
    case = encoder_inputs(k=K)
    values, indices = batchtopk_encode(**case, backend=backend)
    S = values.shape[1]
    same_values, same_indices = batchtopk_encode(**case, slots=S + 2, backend=backend)
    assert torch.equal(same_values[:, :S], values) and torch.equal(same_indices[:, :S], indices)
    assert (same_indices[:, S:] == -1).all() and not same_values[:, S:].any()


def test_with_less_room_rows_are_cut_and_others_gain():
    case = encoder_inputs(k=2)
    case["x"][3] *= 30  # this token outbids all others
    values, indices = batchtopk_encode(**case, slots=4, backend="torch")
    assert values.shape == (N, 4) and (indices >= 0).sum() == 2 * N and (indices[3] >= 0).all()


def test_its_gradient_is_that_of_the_kept_values():
    case = encoder_inputs(k=K)
    whole, fixed = ({name: t.clone().requires_grad_() if isinstance(t, torch.Tensor) else t for name, t in case.items()}
                    for _ in range(2))  # fmt: skip
    batchtopk_encode(**whole, backend="torch")[0].square().sum().backward()
    batchtopk_encode(**fixed, slots=F, backend="torch")[0].square().sum().backward()
    for name in ("x", "W_enc", "b_enc"):
        torch.testing.assert_close(fixed[name].grad, whole[name].grad)


def test_nothing_waits_but_in_the_encoder_of_the_torch_backend():
    case = encoder_inputs(k=K)
    with Waits() as waits:
        batchtopk_encode(**case, slots=9, backend="torch")
    assert set(waits.by_module) <= {"sparseclt.ops._encode"}
    with Waits() as waits:
        batchtopk_encode(**case, backend="torch")
    assert set(waits.by_module) - {"sparseclt.ops._encode"}, "the counter sees the form that waits"


@pytest.mark.parametrize("slots", [0, F + 1])
def test_slots_out_of_range(slots):
    with pytest.raises(ValueError, match="slots: expected from 1 to"):
        batchtopk_encode(**encoder_inputs(k=K), slots=slots)
