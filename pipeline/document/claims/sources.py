"""Where measurements come from: the calculator, the project's files and artifacts, the studies' tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.calc.fit import gpu
from pipeline.calc.precision import precision
from pipeline.calc.report import answer
from pipeline.calc.settings import FinetuningMethod, TrainingConfig, parse_method, parse_training_config
from pipeline.calc.sources.open_model import built_in, nearest
from pipeline.calc.sources.open_model import names as models
from pipeline.data.examples import read_examples
from pipeline.document.claims.expression import Function, number
from pipeline.document.stages import CLAIMS
from pipeline.document.tables import Cell, read_table
from pipeline.errors import UserError
from pipeline.files.artifact import read_json
from pipeline.files.safetensors_header import read_header
from pipeline.project import dvc_yaml
from pipeline.project.logs.run_log import epoch_means, read_steps
from pipeline.project.stage_graph import ARTIFACTS, Project

STUDIES, FIGURES = "studies", "figures"
SHOWN = ("name", "hidden", "heads", "kv_heads", "head_size", "vocabulary", "context", "tied", "total")


class MissingArtifact(Exception):
    """What a claim is measured on is not there; the message is what to do."""


@dataclass(frozen=True)
class Sources:
    """The functions of a measurement. Without a project only the calculator can be asked."""

    project: Project | None = None

    @cached_property
    def functions(self) -> Mapping[str, Function]:
        """Name → function, all of them."""
        of_project = (self.artifact, self.study, self.column, self.row_of_least, self.lines, self.words, self.lengths)
        of_files = (self.tensor_shape, self.size, self.losses, self.epoch_losses)
        return {**PLAIN, **CALCULATOR, **{each.__name__: each for each in (*of_project, *of_files)}}

    def artifact(self, path: str) -> Any:
        """A JSON file below artifacts/."""
        return read_json(self._made(path), "Make it again")

    def study(self, table: str, **where: Any) -> Mapping[str, Cell]:
        """The one row that has these values in STUDY/TABLE, or in figures/NAME, which a figure was drawn from."""
        return _one(self._rows(table), where, _file(table))

    def column(self, table: str, name: str, **where: Any) -> list[Cell]:
        """A column of the rows that have these values, from the first to the last."""
        rows = [row for row in self._rows(table) if _has(row, where)]
        if not rows:
            raise UserError(f"{_file(table)} has no row with {_said(where)}")
        if name not in rows[0]:
            raise UserError(f"{_file(table)} has no column {name}. There are: {', '.join(rows[0])}")
        return [row[name] for row in rows]

    def row_of_least(self, table: str, name: str, **where: Any) -> Mapping[str, Cell]:
        """Of the rows that have these values the one with the least number in a column; of equals the first."""
        values = self.column(table, name, **where)
        least = min(range(len(values)), key=lambda place: number(values[place]))
        return [row for row in self._rows(table) if _has(row, where)][least]

    def lines(self, key: str) -> list[str]:
        """The sentences of a data file, which `section.key` of params.yaml names."""
        project = self._its()
        if key not in CLAIMS.data:
            raise UserError(f"{key} names no data file that claims read. There are: {', '.join(CLAIMS.data)}")
        path = str(project.setting(CLAIMS, key))
        return [example.text for example in read_examples(project.root / path, path)]

    def words(self, key: str, without: str = "") -> list[str]:
        """Each word of a data file once, in order; without those of another, if that is named."""
        known = {word for line in (self.lines(without) if without else []) for word in line.split()}
        return [word for word in dict.fromkeys(" ".join(self.lines(key)).split()) if word not in known]

    def lengths(self, key: str) -> list[int]:
        """How many words each sentence of a data file has."""
        return [len(line.split()) for line in self.lines(key)]

    def tensor_shape(self, path: str, name: str) -> list[int]:
        """The shape of the one tensor in a safetensors file below artifacts/ whose name ends so."""
        header = read_header(self._made(path))
        found = [info.shape for key, info in header.items() if f".{key}".endswith(f".{name}")]
        if len(found) != 1:
            raise UserError(f"{path} has {len(found)} tensors whose name ends in {name}, not one")
        return list(found[0])

    def size(self, path: str) -> int:
        """Bytes of a file below artifacts/."""
        return self._made(path).stat().st_size

    def losses(self, path: str) -> list[float]:
        """The training loss of each step, from a loss.csv below artifacts/."""
        return [step.loss for step in read_steps(self._made(path))]

    def epoch_losses(self, path: str) -> list[float]:
        """Mean training loss of each epoch, from a loss.csv below artifacts/."""
        return epoch_means(read_steps(self._made(path)))

    @cached_property
    def _tables(self) -> dict[str, list[dict[str, Cell]]]:
        """Those that were read: some hundred claims ask some thirty."""
        return {}

    def _rows(self, table: str) -> list[dict[str, Cell]]:
        if table not in self._tables:
            self._tables[table] = read_table(self._made(_file(table)))
        return self._tables[table]

    def _made(self, path: str) -> Path:
        """A file below artifacts/. Raises NotRun with the command that makes it."""
        pure, project = PurePosixPath(path), self._its()
        if pure.is_absolute() or ".." in pure.parts:
            raise UserError(f"{path} does not lie below {ARTIFACTS}/")
        made_by = next((s for s in project.graph.stages.values() if pure.is_relative_to(s.output)), None)
        file = (project.home(made_by.name) if made_by else project).root / ARTIFACTS / pure
        if not file.is_file():
            command = dvc_yaml.command(made_by) if made_by else "dvc repro"
            raise MissingArtifact(f"{ARTIFACTS}/{path} is not there: run `{command}`")
        return file

    def _its(self) -> Project:
        """Raises NotRun where there is no project, or one of another model than the document's."""
        if self.project is None:
            raise MissingArtifact("it is measured on a project: run `lora claims` in one")
        base = self.project.params.pretrain.base
        if self.project.params.pretrain.imports:
            raise MissingArtifact(f"it is about MiniGPT, and this project's base is {base}: make one with `lora new`")
        return self.project


