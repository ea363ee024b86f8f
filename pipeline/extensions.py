"""What installed packages add to the program: methods, formats, stages, commands and more.

An extension is a Python package that names its modules as entry points of one group, `GROUP`. Each
has the name KIND.NAME:

    [project.entry-points.lora_workbench]
    "method.tiny" = "my_package.tiny"
    "data_format.qa" = "my_package.qa"

`KINDS` lists the kinds, and what a module of each defines. Ours are files of a package, found by
their names. A `Registry` holds both. Nothing is imported before it is asked for, nothing is read
from the folder in which a command runs, and an extension that cannot be imported is left out:
`lora doctor` says why.
"""

import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from functools import cache, cached_property
from importlib import import_module
from itertools import islice
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

from pipeline.errors import UserError, first_line

T = TypeVar("T")
GROUP = "lora_workbench"
OFF = "LORA_NO_EXTENSIONS"  # an environment variable that leaves them all out


class Kind(NamedTuple):
    """A kind of extension."""

    attribute: str  # what a module of this kind defines; empty: the module itself is used
    package: str = ""  # ours, with a file for each name


KINDS = {
    "method": Kind("STAGE", "pipeline.stages.methods"),
    "stage": Kind("STAGE"),
    "section": Kind("SECTION"),
    "command": Kind("app"),
    "search": Kind("SEARCH", "pipeline.stages.searches"),
    "engine": Kind("ENGINE", "pipeline.fleet.engines"),
    "fleet_format": Kind("FORMAT", "pipeline.fleet.formats"),
    "evaluation": Kind("KIND", "pipeline.evaluation.kinds"),
    "data_format": Kind("FORMAT", "pipeline.data.formats"),
    "export_format": Kind("FORMAT", "pipeline.export.formats"),
    "gguf_family": Kind("FAMILY", "pipeline.export.gguf.families"),
    "certify_engine": Kind("ENGINE", "pipeline.certify.engines"),
    "certify_kind": Kind("KIND", "pipeline.certify.kinds"),
    "adapter_format": Kind("FORMAT", "pipeline.weights.foreign"),
    "config_format": Kind("FORMAT", "pipeline.project.foreign"),
    "tool_call_format": Kind("FORMAT", "pipeline.inference.http.tool_calls"),
    "tracker": Kind("", "pipeline.project.logs.trackers"),
    "family": Kind("FAMILIES", "pipeline.calc.families"),
    "preset": Kind("PRESET"),
}


class EntryPoint(NamedTuple):
    """A module that an installed package adds."""

    kind: str
    name: str
    module: str
    distribution: str  # the package, as NAME-VERSION


class ExtensionError(UserError):
    """An extension cannot be used. The message names its package."""


@cache
def entry_points() -> tuple[EntryPoint, ...]:
    """The entry points of all installed packages, sorted; nothing is imported. () if `OFF` is set.

    Read by hand: with `importlib.metadata` it takes 60 ms, half of what `lora --help` may take.
    """
    points = list[EntryPoint]()
    if os.environ.get(OFF):
        return ()
    current = os.path.realpath(os.curdir)
    for folder in dict.fromkeys(sys.path):
        # `python -m` puts the current folder there: a project's files are data, not code
        if not folder or os.path.realpath(folder) == current:
            continue
        for package in Path(folder).glob("*.dist-info"):
            points += _read(package)
    return tuple(sorted(set(points)))


def _read(package: Path) -> Iterator[EntryPoint]:
    try:
        text = (package / "entry_points.txt").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return
    if GROUP not in text:
        return
    section = ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            section = line.strip("[]").strip()
        elif section == GROUP and "=" in line and not line.startswith("#"):
            full_name, _, module = line.partition("=")
            kind, _, name = full_name.strip().partition(".")
            yield EntryPoint(kind, name, module.strip(), package.stem)


def added_modules(package: str) -> list[str]:
    """The modules that extensions add to a package of ours which has a registry."""
    kinds = {kind for kind, about in KINDS.items() if about.package == package}
    return [point.module for point in entry_points() if point.kind in kinds]


def packages() -> set[str]:
    """The top-level packages of all extensions."""
    return {point.module.partition(".")[0] for point in entry_points()}


