"""`lora new` and `lora train`: from a base and data to a project with settings that were tried."""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from msgspec import structs

from pipeline.calc.sources.open_model import from_path
from pipeline.data.check import DataReport, check
from pipeline.data.columns import clean_command, columns_option
from pipeline.data.containers import is_hub_id, suffix_of
from pipeline.data.convert import convert
from pipeline.data.examples import Example, in_evaluation
from pipeline.data.formats import iter_examples
from pipeline.data.tokenizers.word import load_tokenizer
from pipeline.errors import UserError
from pipeline.files.base_model import MINIGPT, parse_source, resolve
from pipeline.files.home import expand
from pipeline.models.device import (
    LARGE,
    available_memory,
    device_for_size,
    device_info,
    fast_precision,
)
from pipeline.project.new_project import DEFAULTS, PARAMS, copy_data, refuse_folder, write_project
from pipeline.project.params import edit
from pipeline.project.params.load import TRAINING, parse, read_text
from pipeline.project.params.schema import Pretrained, Section, ValueSource, check_value, hints
from pipeline.project.params.sections import (
    GENERAL,
    PRETRAINED,
    RETAIN,
    ExpandVocab,
    Merge,
    Training,
    change_paths,
)
from pipeline.project.runner import Event, Job, Note, run
from pipeline.project.stage_graph import Project, Stage, StageGraph
from pipeline.stages.recipe import Machine, Recipe, choose
from pipeline.training.probe import Probe, probe

if TYPE_CHECKING:
    from pipeline.calc.architecture import Architecture

SAMPLE = 5_000  # examples that the trial reads
HELD_OUT, MOST_HELD_OUT = 0.1, 200  # share of the examples to hold out, and their number at most
MANY = 500  # of more examples, a share of them is never empty
SHOWN = 3  # problems of the data in an error


@dataclass(frozen=True)
class Request:
    """What the user asks for. Paths are relative to the current folder, in `given` too."""

    folder: Path
    base: str
    data: Sequence[str]
    eval_data: str = ""
    methods: Sequence[str] = ()  # to train; by default lora
    columns: Mapping[str, str] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)  # section.key → value
    devices: int = 1  # that will train together


@dataclass(frozen=True)
class Started:
    """A new project, and what was read, chosen and measured for it."""

    base: str
    model: Architecture | None  # None: a family that the calculator does not know
    report: DataReport
    recipe: Recipe
    machine: Machine
    trial: Probe
    added: Sequence[str]


class Begun(NamedTuple):
    """A project that is there: what was chosen for it if it is new, and what wins over it."""

    started: Started | None
    overrides: Sequence[str] = ()  # section.key=value


def begin(
    request: Request, graph: StageGraph, experiment: bool = False
) -> Generator[Event, None, Begun]:
    """Make the project, or go on with one that is there and as requested.

    `experiment`: given values may differ from its own. Raises UserError.
    """
    path = request.folder / PARAMS
    if not path.exists():
        if not request.base or not request.data:
            raise UserError(
                "lora train needs --base, a model, and --data, the examples to train it on."
            )
        return Begun((yield from start(request, graph)))
    project = Project.of(path, parse(read_text(path), path, graph.sections), graph)
    given = yield from place_files(request.given, request.folder, graph)
    _refuse_other(project, request)
    trained = [stage.section for stage in project.stages.values() if stage.trains]
    for name in request.methods:
        if f"finetune_{name}" not in trained:
            raise UserError(
                f"{request.folder} is a project already, which does not train by {name}. Add a "
                f"section finetune_{name} to {path}, or name another folder with --out."
            )
    if request.columns:
        given |= {f"{section}.columns": dict(request.columns) for section in trained}
    overrides = []
    for key, value in given.items():
        override = f"{key}={edit.dump_inline(value)}"
        changed = parse(read_text(path), path, graph.sections, [override])
        if changed == project.params:
            continue
        if not experiment:
            raise UserError(
                f"{request.folder} is a project already, in which {key} is not "
                f"{edit.dump_inline(value)}. Edit {path}, keep it as an experiment with --name, or "
                "name another folder with --out."
            )
        overrides.append(override)
    return Begun(None, overrides)


