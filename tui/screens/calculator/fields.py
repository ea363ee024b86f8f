"""The calculator's question: its fields, and the result for what is typed in them."""

import re
from collections.abc import Mapping
from typing import Any

from textual.fuzzy import FuzzySearch

from pipeline.calc.architecture import Architecture
from pipeline.calc.fit import gpu, gpus, of_size
from pipeline.calc.method import FinetuningMethod, find_method, names_of
from pipeline.calc.settings import PRECISIONS, TrainingConfig, options_of
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
LONGEST = 12  # digits of a whole number
KINDS: Mapping[type, Kind] = {int: "integer", float: "number"}
METHOD, STEP, GPU = "Method", "Training step", "GPU"  # the groups of fields
METHODS = [COUNTED["lora"], *COUNTED.values()]
GPUS = {**{gpu.name: gpu.label for gpu in gpus().values()}, CUSTOM: "custom"}


def find_models(text: str) -> dict[str, str]:
    """Built-in models whose name or hub id contains the text, with their hub ids; if there are none,
    those with its letters. None of a path or a hub id: it is meant as it is typed.
    """
    text, known = text.strip().lower(), hub_ids()
    if not text or "/" in text:
        return {}
    names = [name for name, hub_id in known.items() if text in f"{name} {hub_id.lower()}"]
    names.sort(key=lambda name: not name.startswith(text))
    if not names:
        fuzzy = FuzzySearch()
        scores = {name: fuzzy.match(text, f"{name} {hub_id}")[0] for name, hub_id in known.items()}
        names = sorted(filter(scores.get, scores), key=lambda name: -scores[name])
    return {name: known[name] for name in names}


def _field(key: str, group: str, default: Any = None, **given: Any) -> Field:
    """A field for an option of a method or of the step; others give what the option would."""
    options = {name: rule for each in METHODS for name, rule in options_of(each).items()}
    option = (options | options_of(TrainingConfig)).get(key)
    if option:
        kind = KINDS.get(option.kind or type(option.default), "text")
        meant = {"kind": "choice" if option.choices else kind, "choices": option.choices}
        given = {**meant, "meaning": option.help, **given}
        if default is None:
            default = "" if option.automatic else option.default
    rule = "Page Down, Page Up: other values."
    if given.get("kind") == "choice":
        rule = "← → other values."
    elif given.get("step") in (counting, doubling):
        rule = "+ − (Page Down, Page Up): larger, smaller."
    given = {"placeholder": format_value(default), **given}
    return Field(key, default=default, rule=rule, group=group, **given)


FIELDS = {
    field.key: field
    for field in (
        _field(
            "model",
            "",
            "qwen3-8b",
            meaning="A built-in name, a path (a folder, config.json, .safetensors, .gguf), or a "
            "hub id, which Enter fetches.",
            step=cycling(list(hub_ids())),
            search=find_models,
        ),
        _field(
            "method",
            METHOD,
            "lora",
            kind="choice",
            choices=names_of(COUNTED.values()),
            meaning="What is trained.",
        ),
        _field("rank", METHOD, step=doubling),
        _field("alpha", METHOD, step=doubling),
        _field("targets", METHOD, choices=TARGETS),
        _field("embeddings", METHOD, names={"new_rows": "new rows"}),
        _field("new_rows", METHOD, 1, label="new rows", step=counting),
        _field("last_blocks", METHOD, label="last blocks", step=counting),
        _field(
            "train_embeddings",
            METHOD,
            "true",
            kind="choice",
            label="embeddings",
            choices=("true", "false"),
            names={"true": "train", "false": "freeze"},
        ),
        _field("virtual_tokens", METHOD, label="virtual tokens", step=counting),
        _field("precision", STEP, choices=list(PRECISIONS)),
        _field("adapter_precision", STEP, label="adapter precision"),
        _field("batch", STEP, step=counting),
        _field("sequence", STEP, step=doubling),
        _field(
            "checkpointing",
            STEP,
            choices=("", *options_of(TrainingConfig)["checkpointing"].choices),
            names={"": "auto"},
        ),
        _field("optimizer", STEP),
        _field("lora_dropout", STEP, "0", label="LoRA dropout", choices=("0", "0.05", "0.1")),
        _field("neftune_alpha", STEP, "0", label="NEFTune", choices=("0", "5", "10")),
        _field("loss", STEP, "full"),
        _field(
            "gpu",
            GPU,
            "rtx4090",
            kind="choice",
            label="GPU",
            choices=list(GPUS),
            names=GPUS,
            meaning="What it has to fit on.",
        ),
        _field(
            "gib",
            GPU,
            24,
            kind="number",
            label="GPU memory, GiB",
            step=doubling,
            meaning="Memory of your GPU.",
        ),
    )
}
DEFAULTS: Texts = {key: format_value(field.default) for key, field in FIELDS.items()}


