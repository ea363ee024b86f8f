"""`lora new` and `lora train`: a project for a base and a data file, chosen for both, and run."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from cli.options import (
    ColumnsOption,
    DeviceOption,
    DevicesOption,
    EndpointOption,
    NameOption,
    NodeRankOption,
    NodesOption,
    OnOption,
    PlainOption,
    SettingsCommand,
    ShardOption,
    columns_of,
    group,
    note_names,
)
from pipeline.errors import UserError
from pipeline.files.text import in_units

if TYPE_CHECKING:
    from pipeline.project.foreign import Config
    from pipeline.project.stage_graph import Project
    from pipeline.stages.quickstart import Request, Started

app = group()
SHOWN_ANSWERS = 4  # questions after training; `lora report` shows all

BaseOption = Annotated[
    str | None,
    Option("--base", help="Base model: a checkpoint folder, a .gguf file or a hub id; or minigpt."),
]
DataOption = Annotated[
    list[str] | None,
    Option(
        "--data", help="Data file or folder, or a hub data set's id; may be given several times."
    ),
]
EvalOption = Annotated[
    str | None,
    Option("--eval-data", help="Examples to evaluate on; default: a share of --data is held out."),
]
MethodsOption = Annotated[
    str | None,
    Option(
        "--methods", help="Methods to train, such as full,lora; `lora finetune --help` lists them."
    ),
]
ValuesOption = Annotated[
    list[str] | None,
    Option("--set", metavar="KEY=VALUE", help="A setting of the project: rank=16, epochs=1."),
]


ConfigOption = Annotated[
    Path | None,
    Option(
        "--from",
        "--config",
        help=(
            "Take settings from a config of PEFT, transformers, TRL, Axolotl, LLaMA-Factory, "
            "mlx-lm."
        ),
    ),
]


@app.command(cls=SettingsCommand)
def new(
    folder: Annotated[Path, Argument(help="New folder, or an existing project to complete.")],
    base: BaseOption = None,
    data: DataOption = None,
    eval_data: EvalOption = None,
    methods: MethodsOption = None,
    columns: ColumnsOption = None,
    no_template: PlainOption = False,
    values: ValuesOption = None,
    params: Annotated[
        Path | None,
        Option("--params", help="Params file to start from; its data files are copied too."),
    ] = None,
    config: ConfigOption = None,
    _device: DeviceOption = None,
) -> None:
    """Make a project: params, data, dvc.yaml. Nothing that is there is overwritten.

    With --base and --data: settings are chosen for both, and a few steps are tried. Without: MiniGPT.
    """
    from cli.console import following, print_line
    from lora_workbench import api
    from pipeline.files.base_model import MINIGPT

    chosen, values = _names(methods), _with_template(values, no_template)
    if config:
        if (folder / "params.yaml").exists():
            raise UserError(
                f"{folder} is a project already. Set the values in its params.yaml, or name a new "
                "folder."
            )
        if params:
            raise UserError(
                "--from and --params both say what the new params file holds. Give one of them."
            )
        base, data, chosen, taken = _read_config(config, base, data, chosen)
        start_project(_request(folder, base, data, eval_data, chosen, columns, values, taken))
    elif base and base != MINIGPT and not params and not (folder / "params.yaml").exists():
        if not data:
            raise UserError(
                "--base needs --data, the examples to train on: a file, a folder or a hub data "
                "set's id."
            )
        start_project(_request(folder, base, data, eval_data, chosen or ["lora"], columns, values))
    else:
        given: dict[str, Any] = {"--data": data, "--eval-data": eval_data, "--columns": columns}
        given |= {"--no-template": no_template, "--set": values}
        if unused := [name for name, value in given.items() if value]:
            raise UserError(
                f"{unused[0]} goes with a new project of --base and --data. Edit "
                f"{folder}/params.yaml."
            )
        with following("new") as show:
            added = api.new(folder, base=base, methods=chosen or None, params=params, on_event=show)
        print_line(f"{folder}: added {', '.join(added)}" if added else f"{folder}: nothing to add")
    print_line(f"Next: cd {quote(str(folder))}; {_dvc()} repro; lora-tui")


@app.command(cls=SettingsCommand)
def train(
    argument: Annotated[
        Path | None, Argument(metavar="[CONFIG]", help="The same as --from CONFIG.")
    ] = None,
    base: BaseOption = None,
    data: DataOption = None,
    out: Annotated[
        Path, Option("--out", help="Folder of the new project, or of one to go on with.")
    ] = Path("run"),
    eval_data: EvalOption = None,
    methods: MethodsOption = None,
    columns: ColumnsOption = None,
    no_template: PlainOption = False,
    values: ValuesOption = None,
    config: ConfigOption = None,
    devices: DevicesOption = 1,
    nodes: NodesOption = 1,
    endpoint: EndpointOption = None,
    node_rank: NodeRankOption = None,
    shard: ShardOption = None,
    name: NameOption = None,
    on: OnOption = None,
    _device: DeviceOption = None,
) -> None:
    """Fine-tune a base on your data, in one command.

    Makes a project in --out and runs it. Settings are chosen for the base, the data and the memory
    here, each with a reason; --set replaces any of them. After a stop, the same command goes on.
    With --name, --set may differ from a project that is there: an experiment beside the others.
    """
    from cli.console import follow, print_note
    from cli.project.report import refuse_broken
    from cli.stages import run_stage
    from cli.stages.finetune import Machines
    from pipeline.inference.catalog import BASES
    from pipeline.stages.quickstart import begin
    from pipeline.stages.registry import GRAPH, open_project

    machines = Machines(devices, nodes, endpoint, node_rank, shard, on)
    machines.check()
    params = out / "params.yaml"
    chosen, values = _names(methods), _with_template(values, no_template)
    taken: Mapping[str, Any] = {}
    if config := config or argument:
        base, data, chosen, taken = _read_config(config, base, data, chosen)
    request = replace(
        _request(out, base or "", data or [], eval_data, chosen, columns, values, taken),
        devices=devices * nodes,
    )
    begun = follow(begin(request, GRAPH, experiment=name is not None), "trying a few steps")
    if begun.started:
        print_started(request, begun.started)
    experiment = name is not None and not begun.started
    for stage in open_project(params).stages.values():
        if stage.name.startswith("finetune_"):
            machines.train(stage, params, begun.overrides, name)
            if not open_project(params).artifact(stage.name).is_dir():
                print_note(f"{stage.name} is on the first machine, where the stages after it run.")
                return
        elif not experiment or stage.method in BASES:
            run_stage(stage.name, params, None, False)
    if not experiment:
        _print_results(open_project(params), out)
        refuse_broken(open_project(params))


def _request(
    folder: Path,
    base: str,
    data: list[str],
    eval_data: str | None,
    methods: list[str],
    columns: str | None,
    values: list[str],
    foreign: Mapping[str, Any] | None = None,
) -> Request:
    from pipeline.stages.quickstart import Request

    given = {**(foreign or {}), **_read_values(values, methods or ["lora"])}
    return Request(folder, base, data, eval_data or "", methods, columns_of(columns), given)


def _with_template(values: list[str] | None, no_template: bool) -> list[str]:
    """The settings of --set, and what --no-template stands for."""
    return [*(values or []), *(["chat_template=none"] * no_template)]


def _names(methods: str | None) -> list[str]:
    return [name.strip() for name in methods.split(",")] if methods else []


def _read_values(settings: list[str], methods: list[str]) -> dict[str, Any]:
    """section.key → value of each `--set`; a key alone is of `training`, or of a method.

    Raises UserError.
    """
    from pipeline.project.params.load import OVERRIDE, TRAINING, other_names, read_override
    from pipeline.project.params.schema import ValueSource, hints
    from pipeline.project.params.sections import Training
    from pipeline.stages.registry import GRAPH, METHODS

    names = other_names(GRAPH.sections)
    tree: dict[str, dict[str, Any]] = {}
    for setting in settings:
        key, value = read_override(setting)
        section, dot, name = key.partition(".")
        if not dot:
            ours = names.ours(key)
            chosen = [METHODS[name] for name in methods if name in METHODS]
            owners = [stage for stage in chosen if ours in hints(stage.settings)] or chosen
            differs = any(ours in stage.settings.PRETRAINED for stage in chosen)
            is_shared = not owners or (ours in hints(Training) and not differs)
            section, name = TRAINING if is_shared else owners[0].section, key
        tree.setdefault(section, {})[name] = value
    read = names.read(tree, ValueSource(OVERRIDE))
    note_names(names.note)
    values: dict[str, Any] = {}
    for section, keys in read.items():
        if not isinstance(keys, dict):
            raise UserError(f"--set cannot give {section}. Name it with --{section}.")
        values |= {f"{section}.{key}": value for key, value in keys.items()}
    return values


def _read_config(
    config: Path, base: str | None, data: list[str] | None, methods: list[str]
) -> tuple[str, list[str], list[str], Mapping[str, Any]]:
    """Base, data, methods and values of another tool's config; the given ones win."""
    from pipeline.project.foreign import read_config
    from pipeline.stages.registry import GRAPH

    foreign = read_config(config, GRAPH.sections)
    _print_foreign(foreign)
    if not (base := base or foreign.base):
        raise UserError(f"{config} names no base model. Name one with --base.")
    if not (data := data or foreign.data):
        raise UserError(f"{config} names no data file that is here. Name one with --data.")
    chosen = list(dict.fromkeys([*methods, GRAPH.stages[foreign.section].method]))
    return base, data, chosen, foreign.values


