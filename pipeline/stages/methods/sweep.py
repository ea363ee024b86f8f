"""A sweep: one LoRA adapter per combination of a grid, all trained in one pass on one frozen base."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import field, structs

from pipeline.errors import UserError
from pipeline.project.params.schema import ALLOW_EMPTY, ReadBy, Section, ValueSource, check_value, effective, hints
from pipeline.project.stage_graph import Look, Project, Stage
from pipeline.stages.methods.lora import FinetuneLora, lora_spec, new_rows, note_wide_rank, save_files

if TYPE_CHECKING:
    from pipeline.adapters.batched import AdapterRouting
    from pipeline.adapters.config import AdapterSpec
    from pipeline.data.windows import Dataset
    from pipeline.models.load import Base
    from pipeline.project.runner import Event, Facts, Job
    from pipeline.training.step import Learner

MAX_ADAPTERS = 256  # adapters in one pass
MAX_NAME = 100  # characters of a name, which is also a folder's
ABBREVIATIONS = {
    "learning_rate": "lr",
    "target_modules": "targets",
    "init_lora_weights": "init",
    "loraplus_ratio": "plus",
}
SWEPT = (  # keys of finetune_lora in which adapters that train together can differ
    *("seed", "learning_rate", "schedule", "warmup_steps", "warmup_ratio", "max_grad_norm", "loraplus_ratio"),
    *("weight_decay", "lora_dropout", "neftune_alpha"),
    *("rank", "alpha", "target_modules", "rank_pattern", "alpha_pattern", "rslora", "dora", "init_lora_weights"),
    "retention_weight",
)


def _read_grid(values: Any, key: str, origin: ValueSource) -> dict[str, tuple[Any, ...]]:
    """Key of finetune_lora → the values to try. Raises UserError."""
    if not isinstance(values, dict):
        raise UserError(f"{key} must be {GRID_RULE}, got {values!r}. {origin.edit(key)}")
    for name, options in values.items():
        if name not in SWEPT:
            known = ", ".join(SWEPT)
            raise UserError(
                f"{key}.{name}: adapters that train together can differ in {known} only. {origin.edit(key)}"
            )
        if not isinstance(options, list) or not options:
            raise UserError(
                f"{key}.{name} must be a list of values, such as [1, 2], got {options!r}. {origin.edit(key)}"
            )
    types = hints(FinetuneLora)
    return {
        name: tuple(check_value(types[name], value, f"{key}.{name}", origin) for value in options)
        for name, options in values.items()
    }


GRID_RULE = "a mapping of keys to lists of values, such as {rank: [1, 2, 4]}"
Grid = Annotated[Mapping[str, tuple[Any, ...]], ALLOW_EMPTY, ReadBy(_read_grid, GRID_RULE)]


class FinetuneSweep(Section, frozen=True, kw_only=True):
    """One adapter per combination of these values of finetune_lora's keys, trained in one pass."""

    grid: Annotated[Grid, "values of finetune_lora's keys: one adapter per combination, trained in one pass"] = field(
        default_factory=lambda: {"rank": (1, 2, 4, 8)}
    )


def check(project: Project) -> None:
    """Raises UserError for a grid that cannot be trained."""
    variants(project.params.finetune_lora, project.params.finetune_sweep)


STAGE = Stage(
    "finetune_sweep",
    __name__,
    output="sweep",
    kind="adapters",
    method="sweep",
    settings=FinetuneSweep,
    needs=("expand_vocab",),
    data=("data", "eval_data", "retention_data"),
    settings_from="finetune_lora",
    summary="Train one adapter per combination of a grid",
    title="LoRA sweep",
    look=Look("#F0E442", "★"),  # its best adapter; the others are dimmed
    order=6,
    check=check,
)


