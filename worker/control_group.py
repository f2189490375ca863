"""What the control groups of this process leave it: the bounds of containers, units and batch jobs.

A limit may stand in the group itself or in any above it. A container sees its own group as the root;
elsewhere the path in /proc/self/cgroup leads to it. Version 2 has one tree, version 1 one a controller.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_NO_LIMIT = 1 << 60
_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def available_memory(root: Path = _ROOT, own: Path = _OWN) -> int:
    """Bytes that this process could still get: of the machine, and of its control groups if that is less."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    rooms = [_memory_room(folder) for folder in _folders("memory", root, own)]
    return min(int(fields["MemAvailable"].split()[0]) * 1024, *rooms, _NO_LIMIT)


def usable_cores(root: Path = _ROOT, own: Path = _OWN) -> int:
    """Cores that this process may keep busy: those it may run on, and no more than its share of their time.

    Threads beyond it use up the share together and then all stand still for the rest of each period.
    """
    shares = [_cpu_share(folder) for folder in _folders("cpu", root, own)]
    return max(1, math.floor(min(len(os.sched_getaffinity(0)), *shares, _NO_LIMIT)))


def _folders(controller: str, root: Path, own: Path) -> Iterator[Path]:
    """The groups of this process, those above them too, as far as they can be seen."""
    paths = {"": Path("/"), controller: Path("/")}
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, place = line.split(":", 2)
        paths |= {name: Path(place) for name in controllers.split(",") if name in paths}
    for name, path in paths.items():
        for above in (path, *path.parents):
            folder = root / name / above.relative_to("/")
            if ".." not in above.parts and folder.is_dir():
                yield folder


def _memory_room(folder: Path) -> int:
    for limit_name, usage_name, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError):
            limit = (folder / limit_name).read_text().strip()
            used = int((folder / usage_name).read_text())
            if limit == "max":
                continue
            stat = {}
            with suppress(OSError):  # sandboxes have the limit alone
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # Usage counts the kernel's copies of files too, the weights that were just read among them.
            return max(int(limit) - max(used - int(stat.get(cached, 0)), 0), 0)
    return _NO_LIMIT


def _cpu_share(folder: Path) -> float:
    """Cores' worth of time."""
    with suppress(OSError):
        quota, period = (folder / "cpu.max").read_text().split()
        return _NO_LIMIT if quota == "max" else int(quota) / int(period)
    with suppress(OSError):
        quota = (folder / "cpu.cfs_quota_us").read_text()
        period = (folder / "cpu.cfs_period_us").read_text()
        return _NO_LIMIT if int(quota) < 0 else int(quota) / int(period)
    return _NO_LIMIT