def _print_foreign(foreign: Config) -> None:
    """What becomes of each key of another tool's config."""
    from cli.console import print_line, print_table
    from pipeline.project.params.edit import dump_inline

    rows = [("base", "base", foreign.base)] * bool(foreign.base)
    rows += [("data", f"{foreign.section}.data", name) for name in foreign.data]
    rows += [
        (theirs, f"{foreign.section}.{ours}", dump_inline(value))
        for ours, (theirs, value) in foreign.taken.items()
    ]
    print_table((foreign.format, "here", "value"), rows)
    reasons: dict[str, list[str]] = {}
    for theirs, why in foreign.left.items():
        reasons.setdefault(why, []).append(theirs)
    for why, keys in reasons.items():
        print_line(f"not taken: {', '.join(keys)} ({why})")


def start_project(request: Request) -> None:
    """Make the project, and say what was found, chosen and measured."""
    from cli.console import follow
    from pipeline.stages.quickstart import start
    from pipeline.stages.registry import GRAPH

    print_started(request, follow(start(request, GRAPH), "trying a few steps"))


def print_started(request: Request, started: Started) -> None:
    """What was found, chosen and measured for a new project."""
    from cli.console import duration_range, print_line, print_note, print_table
    from pipeline.project.params.edit import dump_inline

    report, machine = started.report, started.machine
    print_line(f"base   {', '.join(_describe_base(started))}")
    print_line(f"data   {', '.join(_describe_data(started))}")
    for problems in report.groups[:3]:
        print_note(f"note: {problems}")
    rows = [
        (key.rpartition(".")[2], dump_inline(value), why)
        for key, value, why in started.recipe.rows()
    ]
    print_line("")
    print_table(("chosen", "value", "because"), rows)
    print_line("")
    trial = started.trial
    time = f"{duration_range(*trial.seconds)} here ({trial.timed} steps were timed)"
    memory = ""
    if trial.predicted:
        memory = f"; {in_units(trial.predicted)} of {in_units(machine.memory)} of memory"
    print_line(f"takes  {trial.steps:,} steps, {trial.tokens:,} tokens, {time}{memory}")
    print_line(f"{request.folder}: added {', '.join(started.added)}")


