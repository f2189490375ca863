"""What containers, units and batch jobs leave a worker, in both versions of control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from headrace.worker.control_group import available_memory, usable_cores

MIB = 1 << 20
MEMORY = {
    2: ("", "memory.max", "memory.current", "inactive_file"),
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
CPU = {2: ("", "cpu.max"), 1: ("cpu", "cpu.cfs_quota_us")}
LINES = {2: "0::{path}\n", 1: "9:memory:{path}\n2:cpu,cpuacct:{path}\n1:name=systemd:/elsewhere\n0::/\n"}


def limit_memory(
    root: Path, version: int, path: str, *, limit: int | None, used: int, cached: int = 0
) -> None:
    tree, limit_name, usage_name, stat = MEMORY[version]
    folder = root / tree / path
    folder.mkdir(parents=True, exist_ok=True)
    none = "max" if version == 2 else str((1 << 63) - 4096)
    (folder / limit_name).write_text(f"{none if limit is None else limit}\n")
    (folder / usage_name).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{stat} {cached}\nactive_file 7\n")


def limit_cpu(root: Path, version: int, path: str, quota: int | None) -> None:
    """`quota`: microseconds of each 100 ms."""
    tree, name = CPU[version]
    folder = root / tree / path
    folder.mkdir(parents=True, exist_ok=True)
    if version == 2:
        (folder / name).write_text(f"{'max' if quota is None else quota} 100000\n")
    else:
        (folder / name).write_text(f"{-1 if quota is None else quota}\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")


def group_of(folder: Path, version: int, path: str) -> Path:
    """A file as /proc/self/cgroup."""
    own = folder / "own"
    own.write_text(LINES[version].format(path=path))
    return own


def test_available_memory_is_part_of_the_machine() -> None:
    total = next(
        line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")
    )
    assert 0 < available_memory() <= int(total.split()[1]) * 1024


@pytest.mark.parametrize("version", MEMORY)
@pytest.mark.parametrize(
    ("used", "cached", "room"), [(24 * MIB, 0, 40 * MIB), (60 * MIB, 40 * MIB, 44 * MIB), (80 * MIB, 0, 0)]
)
def test_memory_is_left_that_is_not_used_but_for_copies_of_files(
    tmp_path: Path, version: int, used: int, cached: int, room: int
) -> None:
    """Weights that were read are in memory that the kernel gives to whoever asks for it."""
    limit_memory(tmp_path, version, "", limit=64 * MIB, used=used, cached=cached)
    assert available_memory(tmp_path) == room
    assert available_memory(tmp_path, tmp_path / "no such file") == room
    (tmp_path / MEMORY[version][0] / "memory.stat").unlink()
    assert available_memory(tmp_path) == max(64 * MIB - used, 0)


@pytest.mark.parametrize("version", MEMORY)
def test_the_tightest_group_from_our_own_to_the_root_counts(tmp_path: Path, version: int) -> None:
    """As on a host without containers: a batch job's limit, or a unit's, stands in a group below the root."""
    own = group_of(tmp_path, version, "/slurm/job_7/step_0")
    limit_memory(tmp_path, version, "", limit=None, used=999 * MIB)
    limit_memory(tmp_path, version, "slurm/job_7", limit=64 * MIB, used=40 * MIB)
    limit_memory(tmp_path, version, "slurm/job_7/step_0", limit=None, used=10 * MIB)
    limit_memory(tmp_path, version, "slurm/job_8", limit=MIB, used=MIB)
    assert available_memory(tmp_path, own) == 24 * MIB
    limit_memory(tmp_path, version, "slurm/job_7/step_0", limit=20 * MIB, used=10 * MIB)
    assert available_memory(tmp_path, own) == 10 * MIB


@pytest.mark.parametrize("version", MEMORY)
def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path, version: int) -> None:
    limit_memory(tmp_path, version, "", limit=64 * MIB, used=40 * MIB)
    limit_cpu(tmp_path, version, "", 100_000)
    for path in ("/docker/0123456789ab", "/../elsewhere"):
        own = group_of(tmp_path, version, path)
        assert (available_memory(tmp_path, own), usable_cores(tmp_path, own)) == (24 * MIB, 1)


@pytest.mark.parametrize("version", MEMORY)
def test_groups_without_limits(tmp_path: Path, version: int) -> None:
    own = group_of(tmp_path, version, "/job")
    for path in ("", "job"):
        limit_memory(tmp_path, version, path, limit=None, used=5)
        limit_cpu(tmp_path, version, path, None)
    assert available_memory(tmp_path, own) > MIB
    assert usable_cores(tmp_path, own) == len(os.sched_getaffinity(0))
    assert available_memory(tmp_path / "none", own) > MIB


@pytest.mark.parametrize("version", CPU)
def test_no_more_cores_than_a_group_has_time_for(
    tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = group_of(tmp_path, version, "/pod/main")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    limit_cpu(tmp_path, version, "pod", 800_000)
    limit_cpu(tmp_path, version, "pod/main", None)
    assert usable_cores(tmp_path, own) == 8
    for quota, cores in ((150_000, 1), (50_000, 1), (400_000, 4)):
        limit_cpu(tmp_path, version, "pod/main", quota)
        assert usable_cores(tmp_path, own) == cores
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    assert usable_cores(tmp_path, own) == 2
