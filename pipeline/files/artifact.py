"""Artifact folders and files, written atomically, and the manifest of how one was made.

A manifest holds nothing that differs between two identical runs on one machine.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import UserError
from pipeline.files import locks

Read = TypeVar("Read")

MANIFEST = "manifest.json"
# ns: a file that changed later may change again within one tick of the file system's clock
SETTLED = 2 * 10**9
# in a manifest: name → bytes of the files that a demo is shipped without
NOT_SHIPPED = "not_shipped"
MORE_TEMPLATES = "additional_chat_templates"  # transformers reads this folder in a model folder
# bytes; the largest published tokenizer.json has 35 MB, and opening it takes ten times that
LARGEST_TEXT = 100_000_000
# bytes of a config, manifest or index; that of a model of 150,000 tensors has 15 MB
LARGEST_JSON = 50_000_000
# layers or labels of a config, for each of which transformers makes an entry as it reads it
MOST_LISTED = 1_000_000
_TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken")
# target, process id, start time, machine, kind
_TEMPORARY = re.compile(r"\.(.+)\.(\d+)(?:-(\d*)(?:-(\w+))?)?\.(tmp|old)", re.DOTALL)
DAY = 86_400  # seconds
# What commands write into a folder of their own. A folder with anything else in it is not replaced.
_WRITTEN = re.compile(
    r".*\.(json|jinja|safetensors|gguf|model|tiktoken|py)|loss\.csv|README\.md|Modelfile|merges\.txt|vocab\.txt|"
    + MORE_TEMPLATES,
    re.DOTALL,
)
_DVC_OBJECT = re.compile(r".*/files/md5/[0-9a-f]{2}/[0-9a-f]{30}", re.DOTALL)


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target`, whole or not at all, when the block ends.

    What was there before is replaced, and stays if the block fails or the process is killed.
    """
    with beside(target) as folder:
        yield folder
        old = sibling(target, "old")
        # The contents reach the disk before the name does. Renamed first, the folder could have its
        # name after a power cut, and files without their bytes.
        sync_tree(folder)
        # No rename replaces a folder that is not empty, so the old one moves aside. A process that
        # is killed between the two renames leaves it there, and the next writer puts it back.
        if target.exists():
            target.rename(old)
        try:
            folder.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        _sync(target.parent)  # the names too, before the old folder is gone
        _remove(old)


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, as a rename is atomic only within one file system.

    What killed processes left there is removed first, and what they were about to replace put back.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _recover(target)
    folder = sibling(target, "tmp")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_file(path: Path, contents: str | Iterable[bytes], durable: bool = False) -> None:
    """Replace the file at `path`, which keeps its permissions.

    Raises OSError about `path`, which is then unchanged.

    `durable`: also across a power cut.
    """
    # Written in place, the file would be cut short by a full disk or a kill, and a reader would
    # meet half of it. Beside the target, as a rename is atomic only within one file system; with
    # the process's id, as two may write at a time.
    new = sibling(path, "tmp")
    try:
        _recover(path)
        with new.open("wb") as file:
            file.writelines([contents.encode()] if isinstance(contents, str) else contents)
            # As in `writing`, contents before name. It takes milliseconds, so what is written
            # several times per second or can be computed again does without.
            if durable:
                file.flush()
                os.fsync(file.fileno())
        with suppress(OSError):  # there is none yet, or the file system knows no permissions
            new.chmod(path.stat().st_mode)
        new.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            new.unlink()


def refuse_other(out: Path, earlier: bool, sources: Iterable[Path]) -> None:
    """Raises UserError if writing to the folder `out` could destroy something.

    `out`, which is replaced as a whole, must not be one of `sources`, nor lie inside or around one,
    nor hold the current folder. It must be empty or an `earlier` result, and hold only what
    commands write or a source has: a merge copies the license of a base.
    """
    resolved = out.resolve()
    copied: set[str] = set()
    for source in (source.resolve() for source in sources):
        if resolved == source:
            raise UserError(f"{out} is also an input. Name another folder with --out.")
        if source in resolved.parents or resolved in source.parents:
            raise UserError(
                f"{out} and the input {source} contain one another. Name another folder with --out."
            )
        copied |= {path.name for path in source.glob("[!.]*")}
    if resolved in (Path.cwd(), *Path.cwd().parents):
        raise UserError(
            f"{out} is or holds the current folder, which cannot be replaced. Name another folder "
            "with --out."
        )
    if out.exists() and not earlier and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"{out} exists and holds other files. Name another folder with --out, or remove it."
        )
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    foreign = [name for name in names if not _WRITTEN.fullmatch(name) and name not in copied]
    if foreign:
        raise UserError(
            f"{out} holds {foreign[0]}, which lora did not write. Move it, or name another folder "
            "with --out."
        )


