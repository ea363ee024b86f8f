"""The calculator's question: its fields, and the result for what is typed in them."""

from collections.abc import Mapping
from typing import Any

from pipeline.calc.architecture import Architecture
from pipeline.calc.fit import gpu, gpus, of_size
from pipeline.calc.method import find_method, names_of
from pipeline.calc.settings import PRECISIONS, Option, TrainingConfig, options_of
from pipeline.calc.sources.open_model import hub_ids
from pipeline.calc.target_modules import GROUPS
from pipeline.errors import UserError
from pipeline.project.stage_graph import Project
from pipeline.stages.registry import COUNTED
from pipeline.views.calculation import Result, calculate, options_of_project
from tui.panes.fields import Field, Kind, counting, cycling, doubling, format_value

Texts = Mapping[str, str]  # field → as typed; an empty one means the default for the model
CUSTOM = "custom"  # a GPU with the memory of the field `gib`
TARGETS = (
    *GROUPS,
    "all-linear",
    "q_proj, v_proj",
    "q_proj, k_proj, v_proj, o_proj",
    "qkv_proj, o_proj",
    "c_attn",
)
KINDS: Mapping[type, Kind] = {int: "integer", float: "number"}
NUMBERS = {"integer": "a whole number", "number": "a number"}
METHOD, STEP, GPU = "Method", "Training step", "GPU"  # the groups of fields
GPUS = {**{gpu.name: gpu.label for gpu in gpus().values()}, CUSTOM: "custom"}
OPTIONS = {name: rule for method in COUNTED.values() for name, rule in options_of(method).items()}
OPTIONS |= options_of(TrainingConfig)
NO_OPTION = Option("", "")
# words in a message of `pipeline.calc`, which mostly begins with its field → the field
FIELD_OF = {
    "weights cannot be trained": "precision",
    "embeddings new_rows": "new_rows",
    "target_modules": "targets",
    "freeze": "last_blocks",
}


def find_models(text: str) -> dict[str, str]:
    """Built-in models whose name or hub id contains the text, with their hub ids. None of a path or
    a hub id: it is meant as it is typed.
    """
    text = text.strip().lower()
    if not text or "/" in text:
        return {}
    known = hub_ids().items()
    return {name: hub_id for name, hub_id in known if text in f"{name} {hub_id.lower()}"}


def _field(key: str, group: str, **given: Any) -> Field:
    """A field, mostly for an option of a method or of the step, which says what is not given."""
    option = OPTIONS.get(key, NO_OPTION)
    kind = "choice" if option.choices else KINDS.get(option.kind or type(option.default), "text")
    default = "" if option.automatic else _text(option.default)
    about: dict[str, Any] = {"kind": kind, "default": default, "choices": option.choices}
    about |= {"meaning": option.help, "label": key.replace("_", " "), **given}
    rule = "← → other values." if about["kind"] == "choice" else "Page Down, Page Up: other values."
    return Field(key, group=group, rule=rule, placeholder=about["default"], **about)


def _text(value: Any) -> str:
    return format_value(value).removesuffix(".0")