@lru_cache(maxsize=256)
def calc(model: str = "qwen3-8b", method: str = "lora", rank: int = 8, **options: Any) -> Mapping[str, Any]:
    """What `lora calc --json` answers; options as on its command line, with _ for -. Raises UserError."""
    shapes = _built_in(model)
    own = {field.name for field in fields(FinetuningMethod)} - {"kind", "rank", "alpha", "targets"}
    step = {field.name for field in fields(TrainingConfig)}
    unknown = options.keys() - own - step - {"alpha", "targets"}
    if unknown:
        raise UserError(f"calc has no option {', '.join(sorted(unknown))}")
    more = {name: value for name, value in options.items() if name in own}
    asked = parse_method(method, rank, options.get("alpha"), options.get("targets", "attention"), **more)
    run = {name: value for name, value in options.items() if name in step}
    return answer(shapes, asked, parse_training_config(shapes, method, virtual_tokens=asked.virtual_tokens, **run))


def model(name: str) -> Mapping[str, Any]:
    """The dimensions of a built-in model, `layers` and `total` parameters among them. Raises UserError."""
    shapes = _built_in(name)
    return {**{key: getattr(shapes, key) for key in SHOWN}, "layers": len(shapes.blocks), "parts": shapes.components()}


def _built_in(name: str) -> Any:
    if name not in models():
        raise UserError(f"model {name!r} is not built in. Nearest: {', '.join(nearest(name, models()))}")
    return built_in(name).shapes


def find(rows: Sequence[Mapping[str, Any]], **where: Any) -> Mapping[str, Any]:
    """The one element of a JSON list that has these values. Raises UserError."""
    return _one(rows, where, "the list")


def _file(table: str) -> str:
    """Where a table lies below artifacts/."""
    return f"{table}.csv" if table.startswith(f"{FIGURES}/") else f"{STUDIES}/{table}.csv"


def _one(rows: Sequence[Mapping[str, Any]], where: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    found = [row for row in rows if _has(row, where)]
    if len(found) != 1:
        number = f"{len(found)} rows, not one," if found else "no row"
        raise UserError(f"{place} has {number} with {_said(where)}")
    return found[0]


def _has(row: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    return all(key in row and row[key] == value for key, value in where.items())


def _said(where: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in where.items()) or "any values"


def _least(*values: Any) -> float:
    return min(_numbers(values))


def _greatest(*values: Any) -> float:
    return max(_numbers(values))


def _numbers(values: Sequence[Any]) -> list[float]:
    """Numbers as arguments, or as one list of them."""
    given = values[0] if len(values) == 1 and isinstance(values[0], list) else values
    if not given:
        raise UserError("min and max need at least one number")
    return [number(value) for value in given]


def _root(value: Any) -> float:
    if number(value) < 0:
        raise UserError(f"sqrt needs a number of at least 0, got {value}")
    return math.sqrt(number(value))


def _log2(value: Any) -> float:
    if number(value) <= 0:
        raise UserError(f"log2 needs a number above 0, got {value}")
    return math.log2(number(value))


def _length(value: Any) -> int:
    if not isinstance(value, list | dict | str):
        raise UserError(f"len needs a list or a text, got {value!r}")
    return len(value)


def _values(found: Any) -> list[Any]:
    """Of a JSON object."""
    if not isinstance(found, Mapping):
        raise UserError(f"values needs an object, got {found!r}")
    return list(found.values())


PLAIN: Mapping[str, Function] = {
    **{"min": _least, "max": _greatest, "sqrt": _root, "log2": _log2, "len": _length, "find": find, "values": _values},
    "abs": lambda value: abs(number(value)),
    "round": lambda value, digits=0: round(number(value), int(number(digits)) or None),
}
CALCULATOR: Mapping[str, Function] = {
    **{"calc": calc, "model": model},
    "precision": lambda name: asdict(precision(str(name))),
    "gpu": lambda name: asdict(gpu(str(name))),
}