def is_temporary(name: str) -> bool:
    """Whether a file or folder is one that is being written, or that a killed process left."""
    return bool(_TEMPORARY.fullmatch(name))


def sibling(target: Path, kind: str) -> Path:
    """A path beside `target` with this process's id and machine and, since ids are reused, its
    start time.
    """
    _, started = locks.process_state(os.getpid())
    return target.parent / f".{target.name}.{os.getpid()}-{started}-{_machine()}.{kind}"


def _machine() -> str:
    """This machine's name without the characters that part the name of a temporary folder."""
    return re.sub(r"\W", "_", locks.host())


def _recover(target: Path) -> None:
    """Restore what a killed process was about to replace, and delete what it had started."""
    try:
        siblings = sorted(target.parent.iterdir())
    except OSError:  # there is no folder yet, or it cannot be listed
        return
    for leftover in siblings:
        match = _TEMPORARY.fullmatch(leftover.name)
        if match and match[1] == target.name and is_abandoned(leftover):
            if match[5] == "old" and not target.exists():
                leftover.rename(target)
            else:
                _remove(leftover)


def is_abandoned(path: Path) -> bool:
    """Whether nobody goes on writing this hidden file or folder: its process is gone."""
    # The start time is missing where the system has no /proc, and with the machine in names that
    # earlier versions wrote.
    match = _TEMPORARY.fullmatch(path.name)
    if not match:
        return True
    pid, started, machine = int(match[2]), match[3] or "", match[4] or _machine()
    if machine == _machine():
        return pid == os.getpid() or not locks.is_running(pid, started)
    # Of another machine's process nobody here knows. One that writes changes something every few
    # seconds, or is stopped for the night at most; ctime, as a link keeps the mtime of its file.
    try:
        latest = max(part.stat().st_ctime for part in (path, *path.rglob("*")))
    except FileNotFoundError:  # it has just become the target
        return False
    return time.time() - latest > DAY


def _remove(path: Path) -> None:
    """Delete a folder, or a link or file in its place."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """fsync `folder` and every file and folder below it."""
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_untrusted(folder: Path) -> None:
    """Raises UserError for what no model or adapter folder needs but a malicious one may have.

    That is links to files outside it, text files so large that reading them exhausts memory, and a
    config.json of too many layers or labels.
    """
    # Through a link, a folder from elsewhere could make any file of this machine part of a base,
    # which is then shared. Two kinds are allowed: from a snapshot of the hub's cache to its blobs,
    # and into DVC's cache, where the name of a file is the digest of its content, so that nobody
    # can name a file whose content they do not know.
    # unlike `resolve`, it passes a loop of links, which leads to no file
    resolved = Path(os.path.realpath(folder))
    trusted = [resolved]
    if resolved.parent.name == "snapshots" and resolved.parent.parent.name.startswith("models--"):
        trusted.append(resolved.parent.parent / "blobs")
    for parent, folders, files in os.walk(folder):
        # Links to folders are not followed when a model is read, except that of the chat templates.
        for name in sorted((*files, *(name for name in folders if name == MORE_TEMPLATES))):
            path = Path(parent, name)
            if not path.is_symlink():
                continue
            target = Path(os.path.realpath(path))
            is_inside = any(root in target.parents for root in trusted)
            if not is_inside and not _DVC_OBJECT.fullmatch(str(target)):
                raise UserError(
                    f"{path} is a link to a file outside its folder: {target}. "
                    "Replace it with a copy of that file if you trust it."
                )
        folders[:] = [name for name in folders if not name.startswith(".")]
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        size = path.stat().st_size if path.suffix in _TEXTS and path.is_file() else 0
        if size > LARGEST_TEXT:
            raise UserError(
                f"{path} must have at most {LARGEST_TEXT:,} bytes, got {size:,}. Copy the model "
                "again."
            )
    config: dict[str, Any] = {}
    with suppress(UserError):  # who reads it says that it is missing or broken
        config = read_json(folder / "config.json", "")
    refuse_long_lists(config, str(folder / "config.json"))


def refuse_long_lists(config: Mapping[str, Any], source: str) -> None:
    """Raises UserError for a config, or one in it, of more than `MOST_LISTED` layers or labels."""
    parts: list[Mapping[str, Any]] = [config]
    for part in parts:  # it grows
        parts += [value for value in part.values() if isinstance(value, dict)]
        for key, value in part.items():
            is_count = key.endswith(("layer", "layers", "labels"))
            if is_count and isinstance(value, int | float) and value > MOST_LISTED:
                raise UserError(
                    f"{source}: {key} must be at most {MOST_LISTED:,}, got {value:,}. Copy the "
                    "model again."
                )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, hint: str, most: int | None = None) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises UserError, with `hint` as the next step, if it is missing, no object or has more than
    `most` bytes, by default LARGEST_JSON.
    """
    most = most or LARGEST_JSON
    try:
        with path.open("rb") as file:
            raw = file.read(most + 1)
        if len(raw) > most:
            raise UserError(f"{path} must have at most {most:,} bytes. {hint}.")
        value = json.loads(raw.decode())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. {hint}.") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object. {hint}.")
    return value