def _refuse_other(project: Project, request: Request) -> None:
    """Raises UserError if a project trains another base, or on other data, than requested."""
    origin = project.params.origin.base
    if request.base:
        asked, there = (
            parse_source(request.base, Path.cwd()),
            parse_source(origin, project.root),
        )
        if (asked.hub_id, asked.path.resolve()) != (there.hub_id, there.path.resolve()):
            raise UserError(
                f"{project.params_path} has base {origin}, not {request.base}. Name another folder "
                "with --out."
            )
    names = chain.from_iterable(map(project.data_files, project.stages.values()))
    files = {(project.root / name).resolve() for name in names}
    for name in [*request.data, *filter(None, [request.eval_data])]:
        if Path(name).exists() and Path(name).resolve() not in files:
            raise UserError(
                f"{project.params_path} does not train on {name}. Name another folder with --out."
            )


def start(request: Request, graph: StageGraph) -> Generator[Event, None, Started]:
    """Make the project; its params file is written last. Raises UserError."""
    folder = request.folder
    refuse_folder(folder)
    source = resolve(request.base, Path.cwd())
    if source.kind == MINIGPT:
        raise UserError(
            "--data needs --base, a model to fine-tune: a checkpoint folder, a .gguf file or a "
            "hub id."
        )
    base = request.base
    if source.is_local:
        base = os.path.relpath(source.path.resolve(), folder.resolve())
    stages = _stages_of(graph, request.methods or ("lora",))
    given = _shared((yield from place_files(request.given, folder, graph)), stages)
    files = []
    for name in request.data:
        files.append((yield from _fetched(name, folder)))
    eval_data = yield from _fetched(request.eval_data, folder)
    eval_files = [eval_data] * bool(eval_data)
    # mistakes in the data and in given values are reported before a large base is imported
    _refuse_data(check(files, eval_files=eval_files, columns=request.columns), request.columns)
    draft = [f"base: {edit.dump_inline(base)}", *(f"{stage.section}: {{}}" for stage in stages)]
    overrides = [f"{key}={edit.dump_inline(value)}" for key, value in given.items()]
    drafted = _project(folder, "\n".join(draft), graph, overrides)
    _refuse_unwritten(given, stages)
    folder.mkdir(parents=True, exist_ok=True)
    yield Note(f"importing {request.base}")
    yield from run(drafted, graph.stages["import"])
    made = folder / graph.stages["import"].path
    model = None
    try:
        model = from_path(made).shapes
    except UserError as error:
        yield Note(f"memory is not predicted: {error}")
    device = device_for_size(model.total if model else LARGE)
    machine = Machine(
        str(device_info(device)["name"]),
        available_memory(device),
        fast_precision(device),
        device.type == "cpu",
    )
    if device.type == "cuda":  # elsewhere a step does not wait for launches
        machine = replace(machine, gpus=torch.cuda.device_count(), devices=request.devices)
    context = model.context if model else 0
    report = check(
        files,
        load_tokenizer(made),
        eval_files=eval_files,
        columns=request.columns,
        max_length=int(given.get(f"{TRAINING}.max_length") or context),
        positions=context or None,
        templated=given.get(f"{TRAINING}.chat_template", "auto") == "auto",
    )
    _refuse_data(report, request.columns)
    held_out = 0.0 if eval_files else _share(files, request.columns, report.examples)
    recipe = choose(model, report, held_out, machine, stages, given)

    text = params_text(base, request, files, eval_data, recipe, stages)
    project = _project(folder, text, graph)
    needed = {name for stage in project.stages.values() for name in project.data_files(stage)}
    packaged = sorted({GENERAL, RETAIN} & needed)
    copied = copy_data(folder, {name: DEFAULTS / name for name in packaged})
    if "expand_vocab" in project.stages:
        yield from run(project, graph.stages["expand_vocab"])
    yield Note("trying a few steps")
    trial = yield from _trial(project, stages[0], report.examples, recipe)
    added = copied + write_project(project, text)
    return Started(request.base, model, report, recipe, machine, trial, added)


def place_files(
    given: Mapping[str, Any], folder: Path, graph: StageGraph
) -> Generator[Event, None, dict[str, Any]]:
    """The given values, with their files as the params file in `folder` has to name them.

    Raises UserError for a file that is not there.
    """
    kinds: dict[str, type[Section]] = {TRAINING: Training}
    files: set[str] = set()
    for name, stage in graph.product.items():
        kinds[name] = stage.settings
        files |= {key if "." in key else f"{stage.section}.{key}" for key in stage.data}
    files |= {f"{TRAINING}.{key}" for key in hints(Training) if f"finetune_lora.{key}" in files}
    placed, notes = dict(given), list[str]()
    for key in files & given.keys():
        section, _, name = key.partition(".")
        value = check_value(
            hints(kinds[section])[name], given[key], key, ValueSource(PARAMS, frozenset([key]))
        )
        placed[key] = change_paths(value, partial(_place_file, key=key, folder=folder, notes=notes))
    yield from map(Note, notes)
    return placed


