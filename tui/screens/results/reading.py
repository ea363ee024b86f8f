"""All that the screen shows, read from the files of the project's stages."""

from collections.abc import Callable
from typing import Any

from pipeline.errors import UserError
from pipeline.files.digest_cache import signature
from pipeline.project.logs.run_log import TABLE
from pipeline.project.stage_graph import ARTIFACTS, Project
from pipeline.views.evaluations import read_evaluation
from pipeline.views.reports import read_pages, read_pictures
from pipeline.views.sweeps import read_sweep

MEASURED = "measured"  # the folder of what `lora evaluate --adapter` measured
READERS: dict[str, Callable[[Project], Any]] = {  # by the view that shows it
    "methods": read_evaluation,
    "sweep": read_sweep,
    "report": read_pages,
    "figures": read_pictures,
}
NOTHING = {  # why there is none
    "methods": "Nothing is evaluated yet. Press R to run the pipeline: it trains, then compares "
    "what each model learned and kept.",
    "sweep": "No sweep yet. `lora finetune sweep --over learning_rate` makes one; so does R, with "
    "a section of params.yaml such as finetune_sweep: {grid: {rank: [1, 4, 16]}}.",
    "report": "No report yet. Press R to run the pipeline.",
    "figures": "No figures yet. Press R to run the pipeline: its evaluation draws one.",
}


def stamps(project: Project) -> object:
    """What differs once a file that is read has changed."""
    stages = [stage for stage in project.shown.values() if stage.kind != "checkpoint" or stage.look]
    # of a sweep the table alone: its adapters are many files
    paths = [
        project.artifact(stage.name) / (TABLE if stage.kind == "adapters" else "")
        for stage in stages
    ]
    return project.params, *map(signature, (*paths, project.root / ARTIFACTS / MEASURED))


def read_results(project: Project) -> dict[str, Any]:
    """What each view shows; a text says why there is nothing."""
    found = {}
    for view, read in READERS.items():
        try:
            found[view] = read(project) or NOTHING[view]
        except UserError as error:
            found[view] = str(error)
    return found
