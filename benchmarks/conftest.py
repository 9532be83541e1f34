"""Options of the suite, and how its rows reach pytest-benchmark.

    pytest benchmarks/ [--full | --tiny] [--dtype bfloat16] [--benchmark-json FILE]

pytest-benchmark times one function at a time. Here contenders take turns, timed by `measure.py`; the durations are
handed to pytest-benchmark through a clock that plays them back, so that its table, its statistics and its JSON are
the usual ones. Everything else about a row is in its `extra_info`; rows that failed their gate, thresholds, memory
budget and command are under "sparseclt" in the JSON.
"""

import gc
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import thresholds
import torch
from compare import Row, cases, device_name, versions
from problems import contenders, our_backends
from shapes import EFFORT, OPS, SCALING, STEPS
from steps import step_contenders

from sparseclt.costs import CLTSize, dense_training_bytes


class ReplayClock:
    """A clock whose readings are, in pairs, recorded durations apart."""

    def __init__(self) -> None:
        self.readings: list[float] = []

    def load(self, seconds: list[float]) -> None:
        self.readings = [reading for duration in reversed(seconds) for reading in (duration, 0.0)]

    def __call__(self) -> float:
        return self.readings.pop()


_clock = ReplayClock()


def replayed() -> float:
    return _clock()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sparseclt")
    group.addoption("--full", action="store_true", help="all shapes, curves and thresholds, with more rounds")
    group.addoption("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the ops")
    group.addoption("--tiny", action="store_true", help="tiny shapes: checks that the suite works, not how fast")


def the_set(config: pytest.Config) -> str:
    return "tiny" if config.getoption("--tiny") else "full" if config.getoption("--full") else "quick"


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FAILED] = []


FAILED = pytest.StashKey[list[Row]]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per contender: of each op, of each mode of a training step, of each point of a scaling curve."""
    chosen, parametrize = the_set(metafunc.config), metafunc.parametrize
    if metafunc.function.__name__ == "test_op":
        ops = [(*case, name) for case in cases(OPS[chosen]) for name in contenders(case[0], device())]
        ids = [f"{op}-{way}-{_letters(sizes)}-{name}" for op, way, sizes, name in ops]
        parametrize(("op", "direction", "sizes", "contender"), ops, ids=ids)
    elif metafunc.function.__name__ == "test_step":
        steps = [
            (mode, sizes, name) for mode, sizes in STEPS[chosen].items() for name in step_contenders(mode, device())
        ]
        ids = [f"{mode}-{_letters(sizes)}-{name}" for mode, sizes, name in steps]
        parametrize(("mode", "sizes", "contender"), steps, ids=ids)
    elif metafunc.function.__name__ == "test_scaling":
        base, curves = SCALING[chosen]
        names = [f"ours: {our_backends(device())[-1]}", "dense"]
        points = [(letter, base | {letter: v}, name) for letter, vs in curves.items() for v in vs for name in names]
        ids = [f"{letter}={sizes[letter]}-{name}" for letter, sizes, name in points]
        parametrize(("letter", "sizes", "contender"), points, ids=ids)


def _letters(sizes: dict[str, int]) -> str:
    return "_".join(f"{letter}{size}" for letter, size in sizes.items())


@pytest.fixture(scope="session")
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, request.config.getoption("--dtype"))


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Callable[..., dict[str, Row]]:
    """Rows of a comparison: measured for its first contender, remembered for the others."""
    known: dict[Any, dict[str, Row]] = {}
    chosen = the_set(request.config)

    def rows(key: Any, make: Callable[[bool], Any]) -> dict[str, Row]:
        if key not in known:
            known[key] = make(chosen == "tiny").run(EFFORT[chosen], chosen == "tiny")
            gc.collect()
        return known[key]

    return rows


@pytest.fixture
def publish(request: pytest.FixtureRequest) -> Callable[[Row], None]:
    """Hand a row to pytest-benchmark. A wrong result of ours or of a baseline fails the test; one of a peer is reported
    and skipped."""

    def publish_row(row: Row) -> None:
        if "failed" in row:
            request.config.stash[FAILED].append(row)
            (pytest.skip if row.get("peer") else pytest.fail)(f"{row['contender']}: {row['failed']}")
        benchmark = request.getfixturevalue("benchmark")  # not before: unused, it would warn
        benchmark.group = " ".join([row["case"], row["direction"], _letters(row["shapes"])])
        benchmark.extra_info.update({name: value for name, value in row.items() if name != "samples"})
        _clock.load(row["samples"])
        benchmark.pedantic(_nothing, rounds=len(row["samples"]))

    return publish_row


def _nothing() -> None:
    pass


def memory_budget() -> int:
    """Bytes that a dense step may take: the GPU's memory, or the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def dense_step_bytes(sizes: dict[str, int]) -> int:
    """Peak memory of a dense step in both modes, by formula."""
    size = CLTSize.of_mlps(sizes["L"], sizes["D"], sizes["F"])
    return sum(dense_training_bytes(size, sizes["N"], modes=2).values())


def dense_memory(chosen: str) -> dict[str, list[tuple[int, float]]]:
    """By letter of a scaling curve: (size, bytes of a dense step), up to the first that exceeds the budget."""
    base, curves = SCALING[chosen]
    points: dict[str, list[tuple[int, float]]] = {}
    for letter, values in curves.items():
        value, points[letter] = values[0], []
        for _ in range(24):
            held = dense_step_bytes(base | {letter: value})
            points[letter].append((value, held))
            if held > memory_budget():
                break
            value *= 2
    return points


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["sparseclt"] = {
        "command": " ".join(["pytest", *config.invocation_params.args]),
        "set": the_set(config),
        "device": device_name(device()),
        "threads": torch.get_num_threads(),
        "versions": versions() | {"system": f"{sys.platform}"},
        "memory_budget": memory_budget(),
        "dense_memory": dense_memory(the_set(config)),
        "failed": [{k: v for k, v in row.items() if k != "samples"} for row in config.stash[FAILED]],
        "thresholds": thresholds.as_json(),
    }


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Results get published: without the host's name."""
    machine_info.pop("node", None)
