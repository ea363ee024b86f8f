"""`lora finetune METHOD`: a command for each method that the registry finds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from inspect import getdoc
from pathlib import Path
from signal import SIGINT
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from typer import Exit, Option, Typer, confirm
from typer.main import get_command

from cli.options import (
    DEFAULT_PARAMS,
    UNDER_DVC,
    CheckpointOption,
    DetachOption,
    DeviceOption,
    DevicesOption,
    EndpointOption,
    ForceOption,
    Group,
    Lazy,
    NameOption,
    NodeRankOption,
    NodesOption,
    OnOption,
    ParamsOption,
    PartsOption,
    SetOption,
    SettingsCommand,
    ShardOption,
    finite,
    group,
    project_of,
)
from cli.stages import name_run, of_stage, run_stage
from pipeline.errors import Interrupted, UserError
from pipeline.files.text import in_units
from pipeline.project.process import world

if TYPE_CHECKING:
    from pipeline.fleet.evaluations import FleetEvaluation
    from pipeline.fleet.stages import FleetStages
    from pipeline.fleet.sweeps import FleetSweep
    from pipeline.project.stage_graph import Project, Stage


def _method_names() -> list[str]:
    from pipeline.stages.registry import METHODS

    return [name for name, stage in METHODS.items() if stage.name.startswith("finetune_")]


def _method(name: str) -> Any:
    from pipeline.stages.registry import METHODS

    stage = METHODS[name]
    form = ", in PEFT's format" if stage.kind == "adapter" else ""
    summary = f"{stage.summary} → {stage.path}{form}.\n\n{getdoc(stage.settings)}"
    command = sweep if stage.kind == "adapters" else _distributes(stage)
    single = Typer(rich_markup_mode=None, add_completion=False)
    single.command(name, help=summary, cls=SettingsCommand)(command)
    return get_command(single)


class _Methods(Group):
    """`lora finetune`: one command for each method that the registry finds."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: Any = Lazy(_method_names, _method)


app = group()
finetune = group(
    help="Fine-tune the expanded base with one method.", no_args_is_help=True, cls=_Methods
)
app.add_typer(finetune, name="finetune")


def _distributes(stage: Stage) -> Callable[..., None]:
    """The command of a method that several processes can run together."""

    def command(
        params: ParamsOption = DEFAULT_PARAMS,
        overrides: SetOption = None,
        force: ForceOption = False,
        checkpoint_every: CheckpointOption = None,
        devices: DevicesOption = 1,
        nodes: NodesOption = 1,
        endpoint: EndpointOption = None,
        node_rank: NodeRankOption = None,
        shard: ShardOption = None,
        dry_run: Annotated[
            bool,
            Option(
                "--dry-run",
                help="Try a few steps; show memory, steps, tokens and time, and make nothing.",
            ),
        ] = False,
        apply: Annotated[
            bool, Option("--apply", help="Then write the values of --set into the params file.")
        ] = False,
        name: NameOption = None,
        on: OnOption = None,
        detach: DetachOption = False,
        _device: DeviceOption = None,
    ) -> None:
        machines = Machines(devices, nodes, endpoint, node_rank, shard, on, detach)
        machines.check()
        overrides = of_stage(overrides, stage)
        if apply and (dry_run or not overrides):
            reason = "--dry-run makes nothing" if dry_run else "there are none"
            raise UserError(
                f"--apply writes the values of --set once they have trained, but {reason}. Leave "
                "it out."
            )
        if dry_run:
            _print_plan(project_of(params, overrides), stage)
            return
        machines.train(stage, params, overrides, name, force, checkpoint_every, apply)

    return command


