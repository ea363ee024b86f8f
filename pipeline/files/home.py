"""The user's home folder, also for a user without one, as in a container that runs under a mere
number.
"""

import os
from pathlib import Path


def home_folder() -> Path:
    """The home folder; one in which nothing can be written for a user without one."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(os.devnull)


def expand(name: str) -> Path:
    """`name` with the home folder in place of ~; as it is where there is no such home, which then
    does not exist.
    """
    return Path(os.path.expanduser(name))  # noqa: PTH111  # Path.expanduser raises RuntimeError
