"""The user's config file, which is theirs to write, and what the program remembers between runs, which is ours."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError

NAME = "lora-workbench"
ON_HANGUP = ("continue", "stop")  # what a closed terminal does to a pipeline started from this screen


@dataclass(frozen=True)
class Config:
    """tui.yaml: a theme, other keys by binding id, folders to look for models in, what a hang-up does."""

    theme: str | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    on_hangup: str = "continue"


def config_path() -> Path:
    return _home("XDG_CONFIG_HOME", ".config") / "tui.yaml"


def state_path() -> Path:
    return _home("XDG_STATE_HOME", ".local/state") / "tui.json"


def _home(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / default) / NAME


def load_config(path: Path) -> Config:
    """The config, or the defaults where there is no file. Raises UserError with key, rule and value."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        return Config()
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    known = [f.name for f in fields(Config)]
    if not isinstance(tree, dict) or (unknown := next((key for key in tree if key not in known), None)):
        what = "sections" if not isinstance(tree, dict) else f"unknown key {unknown}"
        raise UserError(f"{path}: {what}. Known: {', '.join(known)}.")
    return Config(
        theme=_text(tree, "theme", path),
        keys=_keys(tree.get("keys") or {}, path),
        folders=_folders(tree.get("folders") or [], path),
        on_hangup=_one_of(tree.get("on_hangup", "continue"), path),
    )


def _text(tree: Mapping[str, Any], key: str, path: Path) -> str | None:
    value = tree.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{path}: {key} must be a text, got {value!r}.")
    return value


def _keys(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for pair in value.items() for key in pair):
        raise UserError(f"{path}: keys must map binding ids to keys, such as pipeline.run: ctrl+r, got {value!r}.")
    return dict(value)


def _folders(value: Any, path: Path) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(folder, str) for folder in value):
        raise UserError(f"{path}: folders must be a list of paths, got {value!r}.")
    return tuple(value)


def _one_of(value: Any, path: Path) -> str:
    if value not in ON_HANGUP:
        raise UserError(f"{path}: on_hangup must be one of {', '.join(ON_HANGUP)}, got {value!r}.")
    return str(value)


@dataclass
class State:
    """What is remembered: the theme chosen last, folders added, prompts given (newest last)."""

    theme: str | None = None
    folders: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> "State":
        """What was saved; a file that is not there or damaged is a fresh start."""
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            folders, prompts = (list(map(str, tree[key])) for key in ("folders", "prompts"))
            return cls(tree["theme"], folders, prompts)
        except (OSError, ValueError, KeyError, TypeError):
            return cls()

    def save(self, path: Path) -> None:
        """Replace the file at once. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}.tmp")
        new.write_text(json.dumps(asdict(self), ensure_ascii=False, indent=1), encoding="utf-8")
        new.replace(path)
