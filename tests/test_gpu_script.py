"""benchmarks/gpu.py runs everywhere: here in the interpreter, without times."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu

SCRIPT = Path(gpu.__file__)
# As on an image with torch, triton and numpy only: what else is installed here cannot be found.
BARE = """
import importlib.util, sys
find = importlib.util.find_spec
absent = set(("pydantic pydantic_core safetensors huggingface_hub tqdm numba transformers transformer_lens datasets"
              " tyro matplotlib pyarrow sparsify").split())
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in absent else find(name, package)
"""


def test_a_dry_run_goes_through_all_sections_on_a_bare_image(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BARE)
    results, page = tmp_path / "gpu.json", tmp_path / "gpu.md"
    command = [sys.executable, SCRIPT, "--dry", "--json", results, "--page", page]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert {row["section"] for row in rows} == set(gpu.LIMITS)
    assert not any(row.get("failed") or row.get("ms") for row in rows), "no times of the interpreter"
    assert len(ended.stdout.splitlines()) >= len(rows) and "commit" in page.read_text()


def test_a_section_that_fails_crashes_or_hangs_is_a_result(tmp_path):
    results = tmp_path / "gpu.json"
    gpu.in_process(["machine"], results, 0.05, {})  # stopped long before torch is imported
    gpu.in_process(["machine"], results, 60, {"PATH": "", "PYTHONPATH": str(tmp_path / "nothing"), "PYTHONHOME": "/"})
    stopped, crashed = (json.loads(line)["failed"] for line in results.read_text().splitlines())
    assert stopped.startswith("stopped after") and crashed.startswith("ended with status")


def test_only_the_part_between_the_marks_of_a_page_is_replaced(tmp_path):
    file = tmp_path / "page.md"
    file.write_text(f"before\n{gpu.BEGIN}\nold\n{gpu.END}\nafter\n")
    gpu.write_page(
        file, gpu.page([{"section": "topk", "name": "a", "ms": 1.5, "MiB": None}], "python benchmarks/gpu.py")
    )
    text = file.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| a | ms 1.5 |" in text and "`python benchmarks/gpu.py`" in text
