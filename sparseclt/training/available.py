"""How much memory this process may still take on the CPU: the machine's, its control groups', its own limit's."""

from collections.abc import Iterator
from pathlib import Path


def host_bytes(root: Path = Path("/")) -> int | None:
    """The least of what the machine has, what every control group around this process leaves it, and what RLIMIT_AS
    leaves it; None where nothing is known (not on Linux). `root`: where /proc and /sys are."""
    return min((*_machine(root), *_control_groups(root), *_address_space(root)), default=None)


def _machine(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _control_groups(root: Path) -> Iterator[int]:
    """What is left below the limit of each group, from the process's own up to the root; both versions of groups."""
    mounts = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            mount, names = mounts, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount, names = mounts / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = mount / path.lstrip("/")
        for directory in (group, *group.parents):
            yield from _left_in(directory, *names)
            if directory == mount:
                break


def _left_in(group: Path, limit: str, usage: str, cache: str) -> Iterator[int]:
    """Files in the page cache count as used, but give way: those that were not read lately are taken as free."""
    if (most := _number(group / limit)) is None or (used := _number(group / usage)) is None:
        return
    statistics = dict(line.split() for line in _lines(group / "memory.stat"))
    yield max(0, most - max(0, used - int(statistics.get(cache, 0))))


def _address_space(root: Path) -> Iterator[int]:
    if sizes := _lines(root / "proc/self/statm"):
        import resource  # Unix only

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            yield max(0, limit - int(sizes[0].split()[0]) * resource.getpagesize())


def _number(file: Path) -> int | None:
    """None without such a file, or without a limit in it ("max")."""
    lines = _lines(file)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
