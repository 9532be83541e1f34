"""A whole training step in vanilla mode and in both modes: ours, dense baselines, an unmasked encode, a floor."""

import pytest
from conftest import device, replayed
from steps import step_comparison


@pytest.mark.benchmark(timer=replayed)
def test_step(mode, sizes, contender, measured, publish):
    key = (mode, *sizes.values())
    publish(measured(key, lambda strict: step_comparison(mode, sizes, device(), strict))[contender])
