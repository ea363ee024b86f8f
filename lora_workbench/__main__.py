"""`lora ARGS`, also as `python -m lora_workbench ARGS`.

`python -m` and PYTHONPATH may put a folder first in which somebody has a cli.py or a pipeline.py
of their own: the current folder is left out, and what still hides our packages is named.
"""

import os
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run a command, as `cli.main.main` does."""
    with suppress(FileNotFoundError):  # a removed folder, which the command reports
        here = os.getcwd()  # noqa: PTH109 (as it stands in sys.path)
        if Path(here) != ROOT:
            sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]  # noqa: PTH100
    for name in ("cli", "tui", "pipeline"):
        spec = find_spec(name)
        if spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT):
            place = spec.origin if spec else "a broken installation"
            sys.exit(
                f"error: {place} hides lora-workbench's own package {name}. Rename it, or take "
                "its folder out of PYTHONPATH."
            )
    from cli.main import main as run

    run()


if __name__ == "__main__":
    main()
