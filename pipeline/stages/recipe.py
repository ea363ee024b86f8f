"""Settings for a base, its data and the memory of this machine, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import ceil
from typing import TYPE_CHECKING, Any

from pipeline.calc.memory import predict
from pipeline.calc.method import trainable
from pipeline.calc.settings import TrainingConfig
from pipeline.data.check import DataReport, suggest_max_length
from pipeline.errors import UserError
from pipeline.files.text import in_units
from pipeline.project.advice import BATCH, BITS_PER_PARAMETER, BITS_PER_TOKEN
from pipeline.project.params.load import TRAINING
from pipeline.project.params.schema import Pretrained, hints
from pipeline.project.params.sections import RETAIN, AdapterTraining, Training
from pipeline.stages.registry import COUNTED

if TYPE_CHECKING:
    from pipeline.calc.architecture import Architecture
    from pipeline.project.stage_graph import Stage

# share of the free memory that a step may take: the calculator counts tensors alone
ROOM = 0.8
RANKS = (1, 2, 4, 8)  # times the default
RETENTION = {"retention_data": RETAIN, "retention_weight": 1.0, "retention_batch_size": 4}
ANSWERS = 8  # held-out examples that are answered at each evaluation
# Tokens per batch to begin with. On a core of a CPU, SmolLM2-135M takes 0.9 of the time in batches
# of 1,000 tokens that it takes in those of 600. More tokens gain little and take memory: 9,213 are
# as quick in nine batches as in two, which have 2.6 times the peak.
ON_GPU, ON_CPU = 16_384, 2_048
# sequences per step and device; steps per epoch, if there are enough examples
LARGEST_BATCH, LEAST_STEPS = 16, 25
EPOCHS = ((20_000, 1), (2_000, 2))  # examples at least → epochs; of fewer the default


@dataclass(frozen=True)
class Machine:
    """The device that will train."""

    device: str
    memory: int  # bytes that training can use
    precision: str  # bf16, fp16 or fp32: `fast_precision`
    is_cpu: bool = False
    gpus: int = 0  # that it has
    devices: int = 1  # GPUs that train together


@dataclass
class Recipe:
    """The chosen settings, by section.key."""

    given: Mapping[str, Any]  # set by the user, which no choice replaces
    values: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    peak: int | None = None  # predicted of a step, in bytes

    def set(self, key: str, value: Any, why: str = "") -> Any:
        """Choose a value, unless the user did. Returns the value that counts."""
        self.values[key] = self.given.get(key, value)
        self.reasons[key] = "as you set it" if key in self.given else why
        return self.values[key]

    def rows(self) -> Iterator[tuple[str, Any, str]]:
        """Key, value and reason, of the settings that have a reason."""
        for key, value in self.values.items():
            if reason := self.reasons[key]:
                yield key, value, reason


def choose(
    model: Architecture | None,
    data: DataReport,
    held_out: float,
    machine: Machine,
    stages: Sequence[Stage],
    given: Mapping[str, Any],
) -> Recipe:
    """Settings with which `stages` train `model` on `data`.

    `model`: None if the calculator does not know it; its memory is then not predicted. `held_out`:
    the share of the examples that can be held out. `given`: section.key → value, set by the user.
    Raises UserError if nothing fits into the machine's memory.
    """
    recipe = Recipe(given)
    examples = data.examples
    defaults = Training.pretrained(Pretrained(), _of_section(given, TRAINING))
    of_few = defaults.pop("epochs")
    epochs = next((epochs for least, epochs in EPOCHS if examples >= least), of_few)
    if f"{TRAINING}.max_steps" not in given and any(
        "epochs" not in stage.settings.PRETRAINED for stage in stages
    ):
        recipe.set(f"{TRAINING}.epochs", epochs, f"{examples:,} examples: more would be memorized")
    defaults.pop("precision")
    for key, value in defaults.items():
        recipe.set(f"{TRAINING}.{key}", value)
    why = "half the memory, and the device multiplies it"
    if machine.precision != "bf16":
        why = "this device has no instructions for bf16"
    recipe.set(f"{TRAINING}.precision", machine.precision, why)
    if not data.evaluation:
        why = "too few examples to hold one out"
        if held_out:
            why = "held out, for the loss on what is not trained on"
        recipe.set(f"{TRAINING}.eval_share", held_out, why)
    is_held_out = data.evaluation or recipe.values[f"{TRAINING}.eval_share"]
    if is_held_out and not all(map(_compares, stages)):
        why = "held-out answers are compared after each epoch"
        recipe.set(f"{TRAINING}.samples", {"held_out": ANSWERS}, why)
    for stage in stages:
        _choose_method(recipe, model, data, stage)
    _fit(recipe, model, machine, stages, data)
    return recipe


def _compares(stage: Stage) -> bool:
    return issubclass(stage.settings, Training) and stage.settings.COMPARES


def _choose_method(
    recipe: Recipe, model: Architecture | None, data: DataReport, stage: Stage
) -> None:
    """A method's settings: its defaults for pretrained bases; LoRA's rank by the data."""
    name, base = stage.section, Pretrained(model.hidden if model else None)
    of_base = stage.settings.pretrained(base, _of_section(recipe.given, name))
    defaults = {key: of_base[key] for key in stage.settings.PRETRAINED}
    low_rank, reasons = "rank" in defaults, {}
    if low_rank:
        reasons["target_modules"] = "learns more than attention alone (LoRA Without Regret)"
    if low_rank and not _compares(stage):
        reasons["learning_rate"] = "of a large base: the width of this one is not known"
        if base.width:
            reasons["learning_rate"] = f"for a base of width {base.width:,} (bench recipe)"
        if recipe.given.get(f"{name}.retention_weight") != 0:
            defaults |= RETENTION
            reasons["retention_data"] = (
                "texts on which answers stay the base's: less is forgotten, a step takes longer"
            )
    if _compares(stage):
        reasons["learning_rate"] = (
            "a tenth of what examples take: an answer that is pushed away takes others along"
        )
        reasons["epochs"] = "preferences are learned in one pass, or a few"
    for key, value in defaults.items():
        recipe.set(f"{name}.{key}", value, reasons.get(key, ""))
    if not low_rank:
        return
    tokens, trained = data.trained_tokens or 0, 0
    for factor in RANKS:
        recipe.set(f"{name}.rank", factor * defaults["rank"])
        if model:
            settings = _settings(recipe, stage)
            trained = trainable(model, COUNTED[stage.method].with_params(settings))
        if trained * BITS_PER_PARAMETER >= tokens * BITS_PER_TOKEN:
            break
    bits = f"{trained:,} parameters hold more than {tokens:,} trained tokens" if trained else ""
    rank = recipe.set(f"{name}.rank", recipe.values[f"{name}.rank"], bits)
    alpha = stage.settings.pretrained(base, {"rank": rank})["alpha"]
    recipe.set(f"{name}.alpha", alpha, f"{alpha / rank:g} × rank")


def _settings(recipe: Recipe, stage: Stage) -> Any:
    """The stage's section as the recipe has it."""
    every = {**recipe.values, **recipe.given}
    values = _of_section(every, TRAINING) | _of_section(every, stage.section)
    known = {key: values[key] for key in values if key in hints(stage.settings)}
    for key, value in known.items():
        known[key] = tuple(value) if isinstance(value, list) else value
    return stage.settings.defaults(Pretrained(), known)


