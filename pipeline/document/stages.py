"""The document's stages: studies, figures and claims. They measure the artifacts of the product's
stages.
"""

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from pipeline.document import studies
from pipeline.document.figures import FIGURES
from pipeline.project.params.schema import Section
from pipeline.project.stage_graph import Stage
from pipeline.stages.registry import METHODS
from pipeline.stages.registry import STAGES as PRODUCT


def find_studies() -> dict[str, ModuleType]:
    """Name → module of each study, in the document's order: by the numbers of its first section."""

    def order(found: tuple[str, ModuleType]) -> list[int]:
        first = found[1].PLACE.partition(",")[0]
        return [int(number) for number in first.removeprefix("§").split(".")]

    found = {
        module.name: import_module(f"{studies.__name__}.{module.name}")
        for module in iter_modules(studies.__path__)
    }
    return dict(sorted(found.items(), key=order))


class Claims(Section, frozen=True, kw_only=True):
    """The document's claims beside what was measured: no settings; `claims: {}` in params.yaml adds
    the stage.
    """


MEASUREMENTS: tuple[Stage, ...] = (*(study.STAGE for study in find_studies().values()), FIGURES)
CLAIMS = Stage(
    "claims",
    "pipeline.document.claims.check",
    "claims",
    "claims",
    "claims",
    Claims,
    needs=(*PRODUCT, *(stage.name for stage in MEASUREMENTS)),
    data=(
        *("pretrain.data", "finetune_lora.data", "finetune_lora.retention_data"),
        *("study_fact_correction.data", "study_knowledge_correction.data"),
    ),
    minigpt_only=True,
    compares=True,  # a claim on what the project does not have is "not run"
    loads=tuple(stage.module for stage in METHODS.values()),  # the calculator counts them
)
STAGES: Mapping[str, Stage] = {stage.name: stage for stage in (*MEASUREMENTS, CLAIMS)}
