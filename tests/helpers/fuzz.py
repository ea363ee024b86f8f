"""Bad input on purpose: valid files, changed by hypothesis, given to a reader that is watched while
it reads.

A reader may answer, or raise a UserError of one readable line. It fails if it raises anything else,
takes more than `SECONDS` or `MEMORY`, opens a file for writing outside the folder it may write to,
starts a program or a connection, or looks up what a pickle names.
"""

import copy
import faulthandler
import json
import os
import resource
import signal
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import LONGEST_MESSAGE, UserError
from pipeline.files.text import OBEYED

# of CPU time, so that a busy machine changes nothing; the page's largest limit is the 10 s of
# patterns
SECONDS = 12.0
# bytes of address space above what the process has: the 512 MiB of templates are another's
MEMORY = 768 * 2**20
# seconds after which what waits forever, or a call of C that no signal interrupts, ends the test
# run
STUCK = 120.0
# Reader → examples that are drawn for it. The seeds are fixed: a run tries the same ones again.
EXAMPLES: Mapping[str, int] = {
    "safetensors headers": 500,
    "safetensors bytes": 200,
    "safetensors indexes": 100,
    "GGUF headers": 300,
    "GGUF bytes": 200,
    "model configs": 600,
    "model folders": 100,
    "tokenizers": 150,
    "chat templates": 100,
    "adapter configs": 800,
    "adapters of PEFT": 300,
    "adapters of other tools": 300,
    "torch files": 400,
    "manifests": 150,
    "params": 400,
    "configs of other tools": 300,
    "data rows": 800,
    "data bytes": 400,
    "task files": 300,
    "HTTP bodies": 300,
    "HTTP heads": 200,
    "requests in JSON lines": 300,
}

# Watching

# what the reader did that it may not; None while nothing is watched
_watched: list[str] | None = None
_allowed = ""  # the only folder that may be written to
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS = {
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.chmod",
    "os.truncate",
}
_NEVER = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "socket.connect",
    "pickle.find_class",
}


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    if event in _NEVER:
        _watched.append(f"{event} {arguments!r:.200}")
    elif event in _PATHS or (
        event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
    ):
        for path in (
            arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]
        ):
            name = (
                os.path.realpath(os.fsdecode(path))
                if isinstance(path, str | bytes | os.PathLike)
                else ""
            )
            if name and not name.startswith((_allowed, "/dev/null")) and "__pycache__" not in name:
                _watched.append(f"{event} {name}")


sys.addaudithook(_audit)


class TooSlow(Exception):
    """A reader took longer than `SECONDS`."""


@contextmanager
def limits(
    folder: Path, seconds: float = SECONDS, memory: int = MEMORY, may: Sequence[str] = ()
) -> Iterator[None]:
    """Within it, time and memory are limited, and writing outside `folder` is an error. `may`:
    events that are none.
    """
    global _watched, _allowed

    def ring(*_: object) -> None:
        raise TooSlow(f"more than {seconds:g} s")

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    former = signal.signal(signal.SIGPROF, ring)
    faulthandler.dump_traceback_later(STUCK, exit=True)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, hard))
    _allowed, _watched = str(folder.resolve()), []
    try:
        yield
    finally:
        seen, _watched = _watched, None
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGPROF, former)
    seen = [event for event in seen if event.partition(" ")[0] not in may]
    assert not seen, f"a reader must not do this: {seen[:3]}"


def read_or_refuse(reader: Callable[[], object], folder: Path, **options: Any) -> str | None:
    """What `reader` says of its input, None if it takes it. Anything but an answer or a UserError
    fails the test.
    """
    try:
        with limits(folder, **options):
            reader()
    except UserError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) <= LONGEST_MESSAGE, message[:500]
        assert not any(ord(character) in OBEYED for character in message), repr(message[:500])
        return message
    return None


# Trying

tried: dict[str, int] = {}  # reader → examples of this process


def fuzz(
    reader: str, **strategies: st.SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test that is tried on `EXAMPLES[reader]` inputs, drawn from `strategies`; its `folder` is a
    fresh one.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        def run(**drawn: Any) -> None:
            tried[reader] = tried.get(reader, 0) + 1
            fixed = {name: value for name, value in drawn.items() if name not in strategies}
            changed = {name: value for name, value in drawn.items() if name in strategies}
            with tempfile.TemporaryDirectory() as folder:
                test(folder=Path(folder), **fixed, **changed)

        import inspect

        names = [name for name in inspect.signature(test).parameters if name != "folder"]
        parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
        checks = (
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.function_scoped_fixture,
        )
        search = settings.get_current_profile_name() == "search"  # of others, and more
        count = EXAMPLES[reader] * (10 if search else 1)
        limited = settings(
            max_examples=count, deadline=None, derandomize=not search, suppress_health_check=checks
        )
        return limited(given(**strategies)(run))

    return decorate


# Changing

LONG = "x" * 5_000
TEXTS = (
    "",
    " ",
    "\0",
    "\x1b[2J\r\n",
    "error: \n",
    "\u202e",
    "\ud800",
    "../../etc/passwd",
    "/etc/passwd",
    "*" * 40,
    LONG,
)
NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400),
    *(0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf")),
)
PATTERNS = (
    r"(\w|.|_)*\d\d\d\d",
    "(((((a*)*)*)*)*)*b",
    "(",
    "[",
    "a{99999}{99999}",
    "(?R)",
    "(?<=a*)",
    "\\",
)


