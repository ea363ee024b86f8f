"""The stage figures: the document's Figures 1 to 5 and its attention example, drawn from the
project's artifacts.

A figure is one file here, found by its name: nothing else lists it. It has its PLACE in the
document, and `render(job)`, which measures and gives tables, words and a drawing.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Annotated

from lab.studies import DATA, LAST, off_minigpt
from pipeline.errors import UserError
from pipeline.project.params.schema import ALLOW_DUPLICATES, Rate, Section, Steps
from pipeline.project.stage_graph import Stage

TwoByTwo = Annotated[tuple[float, ...], ALLOW_DUPLICATES]  # row by row


class Figures(Section, frozen=True, kw_only=True):
    """Figures 1 to 5 and §2.1's attention. Figure 3 trains with the settings of
    study_trajectory.
    """

    window: Annotated[Steps, "Figure 3: tokens per training window; 0: whole sentences"] = 0
    reach: Annotated[Rate, "Figure 3: the parameter is varied by ± this much"] = 4.0
    weight: Annotated[TwoByTwo, "Figure 4: W of the example"] = (1.4, 0.5, -0.2, 0.9)
    change: Annotated[TwoByTwo, "Figure 4: its ΔW"] = (0.5, 0.35, 0.25, 0.1)
    module: Annotated[str, "Figure 4: module whose ΔW of full fine-tuning is measured"] = (
        "layers.1.self_attn.v_proj"
    )

    def __post_init__(self) -> None:
        for key in ("weight", "change"):
            if len(numbers := getattr(self, key)) != 4:
                raise UserError(
                    f"{key} must be the 4 numbers of a 2 × 2 matrix, row by row, got "
                    f"{len(numbers)}. Write four."
                )


STAGE = Stage(
    "figures",
    __name__,  # a package: its code is that of every figure
    "figures",
    "figures",
    "figures",
    Figures,
    needs=("pretrain", "expand_vocab", "finetune_full", "finetune_freeze", "finetune_lora"),
    data=("study_trajectory.data", "study_trajectory.document"),
    extra_sections=("study_trajectory",),
    skipped=lambda params: off_minigpt("figures", params),
    data_folder=DATA,
    work="lab.runner",
    loads=("pipeline.stages.finetune",),
    title="Figures",
    order=LAST,
)


def modules() -> dict[str, ModuleType]:
    """Name → module of each figure, in the document's order: by its number; without one, last."""
    found = {
        module.name: import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)
    }
    return dict(sorted(found.items(), key=lambda item: item[1].PLACE))
