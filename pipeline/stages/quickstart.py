"""From a base and a data file to a project: look at both, choose settings with reasons, try a few steps, write it."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipeline.calc.sources.open_model import from_path
from pipeline.data.check import DataReport, check
from pipeline.data.containers import is_hub_id
from pipeline.data.tokenizers.word import load_tokenizer
from pipeline.errors import UserError
from pipeline.files.artifact import read_json
from pipeline.files.base_model import MINIGPT, resolve
from pipeline.models.device import available_memory, best_device, device_info, multiplies_bf16
from pipeline.project.new_project import DEFAULTS, PARAMS, refuse_folder, write_project
from pipeline.project.params import edit
from pipeline.project.params.load import TRAINING, parse
from pipeline.project.params.sections import Training
from pipeline.project.runner import Event, Job, Note, run
from pipeline.project.stage_graph import Project, Stage, StageGraph
from pipeline.stages.recipe import Machine, Recipe, choose
from pipeline.training.probe import Probe, probe

if TYPE_CHECKING:
    from pipeline.calc.architecture import Architecture

GENERAL = "data/heldout.en.txt"  # everyday English, packaged: on it forgetting is measured until there is better
SAMPLE = 5_000  # examples that the trial reads
SHOWN = 3  # problems of the data in an error


@dataclass(frozen=True)
class Request:
    """What the user asks for. Paths are relative to the current folder; `given`: section.key → value."""

    folder: Path
    base: str
    data: str
    eval_data: str = ""
    methods: Sequence[str] = ("lora",)
    columns: Mapping[str, str] | None = None
    given: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Started:
    """A new project, and what was found, chosen and measured for it. `model`: None if its family is not known."""

    base: str
    model: Architecture | None
    report: DataReport
    recipe: Recipe
    machine: Machine
    trial: Probe | None
    added: Sequence[str]


def start(request: Request, graph: StageGraph) -> Generator[Event, None, Started]:
    """Make the project. Raises UserError before anything but the imported base is written."""
    folder = request.folder
    refuse_folder(folder)
    source = resolve(request.base, Path.cwd())
    if source.kind == MINIGPT:
        raise UserError("--data needs --base, a model to fine-tune: a checkpoint folder, a .gguf file or a hub id.")
    base = os.path.relpath(source.path.resolve(), folder.resolve()) if source.is_local else request.base
    stages = _stages_of(graph, request.methods)
    given = dict(request.given or {})
    early = check(
        [request.data], None, eval_files=[request.eval_data] * bool(request.eval_data), columns=request.columns
    )
    _refuse_data(early)  # before a large base is imported: what needs no tokenizer
    yield from _import(folder, graph, base, given)
    made = folder / graph.stages["import"].path
    device = best_device()
    name = str(device_info(device)["name"])
    machine = Machine(name, available_memory(device), multiplies_bf16(device))
    try:
        model = from_path(made).shapes
    except UserError as error:
        model = None
        yield Note(f"memory is not predicted: {error}")
    report = check(
        [request.data],
        load_tokenizer(made),
        eval_files=[request.eval_data] * bool(request.eval_data),
        columns=request.columns,
        max_length=given.get(f"{TRAINING}.max_length", 0) or (model.context if model else 0),
    )
    _refuse_data(report)
    recipe = choose(model, report, machine, stages, given)
    text = params_text(base, request, recipe, stages)
    project = Project.of(folder / PARAMS, parse(text, folder / PARAMS, graph.sections), graph)
    trial = yield from try_stage(project, stages[0], SAMPLE)
    added = write_project(project, text, {GENERAL: DEFAULTS / GENERAL})
    return Started(base, model, report, recipe, machine, trial, added)


def _stages_of(graph: StageGraph, methods: Sequence[str]) -> list[Stage]:
    known = {stage.method: stage for stage in graph.product.values() if stage.name.startswith("finetune_")}
    if unknown := [name for name in methods if name not in known]:
        raise UserError(f"--methods: unknown method {unknown[0]}. Known: {', '.join(known)}.")
    return [stage for name, stage in known.items() if name in methods]


def _refuse_data(report: DataReport) -> None:
    if report.ok:
        return
    errors = [each for each in report.problems if each.level == "error"][:SHOWN]
    shown = " ".join(f"{each.file}{'' if each.row is None else f':{each.row}'}: {each.problem}" for each in errors)
    more = f" {report.errors - len(errors):,} more." if report.errors > len(errors) else ""
    raise UserError(f"{shown}{more} `lora data check {report.files[0]}` lists all.")


def _import(folder: Path, graph: StageGraph, base: str, given: Mapping[str, Any]) -> Generator[Event, None, None]:
    """Import the base as the project's own stage does, which then finds it made."""
    keys = {key: value for key, value in given.items() if key.startswith("import.")}
    text = edit.set_values(f"base: {edit.dump_inline(base)}\n", keys)
    project = Project.of(folder / PARAMS, parse(text, folder / PARAMS, graph.sections), graph)
    folder.mkdir(parents=True, exist_ok=True)
    yield Note(f"importing {base}")
    yield from run(project, graph.stages["import"])


def try_stage(project: Project, stage: Stage, sample: int | None = None) -> Generator[Event, None, Probe]:
    """Train a few steps of a stage, with all of its data or the first `sample` examples; nothing is kept."""
    with TemporaryDirectory() as folder:
        job = Job(project, stage, Path(folder) / "out", Path(folder) / "run", "", None, sample=sample)
        setup = yield from import_module(stage.work or stage.module).prepare(job)
        return probe(setup.task)


def params_text(base: str, request: Request, recipe: Recipe, stages: Sequence[Stage]) -> str:
    """params.yaml of a new project: what was chosen or given and is not a default, section by section."""
    folder = request.folder.resolve()

    def inside(name: str) -> str:
        return os.path.relpath(Path(name).resolve(), folder)

    values: dict[str, Any] = {}
    for stage in stages:
        values[f"{stage.section}.data"] = inside(request.data)
        if request.eval_data:
            values[f"{stage.section}.eval_data"] = inside(request.eval_data)
        if request.columns:
            values[f"{stage.section}.columns"] = dict(request.columns)
    values |= recipe.values
    if any(stage.method == "lora" for stage in stages):
        values["merge.max_logit_difference"] = 1.0  # a 16-bit base rounds; the certificate has the difference
    values["evaluate.old_data"] = GENERAL
    if any(key.startswith("expand_vocab.") for key in recipe.given):
        values |= {"expand_vocab.data": [], "expand_vocab.audit_data": GENERAL}
    values |= recipe.given
    kinds = {TRAINING: Training, **{stage.section: stage.settings for stage in stages}}
    sections: dict[str, list[str]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        default = getattr(kinds[section](), name, None) if section in kinds else None
        plain = tuple(value) if isinstance(value, list) else value
        if plain != default or key in recipe.given:
            sections.setdefault(section, []).append(f"  {name}: {edit.dump_inline(value)}\n")
    order = ["import", "expand_vocab", TRAINING, *(stage.section for stage in stages), "merge", "evaluate"]
    body = "\n".join(f"{name}:\n{''.join(sections[name])}" for name in order if name in sections)
    return f"{HEADER}\nbase: {edit.dump_inline(base)}\n\n{body}"


HEADER = (
    "# Written by `lora new`. `lora params explain KEY` says what a key means, `lora advise` what others measured.\n"
)
