"""Each op, forward and backward: ours by backend, the dense baseline, the best of plain torch, peers."""

import pytest
from compare import op_comparison
from conftest import device, replayed
from peers import peers


@pytest.mark.benchmark(timer=replayed)
def test_op(op, direction, sizes, contender, measured, publish, dtype):
    key = (op, direction, *sizes.values())
    rows = measured(key, lambda strict: op_comparison(op, direction, sizes, device(), dtype, strict))
    publish(rows[contender] | {"peer": contender in peers(op)})