def once_until_changed(read: Callable[..., Read]) -> Callable[..., Read]:
    """`read` of some files, kept in this process while their states stay.

    A run needs the digests of a base several times, and each takes 0.5 s per GB. No program can set
    ctime: it reveals an edit that keeps the size and restores mtime.
    """

    @lru_cache(maxsize=1000)
    def read_in_state(paths: tuple[Path, ...], _states: tuple[tuple[int, ...], ...]) -> Read:
        return read(*paths)

    @wraps(read)
    def kept(*paths: Path) -> Read:
        stats = [path.stat() for path in paths]
        latest = max((stat.st_ctime_ns for stat in stats), default=0)
        if time.time_ns() - latest <= SETTLED:
            return read(*paths)
        states = [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats]
        return read_in_state(paths, tuple(states))

    return kept


@once_until_changed
def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    import hashlib  # with OpenSSL 3 ms, which the calculator does not need

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def contents(folder: Path) -> dict[str, str]:
    """Relative name → sha256 of every file below `folder` except the manifest."""
    # 10 ms, which the calculator does not need
    from concurrent.futures import ThreadPoolExecutor

    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    names = [path.relative_to(folder).as_posix() for path in files]
    with ThreadPoolExecutor() as pool:  # a large model has several files
        return dict(zip(names, pool.map(file_digest, files), strict=True))


def digest(path: Path) -> str:
    """sha256 of a file, or of a folder's names and contents but the manifest. Raises UserError."""
    if path.is_file():
        return file_digest(path)
    if not path.is_dir():
        raise UserError(f"{path} does not exist. Run the stage that makes it.")
    return contents_digest(contents(path))


def sealed_digest(manifest: Mapping[str, Any]) -> str:
    """`digest` of a manifest's folder at the time it was sealed."""
    return contents_digest(manifest["files"])


def contents_digest(files: Mapping[str, str]) -> str:
    """`digest` of a folder with these contents."""
    import hashlib

    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def seal(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, with the sha256 of every file in the folder."""
    write_json(folder / MANIFEST, {**manifest, "files": contents(folder)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact folder. Raises UserError if it is missing or invalid."""
    path = folder / MANIFEST
    manifest = read_json(path, "Make the artifact again")
    if not isinstance(manifest.get("files"), dict):
        raise UserError(f"{path} is not a manifest of this project. Make the artifact again.")
    return manifest


def not_shipped(folder: Path) -> dict[str, int]:
    """Name → bytes of the files, such as weights, that the artifact in a demo is without; {} for
    any other folder.
    """
    try:
        left_out = read_manifest(folder).get(NOT_SHIPPED, {})
        return {str(name): int(size) for name, size in left_out.items()}
    except (UserError, AttributeError, TypeError, ValueError):
        return {}


def verify(
    folder: Path, contents: Callable[[Path], Mapping[str, str]] = contents
) -> dict[str, Any]:
    """The manifest, if every file has its sha256. Raises UserError with the first that has not."""
    manifest = read_manifest(folder)
    actual, sealed = contents(folder), manifest["files"]
    for name in sorted(actual.keys() | sealed.keys()):
        if actual.get(name) != sealed.get(name):
            change = "was changed"
            if name not in actual:
                change = "is missing"
            elif name not in sealed:
                change = "was added"
            undo = "restore" if name in sealed else "remove"
            raise UserError(
                f"{folder / name} {change} after the artifact was made. Make it again or {undo} "
                "the file."
            )
    return manifest
