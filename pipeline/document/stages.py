"""The document's stages: studies, figures and claims. They measure the artifacts of the product's stages."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipeline.document.figures import FIGURES, Figures
from pipeline.document.studies import PREFIX, names, stage_of, studies
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
    needs=(*PRODUCT, *(f"{PREFIX}{name}" for name in names()), FIGURES.name),
    data=(
        *("data", "pretrain.data", "finetune_lora.data", "finetune_lora.retention_data"),
        *("study_fact_correction.data", "study_knowledge_correction.data"),
    ),
    minigpt_only=True,
    compares=True,
)


class Stages(Mapping[str, Stage]):
    """Name → stage, the product's and then the document's.

    A study's file is read when its stage is asked for, so a project without studies reads none.
    """

    def __getitem__(self, name: str) -> Stage:
        own = {FIGURES.name: FIGURES, CLAIMS.name: CLAIMS}
        return PRODUCT[name] if name in PRODUCT else own[name] if name in own else stage_of(name)

    def __iter__(self) -> Iterator[str]:
        return iter((*CLAIMS.needs, CLAIMS.name))

    def __len__(self) -> int:
        return len(CLAIMS.needs) + 1


def sections() -> Mapping[str, type]:
    """Name → class of the document's sections of params.yaml, which few projects have."""
    of_studies = {f"{PREFIX}{name}": study.settings for name, study in studies().items()}
    return {**of_studies, "figures": Figures, "claims": Claims}
