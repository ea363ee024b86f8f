"""A sweep: one LoRA adapter per combination of a grid, trained together on one frozen base.

`stages/searches` chooses the combinations, `evaluation/selection` the best adapter.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta, field, structs

from pipeline.errors import UserError
from pipeline.project.params.load import Params
from pipeline.project.params.schema import (
    Count,
    File,
    ReadBy,
    Section,
    Seed,
    Steps,
    ValueSource,
    check_value,
    hints,
    reject_unknown_keys,
    value_type,
)
from pipeline.project.stage_graph import Look, Project, Stage
from pipeline.stages.methods.lora import (
    FinetuneLora,
    lora_spec,
    new_rows,
    note_wide_rank,
    save_files,
)
from pipeline.stages.searches import SEARCHES, Trial, Values, count, grids

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.adapters.batched import AdapterRouting
    from pipeline.adapters.config import AdapterSpec
    from pipeline.models.load import Base
    from pipeline.project.runner import Event, Facts, Job
    from pipeline.training.step import Learner

MAX_ADAPTERS = 256  # adapters in one pass
MAX_NAME = 100  # characters of a name, which is also a folder's
TRAINED = "trained.jsonl"  # in the run folder: the keys of the adapters that trained here
# of what stops adapters by comparing them
WHOLE = (
    "finetune_sweep.search halving compares all adapters at each rung: it trains in one part. Leave "
    "out --parts and --only, or set search to grid, random or optuna."
)
PASSES = "passes"  # folder below the run folder, with the finished passes of a sweep of several
# keys of finetune_sweep that only some searches read
SEARCH_KEYS = ("trials", "search_seed", "reduction_factor", "sampler", "generation")
ABBREVIATIONS = {
    "learning_rate": "lr",
    "target_modules": "targets",
    "init_lora_weights": "init",
    "loraplus_ratio": "plus",
}
SWEPT = (  # keys of finetune_lora in which adapters that train together can differ
    "seed",
    "learning_rate",
    "schedule",
    "min_lr_ratio",
    "num_cycles",
    "power",
    "decay_ratio",
    "warmup_steps",
    "warmup_ratio",
    "max_grad_norm",
    "loraplus_ratio",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "lora_dropout",
    "neftune_alpha",
    "rank",
    "alpha",
    "target_modules",
    "layers_to_transform",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "rslora",
    "dora",
    "init_lora_weights",
    "retention_weight",
)


def _read_grid(values: Any, key: str, origin: ValueSource) -> Any:
    """Key of finetune_lora → the values to try, a tuple or a range. Raises UserError.

    A list of grids becomes a tuple of them.
    """
    if values in (None, "", [], {}):
        return {}
    if isinstance(values, list) and all(isinstance(grid, dict) for grid in values):
        return tuple(_read_grid(grid, f"{key}.{n}", origin) for n, grid in enumerate(values))
    if not isinstance(values, dict):
        raise UserError(f"{key} must be {GRID_RULE}, got {values!r}. {origin.edit(key)}")
    # not before a grid is read: the calculator does without
    from pipeline.project.params.aliases import KEYS

    grid: dict[str, Any] = {}
    for theirs, options in values.items():
        name = KEYS.get(theirs, theirs)
        if name not in SWEPT:
            known = ", ".join(SWEPT)
            raise UserError(
                f"{key}.{theirs}: adapters that train together can differ in {known} only. "
                f"{origin.edit(key)}"
            )
        if name in grid:
            raise UserError(f"{key} has {name} under two names. {origin.edit(key)}")
        grid[name] = _read_options(name, options, f"{key}.{theirs}", origin)
    return grid


def _read_options(name: str, options: Any, key: str, origin: ValueSource) -> Any:
    """The values of finetune_lora's key `name`: a tuple, or {low, high, log}. Raises UserError."""
    hint = hints(FinetuneLora)[name]
    if isinstance(options, list) and options:
        return tuple(check_value(hint, value, key, origin) for value in options)
    if not isinstance(options, dict) or not {"low", "high"} <= options.keys():
        raise UserError(
            f"{key} must be a list of values, such as [1, 2], or a range such as {{low: 1, high: "
            f"8}}, got {options!r}. {origin.edit(key)}"
        )
    reject_unknown_keys(options, ["low", "high", "log"], f"{key}.", origin)
    if value_type(FinetuneLora, name) not in (int, float):
        raise UserError(
            f"{key} has no numbers between two values. List them instead. {origin.edit(key)}"
        )
    low, high = (check_value(hint, options[end], f"{key}.{end}", origin) for end in ("low", "high"))
    log = check_value(bool, options.get("log", False), f"{key}.log", origin)
    if low >= high:
        raise UserError(f"{key}.low must be below high = {high:g}, got {low:g}. {origin.edit(key)}")
    if log and low <= 0:
        raise UserError(
            f"{key}.low must be more than 0 in a logarithmic range, got {low:g}. {origin.edit(key)}"
        )
    return {"low": low, "high": high, "log": log}


