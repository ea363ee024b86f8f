"""The memory of this machine, or of the container that limits it: in total, in use, and left.

The page cache counts as free, as for `docker stats` and Kubernetes: a data file that was read once
does not make a machine look full.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.files.cgroup import MOUNT, OWN, folders, read_text


class Memory(NamedTuple):
    """Bytes of memory."""

    total: int  # the smallest limit of a control group, or the machine's memory
    used: int  # of `total`, without what the kernel takes back at once
    available: int  # what a process can still allocate: the least that any limit leaves
    limited: bool  # whether `total` is the limit of a control group


def read_memory(mount: Path = MOUNT, own: Path = OWN) -> Memory:
    """A reading of the machine and of the control groups around this process."""
    memory = _read_machine()
    for limit, folder in memory_limits(mount, own):
        with suppress(OSError, ValueError):  # of a kernel whose files differ
            used = _used(folder)
            available = max(min(memory.available, limit - used), 0)
            if limit < memory.total:
                memory = Memory(limit, used, available, True)
            else:
                memory = memory._replace(available=available)
    return memory


def _read_machine() -> Memory:
    import psutil  # 20 ms, and most runs do not ask

    memory = psutil.virtual_memory()
    return Memory(memory.total, memory.total - memory.available, memory.available, False)


def memory_limits(mount: Path = MOUNT, own: Path = OWN) -> Iterator[tuple[int, Path]]:
    """The limits in bytes of this process's control group and of all above it, with their folders.

    A group shares its own limit with all groups below it, so that each of them may be the tightest.
    """
    for folder in folders("memory", mount, own):
        for name in ("memory.max", "memory.limit_in_bytes"):  # of version 2 and 1
            text = read_text(folder / name).strip()
            if text.isdecimal() and int(text):  # else "max": no limit
                yield int(text), folder


def _used(folder: Path) -> int:
    """Bytes that a control group uses, without files in the page cache that nobody read lately."""
    usage, cache = folder / "memory.current", "inactive_file"
    version_1 = folder / "memory.usage_in_bytes"
    if version_1.exists():
        usage, cache = version_1, "total_inactive_file"
    lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    sizes = dict(line.split() for line in lines)
    return max(int(usage.read_text(encoding="ascii")) - int(sizes.get(cache, 0)), 0)
