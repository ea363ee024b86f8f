"""params.yaml as `Params`: its sections, typed and checked, and where each value comes from.

Precedence: a section's defaults for its base < the `training:` block, for what trains < the section
< `--set`. Every problem is a UserError that names key, rule, value and next step.
"""

import os
from collections import ChainMap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import structs

from pipeline.errors import UserError
from pipeline.files.text import abbreviate_repr
from pipeline.project.params.schema import (
    Pretrained,
    Section,
    ValueSource,
    check_value,
    hints,
    reject_unknown_keys,
)
from pipeline.project.params.sections import Import, Running, Training, change_paths

if TYPE_CHECKING:
    from pipeline.project.params.other_names import OtherNames

T = TypeVar("T", bound=Section)
Kinds = Mapping[str, type[Section]]  # name → class of the sections that a file may have
LARGEST = 1_000_000  # bytes of a params file
TRAINING = "training"  # the block of defaults for every section that trains
PROJECT = "project"  # names the params file that this one builds on
RUNNING = "running"
# sources of values that no file sets
DEFAULT, PRETRAINED = "default", "default for a pretrained base"
OVERRIDE = "--set"
# keys above the sections → the section that holds them in memory; `running` is no stage's, so
# nothing is made again
TOP_LEVEL: Mapping[str, str] = {"base": "import", **dict.fromkeys(hints(Running), RUNNING)}


@dataclass(frozen=True)
class Params:
    """All of params.yaml. `params.section(name)` or `params.name` is a section."""

    # every section that a file may have
    kinds: Kinds = field(compare=False)
    sections: Mapping[str, Section] = field(default_factory=dict)
    # what the file says: section → key → value as YAML loads it
    tree: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False)
    # the block of defaults for what trains: the file's, on that of the file that it builds on
    training: Mapping[str, Any] = field(default_factory=dict, compare=False)
    # section.key → where it is set, for keys that are
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    # the params file whose artifacts and settings this one builds on, relative to its folder
    project: str = ""
    file: str = field(default="params.yaml", compare=False)
    # the sections that the file names; `base` alone gives a project the stage that makes it
    named: frozenset[str] = field(default=frozenset(), compare=False)
    running: Running = field(default=Running(), compare=False)
    width: int | None = None  # of an imported base's hidden states, where it is known
    # what --set says: section.key, or a key above the sections → value
    overrides: Mapping[str, Any] = field(default_factory=dict, compare=False)
    # section, section.key or key above the sections → its other name, which the file has
    spelled: Mapping[str, str] = field(default_factory=dict, compare=False)
    note: str = field(default="", compare=False)  # what other names were taken and ignored

    @property
    def written(self) -> frozenset[str]:
        """The sections in the file."""
        return frozenset(self.tree) - {TRAINING}

    def section(self, name: str) -> Any:
        """The section of this name: from the file, or with its defaults."""
        if name in self.sections:
            return self.sections[name]
        return _read_section(name, self, ValueSource(self.file))

    def __getattr__(self, name: str) -> Any:
        """A section as an attribute: `params.finetune_lora`."""
        if name.startswith("_") or name == "kinds" or name not in self.kinds:
            raise AttributeError(name)
        return self.section(name)

    def of(self, kind: type[T]) -> T:
        """The section of this class."""
        name = next((name for name, known in self.kinds.items() if known is kind), None)
        return kind() if name is None else self.section(name)

    @property
    def report_to(self) -> tuple[str, ...]:
        """The trackers that show the runs."""
        return tuple(dict.fromkeys(self.running.report_to))

    @property
    def origin(self) -> Import:
        """The base model, and how it is imported."""
        origin: Import = self.section("import") if "import" in self.kinds else Import()
        return origin

    @property
    def pretrained(self) -> Pretrained | None:
        """What defaults depend on: the base, if it is imported."""
        return Pretrained(self.width) if self.origin.imports else None

    def replaced(self, sections: Mapping[str, Section]) -> "Params":
        """A copy with some sections replaced. Of these no value is a default any more."""
        sources = dict(self.sources)
        for name in sections:
            for key in hints(self.kinds[name]):
                sources[key_path(name, key)] = "another section"
        return replace(self._with(sections), sources=sources)

    def as_written(self, path: str) -> str:
        """A section, section.key or key above the sections, as the file names it."""
        section, dot, key = path.partition(".")
        return self.spelled.get(path) or f"{self.spelled.get(section, section)}{dot}{key}"

    def _with(self, sections: Mapping[str, Section]) -> "Params":
        return replace(self, sections={**self.sections, **sections})

    def default(self, name: str) -> Section:
        """The section of this name with the defaults that it has on this base."""
        return self.kinds[name].defaults(self.pretrained)

    def source(self, section: str, key: str) -> str:
        """Where a value comes from: --set, a params file, its training block or a default."""
        if where_set := self._where_set(section, key):
            return where_set
        if not self.pretrained or section == RUNNING:
            return DEFAULT
        of_base = self._kind(section).pretrained(self.pretrained, self._set_keys(section))
        return PRETRAINED if key in of_base else DEFAULT

    def following(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults of a section that change where `values` are set, as alpha with the rank."""
        if not self.pretrained:
            return {}
        kind, section = self._kind(name), self.section(name)
        given = {**self._set_keys(name), **values}
        default = kind(**kind.pretrained(self.pretrained, given))
        return {
            key: getattr(default, key)
            for key in hints(kind)
            if key not in given and getattr(default, key) != getattr(section, key)
        }

    def _set_keys(self, section: str) -> dict[str, Any]:
        """Key → value of the section's keys that are set."""
        values = self.section(section)
        return {
            key: getattr(values, key)
            for key in hints(self._kind(section))
            if self._where_set(section, key)
        }

    def _where_set(self, section: str, key: str) -> str:
        """The file, its training block or --set; empty for a default."""
        if where_set := self.sources.get(key_path(section, key)):
            return where_set
        kind = self._kind(section)
        shared = f"{TRAINING}.{key}"
        inherits = issubclass(kind, Training) and key not in kind.NOT_SHARED
        if inherits and shared in self.sources:
            return f"{self.sources[shared]}, {TRAINING}"
        return ""

    def _kind(self, section: str) -> type[Section]:
        return Running if section == RUNNING else self.kinds[section]


def read_text(path: Path) -> str:
    """The text of a params file. Raises UserError."""
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
        if len(raw) > LARGEST:
            raise UserError(
                f"{path} must have at most {LARGEST:,} bytes. Name a params file with --params."
            )
        return raw.decode()
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist. Run this in the project's folder, or name the file with "
            "--params."
        ) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. Name a params file with --params.") from None
    except UnicodeDecodeError:
        raise UserError(
            f"{path} is not UTF-8. Fix it by hand, or name another params file with --params."
        ) from None