def _place_file(name: str, key: str, folder: Path, notes: list[str]) -> str:
    if not name:
        return name
    path = expand(name)
    if path.exists():
        return os.path.relpath(path.resolve(), folder.resolve())
    inside = Path(os.path.normpath(folder.resolve() / path))
    if not inside.exists():
        raise UserError(
            f"{key}: {name} does not exist. Name a file as it is seen from the current folder."
        )
    # as earlier versions read these paths
    notes.append(
        f"{key}: {name} counts from {folder} here. Name it {os.path.relpath(inside)}: paths count "
        "from the current folder."
    )
    return name


def _fetched(name: str, folder: Path) -> Generator[Event, None, str]:
    """The file of the project to which a data set of the hub is fetched; other names unchanged."""
    if not name or Path(name).exists() or suffix_of(Path(name))[0] or not is_hub_id(name):
        return name
    file = folder / "data" / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', name).strip('_')}.jsonl"
    # an earlier, unfinished call may have fetched it
    if not file.exists():
        yield Note(f"fetching {name}")
        yield from (Note(note) for note in convert(Path(name), file).notes)
    return str(file)


def _share(files: Sequence[str], columns: Mapping[str, str], count: int) -> float:
    """The share of `count` examples to hold out.

    Of few, the first share that selects some and leaves some; 0 if none does.
    """
    if count > MANY:
        share = min(HELD_OUT, MOST_HELD_OUT / count)
        # of millions, four decimals would be 0
        return round(share, 4) or float(f"{share:.0e}")
    examples: list[Example] = []
    for name in files:
        examples += iter_examples(Path(name), name, columns=columns)
    for share in (HELD_OUT, 2 * HELD_OUT, 3 * HELD_OUT):
        if 0 < sum(in_evaluation(example, share) for example in examples) < len(examples):
            return share
    return 0.0


def _project(folder: Path, text: str, graph: StageGraph, overrides: Sequence[str] = ()) -> Project:
    path = folder / PARAMS
    return Project.of(path, parse(text, path, graph.sections, overrides), graph)


def _stages_of(graph: StageGraph, methods: Sequence[str]) -> list[Stage]:
    trained = (stage for stage in graph.product.values() if stage.name.startswith("finetune_"))
    known = {stage.method: stage for stage in trained if stage.kind != "adapters"}
    if "sweep" in methods:
        raise UserError(
            "--methods: a sweep varies the settings of lora. Make the project without it, then add "
            "`finetune_sweep: {grid: {rank: [8, 16]}}` to its params.yaml."
        )
    if unknown := [name for name in methods if name not in known]:
        raise UserError(f"--methods: unknown method {unknown[0]}. Known: {', '.join(known)}.")
    return [stage for name, stage in known.items() if name in methods]


def _shared(given: Mapping[str, Any], stages: Sequence[Stage]) -> dict[str, Any]:
    """The given values; those of the only method go into the training block, as chosen ones do."""
    if len(stages) > 1:
        return dict(given)
    (stage,) = stages
    shared = hints(Training).keys() - stage.settings.PRETRAINED.keys() - {"data", "columns"}
    keys = {f"{stage.section}.{key}": f"{TRAINING}.{key}" for key in shared}
    return {keys.get(key, key): value for key, value in given.items()}


def _refuse_unwritten(given: Mapping[str, Any], stages: Sequence[Stage]) -> None:
    """Raises UserError for a given value of a section that the params file will not have."""
    for key in given:
        section = key.partition(".")[0]
        if section not in _sections_of(stages):
            raise UserError(
                f"{key}: the new project has no section {section}. Remove it, name its method in "
                "--methods, or add the section to params.yaml afterwards."
            )


def _sections_of(stages: Sequence[Stage]) -> list[str]:
    """The sections of a new params file, in their order."""
    trained = [stage.section for stage in stages]
    return ["import", "expand_vocab", TRAINING, *trained, "merge", "evaluate"]