def _read_search(value: Any, key: str, origin: ValueSource) -> str:
    if not isinstance(value, str) or value not in SEARCHES:
        raise UserError(f"{key} must be {SEARCH_RULE}, got {value!r}. {origin.edit(key)}")
    return value


GRID_RULE = (
    "a mapping of keys to lists of values, such as {rank: [1, 2, 4]}, a list of such mappings, or "
    "empty"
)
SEARCH_RULE = f"one of {', '.join(SEARCHES)}"
Adapter = tuple[Values, FinetuneLora]  # the values of its combination, and all its settings
OneGrid = Mapping[str, Any]
Grid = Annotated[OneGrid | tuple[OneGrid, ...], ReadBy(_read_grid, GRID_RULE)]


class FinetuneSweep(Section, frozen=True, kw_only=True):
    """One adapter per combination of these values of finetune_lora's keys, trained in one pass."""

    grid: Annotated[
        Grid,
        "values of finetune_lora's keys; where the search draws from it also ranges, such as "
        "{learning_rate: {low: 1.0e-5, high: 1.0e-3, log: true}}",
    ] = field(default_factory=lambda: {"rank": (1, 2, 4, 8)})
    search: Annotated[
        str,
        ReadBy(_read_search, SEARCH_RULE),
        "how combinations are chosen: every one of the grid, drawn at random, by successive "
        "halving or by Optuna",
    ] = "grid"
    trials: Annotated[Steps, "combinations to draw from the grid; 0: all of them"] = 0
    search_seed: Annotated[Seed, "of what is drawn"] = 0
    reduction_factor: Annotated[
        int, Meta(ge=2, le=MAX_ADAPTERS), "of halving: one adapter in so many trains on"
    ] = 3
    sampler: Annotated[
        Literal["tpe", "gp", "qmc"], "Optuna's sampler: TPE, Gaussian process, quasi-Monte Carlo"
    ] = "tpe"
    generation: Annotated[
        Count, "combinations that Optuna's sampler draws at once, for one pass"
    ] = 8
    old_data: Annotated[
        File,
        "texts on which each adapter's divergence from the base is measured at the end; empty: "
        "those of evaluate.old_data",
    ] = ""

    def __post_init__(self) -> None:
        """Raises UserError for a key that the search does not read, or a grid it cannot search."""
        search = SEARCHES[self.search]
        defaults = {field.name: field.default for field in structs.fields(FinetuneSweep)}
        for key in SEARCH_KEYS:
            if key not in search.reads and getattr(self, key) != defaults[key]:
                readers = " or ".join(name for name in SEARCHES if key in SEARCHES[name].reads)
                raise UserError(
                    f"{key} is {getattr(self, key)}, but search {self.search} does not read "
                    f"it. Remove it, or set search to {readers}."
                )
        draws = search.draws(self)
        options = [option for grid in grids(self) for option in grid.items()]
        ranges = [key for key, values in options if isinstance(values, Mapping)]
        if ranges and not draws:
            raise UserError(
                f"grid.{ranges[0]} is a range, of which search {self.search} cannot train every "
                "value. List values, or set search to random and trials to a number."
            )
        if not draws and (combinations := count(self)) > MAX_ADAPTERS:
            raise UserError(
                f"grid has {combinations} combinations; at most {MAX_ADAPTERS} adapters can train "
                "together. Shorten its lists."
            )
        key = "generation" if search.passes(self) > 1 else "trials"
        if draws and getattr(self, key) > MAX_ADAPTERS:
            raise UserError(
                f"{key} must be at most {MAX_ADAPTERS}, the adapters that can train together, got "
                f"{getattr(self, key)}. Lower it."
            )
        search.check(self)


