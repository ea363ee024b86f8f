"""`lora study NAME`: measure one of the document's statements, as a stage."""

from pathlib import Path
from typing import Annotated

import typer

from cli.options import DEFAULT_PARAMS, CheckpointOption, ForceOption, ParamsOption, SetOption, group

app = group()


def _studies() -> dict[str, str]:
    """Name → the document's section and what is measured."""
    from pipeline.document.stages import find_studies

    return {name: f"{study.place}  {study.about}" for name, study in find_studies().items()}


def _complete_name(incomplete: str) -> list[tuple[str, str]]:
    return [(name, about) for name, about in _studies().items() if name.startswith(incomplete)]


NameArgument = Annotated[
    str | None, typer.Argument(help="Study to run. Omit to list all studies.", autocompletion=_complete_name)
]


@app.command()
def study(
    name: NameArgument = None,
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
    force: ForceOption = False,
    checkpoint_every: CheckpointOption = 100,
) -> None:
    """Run a study of the document, or list the studies.

    Writes tables, a picture and a paragraph to artifacts/studies/NAME.
    """
    from cli.console import stdout, table
    from cli.options import UNDER_DVC, project_of
    from cli.stages import run_stage
    from pipeline.errors import UserError

    every = _studies()
    if name is None:
        stdout.print(table(("study", "what it measures"), list(every.items())))
        return
    study_name = name.replace("-", "_")
    if study_name not in every:
        raise UserError(f"Unknown study {name}. Choose one of {', '.join(every)}.")
    project, stage = project_of(params, overrides), f"study_{study_name}"
    path = project.stage(stage).path
    run_stage(stage, params, overrides, force, checkpoint_every)
    if UNDER_DVC:
        return
    show(project.artifact(stage), project.run_folder(stage))
    stdout.print(f"\nIn words: {path}/report.md", markup=False, soft_wrap=True)


def _blank_repeated(rows: list[list[str]]) -> list[list[str]]:
    """Blank the first cell of a row if it equals that of the row above."""
    return [["" if n and row[0] == rows[n - 1][0] else row[0], *row[1:]] for n, row in enumerate(rows)]


def show(folder: Path, run: Path) -> None:
    """Print a study's tables, and the times that its run measured on this machine."""
    from cli.console import stdout, table
    from pipeline.document.tables import TIME, Table, read_table, times
    from pipeline.files.artifact import read_manifest

    tables = [
        Table(name, rows=read_table(folder / f"{name}.csv"), **about)
        for name, about in read_manifest(folder)["tables"].items()
    ]
    if (time := run / f"{TIME}.csv").is_file():
        tables.append(times(read_table(time)))
    for item in tables:
        stdout.print(f"\n{item.title}", markup=False)
        right = [head for head, is_number in item.heads.items() if is_number]
        stdout.print(table(list(item.heads), _blank_repeated(item.shown()), right=right))
