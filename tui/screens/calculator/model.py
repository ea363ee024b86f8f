"""From what the calculator's form holds, as text, to an answer of `pipeline.calc`."""

import re
from dataclasses import dataclass, fields, replace
from functools import cached_property

from pipeline.calc.architecture import Architecture
from pipeline.calc.fit import Gpu, gpu, of_size
from pipeline.calc.memory import Memory, predict, refuse_impossible
from pipeline.calc.parameters import trainable
from pipeline.calc.report import side_by_side, title_of
from pipeline.calc.settings import (
    QLORA,
    FinetuningMethod,
    TrainingConfig,
    parse_method,
    parse_training_config,
    validate,
)
from pipeline.errors import UserError

CUSTOM = "custom"  # a GPU of so many GiB


@dataclass(frozen=True)
class CalculatorQuery:
    """The form's fields, each as it is written there; empty is what suits the model."""

    model: str = "qwen3-8b"
    method: str = "lora"
    rank: str = "8"
    alpha: str = ""
    targets: str = "attention"
    embeddings: str = "none"
    new_rows: str = "1"
    last_blocks: str = "1"
    ends: str = "train"  # embedding and head with freeze
    virtual_tokens: str = "20"
    precision: str = ""
    adapter_precision: str = "fp32"
    batch: str = "1"
    sequence: str = ""
    checkpointing: str = ""
    optimizer: str = "adamw"
    loss: str = "full"
    gpu: str = "rtx4090"
    gib: str = "24"

    def effective(self) -> "CalculatorQuery":
        """The fields that matter to the method as they are, the others as they are in an untouched form."""
        return replace(CalculatorQuery(), **{name: getattr(self, name) for name in relevant(self)})


FIELDS = tuple(field.name for field in fields(CalculatorQuery))
_OWN = {
    "lora": ("rank", "alpha", "targets", "embeddings", "new_rows", "adapter_precision"),
    "qlora": ("rank", "alpha", "targets", "embeddings", "new_rows", "adapter_precision"),
    "freeze": ("last_blocks", "ends"),
    "prefix": ("virtual_tokens",),
    "prompt": ("virtual_tokens",),
}


def relevant(asked: CalculatorQuery) -> list[str]:
    """The fields that decide something: not those of other methods."""
    out = {name for names in _OWN.values() for name in names} - set(_OWN.get(asked.method, ()))
    out |= {"new_rows"} if asked.embeddings != "new_rows" else set()
    out |= {"gib"} if asked.gpu != CUSTOM else set()
    return [name for name in FIELDS if name not in out]


class FieldError(UserError):
    """What is wrong with one field of the form."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Result:
    """One configuration, calculated: `columns` are the methods side by side, `chosen` the one that is asked for."""

    model: Architecture
    method: FinetuningMethod
    run: TrainingConfig
    device: Gpu
    columns: dict[str, tuple[FinetuningMethod, TrainingConfig, Memory]]
    chosen: str

    @property
    def memory(self) -> Memory:
        return self.columns[self.chosen][2]

    @cached_property
    def trainable(self) -> int:
        return trainable(self.model, self.method)

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.model.total

    @property
    def spare(self) -> int:
        """Bytes that stay free on the device; negative where it does not fit."""
        return self.device.bytes - self.memory.peak

    @property
    def title(self) -> str:
        """The configuration in words: model, method, how it runs."""
        run = self.run
        return f"{self.model.name}, {title_of(self.method)}, {run.precision}, {run.batch} × {run.sequence:,} tokens"


def calculate(asked: CalculatorQuery, model: Architecture) -> Result:
    """The answer for `asked` of `model`. Raises FieldError, with the field that is wrong."""
    asked = asked.effective()
    method, run, device = _method(asked), _run(asked, model), _device(asked)
    try:
        validate(method, run)
        refuse_impossible(model, method, run)
        columns = side_by_side(model, method, replace(run, precision="bf16") if run.precision == QLORA else run)
        chosen = next((name for name, (m, r, _) in columns.items() if (m, r) == (method, run)), None)
        if chosen is None:
            columns[chosen := asked.method] = (method, run, predict(model, method, run))
    except UserError as error:
        raise FieldError(_field_of(str(error)), str(error)) from None
    return Result(model, method, run, device, columns, chosen)


def _method(asked: CalculatorQuery) -> FinetuningMethod:
    return parse_method(
        asked.method,
        _whole(asked, "rank"),
        _number(asked, "alpha") if asked.alpha.strip() else None,
        asked.targets,
        embeddings=asked.embeddings,
        new_rows=_whole(asked, "new_rows") if asked.embeddings == "new_rows" else 0,
        last_blocks=_whole(asked, "last_blocks"),
        train_embeddings=asked.ends == "train",
        virtual_tokens=_whole(asked, "virtual_tokens"),
    )


def _run(asked: CalculatorQuery, model: Architecture) -> TrainingConfig:
    return parse_training_config(
        model,
        asked.method,
        batch=_whole(asked, "batch"),
        sequence=_whole(asked, "sequence") if asked.sequence.strip() else None,
        precision=asked.precision.strip() or None,
        adapter_precision=asked.adapter_precision,
        checkpointing=asked.checkpointing or None,
        optimizer=asked.optimizer,
        loss=asked.loss,
        virtual_tokens=_whole(asked, "virtual_tokens"),
    )


def _device(asked: CalculatorQuery) -> Gpu:
    if asked.gpu != CUSTOM:
        return gpu(asked.gpu)
    try:
        return of_size(_number(asked, "gib"))
    except FieldError:
        raise
    except UserError as error:
        raise FieldError("gib", str(error)) from None


def _whole(asked: CalculatorQuery, field: str) -> int:
    text = getattr(asked, field).strip()
    if not re.fullmatch(r"-?[0-9]{1,12}", text):
        raise FieldError(field, f"{_key(field)} must be a whole number, got {text[:40]!r}.")
    return int(text)


def _number(asked: CalculatorQuery, field: str) -> float:
    text = getattr(asked, field).strip()
    try:
        return float(text)
    except ValueError:
        raise FieldError(field, f"{_key(field)} must be a number, got {text[:40]!r}.") from None


def _key(field: str) -> str:
    return field.replace("_", "-")


def _field_of(message: str) -> str:
    """The field that a message of `pipeline.calc` begins with."""
    word = re.split(r"[ :]", message, maxsplit=1)[0].replace("-", "_")
    if word in FIELDS:
        return "new_rows" if message.startswith("embeddings new_rows") else word
    if "weights cannot be trained" in message:
        return "precision"
    return {"target_modules": "targets", "freeze": "last_blocks"}.get(word, "method")
