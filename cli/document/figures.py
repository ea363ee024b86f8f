"""`lora figures`: the document's figures, drawn from trained and measured artifacts."""

from pathlib import Path
from typing import TYPE_CHECKING

from cli.options import (
    DEFAULT_PARAMS,
    UNDER_DVC,
    CheckpointOption,
    ForceOption,
    ParamsOption,
    SetOption,
    group,
    project_of,
)

if TYPE_CHECKING:
    pass

app = group()
STAGE = "figures"


@app.command()
def figures(
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
    force: ForceOption = False,
    checkpoint_every: CheckpointOption = 100,
) -> None:
    """Draw the document's figures from our own runs.

    Writes artifacts/figures: each as PNG and SVG, with its numbers, and a report.
    """
    from cli.stages import run_stage

    project = project_of(params, overrides)
    project.stage(STAGE)
    run_stage(STAGE, params, overrides, force, checkpoint_every)
    if UNDER_DVC:
        return
    show(project.artifact(STAGE), project.stages[STAGE].path)


def show(folder: Path, path: str) -> None:
    """Print each figure with its files, and the path of the report. `path`: the folder as users name it."""
    from cli.console import stdout, table
    from pipeline.files.artifact import read_manifest

    manifest = read_manifest(folder)["figures"].items()
    rows = [
        (f"{name} ({about['place']})", about["shows"], " ".join(file.removeprefix(name) for file in about["files"]))
        for name, about in manifest
    ]
    stdout.print(table(("figure", "what it shows", "files"), rows))
    stdout.print(f"\nIn words: {path}/report.md", markup=False, soft_wrap=True)
