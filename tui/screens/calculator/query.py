"""The calculator's form: its fields, the result of `pipeline.calc` for what is typed, and the
params of a project.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar, get_args

from pipeline.calc.architecture import Architecture
from pipeline.calc.fit import Gpu, gpu, gpus, of_size
from pipeline.calc.memory import Memory, predict, refuse_impossible
from pipeline.calc.method import FinetuningMethod, configure, find_method, names_of, trainable
from pipeline.calc.report import side_by_side
from pipeline.calc.settings import PRECISIONS, QLORA, TrainingConfig, options_of
from pipeline.calc.sources.open_model import built_in, hub_ids, open_model
from pipeline.calc.target_modules import GROUPS
from pipeline.errors import UserError
from pipeline.project.params.load import Params
from pipeline.project.params.sections import Precision, Quantization
from pipeline.project.stage_graph import Project
from pipeline.stages.registry import COUNTED, counted_stage, model_source, options_of_stage
from tui.widgets.form import FormField, counting, cycling, doubling

T = TypeVar("T", int, float)
Query = Mapping[str, str]  # field → text as typed; an empty one means the default for the model
CUSTOM = "custom"  # a GPU with the memory of the field `gib`
TARGETS = (
    *GROUPS,
    "all-linear",
    "q_proj, v_proj",
    "q_proj, k_proj, v_proj, o_proj",
    "qkv_proj, o_proj",
    "c_attn",
)
_OPTIONS = {**options_of(COUNTED["lora"]), **options_of(TrainingConfig)}
_METHOD_OPTIONS = {
    key: option for method in COUNTED.values() for key, option in options_of(method).items()
}
_GPUS = {**{gpu.name: gpu.label for gpu in gpus().values()}, CUSTOM: "custom"}


def _choice(key: str, **more: Any) -> FormField:
    """A field for an option of the calculator that has choices."""
    return FormField(key, "choice", _OPTIONS[key].default, choices=_OPTIONS[key].choices, **more)


FIELDS = {
    field.key: field
    for field in (
        FormField("model", default="qwen3-8b", step=cycling(list(hub_ids()))),
        FormField("method", "choice", "lora", choices=names_of(COUNTED.values())),
        FormField("rank", default="8", step=doubling),
        FormField("alpha", step=doubling),
        FormField("targets", default="attention", step=cycling(TARGETS), choices=TARGETS),
        _choice("embeddings", names={"new_rows": "new rows"}),
        FormField("new_rows", default="1", label="new rows", step=counting),
        FormField("last_blocks", default="1", label="last blocks", step=counting),
        FormField(
            "train_embeddings", "choice", "train", label="embeddings", choices=("train", "freeze")
        ),
        FormField("virtual_tokens", default="20", label="virtual tokens", step=counting),
        FormField("precision", step=cycling(list(PRECISIONS)), choices=list(PRECISIONS)),
        _choice("adapter_precision", label="adapter precision"),
        FormField("batch", default="1", step=counting),
        FormField("sequence", step=doubling),
        FormField(
            "checkpointing",
            "choice",
            choices=("", *_OPTIONS["checkpointing"].choices),
            names={"": "auto"},
        ),
        _choice("optimizer"),
        FormField(
            "lora_dropout", default="0", label="LoRA dropout", step=cycling(("0", "0.05", "0.1"))
        ),
        FormField("neftune_alpha", default="0", label="NEFTune", step=cycling(("0", "5", "10"))),
        _choice("loss"),
        FormField("gpu", "choice", "rtx4090", label="GPU", choices=list(_GPUS), names=_GPUS),
        FormField("gib", default="24", label="GPU memory, GiB", step=doubling),
    )
}
DEFAULTS: Query = {key: field.default for key, field in FIELDS.items()}
SECTIONS = {"method": "Method", "precision": "Training step", "gpu": "GPU"}  # by their first field
_HELP = {  # of fields that are no option of the calculator
    "model": (
        "A built-in name, a path (a folder, config.json, .safetensors, .gguf), or a hub id, which "
        "Enter fetches."
    ),
    "method": "What is trained.",
    "gpu": "What it has to fit on.",
    "gib": "Memory of your GPU.",
}


def describe(key: str) -> str:
    """What a field means, and how its value is stepped."""
    text = _HELP.get(key) or (_METHOD_OPTIONS | _OPTIONS)[key].help
    if FIELDS[key].kind == "choice":
        return f"{text}\n← → other values."
    is_number = FIELDS[key].step in (counting, doubling)
    return f"{text}\n{'+ − (Page Down, Page Up): larger, smaller' if is_number else 'Page Down, Page Up: other values'}."


def _fields_of(method: FinetuningMethod) -> set[str]:
    """The form's fields for a method's options."""
    return options_of(method).keys() & FIELDS.keys() | (
        {"adapter_precision"} if method.adapter else set()
    )


def relevant_fields(query: Query) -> list[str]:
    """The fields that affect the result."""
    irrelevant = {field for method in COUNTED.values() for field in _fields_of(method)}
    irrelevant -= _fields_of(find_method(COUNTED, query["method"])[0])
    irrelevant |= {"new_rows"} if query["embeddings"] != "new_rows" else set()
    irrelevant |= {"gib"} if query["gpu"] != CUSTOM else set()
    return [name for name in FIELDS if name not in irrelevant]


class FieldError(UserError):
    """An error in one field of the form."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Result:
    """The result for a configuration. `columns`: several methods to compare; `chosen`: the name of
    this one.
    """

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


