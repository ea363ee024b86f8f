"""What was typed into the calculator's form: the result of `pipeline.calc` for it, and the params of a project."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeVar, get_args

from pipeline.calc.architecture import Architecture
from pipeline.calc.fit import Gpu, gpu, of_size
from pipeline.calc.memory import Memory, predict, refuse_impossible
from pipeline.calc.method import FinetuningMethod, configure, find_method, trainable
from pipeline.calc.report import side_by_side
from pipeline.calc.settings import QLORA, TrainingConfig, options_of
from pipeline.calc.sources.open_model import built_in, open_model
from pipeline.errors import UserError
from pipeline.files import artifact, base_model
from pipeline.project.params.load import Params
from pipeline.project.params.sections import Precision, Quantization
from pipeline.project.stage_graph import Project
from pipeline.stages.registry import COUNTED

T = TypeVar("T", int, float)
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


def _fields_of(method: FinetuningMethod) -> set[str]:
    """The form's fields for a method's options."""
    own = {"ends" if key == "train_embeddings" else key for key in options_of(method)}
    return own & {*FIELDS} | ({"adapter_precision"} if method.adapter else set())


def relevant_fields(query: CalculatorQuery) -> list[str]:
    """The fields that affect the result."""
    irrelevant = {field for method in COUNTED.values() for field in _fields_of(method)}
    irrelevant -= _fields_of(find_method(COUNTED, query.method)[0])
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
    methods: Mapping[str, FinetuningMethod]
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
        return f"{self.model.name}, {self.method.title}, {run.precision}, {run.batch} × {run.sequence:,} tokens"


def calculate(query: CalculatorQuery, model: Architecture) -> Result:
    """The result for `query` and `model`. Raises FieldError, which names the invalid field."""
    query = query.effective()
    size = _parse(query, "gib", float)
    try:
        device = gpu(query.gpu) if query.gpu != CUSTOM else of_size(size)
    except UserError as error:
        raise FieldError("gib", str(error)) from None
    values = {
        **{key: _parse(query, key, int) for key in ("rank", "last_blocks", "virtual_tokens", "batch")},
        "alpha": _parse(query, "alpha", float) if query.alpha.strip() else None,
        "sequence": _parse(query, "sequence", int) if query.sequence.strip() else None,
        "new_rows": _parse(query, "new_rows", int) if query.embeddings == "new_rows" else 0,
        "train_embeddings": query.ends == "train",
        "precision": query.precision.strip() or None,
        "checkpointing": query.checkpointing or None,
        **{key: getattr(query, key) for key in ("targets", "embeddings", "adapter_precision", "optimizer", "loss")},
    }
    try:
        methods, method, run = configure(model, COUNTED, query.method, **values)
        refuse_impossible(model, method, run)
        # The columns compare methods on one precision: QLoRA's own column has the quantized base.
        plain = replace(run, precision="bf16") if run.precision == QLORA else run
        columns = side_by_side(model, method, plain, methods)
        chosen = next((name for name, (m, r, _) in columns.items() if (m, r) == (method, run)), None)
        if chosen is None:
            columns[chosen := query.method] = (method, run, predict(model, method, run))
    except UserError as error:
        raise FieldError(_field_in_message(str(error)), str(error)) from None
    return Result(model, methods, method, run, device, columns, chosen)


def _parse(query: CalculatorQuery, field: str, kind: type[T]) -> T:
    """A field as a number. Raises FieldError."""
    text = getattr(query, field).strip()
    try:
        # int() would also read other scripts' digits, and take seconds for a million of them.
        if kind is float or re.fullmatch(r"-?[0-9]{1,12}", text):
            return kind(text)
    except ValueError:
        pass
    what = "a number" if kind is float else "a whole number"
    raise FieldError(field, f"{field.replace('_', '-')} must be {what}, got {text[:40]!r}.")


def _field_in_message(message: str) -> str:
    """The field that a message of `pipeline.calc` is about, mostly its first word."""
    word = re.split(r"[ :]", message, maxsplit=1)[0].replace("-", "_")
    if word in FIELDS:
        return "new_rows" if message.startswith("embeddings new_rows") else word
    if "weights cannot be trained" in message:
        return "precision"
    return {"target_modules": "targets", "freeze": "last_blocks"}.get(word, "method")


def query_from_project(project: Project) -> CalculatorQuery:
    """The query that describes `finetune_lora` as the trainer runs it. Raises UserError if the base is invalid."""
    lora, imports = project.params.finetune_lora, project.params.pretrain.imports
    try:
        start, stop = artifact.read_manifest(project.artifact("expand_vocab"))["new_rows"]
        new_rows = max(int(stop) - int(start), 1)
    except (UserError, KeyError, TypeError, ValueError):  # it has not run
        new_rows = 1
    # if empty, the calculator's default for the model applies
    longest = [tokens for tokens in (lora.window, lora.max_length) if tokens]
    return CalculatorQuery(
        model=_model_source(project),
        rank=str(lora.rank),
        alpha=f"{lora.alpha:g}",
        targets=", ".join(lora.target_modules),
        embeddings=lora.train_embeddings,
        new_rows=str(new_rows),
        precision=lora.precision if lora.quantization == "none" else lora.quantization,
        adapter_precision=lora.adapter_precision,
        batch=str(lora.batch_size),
        sequence=str(min(longest)) if longest else "",
        checkpointing=lora.gradient_checkpointing,
        optimizer="adam-flat",
        loss="chunked" if imports else "full",
    )


def trained_model(project: Project) -> tuple[str, Architecture]:
    """The model that this project trains: its name in messages, and its shapes. Reads files. Raises UserError."""
    pretrain = project.params.pretrain
    if not pretrain.imports:
        return "MiniGPT", built_in("minigpt").shapes
    return pretrain.base, open_model(_model_source(project)).shapes


def _model_source(project: Project) -> str:
    """The name or path that the calculator opens: a checkpoint that the pipeline made of the base, else the base."""
    name = project.params.pretrain.base
    if not project.params.pretrain.imports:
        return "minigpt"
    base, expanded = map(project.artifact, ("pretrain", "expand_vocab"))
    try:
        imported = artifact.read_manifest(base)
        if imported["params"]["base"] == base_model.shared_name(name):
            made_from = artifact.read_manifest(expanded)["inputs"] if expanded.is_dir() else {}
            is_current = made_from.get("artifacts/base") == artifact.sealed_digest(imported)
            return str(expanded if is_current else base)
    except (UserError, KeyError, TypeError, AttributeError):
        pass  # not made yet, or another tool's folder
    source = base_model.parse_source(name, project.home("pretrain").root)
    return str(source.path) if source.is_local else source.hub_id


def params_from_result(result: Result, params: Params, trained: tuple[str, Architecture]) -> dict[str, Any]:
    """The params of a configuration as `section.key` → value. Raises UserError if this project cannot train it."""
    method, run, (name, model) = result.method, result.run, trained
    quantization = run.precision if run.precision in get_args(Quantization) else "none"
    # the calculator assumes bf16 for what is not quantized
    precision = "bf16" if quantization != "none" else run.precision
    if precision not in get_args(Precision):
        choices = "fp32, bf16, fp16, int8, nf4 or nf4-dq"
        raise UserError(f"{run.precision} weights are not trainable here yet. Choose {choices}.")
    values: dict[str, Any] = {
        "batch_size": run.batch,
        "precision": precision,
        "gradient_checkpointing": run.checkpointing,
        **method.params(),
    }
    if "last_blocks" in values:
        # MiniGPT has as many blocks as params.yaml says, which may not be trained yet.
        blocks = len(model.blocks) if params.pretrain.imports else params.pretrain.layers
        if values["last_blocks"] > blocks:
            key = "" if params.pretrain.imports else " (pretrain.layers)"
            raise UserError(
                f"last-blocks must be at most {blocks}, the blocks of {name}{key}, got {values['last_blocks']}."
            )
    if method.adapter:
        try:
            trainable(model, method)
        except UserError as error:
            raise UserError(f"{name}, the model of this project, does not have these targets. {error}") from None
        values |= {"adapter_precision": run.adapter_precision, "quantization": quantization}
    return {f"finetune_{method.name}.{key}": value for key, value in values.items()}


def differences(params: Params, values: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`section.key` → (current value, new value) of the values that differ."""
    changes = {}
    for key, new in values.items():
        section, _, name = key.partition(".")
        old = getattr(getattr(params, section), name)
        old = list(old) if isinstance(old, tuple) else old
        if old != new:
            changes[key] = (old, new)
    return changes
