"""Whether files may have changed since they were looked at, by what the file system says of them alone."""

from pathlib import Path

Signature = tuple[tuple[str, int, int, int], ...]


def signature(path: Path) -> Signature:
    """Name, inode, size in bytes and time of change (ns) of a file, or of every file below a folder; () if none."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = []
    for file in files:
        try:
            stat = file.stat()
        except OSError:  # it went while it was looked at
            continue
        if not file.is_dir() and "__pycache__" not in file.parts:
            found.append((str(file.relative_to(path)), stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return tuple(found)
