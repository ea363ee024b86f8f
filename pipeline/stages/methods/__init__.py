"""Fine-tuning methods, one file each, which `stages/registry.py` finds. None imports torch."""

from typing import Any

from pipeline.project.params.sections import Training
from pipeline.project.stage_graph import Stage


def method(name: str, module: str, settings: type[Training], *, kind: str, **about: Any) -> Stage:
    """The stage that fine-tunes the expanded base; `about` are further fields of `Stage`.

    `kind`: adapter, or checkpoint if the whole model is saved. The method's module has
    `attach(job, settings, base)`, which changes the base into what trains, and says how to save it.
    """
    about = {"needs": ("expand_vocab",), "data": ("data", "eval_data"), "variant": name, **about}
    about |= {"kind": kind, "method": name, "settings": settings}
    return Stage(f"finetune_{name}", module, work="pipeline.stages.finetune", **about)
