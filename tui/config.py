"""The config file, written by the user, and the state file, written by the program."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import yaml

from pipeline.errors import UserError
from pipeline.files.artifact import write_file
from pipeline.files.home import home_folder

NAME = "lora-workbench"
ON_HANGUP = ("continue", "stop")  # what happens to a running pipeline when the terminal is closed


@dataclass(frozen=True)
class Config:
    """tui.yaml: theme, keys by binding id, folders to search for models, and what a closed terminal
    does.
    """

    theme: str | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    on_hangup: str = "continue"


def config_path() -> Path:
    return _xdg_folder("XDG_CONFIG_HOME", ".config") / "tui.yaml"


def state_path() -> Path:
    return _xdg_folder("XDG_STATE_HOME", ".local/state") / "tui.json"


def _xdg_folder(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or home_folder() / default) / NAME


def load_config(path: Path) -> Config:
    """The config, or the defaults if there is no file. Raises UserError with key, rule and
    value.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (FileNotFoundError, NotADirectoryError):  # the latter for a home such as /dev/null
        return Config()
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    valid_keys = [f.name for f in fields(Config)]
    if not isinstance(tree, dict) or (
        unknown := next((key for key in tree if key not in valid_keys), None)
    ):
        problem = "must be a mapping" if not isinstance(tree, dict) else f"unknown key {unknown}"
        raise UserError(f"{path}: {problem}. Valid keys: {', '.join(valid_keys)}.")
    # A key without a value counts as left out.
    values = {
        key: default if tree.get(key) is None else tree[key]
        for key, default in asdict(Config()).items()
    }
    keys, folders = values["keys"], values["folders"]
    rules = {
        "theme": (isinstance(values["theme"], str | None), "must be a string"),
        "keys": (
            isinstance(keys, dict)
            and all(isinstance(text, str) for pair in keys.items() for text in pair),
            "must map binding ids to keys, such as pipeline.run: ctrl+r",
        ),
        "folders": (
            isinstance(folders, list | tuple)
            and all(isinstance(folder, str) for folder in folders),
            "must be a list of paths",
        ),
        "on_hangup": (values["on_hangup"] in ON_HANGUP, f"must be one of {', '.join(ON_HANGUP)}"),
    }
    for key, (valid, rule) in rules.items():
        if not valid:
            raise UserError(f"{path}: {key} {rule}, got {values[key]!r}.")
    return Config(**{**values, "folders": tuple(folders)})


@dataclass
class State:
    """What the program saves: the theme chosen last, added folders, past prompts (newest last)."""

    theme: str | None = None
    folders: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> "State":
        """The saved state; empty if the file is missing or damaged."""
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            folders, prompts = (list(map(str, tree[key])) for key in ("folders", "prompts"))
            return cls(tree["theme"], folders, prompts)
        except (OSError, ValueError, KeyError, TypeError):
            return cls()

    def save(self, path: Path) -> None:
        """Replace the file atomically. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(asdict(self), ensure_ascii=False, indent=1))
