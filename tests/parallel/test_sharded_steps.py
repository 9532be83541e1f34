"""A training step of a CLT that is spread over ranks against the same on one."""

import pytest
import torch
from sharded_steps import F, K, L, gradients, joined, run_of_steps

from sparseclt.config import CLTConfig
from sparseclt.model.shape import active_by_layer

GRIDS = {
    "2 x latents": {"latents": 2, "data": 1},
    "4 x latents": {"latents": 4, "data": 1},
    "2 x data": {"latents": 1, "data": 2},
    "2 x data, 2 x latents": {"latents": 2, "data": 2},
}
ONE = {"latents": 1, "data": 1}
LEARNED = {
    "connections__policy": "learned", "connections__candidates_after_steps": 1, "connections__exchange_share": 0.0,
}  # fmt: skip
KINDS = {
    "frozen attention": ("frozen", {}),
    "attention latents": ("latents", {}),
    "learned connections": ("frozen", LEARNED),
    "micro-batches": ("frozen", {"compute__micro_batch_rows": 1}),
    "own targets": ("frozen", {"clt__targets": "own"}),
    "batchtopk": ("frozen", {"clt__activation": "batchtopk"}),
    "jumprelu": ("frozen", {"clt__activation": "jumprelu", "clt__bandwidth": 0.7}),
}
BOTH = "2 x data, 2 x latents"
CASES = [(grid, "frozen attention") for grid in GRIDS]
CASES += [(BOTH, "attention latents"), (BOTH, "learned connections"), (BOTH, "micro-batches"), (BOTH, "own targets")]
CASES += [(grid, kind) for kind in ("batchtopk", "jumprelu") for grid in ("4 x latents", "2 x data", BOTH)]


@pytest.mark.parametrize(("grid", "kind"), CASES)
def test_latents_loss_and_gradients_are_those_of_one_rank(ranks, grid, kind):
    attention, changes = KINDS[kind]
    expected = gradients(attention, ONE, changes)
    n = GRIDS[grid]["latents"] * GRIDS[grid]["data"]
    results = ranks.run(n, gradients, attention, GRIDS[grid], changes)
    for result in results:
        assert result["terms"] == pytest.approx(expected["terms"], rel=1e-12, abs=1e-12)
    for mode, modules in expected["latents"].items():
        for m, (values, indices) in enumerate(modules):
            of_data = [r["latents"][mode][m] for r in results if r["place"][1] == 0]
            torch.testing.assert_close(torch.cat([v for v, _ in of_data]), values, rtol=0, atol=1e-12)
            assert torch.equal(torch.cat([i for _, i in of_data])[values > 0], indices[values > 0])
        if kind == "batchtopk" and mode == "vanilla":
            kept = [int((values > 0).sum()) for values, _ in modules]
            assert kept == [20 * k for k in active_by_layer(K, CLTConfig().active_ratio, L, F)]  # 20 tokens count
    grads = joined(results, "grads")
    assert grads.keys() == expected["grads"].keys()
    for name, grad in expected["grads"].items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
        assert grad.abs().sum() > 0 or name == "mlp_0/W_dec", name


STEPS = 7
RUNS = {
    "co-activation": ("frozen", {"clt__latents": 32, "connections__start_per_latent": 8}),
    "attention latents": ("latents", {}),
    "shared by a module": ("frozen", {"connections__budget": "module"}),
    "learned": ("frozen", LEARNED | {"connections__candidates_after_steps": 2}),
    "dense learned": ("frozen", {"connections__policy": "dense-learned", "connections__open_per_latent": 3.0}),
    "random": ("frozen", {"connections__policy": "random"}),
    "batchtopk": ("frozen", {"clt__activation": "batchtopk"}),
    "jumprelu": ("frozen", {"clt__activation": "jumprelu", "clt__bandwidth": 0.7}),
    "8-bit moments, touched rows": ("frozen", {"optimizer__state": "8bit", "optimizer__rows": "touched"}),
}


@pytest.mark.parametrize(("grid", "kind"), [("4 x latents", "co-activation"), *((BOTH, kind) for kind in RUNS)])
def test_steps_choose_the_same_connections_and_lose_the_same(ranks, grid, kind):
    attention, changes = RUNS[kind]
    expected = run_of_steps(attention, ONE, changes, STEPS)
    results = ranks.run(4, run_of_steps, attention, GRIDS[grid], changes, STEPS)
    state = joined(results, "state")
    for name, tensor in expected["state"].items():
        if name.endswith("connections"):
            assert torch.equal(state[name], tensor), name
        else:
            # Adam divides by the root of squares, which magnifies rounding where gradients are next to nothing.
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    for result in results:
        for own, one in zip(result["metrics"], expected["metrics"], strict=True):
            assert own == pytest.approx(one, rel=1e-8, abs=1e-10)
        for mode, of_mode in expected["activity"].items():
            for name, tensor in of_mode.items():
                torch.testing.assert_close(result["activity"][mode][name], tensor, rtol=0, atol=1e-6)
    if kind == "co-activation":
        assert expected["metrics"][-1]["dead_vanilla"] > 0, "nothing was revived"


EXCHANGED = LEARNED | {
    "connections__exchange_share": 1.0, "connections__open_per_latent": 1.5, "connections__refresh_steps": 1,
    "connections__pressure_weight": 1e-6,
}  # fmt: skip


@pytest.mark.parametrize(("attention", "grid"), [("frozen", "4 x latents"), ("frozen", BOTH), ("latents", BOTH)])
def test_candidates_are_exchanged_as_on_one_rank(ranks, attention, grid):
    first = run_of_steps(attention, ONE, EXCHANGED, 1, True)  # one step only takes in gradients
    expected = run_of_steps(attention, ONE, EXCHANGED, 3, True)
    results = ranks.run(4, run_of_steps, attention, GRIDS[grid], EXCHANGED, 3, True)
    state = joined(results, "state")
    for name, tensor in expected["state"].items():
        if name.endswith("connections"):
            assert torch.equal(state[name], tensor), name
            assert not torch.equal(first["state"][name], tensor), "nothing was exchanged"
    for result in results:
        assert result["activity"]["policy"].keys() == expected["activity"]["policy"].keys() >= {"pressure"}
        active = expected["activity"]["policy"]["recent_values"] > 0
        for name, tensor in expected["activity"]["policy"].items():
            found, of_slots = result["activity"]["policy"][name], name in ("recent_indices", "recent_gradients")
            where = active if of_slots else ...  # nobody reads those of other slots
            torch.testing.assert_close(found[where], tensor[where], rtol=1e-6, atol=1e-6)
