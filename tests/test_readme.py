"""The Python of the README and of the tutorial runs as it stands."""

import os
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_the_training_example_trains_and_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = [block for block in BLOCKS if "Trainer" in block]
    quick = code.replace("steps=850,", "steps=3,").replace(", held_out)", ", held_out[:4])")
    assert "steps=3" in quick and "held_out[:4]" in quick
    exec(compile(quick, "README.md", "exec"), {})
    assert os.path.exists("runs/first/clt/sparseclt.json") and "fvu_sparse" in capsys.readouterr().out


def test_the_tutorial_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "tools")
    from tutorial import PAGE, with_output

    quick = PAGE.read_text().replace("steps=300,", "steps=8,").replace("held_out[:64]", "held_out[:4]")
    assert "steps=8" in quick and "held_out[:4]" in quick
    outputs = re.findall(r"```text\n(.*?)```", with_output(quick), re.S)
    assert len(outputs) == quick.count("```text") and outputs[-1] == "True\n"


def test_the_sae_example_learns():
    (code,) = [block for block in BLOCKS if "topk_encode" in block]
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    torch.manual_seed(0)
    sae, x = scope["TopKSAE"](16, 64, 8), torch.randn(256, 16)
    optimizer = torch.optim.Adam(sae.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = (sae(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and losses[-1] == pytest.approx(min(losses), rel=0.2)
