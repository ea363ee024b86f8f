"""One stage graph with the product's and the document's stages; only this module knows both."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.project.params.load import Params
from pipeline.project.stage_graph import Project, Stage, StageGraph
from pipeline.stages.registry import STAGES


def _of_the_document() -> Mapping[str, Stage]:
    from pipeline.document import stages  # read where a params file has a section that the product has not

    return stages.STAGES


GRAPH = StageGraph(STAGES, _of_the_document)


def open_project(params: Path, overrides: Sequence[str] = ()) -> Project:
    """Open the project of a params file with `section.key=value` overrides. Raises UserError."""
    return Project.load(params, GRAPH, overrides)


def current_project() -> Project:
    """The project in the current folder; without a params file, a project with default settings."""
    params = Path("params.yaml")
    return open_project(params) if params.is_file() else Project(Path(), Params(kinds=GRAPH.sections), GRAPH)


def calculated_claims() -> tuple[str, list[Mapping[str, Any]]]:
    """The claims that need only the calculator: a summary line, and one row per claim with `title` and `mark`."""
    from pipeline.document.claims.check import MARKS, calculated, section_heading, summary

    rows = calculated()
    return summary(rows), [
        {**row, "title": section_heading(row["section"]), "mark": MARKS[row["verdict"]]} for row in rows
    ]
