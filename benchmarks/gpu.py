"""Everything that a GPU has to settle, in at most ten minutes: are the ops right there, and how fast are they?

    python benchmarks/gpu.py [--only SECTION ...] [--seconds 580] [--json build/gpu.json] [--page docs/gpu.md]
    python benchmarks/gpu.py --dry

Needs torch and triton (and numpy, which their images have); reads nothing else of this repository's requirements. Every
result is a line, printed when it is known. Sections run in processes of their own with a time limit: one that crashes,
hangs or fails is reported, and the next one runs. At the end the results go to a JSON file and into docs/gpu.md.

`--dry` runs all sections in Triton's interpreter at tiny shapes, without times, and leaves docs/gpu.md alone.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Sections in the order in which they run, and the seconds each may take; their sum exceeds the whole: most end early.
LIMITS = {
    "machine": 40, "correct": 120, "topk": 80, "fp32": 80, "connected": 90, "decode": 80, "optimiser": 80, "step": 100,
    "connections": 50, "large": 50, "peers": 40, "tests": 150,
}  # fmt: skip
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
Row = dict[str, Any]


def run_sections(names: list[str], file: Path) -> None:
    """Run sections here, one after the other; a failure is a result."""
    import gpu_checks
    import gpu_kernels
    import gpu_steps  # first: it stands in for packages that are absent
    from gpu_clock import GPU, Results
    from gpu_kernels import DRY, FULL

    modules = (gpu_checks, gpu_kernels, gpu_steps)
    known: dict[str, Callable[..., None]] = {s.__name__: s for module in modules for s in module.SECTIONS}
    for name in names:
        out = Results(name, file)
        try:
            known[name](out, FULL if GPU else DRY)
        except Exception as error:  # the others still run
            traceback.print_exc()
            out.add(name, failed=f"{type(error).__name__}: {error}".splitlines()[0][:300])


def in_process(names: list[str], file: Path, seconds: float, environment: dict[str, str]) -> None:
    """Run sections in a process of their own, and note how it ended if not well."""
    command = [sys.executable, str(Path(__file__)), "--sections", *names, "--json", str(file)]
    try:
        status = subprocess.run(command, env=environment, timeout=seconds).returncode
        ended = "" if status == 0 else f"ended with status {status}"
    except subprocess.TimeoutExpired:
        ended = f"stopped after {seconds:.0f} s"
    if ended:
        print(f"{'+'.join(names):10} {ended}", flush=True)
        with file.open("a") as lines:
            lines.write(json.dumps({"section": names[0], "name": "the section", "failed": ended}) + "\n")


def commit() -> str:
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        return found.stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def page(rows: list[Row], command: str) -> str:
    """The results as Markdown: one table per section."""
    lines = [f"Printed by `{command}` on {date.today()}, commit {commit()}.", ""]
    for section in dict.fromkeys(row["section"] for row in rows):
        lines += [f"**{section}**", "", "| | |", "| --- | --- |"]
        for row in rows:
            if row["section"] == section:
                numbers = {k: v for k, v in row.items() if k not in ("section", "name") and v is not None}
                shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
                lines.append(f"| {row['name']} | {shown.replace('|', '/')} |")
        lines.append("")
    return "\n".join(lines)


def write_page(file: Path, text: str) -> None:
    old = file.read_text() if file.exists() else f"{BEGIN}\n{END}\n"
    file.write_text(f"{old[: old.index(BEGIN)]}{BEGIN}\n\n{text}\n{old[old.index(END) :]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="in the interpreter, at tiny shapes, without times")
    parser.add_argument("--only", nargs="*", choices=LIMITS, default=list(LIMITS), help="these sections")
    parser.add_argument("--seconds", type=float, default=580, help="for everything")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "gpu.json", help="results, a line each")
    parser.add_argument("--page", type=Path, help="write the results there (default: docs/gpu.md, except with --dry)")
    parser.add_argument("--sections", nargs="*", help=argparse.SUPPRESS)  # a child process
    a = parser.parse_args()
    if a.sections:
        run_sections(a.sections, a.json)
        return 0
    deadline = time.monotonic() + a.seconds
    a.json.parent.mkdir(parents=True, exist_ok=True)
    a.json.write_text("")
    folders = (str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", ""))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders)), "PYTHONUNBUFFERED": "1"}
    if a.dry:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for names in [a.only] if a.dry else [[name] for name in a.only]:
        left = deadline - time.monotonic()
        limit = left if a.dry else min(left, LIMITS[names[0]])
        if limit > 5:
            in_process(names, a.json, limit, environment)
    rows = [json.loads(line) for line in a.json.read_text().splitlines()]
    if a.page or not a.dry:
        write_page(a.page or ROOT / "docs" / "gpu.md", page(rows, " ".join(["python", *sys.argv])))
    failed = [row for row in rows if row.get("failed")]
    print(f"\n{len(rows)} results, {len(failed)} failed", flush=True)
    for row in failed:
        print(f"{row['section']:10} {row['name']}: {row['failed']}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
