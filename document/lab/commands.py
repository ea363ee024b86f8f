"""`lora study`, `lora figures` and `lora claims`: what the document says, measured on a project's
own artifacts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from cli.options import (
    DEFAULT_PARAMS,
    UNDER_DVC,
    WIDEST,
    CheckpointOption,
    DeviceOption,
    ForceOption,
    JsonOption,
    ParamsOption,
    SetOption,
    group,
    project_of,
)

if TYPE_CHECKING:
    from lab.claims.check import Row
    from pipeline.project.stage_graph import Project

app = group()
COLOURS = {"holds": "green", "differs": "bold red", "depends": "yellow", "not run": "dim"}


def _studies() -> dict[str, str]:
    """Name → the document's section and what is measured."""
    from lab.stages import find_studies

    return {name: f"{study.PLACE}  {study.STAGE.summary}" for name, study in find_studies().items()}


def _complete_name(incomplete: str) -> list[tuple[str, str]]:
    return [(name, about) for name, about in _studies().items() if name.startswith(incomplete)]


@app.command()
def study(
    name: Annotated[
        str | None,
        Argument(help="Study to run. Omit to list all studies.", autocompletion=_complete_name),
    ] = None,
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
    force: ForceOption = False,
    checkpoint_every: CheckpointOption = None,
    _device: DeviceOption = None,
) -> None:
    """Run a study of the document, or list the studies.

    Writes tables, a picture and a paragraph to artifacts/studies/NAME.
    """
    from cli.console import stdout, table
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
    if not UNDER_DVC:
        _show_study(project.artifact(stage), project.run_folder(stage))
        stdout.print(f"\nIn words: {path}/report.md", markup=False, soft_wrap=True)


def _show_study(folder: Path, run: Path) -> None:
    """Print a study's tables, and the times that its run measured on this machine."""
    from cli.console import stdout, table
    from lab.tables import TIME, described, read_table, times
    from pipeline.files.artifact import read_manifest

    tables = [described(folder / f"{name}.csv") for name in read_manifest(folder)["tables"]]
    if (time := run / f"{TIME}.csv").is_file():
        tables.append(times(read_table(time)))
    for item in tables:
        stdout.print(f"\n{item.title}", markup=False)
        right = [head for head, is_number in item.heads.items() if is_number]
        rows, above = list[list[str]](), ""
        # a first cell is blank if it equals that of the row above
        for first, *others in item.shown():
            rows.append(["" if rows and first == above else first, *others])
            above = first
        stdout.print(table(list(item.heads), rows, right=right))


@app.command()
def figures(
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
    force: ForceOption = False,
    checkpoint_every: CheckpointOption = None,
    _device: DeviceOption = None,
) -> None:
    """Draw the document's figures from our own runs.

    Writes artifacts/figures: each as PNG and SVG, with its numbers, and a report.
    """
    from cli.console import stdout, table
    from cli.stages import run_stage
    from pipeline.files.artifact import read_manifest

    project = project_of(params, overrides)
    path = project.stage("figures").path
    run_stage("figures", params, overrides, force, checkpoint_every)
    if UNDER_DVC:
        return
    rows = [
        (
            f"{name} ({about['place']})",
            about["shows"],
            " ".join(file.removeprefix(name) for file in about["files"]),
        )
        for name, about in read_manifest(project.artifact("figures"))["figures"].items()
    ]
    stdout.print(table(("figure", "what it shows", "files"), rows))
    stdout.print(f"\nIn words: {path}/report.md", markup=False, soft_wrap=True)


@app.command()
def claims(
    section: Annotated[
        str | None,
        Option("--section", help="Only a section and its subsections: 3, or 2 for 2.1 to 2.4."),
    ] = None,
    verdict: Annotated[
        str | None,
        Option("--verdict", help="Only one verdict: holds, differs, depends or 'not run'."),
    ] = None,
    only_calculated: Annotated[
        bool,
        Option("--calculated", help="Only those that the calculator can check, in any folder."),
    ] = False,
    params: ParamsOption = DEFAULT_PARAMS,
    as_json: JsonOption = False,
) -> None:
    """Compare the document's claims with what was measured.

    Writes artifacts/claims.
    """
    from cli.console import print_json, stdout
    from lab.claims.check import calculated, filter_rows, summary, verdicts

    project = None if only_calculated else project_of(params)
    rows = filter_rows(verdicts(project) if project else calculated(), section, verdict)
    if as_json:
        print_json(rows)
    elif UNDER_DVC:
        stdout.print(f"{'claims':{WIDEST}}  {summary(rows)}", markup=False, soft_wrap=True)
    else:
        show_claims(rows)
    if project:
        _write_claims(project)


def _write_claims(project: "Project") -> None:
    """Run the stage if all its inputs exist and are up to date; otherwise print why not."""
    from cli.console import follow, stderr
    from pipeline.errors import UserError
    from pipeline.project.runner import run

    if "claims" not in project.stages:
        return
    stage = project.stages["claims"]
    try:
        for name, path in project.inputs(stage).items():
            if not path.exists():
                raise UserError(f"{name} is missing. Run `dvc repro` to make everything.")
        follow(run(project, stage), stage.name, quiet=UNDER_DVC)
    except UserError as error:
        stderr.print(f"{stage.path} was not written: {error}", markup=False, soft_wrap=True)


def show_claims(rows: "Sequence[Row]") -> None:
    """Print each quote and reason, the document's value, the measured one and the verdict, by
    section; a summary.
    """
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from cli.console import stdout
    from lab.claims.check import MARKS, section_heading, summary

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for name, width in (
        ("claim, and why", None),
        ("document", 14),
        ("measured", 19),
        ("verdict", 10),
    ):
        table.add_column(name, overflow="fold", max_width=width)
    section = ""
    for row in rows:
        if row["section"] != section:
            section = row["section"]
            table.add_row(Text(section_heading(section), "bold underline"))
        claim = Group(Text(row["quote"]), Padding(Text(row["why"], "dim"), (0, 0, 0, 2)))
        values, mark = row["shown"], Text(MARKS[row["verdict"]], COLOURS[row["verdict"]])
        table.add_row(claim, Text(values["says"]), Text(values["measured"]), mark)
    stdout.print(table)
    stdout.print(f"\n{summary(rows)}.")
