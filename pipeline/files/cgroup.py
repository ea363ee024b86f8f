"""Memory limit and CPU quota of this process's control group, v1 or v2 (Linux)."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MOUNT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


class MemoryLimit(NamedTuple):
    """`total` bytes of a control group, in `folder`."""

    total: int
    folder: Path

    def used(self) -> int:
        """Bytes that cannot be reclaimed at once: without cached files that nobody read lately.

        As `docker stats` and Kubernetes count, so that a read data file does not look like a full
        machine. Raises OSError and ValueError.
        """
        version_1 = self.folder / "memory.usage_in_bytes"
        usage = version_1 if version_1.exists() else self.folder / "memory.current"
        name = "total_inactive_file" if usage is version_1 else "inactive_file"
        stat = dict(
            line.split()
            for line in (self.folder / "memory.stat").read_text(encoding="ascii").splitlines()
        )
        return max(int(usage.read_text(encoding="ascii")) - int(stat.get(name, 0)), 0)


def memory_limit(host: int, mount: Path = MOUNT, own: Path = OWN) -> MemoryLimit | None:
    """The smallest limit that applies here, if it is below the `host`'s bytes; None without."""
    return min((limit for limit in memory_limits(mount, own) if limit.total < host), default=None)


def memory_limits(mount: Path = MOUNT, own: Path = OWN) -> Iterator[MemoryLimit]:
    """The limits of this control group and of those above it, which it shares with others."""
    for folder in _folders("memory", mount, own):
        for name in ("memory.max", "memory.limit_in_bytes"):
            total = _first_number(folder / name)
            if total:
                yield MemoryLimit(total, folder)


def cpu_quota(mount: Path = MOUNT, own: Path = OWN) -> tuple[float, Path] | None:
    """The smallest number of cores that applies here, and its folder; None without a quota."""
    quotas = []
    for folder in _folders("cpu", mount, own):
        if (folder / "cpu.max").exists():
            texts = _read(folder / "cpu.max").split()
        else:
            texts = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        # else "max" or -1: no quota
        if len(texts) == 2 and all(text.isdecimal() and int(text) for text in texts):
            quotas.append((int(texts[0]) / int(texts[1]), folder))
    return min(quotas, default=None)


def cpu_seconds(folder: Path, mount: Path = MOUNT) -> float:
    """Seconds of CPU time that a control group has used. Raises OSError and ValueError."""
    if (folder / "cpu.max").exists():
        stat = dict(
            line.split() for line in (folder / "cpu.stat").read_text(encoding="ascii").splitlines()
        )
        return int(stat["usage_usec"]) / 1e6
    # where both controllers share a mount; else the same folder in the other one
    usage = folder / "cpuacct.usage"
    if not usage.exists():
        usage = mount / "cpuacct" / folder.relative_to(mount / "cpu") / usage.name
    return int(usage.read_text(encoding="ascii")) / 1e9


def _folders(controller: str, mount: Path, own: Path) -> Iterator[Path]:
    """The folders of this process's control group and of all above it, down to the mount.

    In a container the path of /proc/self/cgroup may be the host's, of which only the mount itself
    is visible.
    """
    for line in _read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            root = mount / controller if controllers else mount
            folder = root / path.lstrip("/")
            for group in (folder, *folder.parents):
                if group.is_relative_to(root) and group.is_dir():
                    yield group


def _first_number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None


def _read(path: Path) -> str:
    """The text of a file; "" if it cannot be read, as kernels differ."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
