"""The params of a stage as fields of a form: those that changed, the stage's own, and groups of those
that all training shares.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from textual.content import Content

from pipeline.errors import UserError
from pipeline.project.params import edit
from pipeline.project.params.load import (
    DEFAULT,
    PRETRAINED,
    TOP_LEVEL,
    TRAINING,
    Params,
    check,
    key_path,
    read_text,
)
from pipeline.project.params.schema import Section, hints, meaning, rule, value_type
from pipeline.project.params.sections import AdapterTraining, Training
from pipeline.project.runner import artifact_settings, changed_params
from pipeline.project.stage_graph import Project, Stage
from tui.panes.fields import Field, Kind, format_value

KINDS: Mapping[Any, Kind] = {
    int: "integer",
    float: "number",
    str: "text",
    Literal: "text",
    tuple: "list",
    Mapping: "mapping",
    UnionType: "files",
}
OTHERS = "training"  # the group of the shared keys that are in no other
GROUPS: Mapping[str, Collection[str]] = {
    OTHERS: (),
    "data": ("data", "columns", "window", "max_length"),
    "evaluation": ("eval_share", "eval_data", "eval_steps", "patience", "samples"),
    "memory": (
        "precision",
        "adapter_precision",
        "quantization",
        "optimizer",
        "gradient_checkpointing",
        "gradient_accumulation_steps",
    ),
}
ORDER = ("", *GROUPS)
HUGE_BOUND = re.compile(r", (below|at most) \d{10,}")  # of a rule: nobody comes near it


def params_of(project: Project, stage: Stage) -> tuple[list[Field], dict[str, Any]]:
    """The params of one of the project's own stages, or of a stage of its parent, and their values.

    Changed ones come first, then the stage's own, those that are set before the others; the rest is
    in groups.
    """
    home = project.home(stage.name)
    section: Section = home.section(stage)
    params = home.params
    comments, artifact = _comments(home.params_path), artifact_settings(home.artifact(stage.name))
    made = artifact.params if artifact else {}
    bases = [hints(base) for base in (Training, AdapterTraining) if isinstance(section, base)]
    shared = {key for base in bases for key in base}
    shared -= {key for key in params.tree.get(stage.name, {}) if key not in TOP_LEVEL}

    fields, values = list[Field](), dict[str, Any]()
    # the stage's own, then those that adapters share, then those that all training shares
    for key in sorted(hints(type(section)), key=lambda key: sum(key in base for base in bases)):
        values[key] = value = getattr(section, key)
        path, source = key_path(stage.name, key), params.source(stage.name, key)
        changed = key in made and bool(changed_params(made, {key: value}))
        group = ""
        if key in shared and not changed:
            group = next((name for name, keys in GROUPS.items() if key in keys), OTHERS)
        kind, choices = _kind(type(section), key)
        comment = comments.get(params.as_written(path)) or comments.get(
            params.as_written(f"{TRAINING}.{key}")
        )
        fields.append(
            Field(
                key,
                kind,
                getattr(params.default(stage.name), key),
                rule=f"{HUGE_BOUND.sub('', rule(type(section), key))} · {_source(source)}",
                problem=partial(_problem, params, stage.name, key),
                choices=choices,
                placeholder="empty",
                meaning=comment or meaning(type(section), key),
                path=path,
                group=group,
                sign="●" * changed,
                note=_was(made[key]) if changed else "",
                quiet=source in (DEFAULT, PRETRAINED),
            )
        )
    fields.sort(key=lambda field: (ORDER.index(field.group), not field.sign, field.quiet))
    return fields, values


def in_order_of(fields: Sequence[Field], before: Mapping[str, Field]) -> list[Field]:
    """The fields of a stage in the order and groups that they had before: none moves while one looks
    at it.
    """
    now = {field.key: field for field in fields}
    if now.keys() != before.keys():
        return list(fields)
    return [replace(now[key], group=field.group) for key, field in before.items()]


def _kind(section: type[Section], key: str) -> tuple[Kind, Sequence[str]]:
    """The kind of a key's values, and those to choose from."""
    hint = value_type(section, key)
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is bool:
        return "boolean", ("true", "false")
    if origin is UnionType and str not in arguments:  # a mapping, or a list of them
        origin = Mapping
    kind = KINDS.get(origin or hint, "text")
    if kind == "list" and KINDS.get(arguments[0], "text") == "text":
        kind = "names"
    return kind, arguments if origin is Literal else ()


def _problem(params: Params, stage: str, key: str, value: Any) -> str:
    try:
        check(params, stage, key, value)
    except UserError as error:
        return str(error)
    return ""


def _was(made: Any) -> Content:
    """The value that the stage's artifact was made with."""
    return Content.styled(f"was {format_value(made) or 'empty'}", "$text-warning")


def _source(source: str) -> str:
    """Where a value is set, in words."""
    if source in (DEFAULT, PRETRAINED):
        return f"the {source}"
    file, _, block = source.partition(", ")
    return f"set in {file}, block {block}" if block else f"set in {file}"


def _comments(path: Path) -> Mapping[str, str]:
    try:
        return edit.comments(read_text(path))
    except UserError:  # the file broke since it was loaded
        return {}
