"""What an artifact was made with: the stage's code, the git commit, the library versions."""

import hashlib
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from modulefinder import ModuleFinder
from pathlib import Path
from types import CodeType
from typing import Any

from pipeline import extensions

ROOT = Path(__file__).resolve().parents[2]
# a package that imports one of these finds its own modules
FINDERS = {"pkgutil", "pipeline.extensions"}
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "matplotlib")


def code_files(*modules: str) -> list[Path]:
    """The files of the program and of extensions that `modules` import, directly or not, including
    their own; nothing is executed.

    A package whose __init__ finds its modules (data formats) runs them all, those of extensions
    too. What a registry elsewhere finds is not among them: so a method's file concerns the stages
    that run that method.
    """
    roots = _roots()
    files: set[Path] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        package, _, _ = name.rpartition(".")  # its __init__ runs before its modules
        if (root := roots.get(name.partition(".")[0])) is None:
            continue
        place = root.joinpath(*name.split("."))
        candidates = (place.with_suffix(".py"), place / "__init__.py")
        path = next((candidate for candidate in candidates if candidate.is_file()), None)
        if path is not None and path not in files:
            files.add(path)
            imported = _imports(path, path.read_bytes())
            waiting += [package, *imported]
            # a package that finds its own modules runs all
            if path.name == "__init__.py" and not FINDERS.isdisjoint(imported):
                waiting += [f"{name}.{module.stem}" for module in path.parent.glob("*.py")]
                waiting += extensions.added_modules(name)
    return sorted(files)


@cache  # by content: a process that runs several stages asks for the same files many times
def _imports(path: Path, _source: bytes) -> tuple[str, ...]:
    """The modules that a file imports, also inside functions.

    Read from bytecode, which Python keeps beside the file: in CPython 3.11, `ast.parse` raises
    SystemError if another thread parses at the same time, as `inspect.signature` does.
    """
    names, imports_in = list[str](), ModuleFinder().scan_opcodes
    try:
        waiting: list[Any] = [SourceFileLoader("module", str(path)).get_code("module")]
    # not Python, as an extension's file may be: what imports it fails, and says so
    except (SyntaxError, ValueError):
        return ()
    while waiting:
        code = waiting.pop()
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        for kind, imported in imports_in(code):
            if kind == "absolute_import":
                members, module = imported
                names += [module, *(f"{module}.{member}" for member in members or ())]
    return tuple(names)


def _roots() -> dict[str, Path]:
    """Top-level package → the folder that it lies in: the program's, and those of extensions."""
    roots = {"pipeline": ROOT}
    for name in extensions.packages():
        spec = find_spec(name)  # of a top-level name: imports nothing
        if spec and spec.origin and spec.has_location:
            # a package's __init__.py, or an extension that is one file
            roots[name] = Path(spec.origin).parents[1 if spec.submodule_search_locations else 0]
    return roots


def code_digest(*modules: str) -> str:
    """sha256 of the names and contents of `code_files(*modules)`."""
    digest = hashlib.sha256()
    # an extension may lie inside another root, as in a clone: its own is the deepest
    roots = sorted(_roots().values(), key=lambda root: -len(root.parts))
    for path in code_files(*modules):
        root = next(root for root in roots if path.is_relative_to(root))
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def commit(*modules: str) -> str | None:
    """The last git commit that changed the code of `modules`, or None outside a repository.

    Not HEAD: a commit that touches a README must not change the bytes of every artifact.
    """
    files = [str(path) for path in code_files(*modules) if path.is_relative_to(ROOT)]
    if not files:  # of an extension alone: without names, git tells HEAD
        return None
    return (_git(ROOT, "log", "-1", "--format=%H", "--", *files) or "").strip() or None


def committed(path: Path) -> str | None:
    """The text of a file in the last commit, or None if it is not in it."""
    return _git(path.parent, "show", f"HEAD:./{path.name}")


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None if it is not installed or fails."""
    try:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError, UnicodeDecodeError):
        return None


def version_of(library: str) -> str:
    """The version of an installed package, or "not installed"."""
    # 6 ms, which the first paint should not wait for
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


@cache
def versions(*more: str) -> Mapping[str, str]:
    """Versions of Python and of the libraries that affect an artifact's bytes, and of those in
    `more` if installed.
    """
    # 6 ms, which the first paint should not wait for
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
    for name in more:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def public(versions: Mapping[str, str]) -> dict[str, str]:
    """The versions by which results are compared: of torch 2.9.0+cu128 the public part, 2.9.0.

    What follows the + is the build for a device, and what one device made is a result for all.
    """
    return {library: str(number).partition("+")[0] for library, number in versions.items()}
