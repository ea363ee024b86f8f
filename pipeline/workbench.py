"""One stage graph with the product's and the document's stages; only this module knows both."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.project import process
from pipeline.project.params.load import RUNNING, Params
from pipeline.project.stage_graph import ARTIFACTS, Project, Stage, StageGraph
from pipeline.stages.registry import STAGES


def _of_the_document() -> Mapping[str, Stage]:
    # read where a params file has a section that the product has not
    from pipeline.document import stages

    return stages.STAGES


GRAPH = StageGraph(STAGES, _of_the_document)


def open_project(params: Path, overrides: Sequence[str] = ()) -> Project:
    """Open the project of a params file with `section.key=value` overrides. Raises UserError.

    What this process computes from then on, it computes on the project's device.
    """
    project = Project.load(params, GRAPH, overrides)
    process.prefer(project.params.running.device, project.params.source(RUNNING, "device"))
    return project


def current_project() -> Project:
    """The project in the current folder; without a params file, a project with default settings."""
    params = Path("params.yaml")
    return (
        open_project(params)
        if params.is_file()
        else Project(Path(), Params(kinds=GRAPH.sections), GRAPH)
    )


# a summary line, and a row for each with its `title` and `mark`
Claims = tuple[str, list[Mapping[str, Any]]]


def calculated_claims() -> Claims:
    """The claims that need only the calculator."""
    from pipeline.document.claims.check import calculated

    return _described(calculated())


def read_claims(project: Project) -> Claims | None:
    """Those that the project's last `lora claims` wrote; None if there are none. Raises
    UserError.
    """
    from pipeline.document.claims.check import JSON

    path = project.root / ARTIFACTS / "claims" / JSON
    try:
        return _described(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. Run `lora claims` again.") from None
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise UserError(f"{path} holds no claims. Run `lora claims` again.") from None


def _described(rows: Sequence[Mapping[str, Any]]) -> Claims:
    from pipeline.document.claims.check import MARKS, section_heading, summary

    return summary(rows), [
        {**row, "title": section_heading(row["section"]), "mark": MARKS[row["verdict"]]}
        for row in rows
    ]


def claim_files(project: Project, name: str) -> list[Path]:
    """The files that a claim is measured on; none if the calculator gives its numbers."""
    from pipeline.document.claims.check import files_of

    return files_of(project, name)


def table_markdown(path: Path) -> str:
    """A table of measurements as Markdown, below its title. Raises UserError."""
    from pipeline.document.tables import described

    table = described(path)
    return f"**{table.title}**\n\n{table.markdown()}"