def check(project: Project) -> None:
    """Raises UserError if the grid cannot be trained, or the search has no losses to compare."""
    settings, sweep = project.params.finetune_lora, project.params.finetune_sweep
    search = SEARCHES[sweep.search]
    if search.compares and not (settings.eval_share or settings.eval_data):
        raise UserError(
            f"finetune_sweep.search {sweep.search} compares held-out losses, but there is no "
            "evaluation set. Set finetune_lora.eval_share, such as to 0.1, or "
            "finetune_lora.eval_data."
        )
    if settings.init_from:
        raise UserError(
            f"finetune_lora.init_from is {settings.init_from}, but a sweep trains new adapters. "
            "Unset it, or use `lora finetune lora`."
        )
    if settings.target_parameters:
        raise UserError(
            f"finetune_lora.target_parameters is {', '.join(settings.target_parameters)}, but "
            "adapters on experts train alone. Unset it, or use `lora finetune lora`."
        )
    if search.passes(sweep) == 1:
        variants(settings, sweep, project.params)


STAGE = Stage(
    "finetune_sweep",
    __name__,
    output="sweep",
    kind="adapters",
    method="sweep",
    settings=FinetuneSweep,
    needs=("expand_vocab",),
    data=("data", "eval_data", "retention_data", "finetune_sweep.old_data", "evaluate.old_data"),
    settings_from="finetune_lora",
    summary="Train one adapter per combination of a grid",
    title="LoRA sweep",
    look=Look("#F0E442", "★"),  # its best adapter; the others are dimmed
    order=6,
    check=check,
)


class Passes:
    """The adapters of a search, pass after pass, each asked for once the one before is told."""

    def __init__(self, project: Project) -> None:
        self._params, self._sweep = project.params, project.params.finetune_sweep
        self._search, self._asked = SEARCHES[self._sweep.search], list[Values]()
        self._tried = list[Trial]()
        self.total = self._search.passes(self._sweep)  # at most
        self.number = 0  # of those that were told
        self.rows = dict[str, Any]()  # adapter → outcome, of those that were told

    def ask(self) -> dict[str, Adapter]:
        """Name → values and settings of each adapter of the next pass; empty after the last."""
        if self.number == self.total:
            return {}
        self._asked = self._search.ask(self._sweep, self._tried)
        return _adapters(self._params.finetune_lora, self._asked, self.rows, self._params)

    def tell(self, made: Mapping[str, Any]) -> None:
        """The outcomes of the adapters that were asked for, in their order."""
        from pipeline.project.logs.run_log import DIVERGED

        losses = [None if row["state"] == DIVERGED else row["eval_loss"] for row in made.values()]
        self._tried += map(Trial, self._asked, losses)
        self.rows |= made
        self.number += 1


def run(job: Job) -> Generator[Event, None, Facts]:
    """Train the combinations of the search → a folder for each adapter, and sweep.json.

    Raises UserError, and whatever `train` raises.
    """
    from pipeline.files import artifact
    from pipeline.models.load import count, skeleton
    from pipeline.project.logs.run_log import DIVERGED, TABLE, remove_other_logs

    check(job.project)
    passes, entries = Passes(job.project), dict[str, str]()
    while adapters := passes.ask():
        keys = entry_keys(job.project, job.input_facts, adapters)
        if passes.total == 1:
            made = yield from _make_pass(job, adapters, {}, keys)
        else:
            made = yield from _waiting_pass(job, adapters, passes, keys)
        passes.tell(made)
        entries |= keys
    rows = passes.rows
    if all(row["state"] == DIVERGED for row in rows.values()):
        raise UserError(
            f"{job.stage.name}: all adapters diverged: none has a finite loss. Lower learning_rate."
        )
    for name in rows if passes.total > 1 else ():
        for waiting in (job.run / PASSES).glob(f"*/{name}"):
            shutil.move(waiting, job.out / name)
    shutil.rmtree(job.run / PASSES, ignore_errors=True)
    remove_other_logs(job.run, rows)  # where all came from the cache, none trained
    artifact.write_json(job.out / TABLE, rows)
    trust = job.project.params.origin.trust_remote_code
    total = count(skeleton(job.project.artifact("expand_vocab"), trust))["total"]
    trained = sum(row["trainable"] for row in rows.values())
    parameters = {"total": total, "trainable": trained}
    return {"adapters": rows, "entries": entries, "parameters": parameters}