def parse(text: str, path: Path, kinds: Kinds, overrides: Sequence[str] = ()) -> Params:
    """Check the `text` of `path`, then apply `section.key=value` overrides. Raises UserError."""
    tree = _read_tree(text, path)
    project = tree.pop(PROJECT, "")
    if not isinstance(project, str) or "\0" in project:
        raise UserError(
            f"{PROJECT} must be the path of a params file, got {project!r}. Edit {path.name}."
        )
    names = other_names(kinds)
    tree = names.read(tree, ValueSource(path.name))
    spelled, written = dict(names.spelled), set(tree)
    given: dict[str, Any] = {}
    for name, value in _read_overrides(overrides, tree, names, kinds).items():
        if name in TOP_LEVEL:
            tree[name] = given[name] = value
            continue
        tree[name] = {**(tree.get(name) or {}), **value}
        given |= {f"{name}.{key}": part for key, part in value.items()}
    added = tree.keys() - written - TOP_LEVEL.keys()
    if project and (inherited := sorted(added - {TRAINING})):
        raise UserError(
            f"--set {inherited[0]}: {path.name} has no such section. Set it in {project}, or add "
            "it here."
        )
    origin = ValueSource(path.name, frozenset({*given, *added}))
    if unknown := [key for key in tree if key not in (*TOP_LEVEL, TRAINING) and key not in kinds]:
        known = [*kinds, *TOP_LEVEL, TRAINING, PROJECT]
        reject_unknown_keys(dict.fromkeys(unknown), known, "", origin)

    # `base` is a setting of import, but stands above the sections: most users set it alone.
    above = {key: tree.pop(key) for key in TOP_LEVEL if key in tree}
    running = {
        key: check_value(hint, above[key], key, origin)
        for key, hint in hints(Running).items()
        if key in above
    }
    _check_keys(tree, kinds, origin)
    # `section:` without keys has all defaults
    tree = {name: keys or {} for name, keys in tree.items()}
    named = frozenset(tree)
    # `base: …` alone makes import, for MiniGPT pretrain, one of the file's sections
    if "base" in above:
        tree["import"] = {**tree.get("import", {}), "base": above["base"]}
        if above["base"] == Import().base and "pretrain" in kinds:
            tree.setdefault("pretrain", {})

    paths = [key_path(name, key) for name, keys in tree.items() for key in keys]
    sources = {path: origin.of(path) for path in [*paths, *running]}
    training = tree.get(TRAINING, {})
    params = Params(
        kinds, {}, tree, training, sources, project, path.name, named, Running(**running)
    )
    params = replace(params, overrides=given, spelled=spelled, note=names.note)
    # read with `origin`, so that its errors name --set; `params.origin` would name the file
    if "import" in tree:
        params = params._with({"import": _read_section("import", params, origin)})
    if params.origin.imports:
        # it loads OpenSSL and ctypes: 8 ms, which the calculator does without
        from pipeline.files import base_model

        params = replace(params, width=base_model.width(params.origin.base, path.parent))
    for key, value in training.items():  # also where nothing trains
        check_value(hints(Training)[key], value, f"{TRAINING}.{key}", origin)
    return _build(params, origin)


