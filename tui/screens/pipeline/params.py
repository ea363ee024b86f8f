"""The params of a stage as rows: those that changed, the stage's own, and groups of those that all
training shares.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pipeline.errors import UserError
from pipeline.files import artifact
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
from pipeline.project.stage_graph import Project, Stage
from tui.widgets.form import FormField, Kind, format_value, to_yaml_value

KINDS: Mapping[Any, Kind] = {
    bool: "boolean",
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


@dataclass(frozen=True)
class Param:
    """A setting. `group`: the folded group that it belongs to; empty for the stage's own, those
    that its section sets and those that changed. `made`: its value when the stage's artifact was
    made, as text, if that was another. `source`: where its value is set.
    """

    field: FormField
    value: Any
    group: str
    meaning: str
    source: str
    made: str | None = None

    @property
    def key(self) -> str:
        return self.field.key

    @property
    def is_default(self) -> bool:
        return self.source in (DEFAULT, PRETRAINED)

    def matches(self, text: str) -> bool:
        """Whether its name, value or meaning contains `text`, whatever the case."""
        return text.casefold() in f"{self.key} {format_value(self.value)} {self.meaning}".casefold()


class Line(NamedTuple):
    """A line of the list: a param, or the head of a group of `size`."""

    group: str
    param: Param | None = None
    size: int = 0
    unfolded: bool = False

    @property
    def key(self) -> str:
        return self.param.key if self.param else group_key(self.group)


def group_key(group: str) -> str:
    """The key of a group's head, which no param has."""
    return f"({group})"


def params_of(project: Project, stage: Stage) -> list[Param]:
    """The params of one of the project's own stages, or of a stage of its parent: changed ones
    first, then the stage's own, those that are set before the others."""
    home = project.home(stage.name)
    section = home.section(stage)
    comments, made = _comments(home.params_path), _made_with(home.artifact(stage.name))
    own = {key for key in home.params.tree.get(stage.name, {}) if key not in TOP_LEVEL}
    shared = {
        key
        for base in (Training, AdapterTraining)
        if isinstance(section, base)
        for key in hints(base)
    }
    params = []
    for field in fields_of(stage.name, section, home.params):
        value = getattr(section, field.key)
        group = next((name for name, keys in GROUPS.items() if field.key in keys), OTHERS)
        is_shared = field.key in shared and field.key not in own
        was = made.get(field.key)
        changed = field.key in made and was != to_yaml_value(value)
        before = None
        if changed:
            before = format_value(tuple(was) if isinstance(was, list) else was)
        params.append(
            Param(
                field,
                value,
                group if is_shared and not changed else "",
                comments.get(key_path(stage.name, field.key))
                or comments.get(f"{TRAINING}.{field.key}" if is_shared else "")
                or meaning(type(section), field.key),
                home.params.source(stage.name, field.key),
                before,
            )
        )
    return sorted(params, key=lambda param: (param.made is None, param.is_default))


def lines_of(params: Sequence[Param], unfolded: Collection[str], text: str = "") -> list[Line]:
    """The params that are in no group, then the groups; with `text` only those that contain it, all
    unfolded.
    """
    shown = [param for param in params if param.matches(text)]
    lines = [Line("", param) for param in shown if not param.group]
    for group in GROUPS:
        if members := [param for param in shown if param.group == group]:
            is_unfolded = bool(text) or group in unfolded
            lines.append(Line(group, size=len(members), unfolded=is_unfolded))
            lines += [Line(group, param) for param in members if is_unfolded]
    return lines


def fields_of(stage: str, section: Section, params: Params) -> list[FormField]:
    """The fields of a stage's own params, then of those that adapters share, then of those that all
    training shares.
    """

    def problem(key: str, value: Any) -> str:
        try:
            check(params, stage, key, value)
        except UserError as error:
            return str(error)
        return ""

    kind, defaults, fields = type(section), params.default(stage), []
    bases = [hints(base) for base in (Training, AdapterTraining) if isinstance(section, base)]
    for key in sorted(hints(kind), key=lambda key: sum(key in base for base in bases)):
        hint = value_type(kind, key)
        origin, arguments = get_origin(hint), get_args(hint)
        if origin is UnionType and str not in arguments:  # a mapping, or a list of them
            origin = Mapping
        choices = arguments if origin is Literal else ()
        if hint is bool:
            choices = ("true", "false")
        fields.append(
            FormField(
                key,
                KINDS.get(origin or hint, "text"),
                getattr(defaults, key),
                rule=rule(kind, key),
                problem=partial(problem, key),
                choices=choices,
                items=KINDS.get(arguments[0], "text") if origin is tuple else "text",
                placeholder="empty",
            )
        )
    return fields


def _comments(path: Path) -> Mapping[str, str]:
    try:
        return edit.comments(read_text(path))
    except UserError:  # the file broke since it was loaded
        return {}


def _made_with(folder: Path) -> Mapping[str, Any]:
    """The params that an artifact was made with; empty if there is none."""
    try:
        params = artifact.read_manifest(folder).get("params")
    except (UserError, AttributeError):  # no manifest, or one that is no mapping
        return {}
    return params if isinstance(params, dict) else {}
