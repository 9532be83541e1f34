"""Run the commands of docs/long-runs.md, one after another, and write what each printed below it.

python tools/long_runs.py    takes a few minutes, on one thread
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs/long-runs.md"
BLOCK = re.compile(r"```console\n(.*?)```", re.S)
COMMAND = re.compile(r"^\$ .*(?:\n> .*)*", re.M)  # "> " continues it


def with_output(block: str, folder: str) -> str:
    """The commands of a block, each followed by what it prints in `folder`."""
    shown = []
    for command in COMMAND.findall(block):
        script = re.sub(r"^[$>] ", "", command, flags=re.M)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", script], cwd=folder, env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        shown += [command, *(line.rstrip() for line in done.stdout.replace(f"{folder}/", "").splitlines())]
    return "\n".join(shown)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        text = BLOCK.sub(lambda block: f"```console\n{with_output(block[1], folder)}\n```", PAGE.read_text())
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