def run_part(job: Job, names: Collection[str]) -> Generator[Event, None, None]:
    """Train some adapters of a pass for the cache, where `run` finds them.

    The passes before must be in the cache. Raises UserError, and whatever `train` raises.
    """
    from pipeline.project.entries import open_cache
    from pipeline.project.entries.adapter_entries import outcomes, store_adapters

    check(job.project)
    passes, cache = Passes(job.project), open_cache(job.project)
    while adapters := passes.ask():
        keys = entry_keys(job.project, job.input_facts, adapters)
        if not keys:
            raise UserError(WHOLE)
        if set(names) <= adapters.keys():
            chosen = {name: adapters[name] for name in adapters if name in names}
            yield from _waiting_pass(job, chosen, passes, keys, part=True)
            store_adapters(cache, job.run / PASSES / str(passes.number))
            return
        if not (made := outcomes(cache, keys)):
            break
        passes.tell(made)
    raise UserError(
        f"--only {','.join(names)}: no pass has these adapters whose earlier passes are done. "
        "`lora finetune sweep` trains all."
    )


def entry_keys(
    project: Project, facts: Mapping[str, Any], adapters: Mapping[str, Adapter]
) -> dict[str, str]:
    """Adapter → key of its entry in the cache, where its end does not depend on the others'.

    `facts`: the sweep's `input_facts`. Empty where a search stops some.
    """
    from pipeline.project.cache import cache_key
    from pipeline.project.runner import without_paths

    if SEARCHES[project.params.finetune_sweep.search].rungs is not None:
        return {}
    method, keys = ["lora", without_paths(_old_data(project))], dict[str, str]()
    for name, (_, lora) in adapters.items():
        keys[name] = cache_key({**_facts(facts, lora), "method": method})
    return keys


def _facts(facts: Mapping[str, Any], lora: FinetuneLora) -> Facts:
    """All that determines an adapter's files, for its manifest; `facts`: those of the sweep."""
    from pipeline.project.runner import without_paths

    kind = {"kind": "adapter", "method": "lora", "seed": lora.seed}
    return {**facts, **kind, "params": without_paths(structs.asdict(lora))}


def _old_data(project: Project) -> str:
    """The texts on which the divergence from the base is measured; empty: it is not."""
    params = project.params
    old_data: str = params.finetune_sweep.old_data or params.section("evaluate").old_data
    return old_data


def _waiting_pass(
    job: Job,
    adapters: Mapping[str, Adapter],
    passes: Passes,
    entries: Mapping[str, str],
    part: bool = False,
) -> Generator[Event, None, dict[str, Any]]:
    """Train a pass of several, or a part of one.

    Its adapters wait in the run folder, so that a sweep can resume.
    """
    from pipeline.files import artifact
    from pipeline.project.runner import Progress, discard_checkpoints

    number, total = passes.number, 1 if part else passes.total
    folder, key = job.run / PASSES / str(number), f"{job.key} {number}"
    asked = json.loads(json.dumps([values for values, _ in adapters.values()]))
    with suppress(UserError, KeyError):
        made = artifact.verify(folder)
        if made["key"] == key and [row["values"] for row in made["adapters"].values()] == asked:
            return dict(made["adapters"])
    with artifact.writing(folder) as out:
        waiting = replace(job, out=out, key=key)
        training = _make_pass(waiting, adapters, passes.rows, entries, part)
        while True:
            try:
                event = next(training)
            except StopIteration as stop:
                rows: dict[str, Any] = stop.value
                break
            if isinstance(event, Progress) and total > 1:
                done, all_steps = number * event.total + event.done, total * event.total
                event = Progress(done, all_steps, f"pass {number + 1} of {total}  {event.text}")
            yield event
        keys = {name: entries[name] for name in rows if name in entries}
        artifact.seal(out, {"key": key, "adapters": rows, "entries": keys})
    discard_checkpoints(job.run)
    return rows


