"""How much memory a run may take: the machine's, less where control groups or the process's own limit say so."""

import resource
from pathlib import Path

import pytest

from sparseclt.training.available import host_bytes

MiB = 1 << 20


def write(root: Path, files: dict[str, str]) -> Path:
    """`root` with these files, on a machine with 1000 MiB to spare."""
    for name, text in ({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   1024000 kB\nBuffers: 1 kB\n"} | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(most: int | str, used: int, inactive: int = 0) -> dict[str, str]:
    """The files of a control group of version 2; sizes in MiB."""
    limit = most if isinstance(most, str) else most * MiB
    return {
        "memory.max": f"{limit}\n",
        "memory.current": f"{used * MiB}\n",
        "memory.stat": f"anon 5\ninactive_file {inactive * MiB}\n",
    }


def under(folder: str, files: dict[str, str]) -> dict[str, str]:
    return {f"sys/fs/cgroup/{folder}/{name}": text for name, text in files.items()}


V2 = {"proc/self/cgroup": "0::/outer/inner\n"}


def test_without_limits_it_is_what_the_machine_has(tmp_path):
    assert host_bytes(write(tmp_path, {})) == 1000 * MiB
    assert host_bytes(write(tmp_path, V2 | under("outer/inner", group("max", 7)))) == 1000 * MiB


def test_the_tightest_group_on_the_way_up_counts(tmp_path):
    files = V2 | under("outer/inner", group(500, 100)) | under("outer", group(800, 650)) | under(".", group("max", 900))
    assert host_bytes(write(tmp_path, files)) == 150 * MiB
    write(tmp_path, under("outer", group(800, 100)))
    assert host_bytes(tmp_path) == 400 * MiB


def test_the_group_of_a_container_is_the_root_of_what_it_sees(tmp_path):
    assert host_bytes(write(tmp_path, {"proc/self/cgroup": "0::/\n"} | under(".", group(300, 100)))) == 200 * MiB


def test_a_path_that_is_not_mounted_leaves_the_groups_above_it(tmp_path):
    assert host_bytes(write(tmp_path, V2 | under(".", group(300, 100)))) == 200 * MiB


def test_cached_files_that_give_way_are_free_and_nothing_is_below_zero(tmp_path):
    assert host_bytes(write(tmp_path, V2 | under("outer", group(300, 290, inactive=80)))) == 90 * MiB
    write(tmp_path, under("outer", group(300, 400)))
    assert host_bytes(tmp_path) == 0


def test_groups_of_version_1(tmp_path):
    files = {
        "proc/self/cgroup": "11:cpu,cpuacct:/job\n9:memory:/job\n1:name=systemd:/job\n0::/job\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{250 * MiB}\n",
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{200 * MiB}\n",
        "sys/fs/cgroup/memory/job/memory.stat": f"cache 1\ntotal_inactive_file {30 * MiB}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "0\n",
    }
    assert host_bytes(write(tmp_path, files)) == 80 * MiB


def test_the_limit_of_the_process_counts(tmp_path, monkeypatch):
    pages = 10 * MiB // resource.getpagesize()
    write(tmp_path, {"proc/self/statm": f"{pages} 5 1 1 0 1 0\n"})
    monkeypatch.setattr(resource, "getrlimit", lambda which: (60 * MiB, resource.RLIM_INFINITY))
    assert host_bytes(tmp_path) == 50 * MiB


def test_a_machine_without_these_files_is_unknown(tmp_path):
    assert host_bytes(tmp_path) is None


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="this machine has no /proc")
def test_this_machine_has_some():
    assert 0 < host_bytes() <= 1 << 50
