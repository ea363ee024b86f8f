"""The functions that a claim can call: the calculator, the project's files and artifacts, the studies' tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.calc.fit import gpu
from pipeline.calc.method import configure
from pipeline.calc.methods import METHODS
from pipeline.calc.open_model import built_in, nearest
from pipeline.calc.open_model import names as models
from pipeline.calc.precision import precision
from pipeline.calc.report import answer
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
MODEL_KEYS = ("name", "hidden", "heads", "kv_heads", "head_size", "vocabulary", "context", "tied", "total")


class MissingArtifact(Exception):
    """The artifact that a claim is measured on does not exist. The message names the command that makes it."""


@dataclass(frozen=True)
class Sources:
    """The functions of a measurement. Without a project only the calculator is available."""

    project: Project | None = None

    @cached_property
    def functions(self) -> Mapping[str, Function]:
        """Name → function. The parameters' names are the keywords that claims.yaml uses."""
        of_project = (self.artifact, self.study, self.column, self.row_of_least, self.lines, self.words, self.lengths)
        of_files = (self.tensor_shape, self.size, self.losses, self.epoch_losses)
        return {**PLAIN, **CALCULATOR, **{function.__name__: function for function in (*of_project, *of_files)}}

    def artifact(self, path: str) -> Any:
        """A JSON file below artifacts/."""
        return read_json(self._artifact_file(path), "Make it again")

    def study(self, table: str, **where: Any) -> Mapping[str, Cell]:
        """The only row of the table STUDY/TABLE (or figures/NAME) with these values."""
        return _only_row(self._rows(table), where, _table_path(table))

    def column(self, table: str, name: str, **where: Any) -> list[Cell]:
        """A column of all rows with these values, in order."""
        rows = [row for row in self._rows(table) if _matches(row, where)]
        if not rows:
            raise UserError(f"{_table_path(table)} has no row with {_format_conditions(where)}")
        if name not in rows[0]:
            raise UserError(f"{_table_path(table)} has no column {name}. Columns: {', '.join(rows[0])}")
        return [row[name] for row in rows]

    def row_of_least(self, table: str, name: str, **where: Any) -> Mapping[str, Cell]:
        """Among the rows with these values, the first with the smallest number in column `name`."""
        values = self.column(table, name, **where)
        least = min(range(len(values)), key=lambda index: number(values[index]))
        return [row for row in self._rows(table) if _matches(row, where)][least]

    def lines(self, key: str) -> list[str]:
        """The sentences of the data file that `key` (`section.key` of params.yaml) names."""
        project = self._project()
        if key not in CLAIMS.data:
            raise UserError(f"{key} is not a data file that claims may read. Use one of {', '.join(CLAIMS.data)}")
        path = str(project.setting(CLAIMS, key))
        return [example.text for example in read_examples(project.root / path, path)]

    def words(self, key: str, without: str = "") -> list[str]:
        """The distinct words of a data file in order, except those of the file `without`."""
        excluded = {word for line in (self.lines(without) if without else []) for word in line.split()}
        return [word for word in dict.fromkeys(" ".join(self.lines(key)).split()) if word not in excluded]

    def lengths(self, key: str) -> list[int]:
        """The number of words of each sentence of a data file."""
        return [len(line.split()) for line in self.lines(key)]

    def tensor_shape(self, path: str, name: str) -> list[int]:
        """The shape of the only tensor whose name ends in `name`, in a safetensors file below artifacts/."""
        header = read_header(self._artifact_file(path))
        shapes = [info.shape for key, info in header.items() if f".{key}".endswith(f".{name}")]
        if len(shapes) != 1:
            raise UserError(f"{path} has {len(shapes)} tensors whose name ends in {name}, instead of one")
        return list(shapes[0])

    def size(self, path: str) -> int:
        """The size in bytes of a file below artifacts/."""
        return self._artifact_file(path).stat().st_size

    def losses(self, path: str) -> list[float]:
        """The training loss of each step, from a loss.csv below artifacts/."""
        return [step.loss for step in read_steps(self._artifact_file(path))]

    def epoch_losses(self, path: str) -> list[float]:
        """Mean training loss of each epoch, from a loss.csv below artifacts/."""
        return epoch_means(read_steps(self._artifact_file(path)))

    @cached_property
    def _tables(self) -> dict[str, list[dict[str, Cell]]]:
        """A cache: some hundred claims read some thirty tables."""
        return {}

    def _rows(self, table: str) -> list[dict[str, Cell]]:
        if table not in self._tables:
            self._tables[table] = read_table(self._artifact_file(_table_path(table)))
        return self._tables[table]

    def _artifact_file(self, path: str) -> Path:
        """A file below artifacts/. Raises MissingArtifact with the command that makes it."""
        pure, project = PurePosixPath(path), self._project()
        if pure.is_absolute() or ".." in pure.parts:
            raise UserError(f"{path} is not below {ARTIFACTS}/")
        made_by = next((s for s in project.graph.stages.values() if pure.is_relative_to(s.output)), None)
        file = (project.home(made_by.name) if made_by else project).root / ARTIFACTS / pure
        if not file.is_file():
            command = dvc_yaml.command(made_by) if made_by else "dvc repro"
            raise MissingArtifact(f"{ARTIFACTS}/{path} does not exist: run `{command}`")
        return file

    def _project(self) -> Project:
        """Raises MissingArtifact without a project, and for a project whose base is not MiniGPT."""
        if self.project is None:
            raise MissingArtifact("this claim is measured on a project: run `lora claims` in one")
        base = self.project.params.pretrain.base
        if self.project.params.pretrain.imports:
            raise MissingArtifact(
                f"this claim is about MiniGPT, but the project's base is {base}: create a project with `lora new`"
            )
        return self.project


