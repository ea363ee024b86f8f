"""`lora fleet`: what runs on other devices and machines."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from typer import Argument, Context, Exit, Option

from cli.options import (
    DEFAULT_PARAMS,
    DetachOption,
    DevicesOption,
    JsonOption,
    PartsOption,
    SetOption,
    finite,
    group,
)
from cli.stages.finetune import read_grid
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.fleet.run import FleetRun
    from pipeline.fleet.states import UnitState

app = group()
fleet = group(help="Runs on other devices and machines.", invoke_without_command=True)
app.add_typer(fleet, name="fleet")

OF_ADAPTERS = ("finetune_sweep", "evaluate")  # stages whose units are of adapters
BAR = 10  # columns of a progress bar: a line of it has 80

RunArgument = Annotated[str, Argument(metavar="RUN", help="A run, or the beginning of its name.")]
MethodsArgument = Annotated[
    list[str], Argument(metavar="METHOD…", help="Methods, such as lora full.")
]
VaryOption = Annotated[
    list[str] | None,
    Option(metavar="KEY=VALUE,…", help="Values to run each with: seed=0,1,2; may be repeated."),
]
ProjectsOption = Annotated[
    list[Path] | None,
    Option("--project", metavar="DIR", help="Project to run them in; may be repeated."),
]
OnOption = Annotated[str, Option("--on", metavar="NAME", help="Cluster of fleet.yaml.")]
UnitsArgument = Annotated[list[int] | None, Argument(metavar="[UNIT]…", help="Only these units.")]


@fleet.callback()
def show(context: Context, as_json: JsonOption = False) -> None:
    """List the runs of the project here, and what each of their units does."""
    from cli.console import print_json, print_line, print_table
    from pipeline.files.text import duration
    from pipeline.fleet.run import find_runs

    if context.invoked_subcommand is not None:
        return
    runs = [(run, *run.look()) for run in find_runs(Path())]
    if as_json:
        print_json([_document(run, states) for run, states, _ in runs])
        return
    if not runs:
        print_line("No run of a fleet is here. `lora finetune sweep --on local` starts one.")
    for run, states, problem in runs:
        rows = []
        for unit in states:
            seen = unit.journal
            step = f"{seen.done:,}/{seen.total:,}" if seen and seen.total else ""
            left = duration(seen.eta) if seen and seen.eta and unit.state == "running" else ""
            counts = str(unit.number), str(unit.attempts)
            rows.append([counts[0], unit.state, unit.node, counts[1], step, left, unit.label])
        makes = "adapters" if run.stage in OF_ADAPTERS else "makes"
        print_line(f"{run.name}  {run.stage} on {run.cluster}{problem and f'  ✗ {problem}'}")
        print_line(_progress(states))
        print_table(["unit", "state", "node", "attempts", "step", "left", makes], rows)


def _progress(states: Sequence[UnitState]) -> str:
    """How far the units are together: on a terminal with a bar."""
    from cli.console import bar, stdout
    from pipeline.files.text import duration
    from pipeline.fleet.states import joined

    journal, parts = joined(states), list[str]()
    if journal.total:
        share = journal.done / journal.total
        drawn = f"{bar(share, BAR):{BAR}} " if stdout.is_terminal else ""
        parts.append(f"{drawn}{share:.0%}")
    parts.append(journal.text)
    if journal.total:
        parts.append(f"{journal.done:,}/{journal.total:,} steps")
    if journal.eta:
        parts.append(f"{duration(journal.eta)} left")
    return "  ".join(parts)


def _document(run: FleetRun, states: Sequence[UnitState]) -> dict[str, Any]:
    """A run and its units, for --json."""
    units = []
    for unit in states:
        seen = unit.journal
        units.append(
            {
                "unit": unit.number,
                "state": unit.state,
                "node": unit.node,
                "attempts": unit.attempts,
                "makes": unit.label.split(),
                "step": seen.done if seen else 0,
                "steps": seen.total if seen else 0,
                "reason": unit.reason,
            }
        )
    return {"run": run.name, "stage": run.stage, "cluster": run.cluster, "units": units}


@fleet.command("run")
def run_methods(
    methods: MethodsArgument,
    vary: VaryOption = None,
    projects: ProjectsOption = None,
    overrides: SetOption = None,
    on: OnOption = "local",
    detach: DetachOption = False,
) -> None:
    """Train methods with several seeds, settings and bases.

    Each is a unit, after what it needs.
    """
    from cli.console import print_line
    from cli.stages.finetune import wait_for
    from pipeline.fleet.stages import FleetStages, varied

    values = read_grid(vary or (), "--vary")
    paths = [folder / DEFAULT_PARAMS for folder in projects or [Path()]]
    wait_for(FleetStages(varied(paths, methods, values, overrides or ()), on), detach)
    print_line("all in the cache: `lora runs` lists them, `lora runs apply KEY` takes one")


@fleet.command("emit")
def emit_files(
    name: Annotated[
        str, Argument(metavar="FORMAT", help="Scheduler: slurm, sky, kubeflow or torchx.")
    ],
    methods: MethodsArgument,
    vary: VaryOption = None,
    grid: Annotated[
        list[str] | None,
        Option(metavar="KEY=VALUE,…", help="Values of a sweep: rank=4,8; one --grid for each key."),
    ] = None,
    parts: PartsOption = None,
    nodes: Annotated[
        int, Option("--nnodes", min=1, help="Machines that train a unit together.")
    ] = 1,
    devices: DevicesOption = 1,
    projects: ProjectsOption = None,
    overrides: SetOption = None,
    on: OnOption = "local",
    options: Annotated[
        list[str] | None,
        Option("--option", metavar="KEY=VALUE", help="Of the scheduler: image=…; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None, Option(metavar="DIR", help="Folder for the files; default: fleet-FORMAT.")
    ] = None,
) -> None:
    """Write files for a scheduler that `lora` does not call. Nothing is submitted."""
    from cli.console import print_line
    from pipeline.fleet.emit import emit, find_format, read_options, units_of
    from pipeline.fleet.settings import read_cluster
    from pipeline.fleet.stages import varied

    find_format(name)
    if "sweep" not in methods and (grid or parts is not None):
        raise UserError("--grid and --parts are of a sweep. Leave them out, or name sweep.")
    values, given = read_grid(vary or (), "--vary"), list(overrides or ())
    if grid:
        given.append(f"finetune_sweep.grid={json.dumps(read_grid(grid))}")
    paths = [folder / DEFAULT_PARAMS for folder in projects or [Path()]]
    more = [f"--devices={devices}"] * (devices > 1)
    wanted = [replace(stage, more=more) for stage in varied(paths, methods, values, given)]
    cluster = read_cluster(wanted[0].project.root, on)
    units = [unit for stage in wanted for unit in units_of(stage, cluster.at_once, parts, nodes)]
    folder = out or Path(f"fleet-{name}")
    files, next_step = emit(name, units, cluster, read_options(name, options or ()), folder)
    print_line(f"units: {len(units)}; written: {', '.join(map(str, files))}")
    print_line(f"submit: {next_step}")


@fleet.command()
def retry(name: RunArgument, units: UnitsArgument = None) -> None:
    """Start units again that failed or were stopped."""
    from cli.console import print_line
    from pipeline.fleet.run import find_run

    run = find_run(Path(), name)
    _require(run, units or ())
    if units and not run.engine.has_queue:
        raise UserError(
            f"{run.cluster} has no queue: the command starts all units that did not end well. Leave "
            "out UNIT."
        )
    idle = ("failed", "stopped", "lost", "waiting")
    ended = [unit.number for unit in run.states() if unit.state in idle]
    chosen = [number for number in ended if not units or number in units]
    if chosen and run.engine.has_queue:
        run.submit(chosen)
    print_line(f"started again: {', '.join(map(str, chosen)) or 'none'}")
    if not run.engine.has_queue:
        _collect(run)


def _require(run: FleetRun, units: Sequence[int]) -> None:
    """Raises UserError for a number that no unit has."""
    last = len(run.numbers())
    for unit in units:
        if not 1 <= unit <= last:
            raise UserError(
                f"{run.name} has no unit {unit}. Its units are 1 to {last}: `lora fleet`."
            )


@fleet.command()
def collect(name: RunArgument) -> None:
    """Wait for a run's units, and write the table of the sweep."""
    from pipeline.fleet.run import find_run

    _collect(find_run(Path(), name))


