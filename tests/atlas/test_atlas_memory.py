"""The pass over text keeps on disk what grows with tokens."""

from pathlib import Path

import pytest
import torch
from clts import connect_random, language_model, random_clt
from tiny_models import VOCAB

from sparseclt.observations import gather as gathering
from sparseclt.observations.gather import gather

ROWS, LENGTH, BATCH = 160, 24, 8


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux, which tells a process's own memory")
def test_memory_does_not_grow_with_tokens(tmp_path, monkeypatch):
    model = language_model("gpt2", torch.float32)
    clt = random_clt(model, latents=256, active=256).eval()
    connect_random(clt, 4)
    rows = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    held, captures = [], gathering.captures

    def watched(*arguments):
        for batch in captures(*arguments):
            held.append(anonymous_bytes())
            yield batch

    monkeypatch.setattr(gathering, "captures", watched)
    gather(clt, model, rows, tmp_path, batch_rows=BATCH)
    assert len(held) == ROWS // BATCH
    first = len(held) // 4
    written = sum(file.stat().st_size for file in tmp_path.iterdir()) * (len(held) - first) // len(held)
    assert written > 30 << 20
    assert min(held[-5:]) - max(held[:first]) < written // 4
