"""Memory does not grow with the text."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

MEBI = 1 << 20
SCRIPT = """
import resource, sys
from transformers import AutoTokenizer
from sparseclt.config import DataConfig, TrainConfig
from sparseclt.data import RowStream, load_rows, rows_digest, text

tokenizer, source, cache, again = *sys.argv[1:4], len(sys.argv) > 4
if again:
    text.write_rows = None
config = TrainConfig(data=DataConfig(source, cache=cache))
rows = load_rows(config, AutoTokenizer.from_pretrained(tokenizer), "train")
rows_digest(rows)
for _, batch in zip(range(100), RowStream(rows, 4, seed=0)):
    batch.sum()
print(len(rows), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


@pytest.fixture(scope="module")
def measure(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    tiny_models.tokenizer().save_pretrained(folder / "tokenizer")

    def run(name: str, mebi: int, *again: str) -> tuple[int, int]:
        """Rows of a text of so many MiB, and the peak memory of a process that reads it, in MiB."""
        path = folder / name
        if not path.exists():
            line = " ".join(f"w{1 + i % 49}" for i in range(200)) + "\n"
            with path.open("w") as file:
                for _ in range(mebi * MEBI // len(line)):
                    file.write(line)
        command = [sys.executable, "-c", SCRIPT, folder / "tokenizer", path, folder / "store", *again]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert done.returncode == 0, done.stderr
        rows, peak = map(int, re.findall(r"\d+", done.stdout))
        return rows, peak

    return run


def test_memory_does_not_grow_with_the_text(measure):
    small_rows, small = measure("small.txt", 4)
    rows, large = measure("large.txt", 48)
    # As rows: 48 MiB; as Python's lists of numbers: 400.
    assert rows > 10 * small_rows and large - small < 64 + 32
    again_rows, again = measure("large.txt", 48, "again")
    assert again_rows == rows and again < large