def relevant(texts: Texts) -> list[str]:
    """The fields that affect the result."""

    def fields_of(method: FinetuningMethod) -> set[str]:
        return {*options_of(method)} | ({"adapter_precision"} if method.adapter else set())

    hidden = set[str]().union(*map(fields_of, COUNTED.values()))
    hidden -= fields_of(find_method(COUNTED, texts["method"])[0])
    if texts["embeddings"] != "new_rows":
        hidden.add("new_rows")
    if texts["gpu"] != CUSTOM:
        hidden.add("gib")
    return [key for key in FIELDS if key not in hidden]


class FieldError(UserError):
    """An error in one field of the form."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def _read(texts: Texts) -> dict[str, Any]:
    """The values of the fields that matter: a hidden one may hold anything. Raises FieldError."""
    values = {}
    for key in relevant(texts):
        field, text = FIELDS[key], texts[key].strip() or DEFAULTS[key]
        value = field.parse(text) if text else None
        is_whole = field.kind == "integer"
        is_text = isinstance(value, str) or (is_whole and len(text) > LONGEST)
        if text and is_text and field.kind in ("integer", "number"):
            what, name = "a whole number" if is_whole else "a number", key.replace("_", "-")
            raise FieldError(key, f"{name} must be {what}, got {text[:40]!r}.")
        values[key] = value
    return values


def answer(texts: Texts, model: Architecture | None) -> Result | None:
    """The result for what is typed; without a model None. Raises FieldError, which names the invalid
    field.
    """
    values = _read(texts)
    try:
        device, size = values.pop("gpu"), values.pop("gib", 0)
        device = of_size(size) if device == CUSTOM else gpu(device)
    except UserError:
        text = texts["gib"][:40]
        raise FieldError("gib", f"GPU memory must be more than 0 GiB, got {text!r}.") from None
    del values["model"]
    if "train_embeddings" in values:
        values["train_embeddings"] = values["train_embeddings"] == "true"
    try:
        return calculate(model, values.pop("method"), device, **values) if model else None
    except UserError as error:
        raise FieldError(_field_of(str(error)), str(error)) from None


def problems(texts: Texts, model: Architecture | None) -> dict[str, str]:
    """The invalid fields: field → message. Without a model, those that are invalid for any.

    The calculator names one at a time: each is replaced by its default to find the next.
    """
    found: dict[str, str] = {}
    while True:
        corrected = {**texts, **{field: DEFAULTS[field] for field in found}}
        try:
            answer(corrected, model)
        except FieldError as error:
            if error.field not in found:
                found[error.field] = str(error)
                continue
        return found  # all, or one whose default is as invalid for this model


def _field_of(message: str) -> str:
    """The field that a message of `pipeline.calc` is about, mostly its first word."""
    word = re.split(r"[ :]", message, maxsplit=1)[0].replace("-", "_")
    if word in FIELDS:
        return "new_rows" if message.startswith("embeddings new_rows") else word
    if "weights cannot be trained" in message:
        return "precision"
    return {"target_modules": "targets", "freeze": "last_blocks"}.get(word, "method")


def texts_of(project: Project) -> Texts:
    """The question that describes what a project trains. Raises UserError if its base is invalid."""
    options = options_of_project(project).items()
    known = {key: value for key, value in options if key in FIELDS and value is not None}
    texts = {key: format_value(value).removesuffix(".0") for key, value in known.items()}
    return {**DEFAULTS, **texts}