def _make_pass(
    job: Job,
    adapters: Mapping[str, Adapter],
    earlier: Mapping[str, Any],
    entries: Mapping[str, str],
    part: bool = False,
) -> Generator[Event, None, dict[str, Any]]:
    """Take adapters from the cache and train the others. Returns name → outcome.

    `earlier`: the outcomes of the passes before. `entries`: the keys of those that the cache may
    have. `part`: others train elsewhere.
    """
    from pipeline.project.runner import Note

    found = {} if job.force else _restored(job, adapters, entries)
    missing = {name: adapter for name, adapter in adapters.items() if name not in found}
    if found:
        count = f"{len(found)} of {len(adapters)} adapters"
        yield Note(f"{job.stage.name}: {count} are taken from the cache")
        # a checkpoint is of the adapters that trained together
        job = replace(job, key=f"{job.key} without {' '.join(found)}")
    rows = found
    if missing:
        rows = found | (yield from _train_pass(job, missing, {**earlier, **found}, part))
        _log_trained(job.run, [entries[name] for name in missing if name in entries])
    return {name: rows[name] for name in adapters}


def _log_trained(run: Path, keys: Sequence[str]) -> None:
    """Append the keys of adapters that were trained here, not taken from the cache."""
    with (run / TRAINED).open("a", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(key)}\n" for key in keys)


def _restored(
    job: Job, adapters: Mapping[str, Adapter], entries: Mapping[str, str]
) -> dict[str, Any]:
    """Name → outcome of the adapters that the cache has, copied to `job.out`, and their logs."""
    from pipeline.project.entries import open_cache
    from pipeline.project.entries.adapter_entries import restore_adapter
    from pipeline.project.logs.run_log import DIVERGED
    from pipeline.training.saving import save_logs

    cache, found = open_cache(job.project), dict[str, Any]()
    for name, (values, _) in adapters.items():
        outcome = name in entries and restore_adapter(cache, entries[name], job.out / name)
        if not outcome:
            continue
        found[name] = {"values": values, **outcome}
        if outcome["state"] == DIVERGED:
            shutil.rmtree(job.out / name)
        else:
            (job.run / name).mkdir(exist_ok=True)
            save_logs(job.out / name, job.run / name)
    return found


def _train_pass(
    job: Job, adapters: Mapping[str, Adapter], earlier: Mapping[str, Any], part: bool
) -> Generator[Event, None, dict[str, Any]]:
    """Train adapters together, saved in `job.out`. Returns name → outcome.

    `earlier`: the outcomes of others, whose logs stay. `part`: others train elsewhere.
    """
    from pipeline.models.load import load_base
    from pipeline.training.batched import ManyAdapters
    from pipeline.training.batches import Batches
    from pipeline.training.data import asked_while_training, build_datasets
    from pipeline.training.loop import train
    from pipeline.training.optimizer import refuse_long_warmup
    from pipeline.training.retention import RetentionLoss, load_retention_texts
    from pipeline.training.step import Evaluation, Learner, mean_losses
    from pipeline.training.task import TrainingTask

    params = job.project.params
    settings, sweep = params.finetune_lora, params.finetune_sweep
    search = SEARCHES[sweep.search]
    if settings.precision == "fp16":
        raise UserError(
            "finetune_lora.precision fp16 trains one adapter at a time. Set it to bf16 or fp32 "
            "for a sweep."
        )
    folder = job.artifact("expand_vocab")
    base = load_base(
        folder, settings.precision, params.origin.trust_remote_code, settings.quantization
    )
    dataset, held_out = yield from build_datasets(job, settings, base)
    max_weight = max(lora.retention_weight for _, lora in adapters.values())
    texts = yield from load_retention_texts(
        job, structs.replace(settings, retention_weight=max_weight), base
    )
    old_data = _old_data(job.project)
    of_old = structs.replace(
        settings, retention_data=old_data, retention_weight=float(bool(old_data))
    )
    old = yield from load_retention_texts(job, of_old, base)

    routing, specs = yield from _attach_all(base, adapters, new_rows(folder))
    learners = []
    for name, (_, lora) in adapters.items():
        batches = Batches.of(dataset, lora)
        retain = None
        if texts is not None and lora.retains:
            retain = RetentionLoss(base.model, texts, lora, routing.base)
        learners.append(Learner(lora, batches, retain, name))
    for learner in learners:
        with _add_name_to_error(learner.name):
            refuse_long_warmup(learner.settings, len(learner.batches), job.stage.section)

    evaluation = None
    if held_out is not None:
        steps = len(learners[0].batches)
        in_order = Batches.held_out(held_out, settings)
        rungs = dict[int, int]()
        if search.rungs is not None:
            rungs = search.rungs(sweep, len(learners), settings.total_steps(steps))
        evaluation = Evaluation(
            in_order,
            settings.eval_steps or steps,
            settings.patience,
            len(learners),
            rungs,
            load_best=settings.load_best,
        )
    less = (
        f"Train fewer adapters at once: shorten {job.stage.name}.grid, or lower "
        "finetune_lora.tokens_per_batch, which they share, or batch_size."
    )
    path = ManyAdapters(base.model, routing)
    asked = asked_while_training(job, settings, base)
    task = TrainingTask(
        base.model,
        learners,
        path,
        evaluation,
        less_memory=less,
        earlier=earlier,
        all_may_diverge=part or bool(earlier),
        **asked,
    )
    yield from train(job, task)

    measured: list[dict[str, Any]] = [{} for _ in learners]
    for n, numbers in enumerate(measured):
        if evaluation is not None and evaluation.dropped(n):
            numbers["dropped"] = True
    live = [n for n, learner in enumerate(learners) if not learner.diverged]
    if old is not None and live:
        divergence = RetentionLoss(base.model, old, of_old, routing.base)
        size, tokens = settings.retention_batch_size, settings.tokens_per_batch
        in_order = Batches(old, size, None, tokens_per_batch=tokens)
        loss = partial(path.divergences, retain=divergence)
        for n, mean in mean_losses(path, in_order, live, loss).items():
            measured[n]["divergence"] = mean
    return _save_adapters(job, base, adapters, specs, learners, measured)