def nested(depth: int, value: Any = 1, key: str | None = None) -> Any:
    for _ in range(depth):
        value = [value] if key is None else {key: value}
    return value


ODD: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from((*TEXTS, *PATTERNS)),
    st.sampled_from(NUMBERS),
    st.sampled_from((None, True, False, "x" * 100_000)),
    st.sampled_from(
        (
            [],
            {},
            [[]],
            [{}],
            {"": None},
            [None] * 3,
            ["x"] * 300,
            nested(60),
            nested(60, key="a"),
            nested(300),
        )
    ),
    st.text(max_size=12),
    st.integers(),
    st.dictionaries(st.text(max_size=6), st.integers() | st.text(max_size=6), max_size=3),
    st.lists(st.integers() | st.text(max_size=6), max_size=4),
)


def _drawn(draw: st.DrawFn, values: st.SearchStrategy[Any]) -> Any:
    """A value that may be changed further: what `sampled_from` draws is the same object each
    time.
    """
    value = draw(values)
    return json.loads(json.dumps(value)) if isinstance(value, dict | list) else value


def _spots(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values below `tree`; of a long list to the first and the last."""
    keys: Sequence[Any] = ()
    if isinstance(tree, dict):
        keys = [*tree]
    elif isinstance(tree, list):
        keys = range(len(tree)) if len(tree) < 8 else (0, 1, len(tree) - 1)
    below = (
        ([(*path, key), *_spots(tree[key], (*path, key))] for key in keys) if len(path) < 20 else ()
    )
    return [spot for spots in below for spot in spots][:3_000]


@st.composite
def changed(draw: st.DrawFn, tree: Any, values: st.SearchStrategy[Any] = ODD, most: int = 3) -> Any:
    """A copy of a tree of dictionaries and lists with up to `most` things in it replaced, removed,
    renamed or moved.
    """
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, most))):
        spots = _spots(tree)
        if not spots or draw(st.integers(0, 40)) == 0:
            return _drawn(draw, values)  # all of it
        *path, last = draw(st.sampled_from(spots))
        parent = tree
        for key in path:
            parent = parent[key]
        match draw(
            st.sampled_from(
                ("replace", "replace", "replace", "remove", "rename", "swap", "wrap", "add")
            )
        ):
            case "replace":
                parent[last] = _drawn(draw, values)
            case "remove":
                del parent[last]
            case "rename" if isinstance(parent, dict):
                parent[
                    draw(st.sampled_from((*TEXTS[:-2], *map(str, parent))) | st.text(max_size=8))
                ] = parent.pop(last)
            case "swap":
                other = draw(
                    st.sampled_from([*parent] if isinstance(parent, dict) else range(len(parent)))
                )
                parent[last], parent[other] = parent[other], parent[last]
            case "wrap":
                parent[last] = draw(
                    st.sampled_from((lambda v: [v], lambda v: {"a": v}, str, lambda v: [v] * 50))
                )(parent[last])
            case _:
                new = _drawn(draw, values)
                if isinstance(parent, dict):
                    parent[draw(st.text(max_size=8))] = new
                else:
                    parent.append(new)
    return tree


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, most: int = 3) -> bytes:
    """`whole` with up to `most` ranges of bytes replaced, removed, doubled or moved, or cut."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        if draw(st.booleans()):  # near the beginning, where headers are
            at %= 64
        count = draw(st.sampled_from((1, 2, 4, 8, 64, 1000)))
        match draw(st.sampled_from(("number", "bytes", "cut", "remove", "double", "zeros", "bit"))):
            case "number":
                value = draw(
                    st.sampled_from((0, 1, 2**7, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1))
                )
                raw = struct.pack("<Q", value)[: draw(st.sampled_from((1, 2, 4, 8)))]
                data[at : at + len(raw)] = raw
            case "bytes":
                data[at : at + count] = draw(st.binary(max_size=16))
            case "cut":
                del data[at:]
            case "remove":
                del data[at : at + count]
            case "double":
                data[at:at] = data[at : at + count] * draw(st.sampled_from((1, 2, 50)))
            case "zeros":
                data[at : at + count] = bytes(len(data[at : at + count]))
            case _ if data:
                data[at % len(data)] ^= 1 << draw(st.integers(0, 7))
            case _:
                pass
    return bytes(data)


def as_json(tree: Any) -> bytes:
    """JSON with NaN, infinities and unpaired surrogates as they are; without what Python itself
    cannot write.
    """
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(tree, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
    finally:
        sys.set_int_max_str_digits(limit)


def json_files(tree: Any, values: st.SearchStrategy[Any] = ODD) -> st.SearchStrategy[bytes]:
    """The bytes of a JSON file like `tree`: in three of four, another tree; in one, other bytes."""
    trees = changed(tree, values).map(as_json)
    deep = st.sampled_from(
        (b"[" * 100_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b"", b"null", b"\xff\xfe{}")
    )
    twice = st.just(as_json(tree)[:-1] + b"," + as_json(tree)[1:])
    return st.one_of(trees, trees, trees, damaged(as_json(tree)), st.one_of(deep, twice))