def _collect(run: FleetRun) -> NoReturn:
    """The command that started the run, again, in the folder in which it was typed."""
    words = [word for word in run.command if word != "--detach"]
    os.chdir(run.place)
    sys.stdout.flush()
    # in this process, which then has Ctrl-C and its question
    os.execv(sys.executable, [sys.executable, "-P", "-m", "lora_workbench", *words])


@fleet.command()
def cancel(name: RunArgument, units: UnitsArgument = None) -> None:
    """Stop units, by default all. They keep their checkpoints: `lora fleet retry` goes on."""
    from cli.console import print_line
    from pipeline.fleet.run import cancel as stop
    from pipeline.fleet.run import find_run

    run = find_run(Path(), name)
    _require(run, units or ())
    stopped = stop(run, units or ())
    print_line(f"stopped: {', '.join(map(str, stopped)) or 'none'}")


@fleet.command()
def logs(
    name: RunArgument, unit: Annotated[int, Argument(metavar="UNIT", help="Its number.")]
) -> None:
    """Print what a unit has printed."""
    from cli.console import print_line
    from pipeline.fleet.run import find_run
    from pipeline.fleet.unit import LOG

    run = find_run(Path(), name)
    _require(run, [unit])
    path = run.unit_folder(unit) / LOG
    print_line(path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "")