def _of_section(values: Mapping[str, Any], section: str) -> dict[str, Any]:
    """The values of a section: section.key → value as key → value."""
    settings, start = {}, f"{section}."
    for key, value in values.items():
        if key.startswith(start):
            settings[key.removeprefix(start)] = value
    return settings


def _fit(
    recipe: Recipe,
    model: Architecture | None,
    machine: Machine,
    stages: Sequence[Stage],
    data: DataReport,
) -> None:
    """Length, batches, checkpointing and quantization: the cheapest combination that fits."""
    batch = _batch_size(data.examples, machine.devices)
    trained = data.examples * (1 - (recipe.values.get(f"{TRAINING}.eval_share") or 0.0))
    longest = (data.quantiles or {}).get("max", 0)
    whole = suggest_max_length(longest, longest, model.context if model else None)
    most = data.suggested_max_length or 0
    lengths = {whole: "no example is cut"}
    if whole < longest:
        lengths[whole] = f"the model's positions; the longest example has {longest:,} tokens"
    lengths.setdefault(most, f"the longest has {longest:,} tokens, which do not fit; 1% is cut")

    adapters = [
        f"{s.section}.quantization" for s in stages if issubclass(s.settings, AdapterTraining)
    ]
    quantizations = ["none"]
    if len(adapters) == len(stages) and machine.precision != "fp32":
        quantizations.append("nf4-dq")
    accumulated = recipe.set(f"{TRAINING}.gradient_accumulation_steps", 1)
    examples = batch * accumulated
    several = f" for {machine.devices} GPUs, at the learning rate for one"
    shared = several if machine.devices > 1 else ""
    steps = f"{examples} examples a step{shared}: an epoch has {ceil(trained / examples):,} steps"
    if (more := _batch_size(data.examples, machine.gpus)) > batch:
        steps += f"; for --devices {machine.gpus} set {more}"
    budgets = [ON_CPU if machine.is_cpu else ON_GPU]
    while budgets[-1] > longest:
        budgets.append(budgets[-1] // 2)
    room = round(ROOM * machine.memory)
    ways = product(lengths, quantizations, ("none", "selective", "full"), budgets)
    for length, quantization, checkpointing, budget in ways:
        recipe.set(f"{TRAINING}.max_length", length, lengths[length])
        recipe.set(f"{TRAINING}.batch_size", batch, steps)
        less = "" if budget == budgets[0] else "more at once does not fit"
        recipe.set(f"{TRAINING}.tokens_per_batch", budget, less)
        saves = "" if checkpointing == "none" else "saves memory"
        recipe.set(f"{TRAINING}.gradient_checkpointing", checkpointing, saves)
        for name in adapters:
            fits = "" if quantization == "none" else "the base in 16 bits does not fit"
            recipe.set(name, quantization, fits)
        if model is None:
            return
        tokens = min(longest, recipe.values[f"{TRAINING}.max_length"] or longest)
        recipe.peak = max((_peak(recipe, model, stage, tokens) for stage in stages), default=0)
        if recipe.peak <= room:
            return
    raise UserError(
        f"a step takes {in_units(recipe.peak or 0)} even with one example, full checkpointing and "
        f"the least precision, and {machine.device} has {in_units(machine.memory)} free. Use a "
        "smaller model, or set a lower max_length."
    )


def _batch_size(examples: int, devices: int) -> int:
    """Sequences per step: more for several devices, to the most that `lora advise` accepts."""
    batch = 1
    while batch < min(LARGEST_BATCH * devices, BATCH) and examples / (2 * batch) >= LEAST_STEPS:
        batch *= 2
    return batch


def _peak(recipe: Recipe, model: Architecture, stage: Stage, length: int) -> int:
    """The predicted peak of a step whose examples all have `length` tokens."""
    settings = _settings(recipe, stage)
    method = COUNTED[stage.method].with_params(settings)
    quantization = getattr(settings, "quantization", "none")
    tokens = settings.batch_size * method.answers * length
    if settings.tokens_per_batch:
        of_step = tokens * settings.gradient_accumulation_steps
        tokens = min(settings.tokens_per_batch, of_step)
    run = TrainingConfig(
        sequence=length,
        tokens_per_batch=tokens,
        answers=method.answers,
        precision=str(settings.precision) if quantization == "none" else quantization,
        adapter_precision=getattr(settings, "adapter_precision", str(settings.precision)),
        trainer="ours",
        optimizer=settings.optimizer,
        checkpointing=settings.gradient_checkpointing,
        loss="chunked",
    )
    return predict(model, method, run).peak
