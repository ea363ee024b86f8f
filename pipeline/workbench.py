"""One stage graph with the product's and the document's stages; only this module knows both."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.document import stages as document
from pipeline.project.params.sections import Params
from pipeline.project.stage_graph import Project, StageGraph

GRAPH = StageGraph(document.Stages(), document.sections)


def open_project(params: Path, overrides: Sequence[str] = ()) -> Project:
    """Open the project of a params file with `section.key=value` overrides. Raises UserError."""
    return Project.load(params, overrides, GRAPH)


def current_project() -> Project:
    """The project in the current folder; without a params file, a project with default settings."""
    params = Path("params.yaml")
    return open_project(params) if params.is_file() else Project(Path(), Params(), GRAPH)


def calculated_claims() -> tuple[str, list[Mapping[str, Any]]]:
    """The claims that need only the calculator: a summary line, and one row per claim with `title` and `mark`."""
    from pipeline.document.claims.check import MARKS, calculated, section_heading, summary

    rows = calculated()
    return summary(rows), [
        {**row, "title": section_heading(row["section"]), "mark": MARKS[row["verdict"]]} for row in rows
    ]
