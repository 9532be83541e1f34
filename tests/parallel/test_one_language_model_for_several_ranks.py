"""The first of the ranks that share a CLT has the language model; the others get what it finds."""

import pytest
import torch
from sharded_runs import batches, captured_ahead, models_loaded, replaced_gradients
from sharded_steps import joined

from sparseclt.config import ActivationConfig

ONE, TWO, FOUR = {"latents": 1, "data": 1}, {"latents": 2, "data": 2}, {"latents": 4, "data": 1}
SOURCES = {
    "captured": {},
    "shuffled": {"activations": ActivationConfig(shuffle_bytes=500_000)},
    "cached": {"activations": ActivationConfig(cache="cache", cache_dtype="int8")},
}


def test_only_the_first_rank_of_a_group_loads_the_model_and_all_know_which_it_is(ranks):
    results = ranks.run(4, models_loaded, TWO)
    assert {r["place"]: r["loaded"] for r in results} == {(0, 0): 1, (0, 1): 0, (1, 0): 1, (1, 1): 0}
    assert len({r["digest"] for r in results}) == 1 and results[0]["digest"]


def test_the_next_batch_is_captured_while_one_is_in_use(ranks):
    assert ranks.run(4, captured_ahead, TWO) == [2, 0, 2, 0]


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("source", SOURCES)
def test_ranks_are_given_the_rows_that_one_rank_is_given(ranks, tmp_path, source, first):
    changes = dict(SOURCES[source])
    if source == "cached":
        changes["activations"] = ActivationConfig(cache=str(tmp_path / "cache"), cache_dtype="int8")
    expected = batches(ONE, changes, first)["batches"]
    assert len(expected) == 6 - first
    results = ranks.run(4, batches, TWO, changes, first)
    for latent in (0, 1):
        of_data = [r["batches"] for r in sorted(results, key=lambda r: r["place"]) if r["place"][1] == latent]
        for step, whole in enumerate(expected):
            for part, tensor in enumerate(whole):
                own = torch.cat([found[step][part] for found in of_data])
                torch.testing.assert_close(own, tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("attention", "grid"), [("frozen", FOUR), ("latents", TWO)])
def test_the_gradient_of_cross_entropy_reaches_all_ranks(ranks, attention, grid):
    expected = replaced_gradients(attention, ONE)
    assert expected["terms"]["cross_entropy_vanilla"] and expected["terms"]["cross_entropy_sparse"]
    results = ranks.run(4, replaced_gradients, attention, grid)
    for result in results:
        assert result["terms"] == pytest.approx(expected["terms"], rel=1e-12, abs=1e-12)
    for name, grad in joined(results, "grads").items():
        message = lambda m, name=name: f"{name}: {m}"  # noqa: E731
        torch.testing.assert_close(grad, expected["grads"][name], rtol=1e-10, atol=1e-12, msg=message)


def test_a_model_on_a_device_of_its_own_finds_the_same():
    expected = replaced_gradients("frozen", ONE)
    found = replaced_gradients("frozen", ONE | {"model_devices": ("cpu",)})
    assert found["terms"] == pytest.approx(expected["terms"], rel=1e-12)
    for name, grad in found["grads"].items():
        torch.testing.assert_close(grad, expected["grads"][name], rtol=1e-12, atol=1e-12)
