"""All that the screen shows, read from the files of the project's stages when one of them
changed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
READING = "Reading the evaluation …"
NOTHING = (
    "Nothing is evaluated yet. Press R to run the pipeline: it trains, then compares what each "
    "model learned and kept."
)
NO_SWEEP = (
    "No sweep yet. `lora finetune sweep --over learning_rate` makes one; so does R, with a section "
    "of params.yaml such as finetune_sweep: {grid: {rank: [1, 4, 16]}}."
)
NO_REPORT = "No report yet. Press R to run the pipeline."
NO_FIGURE = "No figures yet. Press R to run the pipeline: its evaluation draws one."


@dataclass(frozen=True)
class Results:
    """What the project's stages found. A text instead of a value says why there is none."""

    evaluation: Evaluation | str = READING
    sweep: Sweep | str = NO_SWEEP
    pages: Sequence[Page] | str = NO_REPORT
    pictures: Sequence[Picture] | str = NO_FIGURE
    seen: object = None  # stamps of all files, once all were read


def read_results(project: Project, before: Results) -> Results:
    """Read everything again; what was read `before` if no file changed."""
    stages = [stage for stage in project.shown.values() if stage.kind != "checkpoint" or stage.look]
    # of a sweep the table alone: its adapters are many files
    paths = [
        project.artifact(stage.name) / (TABLE if stage.kind == "adapters" else "")
        for stage in stages
    ]
    seen = project.params, *map(signature, (*paths, project.root / ARTIFACTS / MEASURED))
    if seen == before.seen:
        return before
    return Results(
        evaluation=_or_why(read_evaluation, project) or NOTHING,
        sweep=_or_why(read_sweep, project) or NO_SWEEP,
        pages=read_pages(project) or NO_REPORT,
        pictures=read_pictures(project) or NO_FIGURE,
        seen=seen,
    )


def _or_why(read: Callable[[Project], T | None], project: Project) -> T | str | None:
    try:
        return read(project)
    except UserError as error:
        return str(error)
