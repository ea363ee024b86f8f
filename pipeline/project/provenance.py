"""What an artifact was made with: the stage's code, the git commit, the library versions."""

import hashlib
import platform
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from modulefinder import ModuleFinder
from pathlib import Path
from types import CodeType

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "matplotlib")


def code_files(module: str) -> list[Path]:
    """The files of this repository that `module` imports, directly or not, including its own; nothing is executed.

    A package that is a stage's module finds its modules by their names when it runs, so all of them count.
    """
    files: set[Path] = set()
    waiting = [module, *(f"{module}.{path.stem}" for path in ROOT.joinpath(*module.split(".")).glob("*.py"))]
    while waiting:
        name = waiting.pop()
        path = _file_of(name)
        if path is not None and path not in files:
            files.add(path)
            package, _, _ = name.rpartition(".")  # its __init__ runs before its modules
            waiting += [*_imports(path.read_bytes()), package]
    return sorted(files)


def _file_of(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((candidate for candidate in candidates if candidate.is_file()), None)


@cache  # by content: a process that runs several stages asks for the same files many times
def _imports(source: bytes) -> tuple[str, ...]:
    """The modules of `pipeline` that a file imports, also inside functions.

    Read from bytecode: in CPython 3.11, `ast.parse` raises SystemError if another thread parses at the same time, as
    `inspect.signature` does.
    """
    names, imports_in = list[str](), ModuleFinder().scan_opcodes
    waiting = [compile(source, "<source>", "exec")]
    while waiting:
        code = waiting.pop()
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        for kind, imported in imports_in(code):
            if kind == "absolute_import":
                members, module = imported
                names += [module, *(f"{module}.{member}" for member in members or ())]
    return tuple(name for name in names if name.split(".")[0] == "pipeline")


def code_digest(module: str) -> str:
    """sha256 of the names and contents of `code_files(module)`."""
    digest = hashlib.sha256()
    for path in code_files(module):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def commit(module: str) -> str | None:
    """The last git commit that changed the code of `module`, or None outside a repository.

    Not HEAD: a commit that touches a README must not change the bytes of every artifact.
    """
    command = ["git", "log", "-1", "--format=%H", "--", *map(str, code_files(module))]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def committed(path: Path) -> str | None:
    """The text of a file in the last commit, or None if it is not in it."""
    command = ["git", "show", f"HEAD:./{path.name}"]
    try:
        done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError, UnicodeDecodeError):
        return None
    return done.stdout


@cache
def versions(*more: str) -> Mapping[str, str]:
    """Versions of Python and of the libraries that affect an artifact's bytes, and of those in `more` if installed."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}, **_installed(more)}


def _installed(names: Iterable[str]) -> Mapping[str, str]:
    installed = {}
    for name in names:
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed
