"""python: a file of the user's has `score(answer, example)`, which returns a number from 0 to 1.

This runs the user's code, with all rights of the user. So only a file that evaluate.tasks names is
run: a task file from elsewhere brings none of its own.
"""

import copy
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.data.formats import Record
from pipeline.errors import UserError, first_line
from pipeline.evaluation.kinds import Kind, Score, Scores, TaskExample, TaskOptions
from pipeline.files.text import abbreviate_repr


def check(row: Record, location: str) -> None:
    """Any example will do: only the user's function knows what it needs."""


def scorer(options: TaskOptions) -> Score:
    """The user's `score` as a `Score`; the file is run for it. Raises UserError."""
    written = options.values.get("scorer")
    if not written:
        raise UserError(
            f'{options.location}: a task of kind python needs "scorer", a file with '
            "score(answer, example)."
        )
    path = (options.folder / written).resolve()
    if path not in options.files:
        raise UserError(
            f"{options.location}: scorer {written} is not in evaluate.tasks. It is code that would "
            "run here with your rights: read it, and if you trust it, add it there."
        )
    name = options.files[path]
    module = ModuleType("lora_scorer")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look themselves up

    def run() -> None:
        exec(compile(path.read_bytes(), path, "exec"), module.__dict__)

    _call(name, path, options.location, run)
    function = getattr(module, "score", None)
    if not callable(function):
        raise UserError(f"{name} has no function score(answer, example). Define it.")

    def score(answer: str, example: TaskExample) -> Scores:
        row = copy.deepcopy(dict(example.row))
        value = _call(name, path, example.location, lambda: function(answer, row))
        # numpy's numbers are Real too; a text such as "0.5" is a mistake
        is_number = isinstance(value, Real)
        if not (is_number and 0 <= value <= 1):  # NaN is not either
            raise UserError(
                f"{name}: score must return a number from 0 to 1, got {abbreviate_repr(value)} for "
                f"{example.location}. Correct it."
            )
        return {"score": float(value)}

    return score


def _call(name: str, path: Path, where: str, function: Callable[[], Any]) -> Any:
    """The user's function, whose stdout goes to stderr. Raises UserError with its line."""
    try:
        with redirect_stdout(sys.stderr):
            return function()
    except (Exception, SystemExit) as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(path)
        ]
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines.append(error.lineno)
        at = f"{name}:{lines[-1]}" if lines else name
        reason = first_line(error)
        kind = "" if reason == type(error).__name__ else f"{type(error).__name__}: "
        raise UserError(f"{at}: {kind}{reason} (at {where}). Correct the scorer.") from None


KIND = Kind(
    "`score(answer, example)` of the Python file `scorer` says it, from 0 to 1",
    check,
    scorer,
    {"scorer": str},
)
