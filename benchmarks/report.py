"""The measurements of a benchmark run as a Markdown page with plots: `python benchmarks/report.py FILE`, where FILE is
the result of `pytest benchmarks/ --benchmark-json FILE`."""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plots

from sparseclt.evaluation.report import markdown_table

Row = Mapping[str, Any]
_CURVES = "benchmarks-scaling.png"
_RATIOS = "benchmarks-ratios.png"


def write_report(file: str | Path, out: str | Path) -> Path:
    """Write `out`, a Markdown page, and its plots beside it, from pytest-benchmark's JSON `file`.

    Raises ValueError if `file` is not the result of these benchmarks.
    """
    try:
        result = json.loads(Path(file).read_text())
        run, benchmarks = result["sparseclt"], result["benchmarks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"file: expected the output of `pytest benchmarks/ --benchmark-json FILE`, got {file} ({error!r})"
        ) from None
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [benchmark["extra_info"] for benchmark in benchmarks]
    curves = [row for row in rows if "curve" in row]
    groups = grouped([row for row in rows if "curve" not in row])
    parts = ["# Benchmarks", _header(run, result["datetime"], result.get("commit_info") or {}), _HOW_TO_READ]
    parts += ["## Thresholds on the CPU", threshold_table(run["thresholds"], groups, run["set"])]
    if groups:
        compared = [(group, ours) for group in groups.values() if (ours := best_of_ours(group)) is not None]
        plots.ratios(compared, out.parent / _RATIOS)
        parts += ["## Against everyone", f"![time over that of our best backend]({_RATIOS})"]
    ceiling = best_ceiling(rows)
    if ceiling:
        parts[1] += f"\n- ceilings: GEMM {ceiling['flops'] / 1e9:.3g} GFLOP/s, copy {ceiling['bytes'] / 1e9:.3g} GB/s"
    for group in groups.values():
        parts += [f"### {_title(group[0])}", group_table(group, ceiling)]
    if curves:
        plots.scaling(curves, run, out.parent / _CURVES)
        parts += ["## One training step in both modes, size by size", f"![time and memory against sizes]({_CURVES})"]
        parts += [scaling_table(curves)]
    if run["failed"]:
        parts += ["## Not timed: wrong results, or failed", failed_table(run["failed"])]
    out.write_text("\n\n".join(parts) + "\n")
    return out


_HOW_TO_READ = """\
Contenders take turns, in a random order each round, after a gate has compared their results with those of a reference
on the same inputs. Times are medians with quartiles; each call follows another one of the same contender.

- **x ours**: the median over rounds of a contender's time over that of our best backend in the same round. Above 1,
  ours is faster.
- **memory**: transient: the peak of torch's allocations in one call less its results (in a training step: less the
  gradients that remain).
- **resident**: the growth of the process' resident set during another call, less the part that remains. It includes
  what numba's kernels allocate (a row of numbers per thread) and what the C library keeps for later.
- **roofline**: the least time, by the formulas of `sparseclt/costs.py` and the fastest GEMM and copy of this run, over
  the time taken. Each contender is credited with the work that it does, not with the work that was needed."""


def _header(run: Row, date: str, commit: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    code = f"{commit.get('id', '')[:10]}{' (with changes)' if commit.get('dirty') else ''}"
    lines = {
        "device": run["device"], "threads": run["threads"], "versions": versions, "date": date[:16].replace("T", " "),
        "commit": code or "-", "command": f"`{run['command']}` (the {run['set']} set)",
        "dense memory budget": size(run["memory_budget"]),
    }  # fmt: skip
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())


def size(count: float) -> str:
    """Readable bytes: 1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.3g} {unit}"
        count /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    """Readable seconds: 0.012 -> 12 ms."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale or unit == "us":
            return f"{seconds / scale:.3g} {unit}"
    raise AssertionError


def ratio_text(factor: Mapping[str, float]) -> str:
    return f"{factor['median']:.3g} ({factor['low']:.3g} to {factor['high']:.3g})"


