"""Dead latents by the counters of training, for runs that saw a million tokens."""

import torch
from clts import connect_random, language_model, random_clt, tokens

from sparseclt.connections.activity import Activity
from sparseclt.evaluation.dead import with_dead_in_training
from sparseclt.evaluation.metrics import evaluate
from sparseclt.model.modules import Latents
from sparseclt.storage.checkpoint import save_state
from sparseclt.storage.directories import atomic_directory


def activity_after(tokens_fired_last: list[int], seen: int) -> Activity:
    """Three modules of 20 latents, of which the first few last fired so many tokens ago; all others just now."""
    activity = Activity(3, 20)
    N = 1_000
    nothing = Latents(torch.zeros(N, 1), torch.zeros(N, 1, dtype=torch.int64))
    for _ in range(seen // N):
        activity.update([nothing] * 3)
    activity.tokens_since_fired.zero_()
    activity.tokens_since_fired[1, : len(tokens_fired_last)] = torch.tensor(tokens_fired_last)
    return activity


def test_a_latent_is_dead_after_a_million_tokens_of_a_mode_that_saw_so_many(tmp_path):
    model = language_model("gpt2")
    clt = random_clt(model)
    connect_random(clt, 6)
    measured = evaluate(clt, model, tokens(), cross_entropy=False)
    modes = {
        "vanilla": activity_after([999_999, 1_000_000, 1_500_000], seen=1_000_000),
        "sparse": activity_after([], seen=999_000),
    }
    tensors = {f"activity/{m}/{name}": t for m, a in modes.items() for name, t in a.state().items()}
    with atomic_directory(tmp_path / "step_00000001") as directory:
        save_state(directory, tensors, {"step": 1})
    found = with_dead_in_training(measured, tmp_path / "step_00000001")
    assert [m.dead_in_training_vanilla for m in found.modules] == [0, 2 / 20, 0]
    assert found.mean.dead_in_training_vanilla == 2 / 60
    assert found.mean.dead_in_training_sparse is None, "trained on fewer than a million tokens"
    assert found.mean.fvu_sparse == measured.mean.fvu_sparse