@fleet.command()
def check(
    name: Annotated[str, Argument(metavar="NAME", help="Cluster of fleet.yaml, or local.")],
    limit: Annotated[
        float,
        Option("--wait", metavar="SECONDS", min=1, callback=finite, help="Time for the probe."),
    ] = 600.0,
    as_json: JsonOption = False,
) -> None:
    """Run a unit on a cluster, and compare its node with this machine.

    The exit code is 1 if results of its units would be missed, or units fail.
    """
    from cli.console import follow, print_json, print_line, print_table
    from pipeline.fleet.check import check as compare
    from pipeline.stages.registry import current_project

    node, rows = follow(compare(current_project(), name, limit), f"a probe on {name}")
    problems = [row for row in rows if row.problem]
    if as_json:
        facts = [row._asdict() for row in rows]
        print_json({"cluster": name, "node": node, "problems": len(problems), "facts": facts})
    else:
        print_table(("", "here", node), [row[:3] for row in rows])
        for row in problems:
            print_line(f"{row.what}: {row.problem}")
        bad = "its units fail, or their results are not found here"
        print_line(f"{name}: {bad if problems else 'units run there, results are found here'}")
    if problems:
        raise Exit(1)


@fleet.command(hidden=True)
def probe(folder: Annotated[Path, Argument(help="A folder that both machines see.")]) -> None:
    """Print what a node has: what `lora fleet check` runs."""
    import msgspec

    from pipeline.fleet.check import probe as find

    sys.stdout.write(msgspec.json.encode(find(folder)).decode() + "\n")


@fleet.command("unit", hidden=True)
def unit_process(
    folder: Annotated[Path, Argument(help="The unit's folder.")],
    requeue: Annotated[
        bool, Option("--requeue", help="Let Slurm make another attempt where one is needed.")
    ] = False,
) -> None:
    """Make an attempt at a unit: what engines run."""
    from pipeline.fleet.engines.slurm import SlurmJob
    from pipeline.fleet.unit import run_unit

    raise Exit(run_unit(folder, SlurmJob() if requeue else None))
