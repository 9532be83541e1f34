"""Compiles every kernel and launch configuration for real GPUs, without one, and reports the results.

    python benchmarks/compile_report.py [--only REGEX] [--target sm_90 ...] [--jobs 2] [--write] [--json FILE]

Exits with 1 if a kernel does not compile, spills registers, or needs more shared memory than its target has.
`--write` replaces the table in docs/kernels-compiled.md. Takes minutes the first time; after that, compiled kernels
come from Triton's cache (~/.triton/cache).
"""

import argparse
import concurrent.futures
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from csrc_triton.ahead_of_time import AheadOfTime, cases  # noqa: E402

KIB = 1024
# Target and shared memory that one block (workgroup) may use there.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WIDE_LOAD = r"\bLDG\S*\.(?:128|256)\b|\bLDGSTS\S*\.128\b|\bUTMALDG|(?:global|buffer)_load_dwordx4"
TENSOR_CORE = r"\bHMMA\b|\bHMMA\.|\bHGMMA\b|\bHGMMA\.|\bUTC\w*MMA|\bv_mfma_"
PAGE = ROOT / "docs" / "kernels-compiled.md"


@dataclass
class Row:
    """One kernel on one target; -1 where it did not compile."""

    kernel: str
    target: str
    registers: int = -1
    spills: int = -1  # NVIDIA: instructions to or from local memory; AMD: spilled registers
    shared: int = -1  # bytes
    wide_loads: int = -1  # 16-byte loads, instructions
    tensor_core: int = -1  # instructions
    warps: int = -1  # of a block
    loop: int = -1  # instructions of the longest loop; only on NVIDIA
    loop_barriers: int = -1  # of those, how many wait for other warps
    fault: str = ""


def compile_one(case: AheadOfTime, target: str) -> Row:
    row = Row(case.name, target, warps=case.options["num_warps"])
    gpu, limit = TARGETS[target]
    signature, attributes = {}, {}
    for i, name in enumerate(case.kernel.arg_names):
        signature[name], _, multiple = case.signature[name].partition(":")
        if multiple:
            attributes[i,] = [["tt.divisibility", int(multiple)]]
    try:
        source = ASTSource(case.kernel, signature, case.constexprs, attributes)
        compiled = triton.compile(source, target=gpu, options=case.options)
        row.shared = compiled.metadata.shared
        (measure_nvidia if gpu.backend == "cuda" else measure_amd)(row, compiled.asm)
    except Exception as error:  # the report goes on after the first failure
        row.fault = f"does not compile: {str(error)[-300:]}"
        return row
    if row.spills:
        row.fault = "spills registers"
    elif row.shared > limit:
        row.fault = f"needs more shared memory than {limit} bytes"
    return row


def measure_nvidia(row: Row, assembly: dict) -> None:
    environment = os.environ | {"PATH": f"{TOOLS}:{os.environ['PATH']}"}  # cuobjdump calls nvdisasm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [TOOLS / "cuobjdump", option, file.name], env=environment, capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    row.registers = int(re.findall(r"REG:(\d+)", usage)[0])
    row.spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    count_instructions(row, code)
    lines = [(int(place, 16), text) for place, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", code)]
    jumps = ((place, int(to, 16)) for place, text in lines for to in re.findall(r"\bBRA\b.*?0x([0-9a-f]+)", text))
    loops = [[text for at, text in lines if to <= at <= place] for place, to in jumps if to < place]
    longest = max(loops, key=len, default=[])
    row.loop, row.loop_barriers = len(longest), sum("BAR.SYNC" in text or "BAR.RED" in text for text in longest)


def measure_amd(row: Row, assembly: dict) -> None:
    code = assembly["amdgcn"]
    row.registers = int(re.findall(r"\.vgpr_count:\s*(\d+)", code)[0])
    row.spills = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", code))
    count_instructions(row, code)


def count_instructions(row: Row, code: str) -> None:
    row.wide_loads = len(re.findall(WIDE_LOAD, code))
    row.tensor_core = len(re.findall(TENSOR_CORE, code))


def _numbered(job: tuple[int, str]) -> Row:
    return compile_one(cases()[job[0]], job[1])


HEADER = """\
| kernel | target | registers | spills | shared memory, bytes | 16-byte loads | tensor-core instructions |
|---|---|---|---|---|---|---|"""


def line(row: Row) -> str:
    numbers = [row.registers, row.spills, row.shared, row.wide_loads, row.tensor_core]
    cells = [row.kernel, row.target, *("-" if n < 0 else str(n) for n in numbers)]
    return f"| {' | '.join(cells)} |"


def write_page(rows: list[Row]) -> None:
    begin, end = "<!-- table: begin -->", "<!-- table: end -->"
    page, text = PAGE.read_text(), "\n".join([HEADER, *map(line, rows)])
    head, tail = page[: page.index(begin)], page[page.index(end) :]
    PAGE.write_text(f"{head}{begin}\n\nTriton {triton.__version__}.\n\n{text}\n\n{tail}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kernels whose name matches this regular expression")
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile side by side")
    parser.add_argument("--write", action="store_true", help=f"replace the table in {PAGE.relative_to(ROOT)}")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    if args.write and (args.only or args.target != list(TARGETS)):
        parser.error("--write: the page holds all kernels and targets; drop --only and --target")
    chosen = [i for i, case in enumerate(cases()) if re.search(args.only, case.name)]
    jobs = [(i, target) for i in chosen for target in args.target if TARGETS[target][0].backend in cases()[i].backends]
    rows = []
    print(HEADER)
    with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
        for row in pool.map(_numbered, jobs):
            rows.append(row)
            print(line(row), flush=True)
    faults = [row for row in rows if row.fault]
    for row in faults:
        print(f"{row.kernel} on {row.target}: {row.fault}", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows]))
    if args.write:
        write_page(rows)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
