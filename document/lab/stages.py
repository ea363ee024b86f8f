"""The document's stages: studies, figures, and claims, which compares them with the document."""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from lab import figures, studies
from lab.studies import DATA, LAST, off_minigpt, section_number
from pipeline.project.params.schema import Section
from pipeline.project.stage_graph import Stage
from pipeline.stages.registry import METHODS
from pipeline.stages.registry import STAGES as PRODUCT


def find_studies() -> dict[str, ModuleType]:
    """Name → module of each study, in the document's order."""
    found = {
        module.name: import_module(f"{studies.__name__}.{module.name}")
        for module in iter_modules(studies.__path__)
    }
    return dict(sorted(found.items(), key=lambda item: section_number(item[1].PLACE)))


class Claims(Section, frozen=True, kw_only=True):
    """The document's claims beside what was measured: no settings; `claims: {}` in params.yaml adds
    the stage.
    """


MEASUREMENTS = (*(study.STAGE for study in find_studies().values()), figures.STAGE)
STAGE = Stage(
    name="claims",
    module="lab.claims.check",
    output="claims",
    kind="claims",
    method="claims",
    settings=Claims,
    needs=(*PRODUCT, *(stage.name for stage in MEASUREMENTS)),
    data=(
        "pretrain.data",
        "finetune_lora.data",
        "finetune_lora.retention_data",
        "study_fact_correction.data",
        "study_knowledge_correction.data",
    ),
    skipped=lambda params: off_minigpt("claims", params),
    data_folder=DATA,
    compares=True,  # a claim on what the project does not have is "not run"
    loads=tuple(stage.module for stage in METHODS.values()),  # the calculator counts them
    title="The document, measured",
    order=LAST + 1,
)