def run(job: Job) -> Generator[Event, None, Facts]:
    """Train the grid → an adapter folder for each combination, and sweep.json with the outcome of each.

    Raises UserError, and whatever `train` raises.
    """
    import torch

    from pipeline.adapters.attach import attach
    from pipeline.adapters.batched import attach_many
    from pipeline.models.load import DTYPES, load_base
    from pipeline.training.batched import ManyAdapters
    from pipeline.training.batches import Batches
    from pipeline.training.data import build_datasets, read_prompts
    from pipeline.training.loop import TrainingTask, train
    from pipeline.training.optimizer import refuse_long_warmup
    from pipeline.training.retention import load_retention_texts
    from pipeline.training.step import Evaluation

    params = job.project.params
    settings, grid = params.finetune_lora, variants(params.finetune_lora, params.finetune_sweep)
    if settings.precision == "fp16":
        raise UserError(
            "finetune_lora.precision fp16 trains one adapter at a time. Set it to bf16 or fp32 for a sweep."
        )
    folder = job.artifact("expand_vocab")
    base = load_base(folder, settings.precision, params.origin.trust_remote_code, settings.quantization)
    dataset, held_out = yield from build_datasets(job, settings, base)
    max_weight = max(lora.retention_weight for lora in grid.values())
    texts = yield from load_retention_texts(job, structs.replace(settings, retention_weight=max_weight), base)
    specs = {}
    for name, lora in grid.items():
        with _add_name_to_error(name):
            specs[name] = lora_spec(base.model, lora, new_rows(folder))
    notes: list[Event] = []

    def attach_one(name: str, lora: FinetuneLora) -> None:
        """Exactly as finetune_lora does."""
        torch.manual_seed(lora.seed)
        with _add_name_to_error(name):
            attach(base.model, specs[name], DTYPES[lora.adapter_precision], lora.init_lora_weights)
        notes.extend(note_wide_rank(base.model))

    routing = attach_many(base.model, [partial(attach_one, name, lora) for name, lora in grid.items()])
    yield from dict.fromkeys(notes)
    learners = [_learner(base, routing, name, lora, dataset, texts) for name, lora in grid.items()]
    for learner in learners:
        with _add_name_to_error(learner.name):
            refuse_long_warmup(learner.settings, len(learner.batches), job.stage.section)
    evaluation = None
    if held_out is not None:
        every = settings.eval_steps or len(learners[0].batches)
        in_order = Batches(held_out, settings.batch_size, seed=None)
        evaluation = Evaluation(in_order, every, settings.patience, len(learners))
    less = f"Train fewer adapters at once: shorten {job.stage.name}.grid, or lower finetune_lora.batch_size."
    path = ManyAdapters(base.model, routing)
    prompts = read_prompts(job, settings, base)
    yield from train(job, TrainingTask(base.model, learners, path, evaluation, less_memory=less, prompts=prompts))
    return _save_adapters(job, base, grid, specs, learners)


def variants(base: FinetuneLora, sweep: FinetuneSweep) -> dict[str, FinetuneLora]:
    """Name → settings of each adapter, in the grid's order; only `base` if the grid is empty.

    Raises UserError for an invalid or duplicate combination, for too many, and for an adapter to train on from.
    """
    if base.init_from:
        raise UserError(
            f"finetune_lora.init_from is {base.init_from}, but a sweep trains new adapters. Unset it, or use `lora "
            "finetune lora`."
        )
    keys, lists = list(sweep.grid), list(sweep.grid.values())
    if (count := prod(map(len, lists))) > MAX_ADAPTERS:
        raise UserError(
            f"finetune_sweep.grid has {count} combinations; at most {MAX_ADAPTERS} adapters can train together. "
            "Shorten its lists."
        )
    combinations = [dict(zip(keys, values, strict=True)) for values in product(*lists)]
    twice = next((values for n, values in enumerate(combinations) if values in combinations[:n]), None)
    if twice is not None:
        raise UserError(f"finetune_sweep.grid has {_adapter_name(twice)} twice. Remove one of them.")
    names = _disambiguate([_adapter_name(values) or "adapter" for values in combinations])
    adapters: dict[str, FinetuneLora] = {}
    for name, values in zip(names, combinations, strict=True):
        with _add_name_to_error(name):
            adapters[name] = structs.replace(base, **values)
    return adapters


