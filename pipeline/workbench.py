"""The product's stages and the document's in one graph: the one place that knows both, for `lora` and `lora-tui`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.document import stages as document
from pipeline.project.params.sections import Params
from pipeline.project.stage_graph import STAGES, Project, StageGraph

GRAPH = StageGraph({**STAGES, **document.STAGES}, document.sections)


def open_project(params: Path, overrides: Sequence[str] = ()) -> Project:
    """The project of a params file, with `section.key=value` overrides. Raises UserError."""
    return Project.load(params, overrides, GRAPH)


def current_project() -> Project:
    """The project in the current folder, or where there is no params file one with the default settings."""
    params = Path("params.yaml")
    return open_project(params) if params.is_file() else Project(Path(), Params(), GRAPH)


def calculated_claims() -> tuple[str, list[Mapping[str, Any]]]:
    """Of the document's claims those that the calculator decides: a summary, and a row each with `title` and `mark`."""
    from pipeline.document.claims.check import MARKS, calculated, summary, titled

    rows = calculated()
    return summary(rows), [{**row, "title": titled(row["section"]), "mark": MARKS[row["verdict"]]} for row in rows]