class Machines(NamedTuple):
    """The devices and machines that train together."""

    devices: int
    nodes: int
    endpoint: str | None
    node_rank: int | None
    shard: bool | None
    on: str | None = None  # the cluster whose machines they are
    detach: bool = False  # whether nobody waits for the cluster

    @property
    def launches(self) -> bool:
        """Whether this process starts others; not under torchrun, which has."""
        return self.devices * self.nodes > 1 and world().world_size == 1 and self.on is None

    def check(self) -> None:
        """Raises UserError for options that contradict each other."""
        if self.detach and self.on is None:
            raise UserError("--detach leaves units to a cluster. Name it with --on.")
        if self.on is not None:
            if self.endpoint is not None or self.node_rank is not None:
                raise UserError(
                    "--on finds machines that meet by itself. Leave out --rdzv-endpoint and "
                    "--node-rank."
                )
            return
        if self.shard and not self.launches and world().world_size == 1:
            raise UserError(
                "--shard shares the base among several devices. Say how many with --devices."
            )
        if (self.nodes > 1) != (self.endpoint is not None):
            raise UserError(
                "--nnodes and --rdzv-endpoint go together: the machines have to meet. Name both."
            )
        if self.node_rank is not None and self.node_rank >= self.nodes:
            raise UserError(
                f"--node-rank must be less than --nnodes, which is {self.nodes}, got "
                f"{self.node_rank}. Correct it."
            )

    def train(
        self,
        stage: Stage,
        params: Path,
        overrides: Sequence[str],
        name: str | None = None,
        force: bool = False,
        checkpoint_every: int | None = None,
        apply: bool = False,
    ) -> None:
        """Train a stage on them, a process per device; with a `name`, keep the run under it.

        `apply`: then write the overrides into the params file. Raises UserError, and Exit with the
        exit code of processes that failed.
        """
        from lora_workbench.api import Project

        project = Project(params, overrides)
        if name is not None:
            project.refuse_name(name, stage.name)
        if self.on is not None and force:
            raise UserError("--on trains what the cache has not. Leave out --force.")
        if self.on is not None:
            self._send(stage, project.pipeline, overrides, checkpoint_every)
        if not self.launches or stage.kind == "adapters":
            run_stage(
                stage.name, params, overrides, force, checkpoint_every, self.shard, apply=apply
            )
        else:
            from pipeline.training.parallel.launch import launch

            # what is wrong is said before anything starts
            project.pipeline.stage(stage.name)
            given = ["finetune", stage.method, "--params", str(params), *["--force"] * force]
            if checkpoint_every is not None:
                given += ["--checkpoint-every", str(checkpoint_every)]
            given += [f"--set={override}" for override in overrides]
            if self.shard is not None:
                given.append("--shard" if self.shard else "--no-shard")
            given += ["--apply"] * apply
            if code := launch(self.devices, given, self.nodes, self.endpoint or "", self.node_rank):
                raise Exit(code)
        is_here = project.artifact(stage.name).is_dir()  # with several machines, on the first
        if name is not None and is_here and world().is_main_process:
            name_run(name, stage.name, params, overrides)

    def _send(
        self,
        stage: Stage,
        project: Project,
        overrides: Sequence[str],
        checkpoint_every: int | None,
    ) -> None:
        """Train the stage in a unit; its result is then in the cache."""
        from pipeline.fleet.stages import FleetStages, StageRun

        more = [f"--devices={self.devices}"] * (self.devices > 1)
        if checkpoint_every is not None:
            more.append(f"--checkpoint-every={checkpoint_every}")
        if self.shard is not None:
            more.append("--shard" if self.shard else "--no-shard")
        wanted = StageRun(project, overrides, project.stage(stage.name), more)
        wait_for(FleetStages([wanted], self.on or "", self.nodes), self.detach)


def _print_plan(project: Project, stage: Stage) -> None:
    """What a training would take, by its first steps, and what `dvc repro` would run."""
    from cli.console import duration_range, follow, print_line
    from pipeline.models.device import available_memory, device_info
    from pipeline.stages.quickstart import try_stage
    from pipeline.views.stages import Status, apart

    project.stage(stage.name)
    trial = follow(try_stage(project, stage), f"{stage.name}, trying a few steps")
    room = f"{in_units(available_memory(trial.device))} free on {device_info(trial.device)['name']}"
    peak = "not predicted, "
    if trial.predicted:
        peak = f"{in_units(trial.predicted)} of tensors at the peak, "
    print_line(f"memory  {peak}{room}")
    print_line(f"steps   {trial.steps:,}, {trial.steps_per_epoch:,} per epoch")
    print_line(f"tokens  {trial.tokens:,}, {trial.epoch_tokens:,} per epoch")
    print_line(f"time    {duration_range(*trial.seconds)}, by {trial.timed} steps")
    settings = project.params.section(stage.section)
    if settings.save_steps:
        size = trial.trained
        if stage.kind == "checkpoint":
            base = project.artifact("expand_vocab")
            size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
        number = trial.steps // settings.save_steps
        if limit := settings.save_total_limit:
            number = min(number, limit + 1)
        print_line(f"disk    {number} checkpoints of {in_units(size)}")
    states = Status().of(project)
    waiting = [
        other.command for name, other in project.stages.items() if states[name].state != "current"
    ]
    heading = "dvc repro would run" if project.has_dvc else "to run"
    print_line(f"{heading}: {', '.join(waiting) or 'nothing'}")
    for name, reasons in apart(project).items():
        if name in project.stages:
            print_line(
                f"  it replaces {project.artifact_name(name)}, made with other settings: "
                f"{', '.join(reasons)}"
            )