class Registry(Mapping[str, T]):
    """Name → what its module defines: our modules of a kind, then those of extensions.

    `order`: the key by which they are sorted; those that cannot be used are then left out. Without
    it the names are known before anything is imported. `spell`: a module's name → its own. `taken`:
    further names of ours. `check(name, item)`: why what an extension defines cannot be used; empty
    if it can.
    """

    def __init__(
        self,
        kind: str,
        order: Callable[[T], Any] | None = None,
        spell: Callable[[str], str] = str,
        taken: Collection[str] = (),
        check: Callable[[str, T], str] | None = None,
    ) -> None:
        self._kind, self._order, self._check = kind, order, check
        self._ours = {spell(name): module for name, module in _ours(kind).items()}
        self._theirs: dict[str, EntryPoint] = {}
        self._loaded: dict[str, T] = {}
        for point in (point for point in entry_points() if point.kind == kind):
            if point.name in self._ours or point.name in taken:
                _problems[point] = f"{_title(point)}: the program has this name."
            elif other := self._theirs.get(point.name):
                _problems[point] = f"{_title(point)}: {other.distribution} has this name."
            else:
                self._theirs[point.name] = point
        _registries[kind] = self

    def __getitem__(self, name: str) -> T:
        """Raises ExtensionError for an extension that cannot be used."""
        if name in self._loaded:
            return self._loaded[name]
        if name in self._ours:
            self._loaded[name] = _defined(import_module(self._ours[name]), self._kind)
        else:
            self._loaded[name] = self._load(self._theirs[name])
        return self._loaded[name]

    def _load(self, point: EntryPoint) -> T:
        try:
            item: T = _import(point)
            reason = self._check(point.name, item) if self._check else ""
            if self._order:
                ours = [self[name] for name in islice(self._ours, 1)]
                sorted(map(self._order, [*ours, item]))  # raises TypeError unless they compare
        except (AttributeError, LookupError, TypeError) as error:
            reason = f"{point.module} does not define what it has to ({first_line(error)})."
        if reason:
            raise _unusable(point, reason)
        return item

    @cached_property
    def _names(self) -> list[str]:
        names = [*self._ours, *self._theirs]
        if self._order is None:
            return names
        places = {}
        for name in names:
            with suppress(ExtensionError):
                places[name] = self._order(self[name])
        return sorted(places, key=lambda name: places[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._ours or name in self._theirs

    def usable(self) -> Iterator[T]:
        """All that can be used, in order."""
        for name in self:
            with suppress(ExtensionError):
                yield self[name]

    def problems(self) -> None:
        """Find out what cannot be used."""
        for name in self._theirs:
            with suppress(ExtensionError):
                self[name]


_registries: dict[str, Registry[Any]] = {}  # by kind
_problems: dict[EntryPoint, str] = {}  # why it adds nothing


def problems() -> list[str]:
    """A line for each entry point that adds nothing, and why. Imports all extensions."""
    for point in entry_points():
        if point.kind not in KINDS:
            _problems[point] = f"{_title(point)}: the kind must be one of {', '.join(KINDS)}."
            continue
        if package := KINDS[point.kind].package:
            import_module(package)  # makes its registry
        registry = _registries.get(point.kind)
        if registry is None:
            registry = Registry[Any](point.kind)
        registry.problems()
    return [_problems[point] for point in entry_points() if point in _problems]


def _title(point: EntryPoint) -> str:
    return f"{point.kind}.{point.name} of {point.distribution}"


def _unusable(point: EntryPoint, reason: str) -> ExtensionError:
    _problems[point] = f"{_title(point)}: {reason}"
    return ExtensionError(_problems[point])


def _ours(kind: str) -> dict[str, str]:
    """Name of a file → its module, of the package that this kind has here."""
    package = KINDS[kind].package
    if not package:
        return {}
    files = iter_modules(import_module(package).__path__)
    names = [file.name for file in files if not file.name.startswith("_")]
    return {name: f"{package}.{name}" for name in names}


def _import(point: EntryPoint) -> Any:
    """What the module of an entry point defines. Raises ExtensionError."""
    attribute = KINDS[point.kind].attribute
    try:
        module = import_module(point.module)
    except (Exception, SystemExit) as error:  # whatever the code of others raises
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise _unusable(point, f"{point.module} cannot be imported: {reason}.") from None
    if attribute and not hasattr(module, attribute):
        raise _unusable(point, f"{point.module} defines no {attribute}.")
    return _defined(module, point.kind)


def _defined(module: ModuleType, kind: str) -> Any:
    attribute = KINDS[kind].attribute
    return getattr(module, attribute) if attribute else module