def _attach_all(
    base: Base, adapters: Mapping[str, Adapter], rows: tuple[int, ...]
) -> Generator[Event, None, tuple[AdapterRouting, dict[str, AdapterSpec]]]:
    """Attach every adapter exactly as finetune_lora does; `rows`: the new ones of expand_vocab."""
    import torch

    from pipeline.adapters.attach import attach
    from pipeline.adapters.batched import attach_many
    from pipeline.models.load import DTYPES

    model = base.model
    specs = {}
    for name, (_, lora) in adapters.items():
        with _add_name_to_error(name):
            specs[name] = lora_spec(model, lora, rows)
    notes: list[Event] = []

    def attach_one(name: str, lora: FinetuneLora) -> None:
        torch.manual_seed(lora.seed)
        with _add_name_to_error(name):
            attach(model, specs[name], DTYPES[lora.adapter_precision], lora.init_lora_weights)
        notes.extend(note_wide_rank(model))

    calls = [partial(attach_one, name, lora) for name, (_, lora) in adapters.items()]
    routing = attach_many(model, calls)
    yield from dict.fromkeys(notes)
    return routing, specs


def variants(
    base: FinetuneLora, sweep: FinetuneSweep, params: Params | None = None
) -> dict[str, FinetuneLora]:
    """Name → settings of each adapter of the first pass, in the grid's order.

    An empty grid has one, `base`. `params`: the project's, whose defaults may follow what the grid
    sets. Raises UserError for an invalid or duplicate combination.
    """
    adapters = _adapters(base, SEARCHES[sweep.search].ask(sweep, ()), (), params)
    return {name: lora for name, (_, lora) in adapters.items()}


def _adapters(
    base: FinetuneLora, combinations: Sequence[Values], taken: Iterable[str], params: Params | None
) -> dict[str, Adapter]:
    """Name → values and settings of each combination; no name is in `taken`.

    Raises UserError as `variants` does.
    """
    for n, values in enumerate(combinations):
        if values in combinations[:n]:
            raise UserError(
                f"finetune_sweep.grid has {_adapter_name(values) or '{}'} twice. Remove one of "
                "them."
            )
    names = _disambiguate([_adapter_name(values) or "adapter" for values in combinations], taken)
    adapters: dict[str, Adapter] = {}
    for name, values in zip(names, combinations, strict=True):
        with _add_name_to_error(name):
            follows = params.following("finetune_lora", values) if params else {}
            adapters[name] = values, structs.replace(base, **follows, **values)
    return adapters


