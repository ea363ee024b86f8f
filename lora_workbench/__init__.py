"""LoRA workbench: adapt language models with LoRA, and measure what was learned and forgotten.

    import lora_workbench as lw

    project = lw.train("Qwen/Qwen3-0.6B", "tickets.jsonl", "run")
    model = lw.load(project.artifact("finetune_lora"))
    print(lw.generate(model, "How do I reset my password?", chat=True))

The commands call these functions: the checks, the files and the numbers are the same. What goes
wrong by what was given is a `UserError`, whose message says what to do.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_workbench import data
    from lora_workbench.api import (
        Calculation,
        Note,
        Progress,
        Project,
        Result,
        UserError,
        calc,
        evaluate,
        export,
        generate,
        load,
        merge,
        new,
        show,
        sweep,
        train,
    )

__all__ = [  # noqa: RUF022 (in the order of use)
    "Project",
    "new",
    "train",
    "load",
    "generate",
    "evaluate",
    "merge",
    "export",
    "calc",
    "data",
    "sweep",
    "Calculation",
    "Note",
    "Progress",
    "Result",
    "UserError",
    "show",
]


def __getattr__(name: str) -> Any:
    """Import what is used first: torch takes seconds, and a hidden package is told then.

    Raises ImportError if a module of somebody else hides one of our packages.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lora_workbench.packages import hidden

    if problem := hidden():
        raise ImportError(problem)
    if name == "data":
        return import_module("lora_workbench.data")
    return getattr(import_module("lora_workbench.api"), name)