ALL_FIELDS = (
    _field(
        "model",
        "",
        default="qwen3-8b",
        meaning="A built-in name, a path (a folder, config.json, .safetensors, .gguf), or a hub id, "
        "which Enter fetches.",
        step=cycling(list(hub_ids())),
        search=find_models,
    ),
    _field(
        "method",
        METHOD,
        kind="choice",
        default="lora",
        choices=names_of(COUNTED.values()),
        meaning="What is trained.",
    ),
    _field("rank", METHOD, step=doubling),
    _field("alpha", METHOD, step=doubling),
    _field("targets", METHOD, choices=TARGETS),
    _field("embeddings", METHOD, names={"new_rows": "new rows"}),
    _field("new_rows", METHOD, default="1", step=counting),
    _field("last_blocks", METHOD, step=counting),
    _field("train_embeddings", METHOD, kind="choice", choices=("true", "false")),
    _field("virtual_tokens", METHOD, step=counting),
    _field("precision", STEP, choices=list(PRECISIONS)),
    _field("adapter_precision", STEP),
    _field("batch", STEP, step=counting),
    _field("sequence", STEP, step=doubling),
    _field("tokens_per_batch", STEP, step=doubling),
    _field(
        "checkpointing",
        STEP,
        choices=("", *OPTIONS["checkpointing"].choices),
        names={"": "auto"},
    ),
    _field("optimizer", STEP),
    _field("lora_dropout", STEP, label="LoRA dropout", choices=("0", "0.05", "0.1")),
    _field("neftune_alpha", STEP, label="NEFTune", choices=("0", "5", "10")),
    _field("loss", STEP, default="full"),
    _field(
        "gpu",
        GPU,
        kind="choice",
        default="rtx4090",
        label="GPU",
        choices=list(GPUS),
        names=GPUS,
        meaning="What it has to fit on.",
    ),
    _field("gib", GPU, kind="number", default="24", label="GPU memory, GiB", step=doubling),
)
FIELDS = {field.key: field for field in ALL_FIELDS}
DEFAULTS: Texts = {key: field.default for key, field in FIELDS.items()}


def relevant(texts: Texts) -> list[str]:
    """The fields that affect the result."""
    method, _ = find_method(COUNTED, texts["method"])
    hidden = {name for each in COUNTED.values() for name in options_of(each)}
    hidden -= {*options_of(method)}
    if not method.adapter:
        hidden.add("adapter_precision")
    if texts["embeddings"] != "new_rows":
        hidden.add("new_rows")
    if texts["tokens_per_batch"] == "0":  # shown for a project whose batches are filled
        hidden.add("tokens_per_batch")
    if texts["gpu"] != CUSTOM:
        hidden.add("gib")
    return [key for key in FIELDS if key not in hidden]


class FieldError(UserError):
    """What is wrong with fields: field → message."""

    def __init__(self, problems: Mapping[str, str]) -> None:
        super().__init__(*problems.values())
        self.problems = problems


def _read(texts: Texts) -> dict[str, Any]:
    """The values of the fields that matter: a hidden one may hold anything. Raises FieldError."""
    values, problems = dict[str, Any](), dict[str, str]()
    for key in relevant(texts):
        field, text = FIELDS[key], texts[key].strip() or DEFAULTS[key]
        values[key] = field.parse(text) if text else None
        if field.kind in NUMBERS and isinstance(values[key], str):
            name = key.replace("_", "-")
            problems[key] = f"{name} must be {NUMBERS[field.kind]}, got {text[:40]!r}."
    if problems:
        raise FieldError(problems)
    return values


def answer(texts: Texts, model: Architecture) -> Result:
    """The result for what is typed. Raises FieldError."""
    values = _read(texts)
    del values["model"]
    name, size = values.pop("gpu"), values.pop("gib", 0)
    if "train_embeddings" in values:
        values["train_embeddings"] = values["train_embeddings"] == "true"
    try:
        device = of_size(size, "gib") if name == CUSTOM else gpu(name)
        return calculate(model, values.pop("method"), device, **values)
    except UserError as error:
        raise FieldError({_field_of(str(error)): str(error)}) from None


def _field_of(message: str) -> str:
    """The field that a message of `pipeline.calc` is about."""
    for words, field in FIELD_OF.items():
        if words in message:
            return field
    word = message.replace(":", " ").replace("-", "_").split()[0]
    return word if word in FIELDS else "method"


def texts_of(project: Project) -> Texts:
    """The question that describes what a project trains. Raises UserError if its base is invalid."""
    options = options_of_project(project).items()
    known = {key: _text(value) for key, value in options if key in FIELDS and value is not None}
    known["model"] = known["model"].removeprefix(f"{project.root}/")
    return {**DEFAULTS, **known}
