"""All that the screen shows, read from the files of the project's stages when one of them
changed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from pipeline.errors import UserError
from pipeline.files.digest_cache import signature
from pipeline.project.logs.run_log import TABLE
from pipeline.project.stage_graph import ARTIFACTS, Project
from pipeline.workbench import Claims, calculated_claims, read_claims
from tui.screens.results.documents import Page, Picture, read_pages, read_pictures, read_studies
from tui.screens.results.findings import Evaluation, Sweep, read_evaluation, read_sweep

T = TypeVar("T")
MEASURED = "measured"  # the folder of what `lora evaluate --adapter` measured
KINDS = ("evaluation", "adapters", "figures", "study", "claims")  # of stages whose output is shown


@dataclass(frozen=True)
class Results:
    """What the project's stages found. A text instead of a value says why it cannot be read."""

    evaluation: Evaluation | str | None = None
    sweep: Sweep | str | None = None
    pages: Sequence[Page] = ()
    pictures: Sequence[Picture] = ()
    studies: Sequence[Page] = ()
    claims: Claims | str | None = None
    seen: object = None  # stamps of all files, once all were read


def read_results(project: Project, before: Results) -> Iterator[Results]:
    """Read everything again, the comparison first; nothing if no file changed."""
    stages = [stage for stage in project.shown.values() if stage.kind in KINDS or stage.look]
    # of a sweep the table alone: its adapters are many files
    paths = [
        project.artifact(stage.name) / (TABLE if stage.kind == "adapters" else "")
        for stage in stages
    ]
    seen = project.params, *map(signature, (*paths, project.root / ARTIFACTS / MEASURED))
    if seen == before.seen:
        return
    first = replace(
        before,
        evaluation=_or_why(lambda: read_evaluation(project)),
        sweep=_or_why(lambda: read_sweep(project)),
    )
    yield first
    has_claims = any(stage.kind == "claims" for stage in project.stages.values())
    yield replace(
        first,
        pages=read_pages(project),
        pictures=read_pictures(project),
        studies=read_studies(project),
        claims=_or_why(
            lambda: read_claims(project) or (calculated_claims() if has_claims else None)
        ),
        seen=seen,
    )


def _or_why(read: Callable[[], T]) -> T | str:
    try:
        return read()
    except UserError as error:
        return str(error)
