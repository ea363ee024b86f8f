"""`lora claims`: the document's claims, each beside the measured value; the last stage."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import DEFAULT_PARAMS, UNDER_DVC, WIDEST, JsonOption, ParamsOption, group, project_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pipeline.document.claims.check import Row
    from pipeline.project.stage_graph import Project

app = group()
COLOURS = {"holds": "green", "differs": "bold red", "depends": "yellow", "not run": "dim"}


@app.command()
def claims(
    section: Annotated[
        str | None, typer.Option("--section", help="Only a section and its subsections: 3, or 2 for 2.1 to 2.4.")
    ] = None,
    verdict: Annotated[
        str | None, typer.Option("--verdict", help="Only one verdict: holds, differs, depends or 'not run'.")
    ] = None,
    params: ParamsOption = DEFAULT_PARAMS,
    as_json: JsonOption = False,
) -> None:
    """Compare the document's claims with what was measured.

    Writes artifacts/claims.
    """
    from cli.console import print_json, stdout
    from pipeline.document.claims.check import filter_rows, summary, verdicts

    project = project_of(params)
    rows = verdicts(project)
    selected = filter_rows(rows, section, verdict)
    if as_json:
        print_json(selected)
    elif UNDER_DVC:
        stdout.print(f"{'claims':{WIDEST}}  {summary(selected)}", markup=False, soft_wrap=True)
    else:
        show(selected)
    _run_stage(project)


def _run_stage(project: "Project") -> None:
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


def show(rows: "Sequence[Row]") -> None:
    """Print the table of claims and the summary."""
    from cli.console import stdout
    from pipeline.document.claims.check import summary

    stdout.print(claims_table(rows))
    stdout.print(f"\n{summary(rows)}.")


def claims_table(rows: "Sequence[Row]") -> "RenderableType":
    """A table of quote and reason, the document's value, the measured one and the verdict, grouped by section."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from pipeline.document.claims.check import MARKS, section_heading

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for name, width in (("claim, and why", None), ("document", 14), ("measured", 19), ("verdict", 10)):
        table.add_column(name, overflow="fold", max_width=width)
    section = ""
    for row in rows:
        if row["section"] != section:
            section = row["section"]
            table.add_row(Text(section_heading(section), "bold underline"))
        claim = Group(Text(row["quote"]), Padding(Text(row["why"], "dim"), (0, 0, 0, 2)))
        values, mark = row["shown"], Text(MARKS[row["verdict"]], COLOURS[row["verdict"]])
        table.add_row(claim, Text(values["says"]), Text(values["measured"]), mark)
    return table
