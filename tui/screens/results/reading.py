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
from pipeline.views.evaluations import Evaluation, read_evaluation
from pipeline.views.reports import Page, Picture, read_pages, read_pictures
from pipeline.views.sweeps import Sweep, read_sweep

T = TypeVar("T")
MEASURED = "measured"  # the folder of what `lora evaluate --adapter` measured


@dataclass(frozen=True)
class Results:
    """What the project's stages found. A text instead of a value says why it cannot be read."""

    evaluation: Evaluation | str | None = None
    sweep: Sweep | str | None = None
    pages: Sequence[Page] = ()
    pictures: Sequence[Picture] = ()
    seen: object = None  # stamps of all files, once all were read


def read_results(project: Project, before: Results) -> Iterator[Results]:
    """Read everything again, the comparison first; nothing if no file changed."""
    stages = [stage for stage in project.shown.values() if stage.kind != "checkpoint" or stage.look]
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
    yield replace(
        first,
        pages=read_pages(project),
        pictures=read_pictures(project),
        seen=seen,
    )


def _or_why(read: Callable[[], T]) -> T | str:
    try:
        return read()
    except UserError as error:
        return str(error)