@lru_cache(maxsize=256)
def calc(model: str = "qwen3-8b", method: str = "lora", rank: int = 8, **options: Any) -> Mapping[str, Any]:
    """The output of `lora calc --json`; options as on the command line, with _ for -. Raises UserError."""
    shapes = _built_in(model)
    _, finetuning, run = configure(shapes, METHODS, method, rank=rank, **options)
    return answer(shapes, finetuning, run)


def model(name: str) -> Mapping[str, Any]:
    """The dimensions of a built-in model, including `layers` and `total` parameters. Raises UserError."""
    shapes = _built_in(name)
    return {
        **{key: getattr(shapes, key) for key in MODEL_KEYS},
        "layers": len(shapes.blocks),
        "parts": shapes.components(),
    }


def _built_in(name: str) -> Any:
    if name not in models():
        raise UserError(f"model {name!r} is not a built-in model. Did you mean {', '.join(nearest(name, models()))}?")
    return built_in(name).shapes


def find(rows: Sequence[Mapping[str, Any]], **where: Any) -> Mapping[str, Any]:
    """The only element of a JSON list with these values. Raises UserError."""
    return _only_row(rows, where, "the list")


def _table_path(table: str) -> str:
    """The path of a table below artifacts/."""
    return f"{table}.csv" if table.startswith(f"{FIGURES}/") else f"{STUDIES}/{table}.csv"


def _only_row(rows: Sequence[Mapping[str, Any]], where: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    matches = [row for row in rows if _matches(row, where)]
    if len(matches) != 1:
        number = f"{len(matches)} rows instead of one" if matches else "no row"
        raise UserError(f"{name} has {number} with {_format_conditions(where)}")
    return matches[0]


def _matches(row: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    return all(key in row and row[key] == value for key, value in where.items())


def _format_conditions(where: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in where.items()) or "any values"


def _least(*values: Any) -> float:
    return min(_numbers(values))


def _greatest(*values: Any) -> float:
    return max(_numbers(values))


def _numbers(values: Sequence[Any]) -> list[float]:
    """The arguments as numbers; a single list stands for its elements."""
    numbers = values[0] if len(values) == 1 and isinstance(values[0], list) else values
    if not numbers:
        raise UserError("min and max need at least one number")
    return [number(value) for value in numbers]


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


def _values(mapping: Any) -> list[Any]:
    """The values of a JSON object."""
    if not isinstance(mapping, Mapping):
        raise UserError(f"values needs an object, got {mapping!r}")
    return list(mapping.values())


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
