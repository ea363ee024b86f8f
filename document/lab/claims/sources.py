"""What a claim can be measured on: the calculator, and a project's files, artifacts and tables of
measurements.

And how its reason writes a value: `n`, `percent`, `GB` and the like.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

from lab.claims import in_unit
from lab.stages import STAGE as CLAIMS
from lab.tables import Spread, read_table
from pipeline.calc.architecture import Architecture
from pipeline.calc.method import configure
from pipeline.calc.report import answer
from pipeline.calc.sources.open_model import built_in
from pipeline.data.formats import read_examples
from pipeline.errors import UserError
from pipeline.files.artifact import read_json
from pipeline.files.safetensors_file import read_header
from pipeline.project.logs.run_log import Step, read_steps
from pipeline.project.stage_graph import ARTIFACTS, Project
from pipeline.stages.registry import COUNTED

# How a reason writes a value: f"{n(full.trained)} parameters, {percent(share)} of all".
n, percent, times = in_unit, partial(in_unit, unit="%"), partial(in_unit, unit="×")
million, billion = partial(in_unit, unit="million"), partial(in_unit, unit="billion")
B, KB, MB, GB, GiB = (partial(in_unit, unit=unit) for unit in ("B", "KB", "MB", "GB", "GiB"))


class MissingArtifact(Exception):
    """The artifact that a claim is measured on does not exist. The message names the command that
    makes it.
    """


class Record(dict[str, Any]):
    """A row of a table or a JSON object. `record.key` is `record["key"]`; AttributeError if there
    is no value.
    """

    def __getattr__(self, key: str) -> Any:
        if self.get(key) is None:
            having = [name for name, value in self.items() if value is not None]
            raise AttributeError(
                f"there is no value for {key!r}, only for {', '.join(having[:12])}"
            )
        return self[key]


@dataclass(frozen=True)
class Sources:
    """The measurements of a project. Raises MissingArtifact for a file that does not exist, and
    UserError.
    """

    project: Project
    any_base: bool = False  # whether a claim is also about other bases than MiniGPT
    read: list[Path] = field(default_factory=list)  # the files that were asked for

    @cached_property
    def of_any_base(self) -> "Sources":
        """The same for claims that the document does not make of MiniGPT alone."""
        return Sources(self.project, True, self.read)

    def artifact(self, path: str) -> Record:
        """A JSON file below artifacts/."""
        return Record(_as_record(read_json(self._file(path), "Make it again")))

    def row(self, table: str, **where: Any) -> Record:
        """The only row with these values of the table STUDY/TABLE, or figures/NAME."""
        return find(self._table(table), _table_path(table), **where)

    def rows(self, table: str, **where: Any) -> list[Record]:
        """A row for each of several values of a column: m.rows("rank/ranks", rank=(8, 64),
        alpha="r").
        """
        name = next(name for name, value in where.items() if isinstance(value, tuple))
        return [self.row(table, **{**where, name: value}) for value in where[name]]

    def column(self, table: str, name: str, **where: Any) -> list[Any]:
        """A column of all rows with these values, in order. Of several seeds the mean."""
        values = [getattr(row, name) for row in self._table(table) if _matches(row, where)]
        if not values:
            raise UserError(f"{_table_path(table)} has no row with {_format_conditions(where)}")
        return [float(value) if isinstance(value, Spread) else value for value in values]

    def over_seeds(self, table: str, name: str, **where: Any) -> Spread:
        """A column's mean and extremes over the rows with these values, in a table that has a row
        for each seed.
        """
        values = self.column(table, name, **where)
        return Spread.of(values)

    def row_of_least(self, table: str, name: str, **where: Any) -> Record:
        """Among the rows with these values, the first with the smallest number in column `name`."""
        values = self.column(table, name, **where)
        return [row for row in self._table(table) if _matches(row, where)][
            values.index(min(values))
        ]

    def lines(self, key: str) -> list[str]:
        """The sentences of the data file that `key` (`section.key` of params.yaml) names: one of
        CLAIMS.data.
        """
        project = self._minigpt()
        path = str(project.setting(CLAIMS, key))
        self.read.append(project.root / path)
        return [example.text for example in read_examples(project.root / path, path)]

    def tensor_shape(self, path: str, name: str) -> list[int]:
        """The shape of the only tensor whose name ends in `name`, in a safetensors file below
        artifacts/.
        """
        shapes = [
            info.shape
            for key, info in read_header(self._file(path)).items()
            if f".{key}".endswith(f".{name}")
        ]
        if len(shapes) != 1:
            raise UserError(
                f"{path} has {len(shapes)} tensors whose name ends in {name}, instead of one"
            )
        return list(shapes[0])

    def size(self, path: str) -> int:
        """The size in bytes of a file below artifacts/."""
        return self._file(path).stat().st_size

    def steps(self, path: str) -> list[Step]:
        """The steps of training, from a loss.csv below artifacts/."""
        return read_steps(self._file(path))

    @cached_property
    def _tables(self) -> dict[str, list[Record]]:
        """A cache: some hundred claims read some thirty tables."""
        return {}

    def _table(self, table: str) -> list[Record]:
        if table not in self._tables:
            self._tables[table] = [
                Record(row) for row in read_table(self._file(_table_path(table)))
            ]
        return self._tables[table]

    def _file(self, path: str) -> Path:
        """A file below artifacts/ that a stage made. Raises MissingArtifact with the command that
        makes it.
        """
        pure, project = PurePosixPath(path), self.project if self.any_base else self._minigpt()
        # MiniGPT is trained
        stages = (stage for name, stage in project.graph.stages.items() if name != "import")
        made_by = next((stage for stage in stages if pure.is_relative_to(stage.output)), None)
        if made_by is None or ".." in pure.parts:
            raise UserError(f"{path} is not an artifact of a stage")
        file = project.home(made_by.name).root / ARTIFACTS / pure
        if not file.is_file():
            raise MissingArtifact(f"{ARTIFACTS}/{path} does not exist: run `{made_by.command}`")
        self.read.append(file)
        return file

    def _minigpt(self) -> Project:
        """The project. Raises MissingArtifact if its base is not MiniGPT, of which the document
        speaks.
        """
        base = self.project.params.origin
        if base.imports:
            raise MissingArtifact(
                f"this claim is about MiniGPT, but the project's base is {base.base}: create a "
                "project with `lora new`"
            )
        return self.project


@lru_cache(maxsize=256)  # the claims ask some forty questions, most of them several times
def calc(
    model: str = "qwen3-8b",
    *,
    method: str = "lora",
    rank: int = 8,
    trainer: str = "torch",
    **options: Any,
) -> Any:
    """The Record of `lora calc --json`; options as on the command line, with _ for -.

    The step is that of the libraries, unless a claim is about another: the document speaks of no
    trainer.
    """
    shapes = built_in(model).shapes
    _, finetuning, run = configure(shapes, COUNTED, method, rank=rank, trainer=trainer, **options)
    return _as_record(answer(shapes, finetuning, run))


def model(name: str) -> Architecture:
    """The shapes of a built-in model."""
    return built_in(name).shapes


def find(rows: Iterable[Record], table: str = "the list", **where: Any) -> Record:
    """The only row with these values. Raises UserError."""
    matches = [row for row in rows if _matches(row, where)]
    if len(matches) != 1:
        number = f"{len(matches)} rows instead of one" if matches else "no row"
        raise UserError(f"{table} has {number} with {_format_conditions(where)}")
    return matches[0]


def _table_path(table: str) -> str:
    """The path of a table below artifacts/."""
    return f"{table}.csv" if table.startswith("figures/") else f"studies/{table}.csv"


def _matches(row: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    return all(key in row and row[key] == value for key, value in where.items())


def _format_conditions(where: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in where.items()) or "any values"


def _as_record(value: Any) -> Any:
    """JSON with a Record for each object."""
    if isinstance(value, Mapping):
        return Record({key: _as_record(item) for key, item in value.items()})
    return [_as_record(item) for item in value] if isinstance(value, list) else value
