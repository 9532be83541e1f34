"""Time and memory of one training step in both modes, one size at a time: ours and dense."""

import pytest
from baseline_costs import training_step
from conftest import dense_step_bytes, device, memory_budget, replayed, the_set
from shapes import DENSE_FLOPS
from steps import state_bytes, step_comparison

from sparseclt.costs import Widths


@pytest.mark.benchmark(timer=replayed)
def test_scaling(letter, sizes, contender, measured, publish, request):
    formula = dense_step_bytes(sizes)
    flops = training_step("dense", "both", Widths(), **sizes).flops
    dense = flops <= DENSE_FLOPS[the_set(request.config)] and formula < memory_budget() / 2
    if contender == "dense" and not dense:
        pytest.skip(f"a dense step would take {flops:.1e} flops and {formula / 2**30:.1f} GiB")
    labels = {"curve": letter, "value": sizes[letter], "states_bytes": state_bytes(sizes)}
    key = ("scaling", *sizes.values())
    rows = measured(
        key, lambda strict: step_comparison("both", sizes, device(), strict, scaling=True, dense=dense, labels=labels)
    )
    publish(rows[contender] | labels)
