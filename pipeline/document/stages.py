"""The document's stages: studies, figures and claims. They measure the artifacts of the product's stages."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.document.figures import FIGURES, Figures
from pipeline.document.studies import names, stage_of, studies
from pipeline.project.stage_graph import STAGES as PRODUCT
from pipeline.project.stage_graph import Stage


@dataclass(frozen=True)
class Claims:
    """The file of claims: what the document says, and how it is measured."""

    data: str = "data/claims.yaml"


CLAIMS = Stage(
    "claims",
    "pipeline.document.claims.stage",
    "claims",
    "claims",
    "claims",
    needs=(*PRODUCT, *(f"study_{name}" for name in names()), FIGURES.name),
    data=(
        *("data", "pretrain.data", "finetune_lora.data", "finetune_lora.retention_data"),
        *("study_fact_correction.data", "study_knowledge_correction.data"),
    ),
    minigpt_only=True,
    compares=True,
)


def stages() -> Mapping[str, Stage]:
    """Name → stage, in the document's order. Reads every study's file, which claims alone do not need."""
    return {stage.name: stage for stage in (*map(stage_of, studies()), FIGURES, CLAIMS)}


def sections() -> Mapping[str, type]:
    """Name → class of the document's sections of params.yaml, which few projects have."""
    of_studies = {f"study_{name}": study.settings for name, study in studies().items()}
    return {**of_studies, "figures": Figures, "claims": Claims}