def calculate(query: Query, model: Architecture) -> Result:
    """The result for `query` and `model`. Raises FieldError, which names the invalid field."""
    device, values = _read(query)
    try:
        methods, method, run = configure(model, COUNTED, query["method"], **values)
        refuse_impossible(model, method, run)
        # The columns compare methods on one precision: QLoRA's own column has the quantized base.
        plain = replace(run, precision="bf16") if run.precision == QLORA else run
        columns = side_by_side(model, method, plain, methods)
        chosen = next(
            (name for name, (m, r, _) in columns.items() if (m, r) == (method, run)), None
        )
        if chosen is None:
            columns[chosen := query["method"]] = (method, run, predict(model, method, run))
    except UserError as error:
        raise FieldError(_field_in_message(str(error)), str(error)) from None
    return Result(model, methods, method, run, device, columns, chosen)


def problems(query: Query, model: Architecture | None) -> dict[str, str]:
    """The invalid fields: field → message. Without a model, those that are invalid for any.

    The calculator names one at a time: each is replaced by its default to find the next.
    """
    found: dict[str, str] = {}
    while True:
        corrected = {**query, **{field: DEFAULTS[field] for field in found}}
        try:
            calculate(corrected, model) if model else _read(corrected)
        except FieldError as error:
            if error.field not in found:
                found[error.field] = str(error)
                continue
        return found  # all, or one whose default is as invalid for this model


def _read(query: Query) -> tuple[Gpu, dict[str, Any]]:
    """The device, and the settings as `configure` takes them. Raises FieldError."""
    # a hidden field may hold anything
    query = {**DEFAULTS, **{name: query[name] for name in relevant_fields(query)}}
    size = _parse(query, "gib", float)
    try:
        device = gpu(query["gpu"]) if query["gpu"] != CUSTOM else of_size(size)
    except UserError:
        raise FieldError(
            "gib", f"GPU memory must be more than 0 GiB, got {query['gib'][:40]!r}."
        ) from None
    return device, {
        **{
            key: _parse(query, key, int)
            for key in ("rank", "last_blocks", "virtual_tokens", "batch")
        },
        "alpha": _parse(query, "alpha", float) if query["alpha"].strip() else None,
        **{key: _parse(query, key, float) for key in ("lora_dropout", "neftune_alpha")},
        "sequence": _parse(query, "sequence", int) if query["sequence"].strip() else None,
        "new_rows": _parse(query, "new_rows", int) if query["embeddings"] == "new_rows" else 0,
        "train_embeddings": query["train_embeddings"] == "train",
        "precision": query["precision"].strip() or None,
        "checkpointing": query["checkpointing"] or None,
        **{
            key: query[key]
            for key in ("targets", "embeddings", "adapter_precision", "optimizer", "loss")
        },
    }


def _parse(query: Query, field: str, kind: type[T]) -> T:
    """A field as a number. Raises FieldError."""
    text = query[field].strip()
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


def query_from_project(project: Project) -> Query:
    """The query that describes what the project trains. Raises UserError if its base is invalid."""
    stage = counted_stage(project)
    options = options_of_stage(project, stage).items()
    known = {key: _as_text(value) for key, value in options if key in FIELDS and value is not None}
    if "new_rows" in known and known["embeddings"] != "new_rows":
        del known["new_rows"]
    return {**DEFAULTS, "model": model_source(project), "method": stage.method, **known}


def _as_text(value: Any) -> str:
    """An option's value as it would be typed."""
    if isinstance(value, bool):
        return "train" if value else "freeze"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def trained_model(project: Project) -> tuple[str, Architecture]:
    """The model that this project trains: its name in messages, and its shapes. Reads files. Raises
    UserError.
    """
    origin = project.params.origin
    if not origin.imports:
        return "MiniGPT", built_in("minigpt").shapes
    return origin.base, open_model(model_source(project)).shapes


def params_from_result(
    result: Result, params: Params, trained: tuple[str, Architecture]
) -> dict[str, Any]:
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
        "precision": precision,
        "gradient_checkpointing": run.checkpointing,
        "optimizer": run.optimizer,
        "neftune_alpha": run.neftune_alpha,
        **method.params(),
    }
    if "last_blocks" in values:
        # MiniGPT has as many blocks as params.yaml says, which may not be trained yet.
        blocks = len(model.blocks) if params.origin.imports else params.pretrain.layers
        if values["last_blocks"] > blocks:
            key = "" if params.origin.imports else " (pretrain.layers)"
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