def _adapter_name(values: Mapping[str, Any]) -> str:
    """Such as rank-4_seed-0, a valid folder name on every file system."""
    return "_".join(f"{ABBREVIATIONS.get(key, key)}-{_format_value(value)}" for key, value in values.items())


def _format_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "+".join(f"{_format_value(key)}={_format_value(item)}" for key, item in value.items()) or "none"
    if isinstance(value, tuple):
        return "+".join(map(_format_value, value))
    return re.sub(r"[^\w.=+-]+", "~", f"{value:g}" if isinstance(value, float) else str(value))


def _disambiguate(names: Iterable[str]) -> list[str]:
    """Truncate long names, and append numbers to duplicates."""
    unique: list[str] = []
    for name in names:
        short, number = name[:MAX_NAME], 2
        while short in unique:
            short, number = f"{name[:MAX_NAME]}.{number}", number + 1
        unique.append(short)
    return unique


@contextmanager
def _add_name_to_error(adapter: str) -> Iterator[None]:
    """Prefix a UserError with the adapter's name, as the wrong value may come from the grid."""
    try:
        yield
    except UserError as error:
        raise UserError(f"finetune_sweep, {adapter}: {error}") from None


def _learner(
    base: Base, routing: AdapterRouting, name: str, own: FinetuneLora, learned: Dataset, texts: Dataset | None
) -> Learner:
    from pipeline.training.batches import Batches
    from pipeline.training.retention import RetentionLoss
    from pipeline.training.step import Learner

    batches = Batches(learned, own.batch_size, own.seed, own.gradient_accumulation_steps)
    retain = None
    if texts is not None and own.retains:
        retain = RetentionLoss(base.model, texts, own, routing.base)
    return Learner(own, batches, retain, name)


def _save_adapters(
    job: Job,
    base: Base,
    grid: Mapping[str, FinetuneLora],
    specs: Mapping[str, AdapterSpec],
    learners: Sequence[Learner],
) -> Facts:
    """Save each adapter that did not diverge in its own folder, sealed like finetune_lora's artifact."""
    from pipeline.adapters.batched import only_adapter, trained_by
    from pipeline.files import artifact
    from pipeline.models.load import count, skeleton
    from pipeline.project import provenance
    from pipeline.project.logs.run_log import DIVERGED, DONE, LOSS, STOPPED, TABLE, final_loss, read_steps
    from pipeline.stages.finetune import save_adapter_of
    from pipeline.training.data import save_logs

    folder = job.project.artifact("expand_vocab")
    total = count(skeleton(folder, job.project.params.origin.trust_remote_code))["total"]
    commit = provenance.commit(job.stage.module)
    rows: dict[str, Any] = {}
    for number, learner in enumerate(learners):
        name, lora = learner.name, grid[learner.name]
        steps = read_steps(job.run / name / LOSS)
        held_out = [step.eval_loss for step in steps if step.eval_loss is not None]
        trained = trained_by(base.model, number)
        rows[name] = {
            "state": DIVERGED if learner.diverged else DONE if learner.stopped is None else STOPPED,
            "trainable": trained,
            "steps": len(steps),
            "final_loss": final_loss(steps),
            "eval_loss": min(held_out) if lora.patience and held_out else held_out[-1] if held_out else None,
        }
        if learner.diverged:
            continue
        out = job.out / name
        out.mkdir()
        with only_adapter(base.model, number):
            save = partial(save_files, base=base, spec=specs[name], folder=folder, settings=lora)
            facts = save_adapter_of(job, base, save, out, trained)
        save_logs(job.run / name, out)
        facts_of_adapter = {"kind": "adapter", "method": "lora", "seed": lora.seed, "params": effective(lora)}
        artifact.seal(out, {**job.input_facts, **facts_of_adapter, "commit": commit, **facts})
    artifact.write_json(job.out / TABLE, rows)
    trained = sum(row["trainable"] for row in rows.values())
    return {"adapters": rows, "parameters": {"total": total, "trainable": trained}}
