"""Files for schedulers that `lora` does not call. A format is a file here with `FORMAT`."""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from pipeline.errors import UserError
from pipeline.extensions import Registry
from pipeline.fleet.settings import Cluster
from pipeline.fleet.unit import Unit
from pipeline.project.entries import STORE
from pipeline.project.process import WORK

MARK = "# Made by lora fleet emit"  # begins a comment in every file that this program may replace
PORT = 29_500  # torch's, at which the machines of a unit meet
CACHE = "cache"  # an option of all formats


@dataclass(frozen=True)
class Batch:
    """Units for a scheduler. `options`: those of --option; `folder`: where the files will be."""

    name: str
    units: Sequence[Unit]
    cluster: Cluster
    options: Mapping[str, str]
    folder: Path

    @property
    def nodes(self) -> int:
        """Machines that run a unit together."""
        return max(unit.nodes for unit in self.units)

    def unit_name(self, number: int) -> str:
        """A unit's name among the scheduler's jobs: letters, digits and dashes."""
        return f"lora-{self.name}-{number}"

    def exports(self, number: int, cache: str = "") -> str:
        """The bash line that sets a unit's variables. `cache`: where its machines see the cache,
        if not as here. Schedulers would substitute in values of their own fields.
        """
        unit = self.units[number - 1]
        folder = PurePosixPath(unit.root, "runs", unit.stage, "fleet", self.name, "units")
        if cache := cache or self.options.get(CACHE, ""):
            # the cache is what outlives a machine: so must the checkpoints
            folder = PurePosixPath(cache).parent / "units" / self.name
        values = {"LORA_CACHE": cache or unit.cache, WORK: str(folder / str(number))}
        begin = ""
        if store := self.cluster.store:
            values[STORE] = store
            if not cache:  # `setup` may name a disk of the machine
                default = quoted([values.pop("LORA_CACHE")])
                begin = f'[ "$LORA_CACHE" ] || export LORA_CACHE={default}; '
        exports = " ".join(f"{name}={quoted([value])}" for name, value in values.items())
        return f"{begin}export {exports}"

    def script(self, number: int, meet: str, cache: str = "", is_there: bool = False) -> str:
        """bash lines that run a unit. `meet`: options with which several machines find each other,
        as the shell reads them; `is_there`: whether the project's folder is the current one.
        """
        unit = self.units[number - 1]
        begin = [] if is_there else [f"cd {quoted([unit.root])} || exit"]
        together = f" --nnodes={unit.nodes} {meet}" if unit.nodes > 1 else ""
        # the scheduler's signal reaches lora, which writes a checkpoint
        run = f"exec lora {quoted(unit.command)}{together}"
        exports = self.exports(number, cache)
        return "\n".join([*self.cluster.setup, *begin, exports, f'mkdir -p "${WORK}"', run, ""])

    def head(self, number: int | None, checked: str) -> str:
        """The comment with which a file begins. `number`: of its unit, if it is for one."""
        # a label may hold a line break, which would end the comment
        labels = "" if number is None else f" {json.dumps(self.units[number - 1].label)}."
        return f"{MARK}. {checked}{labels}\n"


class Format(NamedTuple):
    """How a scheduler takes units."""

    files: Callable[[Batch], Mapping[str, str]]  # name → text
    next_step: Callable[[Batch, Path], str]  # the shell's line that submits the files of a folder
    options: Mapping[str, str]  # of --option: name → help
    any_option: bool = False  # whether further ones are the scheduler's own


def quoted(words: Sequence[str]) -> str:
    """Words as bash reads them, in which nothing else substitutes a variable.

    Kubernetes replaces $(NAME) in a command, torchx $NAME and ${NAME}: a dollar is written as
    $'\\44'.
    """
    return " ".join(shlex.quote(word).replace("$", "'$'\\44''") for word in words)


def yaml_text(document: Mapping[str, Any]) -> str:
    """A document as YAML, its keys in their order, texts of several lines as blocks."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        style = "|" if "\n" in text else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, represent)
    return yaml.dump(document, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1_000)


def each_file(folder: Path, suffix: str, command: str) -> str:
    """The shell's line that calls a command with every file of a folder."""
    return f'for file in {quoted([str(folder)])}/*{suffix}; do {command} "$file"; done'


def require(batch: Batch, scheduler: str, name: str, example: str) -> str:
    """The value of an option that has to be given. Raises UserError."""
    if not (value := batch.options.get(name, "")):
        raise UserError(
            f"{scheduler} needs {name}, got none. Add --option {name}={example}, with your own."
        )
    return value


FORMATS = Registry[Format]("fleet_format")