def grid_around(project: Project, keys: Sequence[str]) -> dict[str, list[Any]]:
    """Key → values around the advised ones, for `--over`. Raises UserError for other keys."""
    from pipeline.project.advice import advised_learning_rate

    lora = project.params.finetune_lora
    rate = advised_learning_rate(project)
    rates: list[float] = []
    ranks: set[int] = set()
    alphas: list[float] = []
    for n in range(-2, 3):
        rates.append(float(f"{rate * 3.0**n:.2g}"))
        ranks.add(max(1, int(lora.rank * 2.0**n)))
        alphas.append(lora.alpha * 2.0**n)
    known: dict[str, list[Any]] = {
        "learning_rate": rates,
        "rank": sorted(ranks),
        "alpha": alphas,
        "target_modules": [["attention"], ["feed_forward"], ["all-linear"]],
    }
    if unknown := [key for key in keys if key not in known]:
        raise UserError(
            f"--over takes one of {', '.join(known)}, got {unknown[0]}. Write the values of "
            "another key into finetune_sweep.grid."
        )
    return {key: known[key] for key in keys}


def _adapter_name(values: Values) -> str:
    """Such as rank-4_seed-0, a valid folder name on every file system."""
    return "_".join(
        f"{ABBREVIATIONS.get(key, key)}-{_format_value(value)}" for key, value in values.items()
    )


def _format_value(value: Any) -> str:
    if isinstance(value, Mapping):
        items = [f"{_format_value(key)}={_format_value(item)}" for key, item in value.items()]
        return "+".join(items) or "none"
    if isinstance(value, tuple):
        return "+".join(map(_format_value, value))
    return re.sub(r"[^\w.=+-]+", "~", f"{value:g}" if isinstance(value, float) else str(value))


def _disambiguate(names: Iterable[str], taken: Iterable[str]) -> list[str]:
    """Truncate long names, and append numbers to duplicates."""
    used, unique = set(taken), list[str]()
    for name in names:
        short, number = name[:MAX_NAME], 2
        while short in used:
            short, number = f"{name[:MAX_NAME]}.{number}", number + 1
        used.add(short)
        unique.append(short)
    return unique


@contextmanager
def _add_name_to_error(adapter: str) -> Iterator[None]:
    """Prefix a UserError with the adapter's name, as the wrong value may come from the grid."""
    try:
        yield
    except UserError as error:
        raise UserError(f"finetune_sweep, {adapter}: {error}") from None


def _save_adapters(
    job: Job,
    base: Base,
    adapters: Mapping[str, Adapter],
    specs: Mapping[str, AdapterSpec],
    learners: Sequence[Learner],
    measured: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Save each adapter that did not diverge in a folder, sealed as finetune_lora's artifact is.

    `measured`: more entries for each outcome. Returns name → outcome.
    """
    from pipeline.adapters.batched import only_adapter, trained_by
    from pipeline.files import artifact
    from pipeline.project import provenance
    from pipeline.project.entries.adapter_entries import OUTCOME
    from pipeline.project.logs.run_log import DIVERGED, DONE, LOSS, STOPPED, final_loss, read_steps
    from pipeline.stages.finetune import facts_of_base, save_adapter_of
    from pipeline.training.saving import save_logs

    folder = job.project.artifact("expand_vocab")
    commit, trained_on = provenance.commit(job.stage.module), facts_of_base(job)
    rows: dict[str, Any] = {}
    for number, learner in enumerate(learners):
        name = learner.name
        values, lora = adapters[name]
        steps = read_steps(job.run / name / LOSS)
        trained = trained_by(base.model, number)
        state = DONE if learner.stopped is None else STOPPED
        held_out = [step.eval_loss for step in steps if step.eval_loss is not None]
        loss = None
        if held_out:
            loss = min(held_out) if lora.takes_best else held_out[-1]
        outcome = {
            "state": DIVERGED if learner.diverged else state,
            "trainable": trained,
            "steps": len(steps),
            "final_loss": final_loss(steps),
            "eval_loss": loss,
            **measured[number],
        }
        rows[name] = {"values": values, **outcome}
        if learner.diverged:
            continue
        out = job.out / name
        out.mkdir()
        with only_adapter(base.model, number):
            save = partial(save_files, base=base, spec=specs[name], folder=folder, settings=lora)
            facts = save_adapter_of(trained_on, base, save, out, trained)
        save_logs(job.run / name, out)
        more = {"commit": commit, OUTCOME: outcome}
        artifact.seal(out, {**_facts(job.input_facts, lora), **facts, **more})
    return rows
