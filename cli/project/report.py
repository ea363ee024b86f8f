"""`lora report`: the last comparison; what was made from files that have changed since, and how it is made again."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cli.options import DEFAULT_PARAMS, ParamsOption, group, project_of

if TYPE_CHECKING:
    from pipeline.project.stage_graph import Project

app = group()
MOST = 3  # commands that are named one by one


@app.command()
def report(params: ParamsOption = DEFAULT_PARAMS) -> None:
    """Show the last comparison, and where the report is."""
    from cli.console import stdout, table
    from pipeline.errors import UserError
    from pipeline.files.artifact import read_json
    from pipeline.stages.report import LEGEND, comparison

    project = project_of(params)
    folder = project.artifact("evaluate")
    metrics = read_json(folder / "metrics.json", "Run `make repro`, or `lora evaluate`")
    try:
        columns, rows = comparison(metrics)
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / 'metrics.json'} holds other metrics. Run `lora evaluate` again.") from None
    stdout.print(table(columns, rows, right=columns[1:]))
    stdout.print(f"\n{LEGEND}\n", markup=False, soft_wrap=True)
    there = (folder / "report.md").exists()
    stdout.print(
        f"report: {folder / 'report.md'}" if there else "These came with the project; `make repro` makes yours."
    )
    whole = folder.parent / "claims/report.md"
    if whole.exists():
        stdout.print(f"what the document claims, and what was measured: {whole}", markup=False, soft_wrap=True)
    for name in ("evaluate", *["claims"] * whole.exists()):
        old = outdated(project, [name])
        if name in old:
            warn(f"{project.artifact_name(name)} is", old[name], old)


def outdated(project: "Project", names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`status.outdated`, by digests that are kept: this is for people to look at."""
    from pipeline.files.digest_cache import DigestStore
    from pipeline.project import status

    store = DigestStore()
    found = status.outdated(project, names, store.digest)
    store.save()
    return found


def warn(subject: str, reasons: Sequence[str], stages: Mapping[str, object]) -> None:
    """One line on stderr: what is out of date, why, and how it is made again from the first of `stages` on."""
    from cli.console import stderr
    from pipeline.project.dvc_yaml import command
    from pipeline.workbench import GRAPH

    commands = [f"`{command(GRAPH.stages[name])}`" for name in stages]
    again = ", then ".join(commands) if len(commands) <= MOST else "`dvc repro`"
    stderr.print(f"{subject} out of date: {', '.join(reasons)}. Run {again}.", markup=False, soft_wrap=True)
