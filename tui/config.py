"""The config file, written by the user, and the state file, written by the program."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec
import yaml

from pipeline.errors import UserError
from pipeline.files.artifact import write_file
from pipeline.files.home import home_folder

NAME = "lora-workbench"
KEYS = "theme, keys (binding → key), folders (a list), on_hangup (continue or stop)"


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """tui.yaml: theme, keys by binding id, folders to search for models, and what a closed terminal
    does to a running pipeline.
    """

    theme: str | None = None
    keys: Mapping[str, str] = {}
    folders: tuple[str, ...] = ()
    on_hangup: Literal["continue", "stop"] = "continue"


def config_path() -> Path:
    return _xdg_folder("XDG_CONFIG_HOME", ".config") / "tui.yaml"


def state_path() -> Path:
    return _xdg_folder("XDG_STATE_HOME", ".local/state") / "tui.json"


def _xdg_folder(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or home_folder() / default) / NAME


def load_config(path: Path) -> Config:
    """The config, or the defaults if there is no file. Raises UserError with what is wrong."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if isinstance(tree, dict):  # a key without a value counts as left out
            tree = {key: value for key, value in tree.items() if value is not None}
        return msgspec.convert(tree, Config)
    except (FileNotFoundError, NotADirectoryError):  # the latter for a home such as /dev/null
        return Config()
    except (yaml.YAMLError, msgspec.ValidationError, ValueError, OSError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read: {problem}. It holds {KEYS}.") from None


class State(msgspec.Struct):
    """What the program saves: the theme chosen last, added folders, past prompts (newest last)."""

    theme: str | None = None
    folders: list[str] = []
    prompts: list[str] = []

    @classmethod
    def load(cls, path: Path) -> "State":
        """The saved state; empty if the file is missing or damaged."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError):
            return cls()

    def save(self, path: Path) -> None:
        """Replace the file atomically. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, msgspec.json.format(msgspec.json.encode(self), indent=1).decode())
