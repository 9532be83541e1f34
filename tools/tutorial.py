"""Run the Python of docs/tutorial.md, block after block, and write the output of each below it.

python tools/tutorial.py    takes about a minute, on one thread
"""

import io
import os
import re
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import torch

PAGE = Path(__file__).parents[1] / "docs/tutorial.md"
# A block of Python, and the output that stands below it from the last time.
BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n.*?```\n)?", re.S)


def with_output(page: str) -> str:
    """`page` with the output of every Python block below it; the blocks share their names."""
    names: dict[str, object] = {}

    def run(block: re.Match[str]) -> str:
        code, printed = block["code"], io.StringIO()
        with redirect_stdout(printed):
            exec(compile(code, PAGE.name, "exec"), names)
        output = "".join(f"{line.rstrip()}\n" for line in printed.getvalue().splitlines())
        return f"```python\n{code}```\n" + (f"\n```text\n{output}```\n" if output else "")

    return BLOCK.sub(run, page)


def main() -> None:
    torch.set_num_threads(1)
    text = PAGE.read_text()
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as empty:  # the tutorial's run directory goes with it
        os.chdir(empty)
        try:
            text = with_output(text)
        finally:
            os.chdir(home)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