def sweep(
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
    force: ForceOption = False,
    checkpoint_every: CheckpointOption = None,
    over: Annotated[
        list[str] | None,
        Option(
            metavar="KEY",
            help=(
                "Sweep values around the advised ones: learning_rate, rank, alpha, target_modules."
            ),
        ),
    ] = None,
    max_divergence: Annotated[
        float | None,
        Option(
            min=0, callback=finite, help="Choose among adapters that are this close to the base."
        ),
    ] = None,
    grid: Annotated[
        list[str] | None,
        Option(metavar="KEY=VALUE,…", help="Values to try: rank=4,8,16; one --grid for each key."),
    ] = None,
    apply: Annotated[
        bool, Option("--apply", help="Write the best adapter's values into finetune_lora.")
    ] = False,
    on: OnOption = None,
    parts: PartsOption = None,
    detach: DetachOption = False,
    only: Annotated[
        str | None,
        Option(
            metavar="NAME,…",
            help="Train only these adapters, for the cache; then the whole sweep takes them there.",
        ),
    ] = None,
    _device: DeviceOption = None,
) -> None:
    """The command of a sweep, which also chooses among what it made."""
    from pipeline.stages.registry import METHODS

    overrides = of_stage(overrides, METHODS["sweep"])
    if over or grid:
        from pipeline.stages.methods.sweep import grid_around

        project = project_of(params, overrides)
        if (over and grid) or "finetune_sweep.grid" in project.params.overrides:
            raise UserError(
                "--over, --grid and --set finetune_sweep.grid each make the grid. Give one of them."
            )
        values = grid_around(project, over) if over else read_grid(grid or ())
        overrides.append(f"finetune_sweep.grid={json.dumps(values)}")
    if on is None and (parts is not None or detach):
        raise UserError("--parts and --detach are of what --on sends. Name a cluster with --on.")
    if on is not None and (force or only is not None):
        raise UserError(
            "--on trains what the cache has not, all of it. Leave out --force and --only."
        )
    if on is not None:
        from pipeline.fleet.sweeps import FleetSweep

        sent = FleetSweep(project_of(params, [*overrides]), overrides, on, parts)
        wait_for(sent, detach)
    if only is not None:
        _train_part(project_of(params, overrides), only.split(","), checkpoint_every)
        return
    run_stage("finetune_sweep", params, overrides, force, checkpoint_every)
    if not UNDER_DVC:
        _choose(project_of(params, overrides), max_divergence, apply)


def wait_for(sent: FleetSweep | FleetStages | FleetEvaluation, detach: bool = False) -> None:
    """Show how units go, until all have ended; `detach`: a job waits for them in the queue.

    Raises UserError, Exit once that job is there, and Interrupted after Ctrl-C: units of this
    machine stop, of others if the user says so.
    """
    from cli.console import follow, print_line
    from pipeline.fleet.run import Detached, cancel

    run = sent.run
    if detach and not run.engine.has_queue:
        raise UserError(
            f"--detach: units on {run.cluster} end with this command. Leave it out, or name a "
            "cluster that has a queue."
        )
    run.detaches = detach
    try:
        follow(sent.events(), f"{run.stage} on {run.cluster}")
    except Detached:
        print_line(f"{run.name} is in the queue, and what follows it. `lora fleet` shows it.")
        raise Exit from None
    except KeyboardInterrupt:
        if run.is_elsewhere:
            raise Interrupted(SIGINT, f"the units of {run.name} go on", False) from None
        again = "the same command goes on from their checkpoints"
        if not run.engine.has_queue or _wants_to_cancel():
            cancel(run)
            raise Interrupted(
                SIGINT, f"the units of {run.name} are stopped; {again}", False
            ) from None
        left = f"{run.name} goes on in the queue; `lora fleet collect {run.name}` waits for it"
        raise Interrupted(SIGINT, left, False) from None