def _refuse_data(report: DataReport, columns: Mapping[str, str]) -> None:
    if report.ok:
        return
    errors = [group for group in report.groups if group.level == "error"]
    left = report.errors - sum(group.rows for group in errors[:SHOWN])
    more = f" {left:,} more." if left else ""
    check_all = f"lora data check {quote(report.files[0])}{columns_option(columns)}"
    cleaned = clean_command(report.files[0], columns)
    raise UserError(
        f"{' '.join(map(str, errors[:SHOWN]))}{more} `{check_all}` lists all; `{cleaned}` writes a "
        "file without rows that are empty or twice there, with --drop too-long also without those "
        "that are too long."
    )


def _trial(
    project: Project, stage: Stage, examples: int, recipe: Recipe
) -> Generator[Event, None, Probe]:
    """The trial of a stage; of many examples it reads a part."""
    if examples <= SAMPLE:
        return (yield from try_stage(project, stage))
    settings = project.params.section(stage.section)
    # a part may have no example to hold out
    plain = structs.replace(
        settings,
        eval_share=0.0,
        eval_data="",
        eval_steps=0,
        patience=0,
        load_best=False,
        metric_for_best_model="eval_loss",
        samples={},
    )
    part = replace(project, params=project.params.replaced({stage.section: plain}))
    trial = yield from try_stage(part, stage, SAMPLE)
    trial = trial.of_all(SAMPLE / (examples * (1 - settings.eval_share)), settings.max_steps)
    # the largest step may be in the rest
    return trial._replace(predicted=recipe.peak) if recipe.peak else trial


def try_stage(
    project: Project, stage: Stage, sample: int | None = None
) -> Generator[Event, None, Probe]:
    """Train a few steps on all data or the first `sample` examples; nothing is kept."""
    with TemporaryDirectory() as folder:
        out, log = Path(folder, "out"), Path(folder, "run")
        job = Job(project, stage, out, log, "", None, sample=sample)
        setup = yield from import_module(stage.work or stage.module).prepare(job)
        return probe(setup.task)


def params_text(
    base: str,
    request: Request,
    files: Sequence[str],
    eval_data: str,
    recipe: Recipe,
    stages: Sequence[Stage],
) -> str:
    """params.yaml of a new project: what was chosen or given, section by section.

    It leaves out what is off by default, and alpha if it follows the rank. It has the other
    defaults for a pretrained base, as another release may change them.
    """
    folder = request.folder.resolve()

    def inside(name: str) -> str:
        return os.path.relpath(Path(name).resolve(), folder)

    values: dict[str, Any] = {}
    for stage in stages:
        paths = [inside(name) for name in files]
        values[f"{stage.section}.data"] = paths if len(paths) > 1 else paths[0]
        if eval_data:
            values[f"{stage.section}.eval_data"] = inside(eval_data)
        if request.columns:
            values[f"{stage.section}.columns"] = dict(request.columns)
    values |= recipe.values
    if any(stage.method == "lora" for stage in stages):
        values |= {f"merge.{key}": value for key, value in Merge.PRETRAINED.items()}
    values["evaluate.old_data"] = GENERAL
    if any(key.startswith("expand_vocab.") for key in recipe.given):
        values |= {f"expand_vocab.{key}": value for key, value in ExpandVocab.PRETRAINED.items()}
    values |= recipe.given
    kinds: dict[str, type[Section]] = {TRAINING: Training}
    always = {f"{TRAINING}.{key}" for key in (*PRETRAINED, *Training.PRETRAINED)}
    for stage in stages:
        kinds[stage.section] = stage.settings
        always |= {f"{stage.section}.{key}" for key in stage.settings.PRETRAINED}
    sections: dict[str, list[str]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        rank = values.get(f"{section}.rank")
        given = {} if rank is None else {"rank": rank}
        defaults = kinds[section].defaults(Pretrained(), given) if section in kinds else None
        plain = tuple(value) if isinstance(value, list) else value
        if plain != getattr(defaults, name, None) or key in always or key in recipe.given:
            sections.setdefault(section, []).append(f"  {name}: {edit.dump_inline(value)}\n")
    order = [name for name in _sections_of(stages) if name in sections]
    body = "\n".join(f"{name}:\n{''.join(sections[name])}" for name in order)
    return f"{HEADER}\nbase: {edit.dump_inline(base)}\n\n{body}"


HEADER = (
    "# Written by `lora new` for this base. `lora params explain KEY` says what a key means,\n"
    "# `lora advise` what others measured.\n"
)
