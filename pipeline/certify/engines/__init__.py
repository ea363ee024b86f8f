"""The programs in which an adapter can be certified, one file each, found by its name."""

import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.extensions import Registry

SPEC = re.compile(r"(?P<name>[A-Za-z][\w.-]*?)(==(?P<version>\d[\w.]*))?", re.ASCII)


class Engine(NamedTuple):
    """A program that opens PEFT adapters."""

    order: int
    # a version such as 0.18, or None → what pip must install
    requirements: Callable[[str | None], tuple[str, ...]]
    runner: str  # a file of pipeline/certify/runners
    is_here: Callable[[], bool]  # whether this Python has all that it needs


class Wanted(NamedTuple):
    """An engine of `--in`, such as peft==0.18."""

    name: str
    version: str | None

    @property
    def label(self) -> str:
        return self.name if self.version is None else f"{self.name}=={self.version}"

    def python(self) -> Path:
        """This Python where no version is asked for and it has the program; else an environment's.

        Raises UserError where it cannot be had.
        """
        from pipeline.certify.environment import python_with

        engine = ENGINES[self.name]
        if self.version is None and engine.is_here():
            return Path(sys.executable)
        return python_with(engine.requirements(self.version))


def parse(text: str) -> list[Wanted]:
    """`peft==0.18,transformers` → the engines. Raises UserError for an unknown one."""
    wanted = list[Wanted]()
    for part in text.split(","):
        match = SPEC.fullmatch(part.strip())
        name = match["name"].lower() if match else part.strip()
        if match is None or name not in ENGINES:
            raise UserError(
                f"--in must name engines, with a version if it matters (peft==0.18), got {name!r}. "
                f"Known: {', '.join(ENGINES)}."
            )
        wanted.append(Wanted(name, match["version"]))
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


ENGINES = Registry[Engine]("certify_engine", order=lambda engine: engine.order)
