"""One file a fine-tuning method. Reading one imports no torch; see
`pipeline/stages/registry.py`.
"""

from typing import Any

from pipeline.project.params.sections import Training
from pipeline.project.stage_graph import Stage


def method(name: str, module: str, settings: type[Training], *, kind: str, **about: Any) -> Stage:
    """The stage that fine-tunes the expanded base with a method; `about` are further fields of
    `Stage`.

    `kind`: adapter, or checkpoint where the whole model is the artifact. The method's module has
    `attach(job, settings, base)`, which makes of the base what trains and says how that is saved.
    """
    about = {"needs": ("expand_vocab",), "data": ("data", "eval_data"), "variant": name, **about}
    return Stage(
        f"finetune_{name}",
        module,
        kind=kind,
        method=name,
        settings=settings,
        work=FINETUNE,
        **about,
    )


FINETUNE = "pipeline.stages.finetune"
