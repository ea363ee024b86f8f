"""The document's stages: studies, figures and claims. They measure the artifacts of the product's stages."""

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules

from pipeline.document import studies
from pipeline.document.figures import FIGURES
from pipeline.project.params.schema import Section
from pipeline.project.stage_graph import Stage
from pipeline.stages.registry import METHODS
from pipeline.stages.registry import STAGES as PRODUCT


def find_studies() -> Mapping[str, studies.Study]:
    """Name → study, in the document's order."""
    found: dict[str, studies.Study] = {
        m.name: import_module(f"{studies.__name__}.{m.name}").STUDY for m in iter_modules(studies.__path__)
    }
    return dict(sorted(found.items(), key=lambda item: item[1].order))


def stage_of(name: str, study: studies.Study) -> Stage:
    """The node study_NAME in the stage graph. Its module is its own file, so it does not depend on other studies."""
    return Stage(
        f"study_{name}",
        f"{studies.__name__}.{name}",
        output=f"studies/{name}",
        kind="study",
        method=name,
        settings=study.settings,
        needs=study.needs,
        data=study.data,
        extra_sections=study.extra_sections,
        minigpt_only=study.minigpt_only,
        work="pipeline.document.runner",
        # the stages that it runs: their modules are found by name
        loads=("pipeline.stages.pretrain", *(PRODUCT[s].module for s in study.extra_sections if s in PRODUCT)),
        summary=study.about,
    )


class Claims(Section, frozen=True, kw_only=True):
    """The document's claims beside what was measured: no settings; `claims: {}` in params.yaml adds the stage."""


MEASUREMENTS = (*(stage_of(name, study) for name, study in find_studies().items()), FIGURES)
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
    compares=True,
    loads=tuple(stage.module for stage in METHODS.values()),  # the calculator counts them
)
STAGES: Mapping[str, Stage] = {stage.name: stage for stage in (*MEASUREMENTS, CLAIMS)}
