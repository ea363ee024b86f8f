"""The user's home folder, also of a user without one, as a mere number in a container."""

import os
from pathlib import Path


def home_folder() -> Path:
    """The home folder; one in which nothing can be written for a user without one."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(os.devnull)


def from_home(path: Path) -> str:
    """The path with ~ for the home folder."""
    home = home_folder()
    is_below = path.is_relative_to(home) and path != home
    return f"~/{path.relative_to(home)}" if is_below else str(path)


def expand(name: str) -> Path:
    """`name` with the home folder in place of ~, or as it is where there is no such home."""
    return Path(os.path.expanduser(name))  # noqa: PTH111  # Path.expanduser raises RuntimeError