def _check_keys(tree: Mapping[str, Any], kinds: Kinds, origin: ValueSource) -> None:
    """Raises UserError for what is no section, and for a section's unknown key."""
    for name, keys in tree.items():
        if keys is not None and not isinstance(keys, dict):
            raise UserError(
                f"{origin.of(name)}: {name} must be a section of key: value lines, got "
                f"{abbreviate_repr(keys)}."
            )
        kind = Training if name == TRAINING else kinds[name]
        known = [key for key in hints(kind) if key not in TOP_LEVEL]
        reject_unknown_keys(keys or {}, known, f"{name}.", origin)
    if "data" in (tree.get(TRAINING) or {}):
        raise UserError(
            "training.data: each stage names its own data, which dvc.yaml watches. Move it to the "
            "stages' sections."
        )


def other_names(kinds: Kinds) -> "OtherNames":
    """A reader of other tools' names for a params file's sections and what stands above them."""
    from pipeline.project.params.other_names import OtherNames

    return OtherNames(ChainMap({TRAINING: Training}, kinds), TOP_LEVEL)  # type: ignore[arg-type]


def inherit(
    params: Params, parent: Params, files: Mapping[str, Collection[str]], prefix: str
) -> Params:
    """`params` on its parent's training block, and with the parent's sections that it has not.

    `files`: section → its keys that name files. Their paths get the `prefix` that leads to the
    parent's folder.
    """

    def from_here(path: str) -> str:
        if not path or path.startswith("~"):
            return path
        return Path(os.path.normpath(Path(prefix) / path)).as_posix()

    sources = {key: f"{prefix}/{source}" for key, source in parent.sources.items()}
    running = {key: getattr(params.running, key) for key in hints(Running) if key in params.sources}
    child = replace(
        params,
        training={**parent.training, **params.training},
        sources={**sources, **params.sources},
        running=structs.replace(parent.running, **running),
        width=params.width if "import" in params.written else parent.width,
    )
    # The child's sections are read again, on the parent's training block. The parent's are taken as
    # they were read in its file, where its own block counts: the artifacts that the child reads
    # were made with these.
    inherited = {}
    for name in parent.written - params.written:
        section = parent.section(name)
        paths = {key: change_paths(getattr(section, key), from_here) for key in files.get(name, ())}
        inherited[name] = structs.replace(section, **paths)
    overridden = frozenset(key for key, source in params.sources.items() if source == OVERRIDE)
    return _build(child._with(inherited), ValueSource(params.file, overridden))


