"""`lora runs`: a project's training runs, and the trackers that follow or get them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context, Option

from cli.options import DEFAULT_PARAMS, JsonOption, ParamsOption, group, project_of

if TYPE_CHECKING:
    from pipeline.project.logs.runs import Run
    from pipeline.project.stage_graph import Project

RUN = "A name that --name gave, a key in `lora runs`, or a stage for its last."

app = group()
runs = group(
    help="List training runs, take one again, send to trackers.", invoke_without_command=True
)
app.add_typer(runs, name="runs")


@runs.callback()
def list_runs(
    context: Context, params: ParamsOption = DEFAULT_PARAMS, as_json: JsonOption = False
) -> None:
    """List the last run of each stage and those in the cache: steps, loss, when."""
    if context.invoked_subcommand:
        return
    from dataclasses import asdict
    from datetime import datetime

    from cli.console import print_json, print_line, print_table
    from pipeline.views.runs import discover_runs, rows

    project = project_of(params)
    listed = list(rows(discover_runs(project.root, project)))
    if as_json:
        print_json([asdict(row) for row in listed])
        return
    cells = [
        (
            row.key or "unfinished",
            row.run,
            f"{row.steps:,}",
            "" if row.loss is None else f"{row.loss:.4f}",
            datetime.fromtimestamp(row.when).strftime("%Y-%m-%d %H:%M"),
        )
        for row in listed
    ]
    print_table(("key", "run", "steps", "loss", "when"), cells, right=("steps", "loss"))
    print_line(
        "\nTake one again with `lora runs apply KEY`, compare two with `lora runs compare A B`, send "
        "one with `lora runs export KEY --to TRACKER`. A name will do for a key."
    )


@runs.command()
def apply(
    name: Annotated[str, Argument(metavar="RUN", help=RUN)],
    params: ParamsOption = DEFAULT_PARAMS,
) -> None:
    """Take an earlier run again: its settings and its artifact.

    The settings go into the params file, the artifact comes from the cache. The one that it
    replaces stays there.
    """
    from cli.console import print_line
    from pipeline.errors import UserError
    from pipeline.project.cache import SHORT_KEY
    from pipeline.project.reapply import restore, settings_to_write

    project = project_of(params)
    chosen, values = _choose(project, name), dict[str, Any]()
    for run in chosen:
        if not run.key:
            raise UserError(
                f"{run.label} has not finished, so there is nothing to take. `lora runs` lists the "
                "others."
            )
        if project.home(run.stage) is not project:
            raise UserError(
                f"{run.stage} is a stage of {project.params.project}. Run this in "
                f"{project.home(run.stage).root}."
            )
        values |= settings_to_write(project, run)
    _refuse_unwritable(project, values, name)  # before an artifact is replaced
    for run in chosen:
        restore(project, run)
    write_values(project, values, name)
    for run in chosen:
        label = " ".join(run.label.split())
        print_line(f"{project.artifact_name(run.stage)}  {run.key[:SHORT_KEY]}, {label}")


@runs.command()
def compare(
    one: Annotated[str, Argument(metavar="A", help=RUN)],
    other: Annotated[str, Argument(metavar="B", help=RUN)],
    params: ParamsOption = DEFAULT_PARAMS,
    as_json: JsonOption = False,
) -> None:
    """Compare the settings, training and evaluation of two runs."""
    from dataclasses import asdict

    from cli.console import number, print_json, print_line, print_table
    from lora_workbench.api import Project
    from pipeline.evaluation.comparison import comparison, legend
    from pipeline.project.params.edit import dump_inline

    found = Project(params).compare(one, other)
    if as_json:
        print_json({"runs": [one, other], **asdict(found)})
        return
    rows = [(key, *map(dump_inline, values)) for key, values in found.settings.items()]
    print_table(("setting", one, other), rows or [("none differs", "", "")])
    print_line("")
    rows = []
    for name, values in found.curves.items():
        form = "," if name == "steps" else ".4f"
        if any(value is not None for value in values):
            rows.append((name, *(number(value, form) for value in values)))
    print_table(("training", one, other), rows, right=(one, other))
    evaluated = {name: row for name, row in zip((one, other), found.metrics, strict=True) if row}
    if evaluated:
        columns, lines = comparison(evaluated)
        print_line("")
        print_table(columns, lines, right=columns[1:])
        print_line("\n" + legend(columns))
    for name in (one, other):
        if name not in evaluated:
            print_line(f"\n{name} is not evaluated yet with evaluate's settings of now.")


@runs.command()
def remove(
    name: Annotated[str, Argument(help="Name that --name gave it.")],
    params: ParamsOption = DEFAULT_PARAMS,
) -> None:
    """Remove a named run, with its results in the cache.

    A result that is in artifacts/ stays there.
    """
    from cli.console import print_line
    from pipeline.errors import UserError
    from pipeline.files.text import in_units
    from pipeline.project.cache import Cache

    cache = Cache(project_of(params).cache)
    if name not in cache.named():
        known = ", ".join(cache.named()) or "none yet: `lora finetune lora --name NAME` makes one"
        raise UserError(f"There is no named run {name[:60]}. Known: {known}.")
    print_line(f"{name} is removed, with {in_units(cache.forget(name))} of the cache.")


@runs.command()
def export(
    to: Annotated[
        str,
        Option("--to", metavar="TRACKER", help="dvclive, mlflow, tensorboard, trackio or wandb."),
    ],
    name: Annotated[
        str | None,
        Argument(
            metavar="[RUN]",
            help=f"{RUN} Omit: the last of each stage.",
        ),
    ] = None,
    params: ParamsOption = DEFAULT_PARAMS,
    out: Annotated[
        Path | None, Option(help="Folder of the tracker's runs, instead of its own.")
    ] = None,
) -> None:
    """Send finished runs to a tracker.

    By the same code as report_to does while they go on; steps that it has are not sent again.
    """
    from cli.console import print_line, print_note
    from pipeline.errors import UserError
    from pipeline.project.logs.follower import Followed, Follower, check, missing

    check([to], "--to")
    if why := missing(to):
        raise UserError(f"--to {to}: {why}.")
    project = project_of(params)
    for run in _choose(project, name):
        if not run.key:
            print_note(f"{run.label} has not finished, and is left out.")
            continue
        followed = Followed(
            root=str(project.root),
            stage=run.stage,
            sweeps=run.sweeps,
            key=run.key,
            params=run.params,
            artifact=str(run.log_folder),
            out=str(out.absolute()) if out else "",
        )
        follower = Follower(to, followed)
        follower.wait()
        if problem := follower.problem():
            raise UserError(f"{to}: {problem}. {follower.log} has more.")
        print_line(f"{run.label}  sent; {follower.view}")


def _choose(project: Project, name: str | None) -> list[Run]:
    from pipeline.views.runs import choose, discover_runs

    return choose(discover_runs(project.root, project), name)


def write_values(project: Project, values: Mapping[str, Any], what: str = "--apply") -> None:
    """Write `section.key` → value into the params file, and print the lines that changed.

    Raises UserError, which for a section of the project that this one builds on begins with `what`.
    """
    from difflib import unified_diff

    from cli.console import print_line, print_note
    from pipeline.project.params.edit import save
    from pipeline.project.params.load import read_text
    from pipeline.stages.registry import open_project

    _refuse_unwritable(project, values, what)
    path = project.params_path
    named = open_project(path).params.written
    before = read_text(path)
    save(path, values, project.graph.sections)
    lines = unified_diff(before.splitlines(), read_text(path).splitlines(), n=0, lineterm="")
    changed = [line for line in [*lines][2:] if line[0] in "+-"]
    print_line(
        "\n".join([f"{path.name}:", *changed])
        if changed
        else f"{path.name} has these values already."
    )
    new = [
        section
        for section in _sections_of(values)
        if section not in named and section in project.graph.product
    ]
    if new and (project.root / "dvc.yaml").is_file():
        print_note(
            f"{new[0]} is a stage of this project now. For `dvc repro`, remove dvc.yaml and run "
            "`lora new .`."
        )


def _sections_of(values: Mapping[str, Any]) -> dict[str, None]:
    return dict.fromkeys(key.partition(".")[0] for key in values if "." in key)


def _refuse_unwritable(project: Project, values: Mapping[str, Any], what: str) -> None:
    """Raises the UserError of `write_values`, and writes nothing."""
    from pipeline.errors import UserError
    from pipeline.project.params.edit import edited
    from pipeline.stages.registry import open_project

    path = project.params_path
    named = open_project(path).params.written
    inherited = project.parent.params.written if project.parent else frozenset()
    for section in _sections_of(values):
        if section in inherited - named:
            raise UserError(
                f"{what}: {section} is a section of {project.params.project}. Set it there by hand."
            )
    edited(path, values, project.graph.sections)
