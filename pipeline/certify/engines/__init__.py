"""The programs in which models can be certified, one file each, found by its name."""

import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from pipeline.certify.kinds import Checked
from pipeline.errors import UserError
from pipeline.extensions import Registry

SPEC = re.compile(
    r"(?P<name>[A-Za-z][\w.-]*?)(==(?P<version>\d[\w.]*))?(:(?P<precision>\w+))?", re.ASCII
)


# What is certified, or a changed copy, or None for its base alone → the files that a program opens:
# a model, and an adapter on it or None. Raises UserError where they cannot be written.
Opens = Callable[[Path | None], tuple[Path, Path | None]]


def as_stored(checked: Checked, _precision: str | None, _room: Path) -> Opens:
    """The files themselves."""

    def opens(path: Path | None) -> tuple[Path, Path | None]:
        if path is not None and not checked.kind.is_adapter(path):
            return path, None
        return checked.base, path

    return opens


class Engine(NamedTuple):
    """A program."""

    order: int
    # a version such as 0.18, or None → what pip must install
    requirements: Callable[[str | None], tuple[str, ...]]
    runner: str  # a file of pipeline/certify/runners
    # whether this Python has all that it needs for a kind of `KINDS`
    is_here: Callable[[str], bool]
    kinds: tuple[str, ...] = ("adapter", "checkpoint")  # that it opens
    precisions: tuple[str, ...] = ()  # in which it can compute, the default first; none is fp32
    # `precision` and a folder for files → what it opens
    opens: Callable[[Checked, str | None, Path], Opens] = as_stored
    # `precision` and a folder → entries of the certificate, of what rounding would cost a merge
    if_merged: Callable[[Checked, str | None, Path], dict[str, float]] | None = None

    def rounding(self, precision: str | None) -> str | None:
        """How it rounds at a precision; None in fp32."""
        return precision or (self.precisions[0] if self.precisions else None)


class Wanted(NamedTuple):
    """An engine of `--in`, such as peft==0.18 or llama.cpp:q8_0."""

    name: str
    version: str | None = None
    precision: str | None = None

    @property
    def label(self) -> str:
        version = self.version and f"=={self.version}"
        precision = self.precision and f":{self.precision}"
        return f"{self.name}{version or ''}{precision or ''}"

    @property
    def engine(self) -> Engine:
        return ENGINES[self.name]

    def python(self, kind: str, make: bool = True) -> Path:
        """This Python where no version is asked for and it has the program; else an environment's.

        Raises UserError where it cannot be had.
        """
        from pipeline.certify.environment import python_with

        if self.version is None and self.engine.is_here(kind):
            return Path(sys.executable)
        return python_with(self.engine.requirements(self.version), make)


def parse(text: str) -> list[Wanted]:
    """`peft==0.18,llama.cpp:q8_0` → the engines. Raises UserError for an unknown one."""
    wanted = list[Wanted]()
    for part in text.split(","):
        match = SPEC.fullmatch(part.strip())
        name = match["name"].lower() if match else part.strip()
        if match is None or name not in ENGINES:
            raise UserError(
                f"--in must name engines, with a version if it matters (peft==0.18), got {name!r}. "
                f"Known: {', '.join(ENGINES)}."
            )
        precision, known = match["precision"], ENGINES[name].precisions
        if precision is not None and precision not in known:
            raise UserError(
                f"--in {part.strip()}: {name} has no {precision!r}. It has "
                f"{', '.join(known) or 'fp32 alone'}."
            )
        wanted.append(Wanted(name, match["version"], precision))
    return list(dict.fromkeys(wanted))


def pinned(name: str, version: str | None) -> str:
    """What pip installs: 0.18 stands for any 0.18.x."""
    if version is None:
        return name
    return f"{name}=={version}.*" if version.count(".") < 2 else f"{name}=={version}"


def has(*packages: str) -> bool:
    """Whether this Python has packages."""
    return all(find_spec(package) is not None for package in packages)


def is_before(version: str | None, *limit: int) -> bool:
    """Whether a version is older than `limit`; none is the newest."""
    if version is None:
        return False
    numbers = re.findall(r"\d+", version)
    return tuple(map(int, numbers))[: len(limit)] < limit


ENGINES = Registry[Engine](
    "certify_engine",
    order=lambda engine: engine.order,
    spell=lambda name: name.replace("_", "."),
)
