"""The control groups of this process, version 1 or 2 (Linux), and the CPU time they may use."""

from collections.abc import Iterator
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def cpu_quota(mount: Path = MOUNT, own: Path = OWN) -> tuple[float, Path] | None:
    """The least number of cores that a control group may use, and its folder; None if unlimited."""
    quotas = []
    for folder in folders("cpu", mount, own):
        if (folder / "cpu.max").exists():
            texts = read_text(folder / "cpu.max").split()
        else:
            texts = [
                read_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
            ]
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
    # cpu and cpuacct may share a mount; else it is in the same folder of the other mount
    usage = folder / "cpuacct.usage"
    if not usage.exists():
        usage = mount / "cpuacct" / folder.relative_to(mount / "cpu") / usage.name
    return int(usage.read_text(encoding="ascii")) / 1e9


def folders(controller: str, mount: Path, own: Path) -> Iterator[Path]:
    """The folders of this process's control group and of all above it, down to the mount.

    In a container the path of /proc/self/cgroup may be the host's, of which only the mount itself
    is visible.
    """
    for line in read_text(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            root = mount / controller if controllers else mount
            folder = root / path.lstrip("/")
            for group in (folder, *folder.parents):
                if group.is_relative_to(root) and group.is_dir():
                    yield group


def read_text(path: Path) -> str:
    """The text of a file; "" if it cannot be read, as kernels differ in their control groups."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