def _build(params: Params, origin: ValueSource) -> Params:
    """`params` with the sections that its tree says, checked."""
    names = [name for name in params.tree if name != TRAINING]
    return params._with({name: _read_section(name, params, origin) for name in names})


def _read_section(name: str, params: Params, origin: ValueSource) -> Section:
    """A section: what the file says, else the training block if it trains, else its defaults."""
    kind = params.kinds[name]
    types = hints(kind)
    values = {}
    if issubclass(kind, Training):
        for key, value in params.training.items():
            if key not in kind.NOT_SHARED:
                values[key] = check_value(types[key], value, f"{TRAINING}.{key}", origin)
    for key, value in params.tree.get(name, {}).items():
        values[key] = check_value(types[key], value, key_path(name, key), origin)
    base = None if kind is Import else params.pretrained
    try:
        return kind.defaults(base, values)
    except UserError as error:  # of keys that contradict each other
        raise UserError(f"{name}.{error}") from None


def _read_tree(text: str, path: Path) -> dict[str, Any]:
    from pipeline.files import strict_yaml

    try:
        tree = strict_yaml.load(text)
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(
            f"{path} must hold sections such as `finetune_lora:`, got {abbreviate_repr(tree)}."
        )
    return tree


def read_override(override: str) -> tuple[str, Any]:
    """The key of an override, and its value. Raises UserError."""
    from pipeline.files import strict_yaml

    path, equals, text = override.partition("=")
    path = path.strip()
    if not equals or not all(path.partition(".")[::2] if "." in path else (path,)):
        raise UserError(
            f"--set takes section.key=value, such as finetune_lora.rank=8, got {override!r}."
        )
    try:
        return path, strict_yaml.load(text)
    except ValueError:
        raise UserError(f"--set {path}: {text!r} is not a YAML value.") from None


def _read_overrides(
    overrides: Sequence[str],
    tree: Mapping[str, Any],
    names: "OtherNames",
    kinds: Kinds,
) -> dict[str, Any]:
    """Overrides of the tree as a tree, by our names. Raises UserError."""
    given: dict[str, Any] = {}
    for override in overrides:
        path, value = read_override(override)
        section, dot, key = path.partition(".")
        if not dot and names.ours(path) in TOP_LEVEL:
            given[path] = value
            continue
        if not dot:
            section, key = _section_of(names.ours(path), tree, kinds), path
        if not section:
            if names.ignores(path, path):
                continue
            raise UserError(
                f"--set takes section.key=value, such as finetune_lora.rank=8, got {override!r}."
            )
        if section in (PROJECT, *TOP_LEVEL) or not isinstance(tree.get(section) or {}, dict):
            raise UserError(f"--set {path}: {section} is not a section in the params file.")
        given.setdefault(section, {})[key] = value
    return names.read(given, ValueSource(OVERRIDE), tree)


def _section_of(ours: str, tree: Mapping[str, Any], kinds: Kinds) -> str:
    """The section of the tree that our key alone means; empty if several can be meant.

    Where several methods have the key, it is `training` if that counts for all of them.
    """
    owners = [name for name in tree if name in kinds and ours in hints(kinds[name])]
    trained = {name: kind for name in owners if issubclass(kind := kinds[name], Training)}
    trained.pop("pretrain", None)
    if len(trained or owners) == 1:
        return next(iter(trained or owners))
    is_settled = any(
        ours in kind.NOT_SHARED or ours in (tree[name] or {}) for name, kind in trained.items()
    )
    return TRAINING if trained and ours in hints(Training) and not is_settled else ""


def check(params: Params, name: str, key: str, value: Any) -> None:
    """Raises UserError if `key` of section `name` cannot be `value`, with the file's other keys."""
    section = {**params.tree.get(name, {}), key: value}
    changed = replace(params, tree={**params.tree, name: section})
    _read_section(name, changed, ValueSource(params.file))


def key_path(section: str, key: str) -> str:
    """A key as params.yaml has it: base, or section.key."""
    return key if TOP_LEVEL.get(key) == section else f"{section}.{key}"