def grouped(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by comparison: case, direction and shapes."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["case"], row["direction"], *row["shapes"].items()].append(row)
    return dict(groups)


def is_ours(row: Row) -> bool:
    """Whether a row is one of our backends, and not a variant such as "train_step"."""
    return row["contender"].startswith("ours: ") and "," not in row["contender"]


def best_of_ours(group: Sequence[Row]) -> Row | None:
    return fastest([row for row in group if is_ours(row)])


def fastest(rows: Sequence[Row]) -> Row | None:
    return min(rows, key=lambda row: row["seconds"]["median"], default=None)


def _title(row: Row) -> str:
    shapes = ", ".join(f"{letter} {size}" for letter, size in row["shapes"].items())
    way = "" if row["direction"] == "step" else f" {row['direction']}"
    return f"{row['case']}{way}: {shapes}"


def best_ceiling(rows: Iterable[Row]) -> dict[str, float]:
    """The fastest GEMM and copy of the run: other load on the machine may have slowed the rest."""
    best: dict[str, float] = {}
    for row in rows:
        for what, rate in row["ceiling"].items():
            best[what] = max(rate, best.get(what, 0.0))
    return best


def group_table(group: Sequence[Row], ceiling: Mapping[str, float]) -> str:
    """One comparison: one row per contender, the fastest first."""
    ours = best_of_ours(group)
    lines = []
    for row in sorted(group, key=lambda row: row["seconds"]["median"]):
        ratio = ours["ratios"].get(row["contender"]) if ours else None
        lines.append(
            {
                "contender": f"**{row['contender']}**" if is_ours(row) else row["contender"],
                "time": f"{duration(row['seconds']['median'])} "
                f"({duration(row['seconds']['low'])} to {duration(row['seconds']['high'])})",
                "ratio": ratio_text(ratio) if ratio else "1" if row is ours else None,
                "memory": size(row["peak_bytes"]),
                "resident": None if row["resident_bytes"] is None else size(row["resident_bytes"]),
                "flops": row["flops"] / 1e9,
                "bytes": row["bytes"] / 1e6,
                "achieved": max(row[what] / rate for what, rate in ceiling.items()) / row["seconds"]["median"],
                "rounds": f"{row['rounds']} x {row['calls']}",
            }
        )
    columns = {
        "contender": ("contender", ""), "time": ("time", ""), "ratio": ("x ours", ""), "memory": ("memory", ""),
        "resident": ("resident", ""),
        "flops": ("GFLOP", ".3g"), "bytes": ("MB", ".4g"), "achieved": ("roofline", ".0%"),
        "rounds": ("rounds x calls", ""),
    }  # fmt: skip
    return markdown_table(lines, columns)


def threshold_table(thresholds: Sequence[Row], groups: Mapping[Any, Sequence[Row]], chosen: str) -> str:
    """Thresholds and measurements; "-" where the run did not measure one."""
    lines = []
    for asked in thresholds:
        group = groups.get((asked["case"], asked["direction"], *asked["shapes"].items()), ())
        names = [f"ours: {backend}" for backend in asked["backends"]]
        ours = fastest([row for row in group if (row["contender"] in names if names else is_ours(row))])
        against = next((row for row in group if row["contender"] == asked["against"]), None)
        shapes = ", ".join(f"{letter} {value}" for letter, value in asked["shapes"].items())
        line = {"work": f"{asked['work']}, {shapes}", "against": asked["against"], "asked": _asked(asked)}
        if ours and against:
            ratio, met = ours["ratios"][asked["against"]], []
            if asked["at_most"] is not None:
                ratio = {"median": 1 / ratio["median"], "low": 1 / ratio["high"], "high": 1 / ratio["low"]}
                met.append(ratio["median"] <= asked["at_most"])
            else:
                met.append(ratio["median"] >= asked["times"])
            line |= {"measured": f"{ratio_text(ratio)} x", "by": ours["contender"].removeprefix("ours: ")}
            if asked["memory"] is not None:
                saved = against["peak_bytes"] / max(ours["peak_bytes"], 1)
                line["measured"] += f", 1/{saved:.3g} of the memory"
                met.append(saved >= asked["memory"])
            line["met"] = "yes" if all(met) else "**no**"
        lines.append(line)
    columns = ("work", "against", "asked", "measured", "by", "met")
    table = markdown_table(lines, {name: (name, "") for name in columns})
    missing = sum("met" not in line for line in lines)
    note = f"\n\n{missing} of {len(lines)} are not in the {chosen} set (or their backend is not installed)."
    return table + (note if missing else "")


def _asked(asked: Row) -> str:
    if asked["at_most"] is not None:
        return f"at most {asked['at_most']:g} x its time"
    memory = f", 1/{asked['memory']:g} of its memory" if asked["memory"] is not None else ""
    by = f" ({', '.join(asked['backends'])})" if asked["backends"] else ""
    return f"{asked['times']:g} x faster{memory}{by}"


def scaling_table(curves: Sequence[Row]) -> str:
    """Every point of the curves; memory includes parameters, gradients and moments."""
    lines = [
        {
            "size": f"{row['curve']} = {row['value']}",
            "contender": row["contender"],
            "time": duration(row["seconds"]["median"]),
            "memory": size(row["peak_bytes"] + row["states_bytes"]),
            "ratio": ratio_text(row["ratios"]["dense"]) if "dense" in row["ratios"] else None,
        }
        for row in sorted(curves, key=lambda row: (row["curve"], row["value"], row["contender"]))
    ]
    titles = {"size": "size", "contender": "contender", "time": "time", "memory": "memory", "ratio": "dense / ours"}
    return markdown_table(lines, {name: (title, "") for name, title in titles.items()})


def failed_table(rows: Sequence[Row]) -> str:
    lines = [{"work": _title(row), "contender": row["contender"], "why": row["failed"]} for row in rows]
    return markdown_table(lines, {name: (name, "") for name in ("work", "contender", "why")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the JSON file of pytest-benchmark")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks.md"), help="the page (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        print(write_report(arguments.file, arguments.out))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
