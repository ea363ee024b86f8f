"""The document's stages: studies, figures and claims. They measure the artifacts of the product's stages."""

from collections.abc import Mapping
from typing import Any

from pipeline.document import params
from pipeline.project.stage_graph import Stage
from pipeline.stages.registry import METHODS
from pipeline.stages.registry import STAGES as PRODUCT

PARENTS = ("pretrain", "expand_vocab")
TUNED = ("finetune_full", "finetune_freeze", "finetune_lora", "finetune_prefix", "finetune_prompt")
TRAINED = ("train_from_scratch", *TUNED)


def _study(name: str, *data: str, needs: tuple[str, ...] = PARENTS, **options: Any) -> Stage:
    """A stage that measures statements of the document; on MiniGPT only, unless `options` say otherwise."""
    module, output = f"pipeline.document.studies.{name}", f"studies/{name}"
    options.setdefault("loads", tuple(PRODUCT[s].module for s in options.get("extra_sections", ()) if s in PRODUCT))
    settings = getattr(params, "Study" + name.title().replace("_", ""))
    return Stage(
        f"study_{name}", module, output, "study", name, settings, needs, data, **{"minigpt_only": True, **options}
    )


def _training_data(sections: tuple[str, ...]) -> tuple[str, ...]:
    """The params keys of these stages' training data."""
    return (*(f"{section}.data" for section in sections), "finetune_lora.retention_data")


MEASUREMENTS = (
    _study("fact_correction", "data", "retention_data", "prompts", "document"),
    _study(
        *("knowledge_correction", "data", "retention_data", "prompts", "old_data"),
        extra_sections=("finetune_lora",),
        minigpt_only=False,
    ),
    _study("trajectory", "data", "document"),
    _study("methods", "old_data", "new_data", *_training_data(TRAINED), extra_sections=TRAINED),
    _study("rank", "old_data", "new_data"),
    _study("spectrum", "old_data", "new_data"),
    _study("intrinsic_dimension", "data", "document"),
    _study("quantization", "data", "document", "pretrain.data", needs=("pretrain",), extra_sections=("pretrain",)),
    _study("forgetting", "old_data", "new_data", *_training_data(TUNED), extra_sections=TUNED),
    Stage(
        "figures",
        "pipeline.document.figures.registry",
        "figures",
        "figures",
        "figures",
        params.Figures,
        needs=("pretrain", "expand_vocab", "finetune_full", "finetune_freeze", "finetune_lora"),
        data=("study_trajectory.data", "study_trajectory.document"),
        extra_sections=("study_trajectory",),
        minigpt_only=True,
    ),
)
CLAIMS = Stage(
    "claims",
    "pipeline.document.claims.report",
    "claims",
    "claims",
    "claims",
    params.Claims,
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
