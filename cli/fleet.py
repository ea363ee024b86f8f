"""`lora fleet`: what runs on other devices and machines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from typer import Argument, Context, Exit, Option

from cli.options import DEFAULT_PARAMS, DetachOption, JsonOption, SetOption, group
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
UnitsArgument = Annotated[list[int] | None, Argument(metavar="[UNIT]…", help="Only these units.")]


@fleet.callback()
def show(context: Context, as_json: JsonOption = False) -> None:
    """List the runs of the project here, and what each of their units does."""
    from cli.console import print_json, print_line, print_table
    from pipeline.files.text import duration
    from pipeline.fleet.run import find_runs

    if context.invoked_subcommand is not None:
        return
    runs = [(run, run.states()) for run in find_runs(Path())]
    if as_json:
        print_json([_document(run, states) for run, states in runs])
        return
    if not runs:
        print_line("No run of a fleet is here. `lora finetune sweep --on local` starts one.")
    for run, states in runs:
        rows = []
        for unit in states:
            seen = unit.journal
            step = f"{seen.done:,}/{seen.total:,}" if seen and seen.total else ""
            left = duration(seen.eta) if seen and seen.eta and unit.state == "running" else ""
            counts = str(unit.number), str(unit.attempts)
            rows.append([counts[0], unit.state, unit.node, counts[1], step, left, unit.label])
        makes = "adapters" if run.stage in OF_ADAPTERS else "makes"
        print_line(f"{run.name}  {run.stage} on {run.cluster}")
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
    methods: Annotated[list[str], Argument(metavar="METHOD…", help="Methods, such as lora full.")],
    vary: Annotated[
        list[str] | None,
        Option(metavar="KEY=VALUE,…", help="Values to run each with: seed=0,1,2; may be repeated."),
    ] = None,
    projects: Annotated[
        list[Path] | None,
        Option("--project", metavar="DIR", help="Project to run them in; may be repeated."),
    ] = None,
    overrides: SetOption = None,
    on: Annotated[str, Option("--on", metavar="NAME", help="Cluster of fleet.yaml.")] = "local",
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


@fleet.command()
def retry(name: RunArgument, units: UnitsArgument = None) -> None:
    """Start units again that failed or were stopped."""
    from cli.console import print_line
    from pipeline.fleet.run import find_run

    run = find_run(Path(), name)
    ended = [unit.number for unit in run.states() if unit.state in ("failed", "stopped", "lost")]
    chosen = [number for number in ended if not units or number in units]
    if chosen and run.engine.has_queue:
        run.submit(chosen)
    print_line(f"started again: {', '.join(map(str, chosen)) or 'none'}")
    if not run.engine.has_queue:
        _collect(run)


@fleet.command()
def collect(name: RunArgument) -> None:
    """Wait for a run's units, and write the table of the sweep."""
    from pipeline.fleet.run import find_run

    _collect(find_run(Path(), name))


def _collect(run: FleetRun) -> NoReturn:
    """The command that started the run, again, in the folder in which it was typed."""
    command = [sys.executable, "-P", "-m", "lora_workbench", *run.command]
    raise Exit(subprocess.run(command, cwd=run.place, check=False).returncode)


@fleet.command()
def cancel(name: RunArgument, units: UnitsArgument = None) -> None:
    """Stop units, by default all. They keep their checkpoints: `lora fleet retry` goes on."""
    from cli.console import print_line
    from pipeline.fleet.run import cancel as stop
    from pipeline.fleet.run import find_run

    stopped = stop(find_run(Path(), name), units or ())
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
    if unit not in run.numbers():
        last = len(run.numbers())
        raise UserError(f"{run.name} has no unit {unit}. Its units are 1 to {last}: `lora fleet`.")
    path = run.unit_folder(unit) / LOG
    print_line(path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "")


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
