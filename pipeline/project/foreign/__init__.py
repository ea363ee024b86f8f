"""Configs of other tools as settings of this one, for `lora new --from`.

A tool is one file here with its `FORMAT`; tools are asked by `Format.order`. Other names of keys
are in `params/aliases.py`: a tool's file reads only what another name alone does not say. Every
problem is a UserError with file and key.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UserError
from pipeline.extensions import Registry
from pipeline.files.artifact import read_json
from pipeline.files.text import abbreviate_repr
from pipeline.project.params.aliases import KEYS, why_none
from pipeline.project.params.load import Kinds
from pipeline.project.params.other_names import Why, translated
from pipeline.project.params.schema import ValueSource, check_value, hints
from pipeline.project.params.sections import PRETRAINED, READ_WITH

LARGEST = 100_000  # characters of a config; published ones have a few thousand
LONGEST = 1_000  # characters of a value that is taken


class Format(NamedTuple):
    """A tool."""

    order: int  # in which tools are asked
    name: str
    marks: frozenset[str]  # keys of which one says that a config is the tool's
    read: Callable[["Config"], None]  # takes from a Config what a name alone does not say


class Config:
    """A config while it is read, and then what became of its keys.

    `Format.read` pops keys from `rest` by its own rules; others are taken by their names.
    """

    def __init__(self, form: str, tree: Mapping[str, Any], path: Path, kinds: Kinds) -> None:
        self.format, self.rest, self.path, self._kinds = form, dict(tree), path, kinds
        self.section = "finetune_lora"  # the method's, to which all values belong
        self.base = ""  # as the config names it, if it does
        self.data: list[str] = []  # those of its data files that exist
        self.taken: dict[str, tuple[str, Any]] = {}  # our key → theirs, value
        self.left: dict[str, str] = {}  # their key → why it is not taken

    @property
    def values(self) -> dict[str, Any]:
        """section.key → value, as it is taken."""
        return {f"{self.section}.{ours}": value for ours, (_, value) in self.taken.items()}

    def choose(self, key: str, sections: Mapping[Any, str], default: str = "finetune_lora") -> None:
        """Set the section by the value of `key`. Raises UserError for one not in `sections`."""
        value = self.rest.pop(key, None)
        if value is not None and (not isinstance(value, str | bool) or value not in sections):
            known = ", ".join(map(str, sections))
            raise UserError(
                f"{self.path}: {key} must be one of {known}, got {abbreviate_repr(value)}. Edit "
                "the file."
            )
        self.section = sections.get(value, default)

    def choose_preferences(self, key: str, losses: Mapping[str, str]) -> None:
        """Learn from preferences in place of examples if `key` names one of the `losses`."""
        if self.section == "finetune_lora" and (loss := losses.get(str(self.rest.get(key)))):
            self.section = "finetune_dpo"
            self.take(key, "loss", loss)
            del self.rest[key]

    def take(self, theirs: str, ours: str, value: Any) -> None:
        """Take a value if the section has `ours`. Raises UserError if the value breaks a rule."""
        origin, where = ValueSource(self.path.name), f"{self.path}: {theirs}"
        if ours == "base":
            self.base = check_value(str, value, where, origin)
            return
        types = hints(self._kinds[self.section])
        if ours not in types:
            why = "there is no such setting here"
            if theirs in KEYS:
                why = f"{self.section} has no {ours}"
            self.left[theirs] = why_none(theirs) or why
            return
        if len(repr(value)) > LONGEST:
            raise UserError(f"{where} is too long: {abbreviate_repr(value)}. Edit the file.")
        typed = check_value(types[ours], value, where, origin)
        self.taken[ours] = (theirs, list(typed) if isinstance(typed, tuple) else typed)

    def take_files(self, theirs: str, names: Any) -> None:
        """Take the data files among `names`, from the current folder or the config's.

        Of a folder train.jsonl is taken.
        """
        for name in names if isinstance(names, list) else [names]:
            relative = str(name)[:LONGEST]
            paths = []
            for folder in (Path(), self.path.parent):
                paths += [folder / relative, folder / relative / "train.jsonl"]
            file = None
            with suppress(OSError):  # too long for a name
                file = next((path for path in paths if path.is_file()), None)
            if file:
                self.data.append(str(file))
            else:
                self.left[theirs] = (
                    "no such file; `lora data convert` makes one of a data set of the hub"
                )

    def take_rest(self) -> None:
        """Take by its name what the tool's own rules have not taken."""
        for theirs, value, ours, converted in translated(self.rest):
            if isinstance(converted, Why):
                self.left[theirs] = converted
            elif ours == "data" and converted is not None:
                self.take_files(theirs, value)
            elif converted is not None:
                self.take(theirs, ours, converted)

    def drop(self, ours: str, why: str) -> None:
        """Move what was taken to what is left."""
        if ours in self.taken:
            self.left[self.taken.pop(ours)[0]] = why

    def drop_excluded(self) -> None:
        """Leave settings that other settings exclude."""
        if not self.taken.get("eval_share", ("", 0))[1]:
            for key in ("eval_steps", "patience", "load_best"):
                self.drop(key, "nothing is held out: set eval_share")
        if self.taken.get("warmup_steps", ("", 0))[1]:
            self.drop("warmup_ratio", "warmup_steps is set too")
        for ours, (chooser, readers) in READ_WITH.items():
            _, chosen = self.taken.get(chooser, ("", PRETRAINED.get(chooser, readers[0])))
            if chosen not in readers:
                self.drop(ours, f"{chooser} {chosen} does not read it")


def read_config(path: Path, kinds: Kinds) -> Config:
    """Another tool's config as settings; `kinds` as in `params.load.parse`. Raises UserError."""
    tree = _read_tree(path)
    tool = next((tool for tool in FORMATS.values() if tool.marks & tree.keys()), None)
    if tool is None:
        names = ", ".join(tool.name for tool in FORMATS.values())
        raise UserError(
            f"{path} is no config that is read here ({names}). "
            "A params file of this project is given with --params."
        )
    config = Config(tool.name, tree, path, kinds)
    try:
        tool.read(config)
        config.take_rest()
    except RecursionError:
        raise UserError(f"{path} is nested too deeply. Name another file.") from None
    config.drop_excluded()
    return config


def _read_tree(path: Path) -> dict[str, Any]:
    from pipeline.files import strict_yaml

    if path.suffix == ".bin":
        raise UserError(f"{path} is a pickle, which is not read. Name a config in YAML or JSON.")
    tree = (
        read_json(path, "Name a config", LARGEST)
        if path.suffix == ".json"
        else strict_yaml.read(path, str(path), LARGEST)
    )
    if not isinstance(tree, dict):
        raise UserError(
            f"{path} must hold key: value lines, got {abbreviate_repr(tree)}. Name another file."
        )
    return {str(key)[:LONGEST]: value for key, value in tree.items()}


FORMATS = Registry[Format]("config_format", order=lambda form: form.order)
