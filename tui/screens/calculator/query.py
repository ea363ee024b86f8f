"""What was typed into the calculator's form, and the result of `pipeline.calc` for it."""

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

CUSTOM = "custom"  # a GPU with the memory of the field `gib`


@dataclass(frozen=True)
class CalculatorQuery:
    """The fields of the form, as typed; an empty one means the default for the model."""

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
        """The query with the defaults in fields that are not relevant to the method."""
        return replace(CalculatorQuery(), **{name: getattr(self, name) for name in relevant_fields(self)})


FIELDS = tuple(field.name for field in fields(CalculatorQuery))
_METHOD_FIELDS = {
    "lora": ("rank", "alpha", "targets", "embeddings", "new_rows", "adapter_precision"),
    "qlora": ("rank", "alpha", "targets", "embeddings", "new_rows", "adapter_precision"),
    "freeze": ("last_blocks", "ends"),
    "prefix": ("virtual_tokens",),
    "prompt": ("virtual_tokens",),
}


def relevant_fields(query: CalculatorQuery) -> list[str]:
    """The fields that affect the result."""
    of_methods = {name for names in _METHOD_FIELDS.values() for name in names}
    irrelevant = of_methods - set(_METHOD_FIELDS.get(query.method, ()))
    irrelevant |= {"new_rows"} if query.embeddings != "new_rows" else set()
    irrelevant |= {"gib"} if query.gpu != CUSTOM else set()
    return [name for name in FIELDS if name not in irrelevant]


class FieldError(UserError):
    """An error in one field of the form."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Result:
    """The result for a configuration. `columns`: several methods to compare; `chosen`: the name of this one."""

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
        """Free bytes on the device; negative if it does not fit."""
        return self.device.bytes - self.memory.peak

    @property
    def title(self) -> str:
        """The configuration in words: model, method, precision, batch."""
        run = self.run
        return f"{self.model.name}, {title_of(self.method)}, {run.precision}, {run.batch} × {run.sequence:,} tokens"


def calculate(query: CalculatorQuery, model: Architecture) -> Result:
    """The result for `query` and `model`. Raises FieldError, which names the invalid field."""
    query = query.effective()
    method = parse_method(
        query.method,
        _parse_int(query, "rank"),
        _parse_float(query, "alpha") if query.alpha.strip() else None,
        query.targets,
        embeddings=query.embeddings,
        new_rows=_parse_int(query, "new_rows") if query.embeddings == "new_rows" else 0,
        last_blocks=_parse_int(query, "last_blocks"),
        train_embeddings=query.ends == "train",
        virtual_tokens=_parse_int(query, "virtual_tokens"),
    )
    run = parse_training_config(
        model,
        query.method,
        batch=_parse_int(query, "batch"),
        sequence=_parse_int(query, "sequence") if query.sequence.strip() else None,
        precision=query.precision.strip() or None,
        adapter_precision=query.adapter_precision,
        checkpointing=query.checkpointing or None,
        optimizer=query.optimizer,
        loss=query.loss,
        virtual_tokens=method.virtual_tokens,
    )
    size = _parse_float(query, "gib")
    try:
        device = gpu(query.gpu) if query.gpu != CUSTOM else of_size(size)
    except UserError as error:
        raise FieldError("gib", str(error)) from None
    try:
        validate(method, run)
        refuse_impossible(model, method, run)
        # The columns compare methods on one precision: QLoRA's own column has the quantized base.
        columns = side_by_side(model, method, replace(run, precision="bf16") if run.precision == QLORA else run)
        chosen = next((name for name, (m, r, _) in columns.items() if (m, r) == (method, run)), None)
        if chosen is None:
            columns[chosen := query.method] = (method, run, predict(model, method, run))
    except UserError as error:
        raise FieldError(_field_in_message(str(error)), str(error)) from None
    return Result(model, method, run, device, columns, chosen)


def _parse_int(query: CalculatorQuery, field: str) -> int:
    text = getattr(query, field).strip()
    if not re.fullmatch(r"-?[0-9]{1,12}", text):
        raise FieldError(field, f"{field.replace('_', '-')} must be a whole number, got {text[:40]!r}.")
    return int(text)


def _parse_float(query: CalculatorQuery, field: str) -> float:
    text = getattr(query, field).strip()
    try:
        return float(text)
    except ValueError:
        raise FieldError(field, f"{field.replace('_', '-')} must be a number, got {text[:40]!r}.") from None


def _field_in_message(message: str) -> str:
    """The field that a message of `pipeline.calc` is about, mostly its first word."""
    word = re.split(r"[ :]", message, maxsplit=1)[0].replace("-", "_")
    if word in FIELDS:
        return "new_rows" if message.startswith("embeddings new_rows") else word
    if "weights cannot be trained" in message:
        return "precision"
    return {"target_modules": "targets", "freeze": "last_blocks"}.get(word, "method")
