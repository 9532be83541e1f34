"""What a run of `pytest benchmarks/ --benchmark-json FILE` measured, as a Markdown page with plots."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseclt.evaluation.report import _table

Row = Mapping[str, Any]
_CURVES = "benchmarks-scaling.png"
_RATIOS = "benchmarks-ratios.png"


def bench_report(file: str | Path, out: str | Path) -> Path:
    """Write `out`, a Markdown page, and its plots beside it, from pytest-benchmark's JSON `file`.

    Raises ValueError if `file` is not the result of sparseclt's benchmarks.
    """
    from sparseclt import bench_plots

    try:
        result = json.loads(Path(file).read_text())
        run, benchmarks = result["sparseclt"], result["benchmarks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"file: expected what `pytest benchmarks/ --benchmark-json FILE` wrote, got {file} ({error!r})"
        ) from None
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [benchmark["extra_info"] for benchmark in benchmarks]
    curves = [row for row in rows if "curve" in row]
    groups = grouped([row for row in rows if "curve" not in row])
    parts = ["# Benchmarks", _header(run, result["datetime"], result.get("commit_info") or {}), _HOW_TO_READ]
    parts += ["## What is asked of ours on the CPU", threshold_table(run["thresholds"], groups, run["set"])]
    if groups:
        bench_plots.ratios(groups, out.parent / _RATIOS)
        parts += ["## Against everyone", f"![time over that of our best backend]({_RATIOS})"]
    ceiling = best_ceiling(rows)
    if ceiling:
        parts[1] += f"\n- ceilings: GEMM {ceiling['flops'] / 1e9:.3g} GFLOP/s, copy {ceiling['bytes'] / 1e9:.3g} GB/s"
    for _, group in groups.items():
        parts += [f"### {_title(group[0])}", group_table(group, ceiling)]
    if curves:
        bench_plots.scaling(curves, run, out.parent / _CURVES)
        parts += ["## One training step in both modes, size by size", f"![time and memory against sizes]({_CURVES})"]
        parts += [scaling_table(curves)]
    if run["failed"]:
        parts += ["## Not timed: wrong results, or failed", failed_table(run["failed"])]
    out.write_text("\n\n".join(parts) + "\n")
    return out


_HOW_TO_READ = """\
Contenders take turns, in a random order each round, after a gate has compared their results with those of a reference
on the same inputs. Times are medians with quartiles, each of a call behind another one of the same contender.

- **x ours**: the median over rounds of a contender's time over that of our best backend in the same round. Above 1,
  ours is faster.
- **memory**: transient, the peak of what torch allocates in one call less its results (in a training step: less
  gradients that stay).
- **resident**: by how much the process' resident set grew in another call, less what stayed. It also sees what numba's
  kernels allocate (a row of numbers a thread), and what the C library keeps for later.
- **roofline**: the least time, by the formulas of `benchmarks/costs.py` and the fastest GEMM and copy of this run, over
  the time taken. Each contender is credited with the work that it does, not with what was needed."""


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
    """Bytes for people: 1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.3g} {unit}"
        count /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale or unit == "us":
            return f"{seconds / scale:.3g} {unit}"
    raise AssertionError


def times(factor: Mapping[str, float]) -> str:
    return f"{factor['median']:.3g} ({factor['low']:.3g} to {factor['high']:.3g})"


def grouped(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows of one comparison side by side."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["case"], row["direction"], *row["shapes"].items()].append(row)
    return dict(groups)


def is_ours(row: Row) -> bool:
    """A backend of ours in the comparison proper."""
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
    """The fastest GEMM and copy of the run: what else the machine did slowed some of them."""
    best: dict[str, float] = {}
    for row in rows:
        for what, rate in row["ceiling"].items():
            best[what] = max(rate, best.get(what, 0.0))
    return best


def group_table(group: Sequence[Row], ceiling: Mapping[str, float]) -> str:
    """A comparison: a row a contender, the fastest first."""
    ours = best_of_ours(group)
    lines = []
    for row in sorted(group, key=lambda row: row["seconds"]["median"]):
        ratio = ours["ratios"].get(row["contender"]) if ours else None
        lines.append(
            {
                "contender": f"**{row['contender']}**" if is_ours(row) else row["contender"],
                "time": f"{duration(row['seconds']['median'])} "
                f"({duration(row['seconds']['low'])} to {duration(row['seconds']['high'])})",
                "ratio": times(ratio) if ratio else "1" if row is ours else None,
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
    return _table(lines, columns)


def threshold_table(thresholds: Sequence[Row], groups: Mapping[Any, Sequence[Row]], chosen: str) -> str:
    """Work, asked, measured; "-" where the run did not measure it."""
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
            line |= {"measured": f"{times(ratio)} x", "by": ours["contender"].removeprefix("ours: ")}
            if asked["memory"] is not None:
                saved = against["peak_bytes"] / max(ours["peak_bytes"], 1)
                line["measured"] += f", 1/{saved:.3g} of the memory"
                met.append(saved >= asked["memory"])
            line["met"] = "yes" if all(met) else "**no**"
        lines.append(line)
    columns = ("work", "against", "asked", "measured", "by", "met")
    table = _table(lines, {name: (name, "") for name in columns})
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
    """Every point of the curves; memory with parameters, gradients and moments."""
    lines = [
        {
            "size": f"{row['curve']} = {row['value']}",
            "contender": row["contender"],
            "time": duration(row["seconds"]["median"]),
            "memory": size(row["peak_bytes"] + row["states_bytes"]),
            "ratio": times(row["ratios"]["dense"]) if "dense" in row["ratios"] else None,
        }
        for row in sorted(curves, key=lambda row: (row["curve"], row["value"], row["contender"]))
    ]
    titles = {"size": "size", "contender": "contender", "time": "time", "memory": "memory", "ratio": "dense / ours"}
    return _table(lines, {name: (title, "") for name, title in titles.items()})


def failed_table(rows: Sequence[Row]) -> str:
    lines = [{"work": _title(row), "contender": row["contender"], "why": row["failed"]} for row in rows]
    return _table(lines, {name: (name, "") for name in ("work", "contender", "why")})
