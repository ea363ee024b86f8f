"""`lora ARGS`, also as `python -m lora_workbench ARGS`.

`python -m` and PYTHONPATH may put a folder first in which somebody has a cli.py or a pipeline.py
of their own: the current folder is looked in last (an extension may be installed from it), and
what still hides our packages is named.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

from lora_workbench.packages import ROOT, hidden


def main() -> None:
    """Run a command, as `cli.main.main` does."""
    with suppress(FileNotFoundError):  # a removed folder, which the command reports
        here = os.getcwd()  # noqa: PTH109 (as it stands in sys.path)
        if Path(here) != ROOT:
            sys.path.sort(key=lambda path: os.path.abspath(path) == here)  # noqa: PTH100
    if problem := hidden():
        sys.exit(f"error: {problem}")
    from cli.main import main as run

    run()


if __name__ == "__main__":
    main()
