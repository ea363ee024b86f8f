"""What the calculator answers: memory beside other methods, what fits, and the params of a project."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, get_args

from pipeline.calc.architecture import Architecture
from pipeline.calc.fit import LARGEST, Gpu, Largest, changes, largest
from pipeline.calc.memory import Memory, possible, predict, refuse_impossible
from pipeline.calc.method import FinetuningMethod, configure, trainable
from pipeline.calc.report import side_by_side
from pipeline.calc.settings import QLORA, TrainingConfig
from pipeline.calc.sources.open_model import built_in, open_model
from pipeline.errors import UserError
from pipeline.project.params.load import Params
from pipeline.project.params.sections import Precision, Quantization
from pipeline.project.stage_graph import Project
from pipeline.stages.registry import COUNTED, counted_stage, model_source, options_of_stage

SWEPT = {
    "rank": (1, 2, 4, 8, 16, 64),
    "batch": (1, 2, 4, 8, 16, 32),
    "sequence": tuple(2**n for n in range(15)),
}
COUNT = 6  # of values that are compared, the largest

Peaks = Mapping[int, int | None]  # value of a setting → peak in bytes; None: it cannot be trained


@dataclass(frozen=True)
class Result:
    """The answer for a configuration, beside other methods."""

    model: Architecture
    methods: Mapping[str, FinetuningMethod]
    method: FinetuningMethod
    run: TrainingConfig
    device: Gpu
    columns: Mapping[str, tuple[FinetuningMethod, TrainingConfig, Memory]]
    chosen: str  # the column of this configuration

    @property
    def memory(self) -> Memory:
        return self.columns[self.chosen][2]

    @cached_property
    def trainable(self) -> int:
        return trainable(self.model, self.method)

    @property
    def share(self) -> float:
        """Trainable of all parameters."""
        return self.trainable / self.model.total

    @property
    def spare(self) -> int:
        """Free bytes on the device; negative if it does not fit."""
        return self.device.bytes - self.memory.peak

    @property
    def title(self) -> str:
        """The configuration in words: model, method, precision, batch."""
        run = self.run
        return f"{self.model.name}, {self.method.title}, {run.precision}, {run.size}"

    # Other values of a setting

    def value(self, key: str) -> int:
        """The present value of a setting of SWEPT; 0 if the method has no rank."""
        found: int = getattr(self.method if key == "rank" else self.run, key, 0)
        return found

    def values(self, key: str) -> Sequence[int]:
        """The values that are compared, with the present one; none if the method has no rank."""
        now, limit = self.value(key), self.model.context if key == "sequence" else LARGEST[key]
        others = [value for value in SWEPT[key] if value <= limit]
        return sorted({now, *others[-COUNT:]}) if now else ()

    def peak(self, key: str, value: int) -> int | None:
        """The peak with another value of a setting; None if it cannot be trained."""
        method, run, change = self.method, self.run, dict[str, Any]({key: value})
        if key == "rank":
            method = method.with_rank(value) or method
        else:
            run = replace(run, **change)
        is_possible = possible(self.model, method, run)
        return predict(self.model, method, run).peak if is_possible else None


def calculate(model: Architecture, name: str, device: Gpu, **values: Any) -> Result:
    """The answer for the method called `name` and these options of it and of the step.

    Raises UserError.
    """
    methods, method, run = configure(model, COUNTED, name, **values)
    refuse_impossible(model, method, run)
    # The columns compare methods on one precision: QLoRA's own column has the quantized base.
    plain = replace(run, precision="bf16") if run.precision == QLORA else run
    columns = side_by_side(model, method, plain, methods)
    same = (
        key for key, (other, its_run, _) in columns.items() if (other, its_run) == (method, run)
    )
    chosen = next(same, name)
    columns.setdefault(chosen, (method, run, predict(model, method, run)))
    return Result(model, methods, method, run, device, columns, chosen)


class Advice(NamedTuple):
    """What a slower search finds: a tenth of a second for a large model."""

    largest: Largest
    changes: Sequence[tuple[str, int]]  # what makes it fit, and the peak with it
    sweeps: Mapping[str, Peaks]


def advise(result: Result) -> Advice:
    """The largest values that fit, else what to change, and the peaks with other values."""
    configuration = (result.model, result.method, result.run, result.device.bytes)
    ways = [] if result.spare >= 0 else changes(*configuration, result.methods)
    fixes = [(change, peak) for change, _, _, peak in ways]
    sweeps = {}
    for key in SWEPT:
        sweeps[key] = {value: result.peak(key, value) for value in result.values(key)}
    return Advice(largest(*configuration), fixes, sweeps)


# A project's params


def options_of_project(project: Project) -> dict[str, Any]:
    """The model, the method and the options that describe what a project trains."""
    stage = counted_stage(project)
    options = options_of_stage(project, stage)
    if options.get("embeddings") != "new_rows":
        options.pop("new_rows", None)
    return {"model": model_source(project), "method": stage.method, **options}


def trained_model(project: Project) -> tuple[str, Architecture]:
    """The model that this project trains: its name in messages, and its shapes. Reads files. Raises
    UserError.
    """
    origin = project.params.origin
    if not origin.imports:
        return "MiniGPT", built_in("minigpt").shapes
    return origin.base, open_model(model_source(project)).shapes


def params_of(result: Result, params: Params, trained: tuple[str, Architecture]) -> dict[str, Any]:
    """The params of a configuration as `section.key` → value. Raises UserError if this project
    cannot train it.
    """
    method, run, (name, model) = result.method, result.run, trained
    quantization = run.precision if run.precision in get_args(Quantization) else "none"
    # the calculator assumes bf16 for what is not quantized
    precision = "bf16" if quantization != "none" else run.precision
    if precision not in get_args(Precision):
        choices = "fp32, bf16, fp16, int8, nf4 or nf4-dq"
        raise UserError(f"{run.precision} weights are not trainable here yet. Choose {choices}.")
    values: dict[str, Any] = {
        "batch_size": run.batch,
        "tokens_per_batch": run.tokens_per_batch,
        "precision": precision,
        "gradient_checkpointing": run.checkpointing,
        "optimizer": run.optimizer,
        "neftune_alpha": run.neftune_alpha,
        **method.params(),
    }
    # MiniGPT has as many blocks as params.yaml says, which may not be trained yet.
    blocks, key = len(model.blocks), ""
    if not params.origin.imports:
        blocks, key = params.pretrain.layers, " (pretrain.layers)"
    if values.get("last_blocks", 0) > blocks:
        raise UserError(
            f"last-blocks must be at most {blocks}, the blocks of {name}{key}, got "
            f"{values['last_blocks']}."
        )
    if method.adapter:
        try:
            trainable(model, method)
        except UserError as error:
            raise UserError(
                f"{name}, the model of this project, does not have these targets. {error}"
            ) from None
        values |= {"adapter_precision": run.adapter_precision, "quantization": quantization}
    if values.get("train_embeddings") == "none" and "expand_vocab" not in params.written:
        current = params.section(f"finetune_{method.name}").train_embeddings
        if current == "new_rows":  # of which there are none: the same
            del values["train_embeddings"]
    return {f"finetune_{method.name}.{key}": value for key, value in values.items()}


def differences(params: Params, values: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`section.key` → (current value, new value) of the values that differ."""
    changed = {}
    for key, new in values.items():
        section, _, name = key.partition(".")
        old = getattr(getattr(params, section), name)
        old = list(old) if isinstance(old, tuple) else old
        if old != new:
            changed[key] = (old, new)
    return changed