def _describe_base(started: Started) -> Iterator[str]:
    model = started.model
    yield started.base
    if model is None:
        yield "a family that the calculator does not know"
        return
    yield f"{model.total:,} parameters"
    yield f"{len(model.blocks)} blocks of {model.family}"
    if model.context:
        yield f"context {model.context:,}"


def _describe_data(started: Started) -> Iterator[str]:
    from pipeline.data.formats import FORMATS

    report = started.report
    formats = " and ".join(report.formats)
    if report.templated:
        formats += ", in the base's chat template"
    yield f"{', '.join(Path(name).name for name in report.files)} ({formats})"
    yield f"{report.examples:,} examples"
    if report.turns:
        yield f"{report.turns:,} turns"
    if report.tokens and report.trained_tokens is not None and report.quantiles:
        share = report.trained_tokens / report.tokens
        parts = (form.trained for form in FORMATS.values() if form.name in report.formats)
        trained = f"{report.trained_tokens:,} ({share:.0%}) are trained on"
        what = " and ".join(dict.fromkeys(parts))
        yield f"{report.tokens:,} tokens, of which {trained}: {what}"
        yield f"longest {report.quantiles['max']:,}"
    if report.evaluation:
        yield f"{report.evaluation:,} to evaluate on"
    if report.duplicates:
        yield f"{report.duplicates:,} duplicates"