def _wants_to_cancel() -> bool:
    """Whether a user at a terminal wants the units stopped; without a terminal they go on."""
    if not sys.stdin.isatty():
        return False
    return confirm(
        "Cancel the units? Otherwise they go on, and `lora fleet` shows them", False, err=True
    )


def _train_part(project: Project, names: Sequence[str], checkpoint_every: int | None) -> None:
    """Train some adapters of a sweep, for the cache."""
    from cli.console import follow, print_line
    from pipeline.project.runner import run_part as run_for_cache
    from pipeline.stages.methods.sweep import run_part

    stage = project.stage("finetune_sweep")
    work = partial(run_part, names=names)
    follow(run_for_cache(project, stage, work, checkpoint_every), stage.name)
    print_line(
        f"{', '.join(names)}: in the cache. `{stage.command}` without --only takes them there."
    )


def read_grid(options: Sequence[str], option: str = "--grid") -> dict[str, list[Any]]:
    """Key → values of each `option`. Raises UserError."""
    from pipeline.files import strict_yaml
    from pipeline.project.params.schema import ValueSource, check_value, hints
    from pipeline.stages.methods.sweep import FinetuneSweep

    grid: dict[str, list[Any]] = {}
    for given in options:
        key, equals, text = given.partition("=")
        try:
            values = strict_yaml.load(f"[{text}]")
        except ValueError:
            values = None
        if not equals or not values or key in grid:
            raise UserError(
                f"{option} takes a key once with its values, such as rank=4,8,16, got {given!r}."
            )
        grid[key] = values
    if option == "--grid":
        check_value(hints(FinetuneSweep)["grid"], grid, option, ValueSource(option))
    return grid


def _choose(project: Project, max_divergence: float | None, apply: bool) -> None:
    """Print a sweep's adapters and the best of them.

    `apply`: write its values, and those that --set gave all of them, into the params file.
    """
    from cli.console import print_line, print_table
    from cli.runs import write_values
    from pipeline.evaluation.selection import beyond, choose, loss_of, pareto
    from pipeline.files.artifact import read_json
    from pipeline.project.logs.run_log import TABLE
    from pipeline.project.params.edit import dump_inline

    table = read_json(project.artifact("finetune_sweep") / TABLE, "Run `lora finetune sweep`")
    front = pareto(table)
    numbers = {
        "trained": ("trainable", ","),
        "steps": ("steps", ","),
        "loss": ("final_loss", ".4f"),
        "held out": ("eval_loss", ".4f"),
    }
    if front:
        numbers["divergence"] = ("divergence", ".4f")
    rows = []
    for name, end in table.items():
        row = [name]
        for key, form in numbers.values():
            row.append("" if end.get(key) is None else f"{end[key]:{form}}")
        if front:
            row.append("yes" if name in front else "")
        rows.append([*row, end["state"]])
    columns = ["adapter", *numbers, *["Pareto"] * bool(front), "end"]
    print_table(columns, rows, right=tuple(numbers))
    best = choose(table, max_divergence)
    chosen = table[best]
    kind = "loss" if chosen["eval_loss"] is None else "held-out loss"
    divergence = f", divergence {chosen['divergence']:.4f}" if front else ""
    print_line(f"best: {best}, {kind} {loss_of(chosen):.4f}{divergence}")
    if chosen["eval_loss"] is None:
        print_line(
            "No example is held out: the training loss decides. Set finetune_lora.eval_share."
        )
    grid, lora = project.params.finetune_sweep.grid, type(project.params.finetune_lora)
    for key, (edge, further) in beyond(table, best, grid, lora).items():
        longer = dump_inline({key: further})
        print_line(
            f"{key} {dump_inline(chosen['values'][key])} is the {edge} that was tried: a better "
            f"one may be beyond it. Sweep on with --set 'finetune_sweep.grid={longer}'."
        )
    if apply:
        given = project.params.overrides.items()
        written = {key: value for key, value in given if key.startswith("finetune_lora.")}
        for key, value in chosen["values"].items():
            written[f"finetune_lora.{key}"] = value
        write_values(project, written)
