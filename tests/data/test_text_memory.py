"""Memory does not grow with the text."""

import re
import subprocess
import sys
from pathlib import Path

import tiny_models

SCRIPT = """
import resource, sys
from transformers import AutoTokenizer
from sparseclt.config import DataConfig, TrainConfig
from sparseclt.data import RowStream, load_rows, rows_digest

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
for source in sys.argv[3:]:
    config = TrainConfig(data=DataConfig(source, cache=sys.argv[2]))
    rows = load_rows(config, tokenizer, "train")
    rows_digest(rows)
    for _, batch in zip(range(100), RowStream(rows, 4, seed=0)):
        batch.sum()
    print(len(rows), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


def test_memory_does_not_grow_with_the_text(tmp_path):
    tiny_models.tokenizer().save_pretrained(tmp_path / "tokenizer")
    line = " ".join(f"w{1 + i % 49}" for i in range(200)) + "\n"
    for name, mebi in (("small.txt", 2), ("large.txt", 20)):
        with (tmp_path / name).open("w") as file:
            file.writelines(line for _ in range((mebi << 20) // len(line)))
    paths = [tmp_path / name for name in ("tokenizer", "store", "small.txt", "large.txt")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *paths], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    small_rows, small, large_rows, large = map(int, re.findall(r"\d+", done.stdout))
    # Much less than the text with its encodings, or a list of its tokens.
    assert large_rows > 8 * small_rows and large - small < 64, (small, large)