def _describe_run(project: Project, variant: str) -> str:
    """The time and memory of a variant's last training here."""
    from pipeline.files.text import duration
    from pipeline.project.logs.run_log import last_telemetry

    stage = next(stage for stage in project.stages.values() if stage.variant == variant)
    last = last_telemetry(project.run_folder(stage.name))
    if last is None:
        return "trained elsewhere"
    memory = ""
    if last.measured:
        memory = (
            f", memory: {in_units(last.measured)} measured, {in_units(last.predicted)} predicted"
        )
    return f"{last.step} steps in {duration(last.seconds)}{memory}"


def _print_results(project: Project, folder: Path) -> None:
    """Answers as expected, what was learned and forgotten, the memory, and some answers."""
    from cli.console import print_line
    from cli.project.report import count_lines, print_answers
    from pipeline.export.formats import FORMATS
    from pipeline.files.artifact import read_json

    evaluation = project.artifact("evaluate")
    metrics = read_json(evaluation / "metrics.json", "Run `lora evaluate`")
    samples = read_json(evaluation / "samples.json", "Run `lora evaluate`")
    # MiniGPT's base has no rows for new words, so its loss on them is that of the model that
    # training starts from
    base: dict[str, Any] = next(
        (metrics[name] for name in ("base", "expanded") if "new_loss" in metrics.get(name, {})), {}
    )
    stages = [stage for stage in project.stages.values() if stage.look and stage.variant]
    names = [stage.variant for stage in stages if "new_loss" in metrics.get(stage.variant, {})]
    held_out = any(
        section.eval_share or section.eval_data for section in map(project.section, stages)
    )
    where = "held-out examples" if held_out else "the examples trained on"
    print_line("")
    for name in names:
        numbers = metrics[name]
        lines = count_lines(metrics, name, where)
        before = f"{base['new_loss']:.3f} → " if base else ""
        lines.append(f"loss on {where} {before}{numbers['new_loss']:.3f} nats per token")
        if forgetting := numbers.get("forgetting"):
            kept = f"{forgetting['answers_kept']:.0%} of the base's first choices kept"
            lines.append(f"other text: loss {forgetting['loss_rise']:+.3f}, {kept}")
        lines.append(_describe_run(project, name))
        print_line(f"{name}: {lines[0]}")
        for line in lines[1:]:
            print_line(f"{' ' * len(name)}  {line}")
    print_answers(samples, ["base", *names], SHOWN_ANSWERS)
    adapter = next((s.path for s in project.stages.values() if s.kind == "adapter"), None)
    project_folder = quote(os.path.relpath(folder))
    print_line(
        f"\nNext: cd {project_folder}; lora report   all answers; or: lora-tui, lora chat, lora "
        "serve"
    )
    print_line(f"      {_dvc()} repro   after an edit of params.yaml")
    if adapter:
        print_line(
            f"      lora export {adapter} --format peft --out DIR   (or "
            f"{', '.join(list(FORMATS)[1:])})"
        )


def _dvc() -> str:
    """How DVC is called here: by its path where it is not on PATH, as in an environment of pipx."""
    return "dvc" if shutil.which("dvc") else quote(str(Path(sys.executable).with_name("dvc")))
