"""The sections of params.yaml for the document's stages: one per study, the figures and the claims.

A setting that a study does not have, such as the batch size, is the document's (§9.2) or its stage's own section's.
"""

from typing import Annotated

from msgspec import Meta

from pipeline.errors import UserError
from pipeline.project.params.schema import ALLOW_DUPLICATES, Count, File, Rate, Section, Seed, Share, Steps

Seeds = tuple[Seed, ...]
Rates = tuple[Rate, ...]
Counts = tuple[Count, ...]
TwoByTwo = Annotated[tuple[float, ...], ALLOW_DUPLICATES]  # row by row


class StudyFactCorrection(Section, frozen=True, kw_only=True):
    """§6: V only against all projections, over the settings the document leaves open, and without full embeddings."""

    data: str = "data/fact_correction.de.txt"
    retention_data: str = "data/retain.de.txt"
    prompts: str = "data/prompts.yaml"
    document: str = "data/document.yaml"  # the document's answers to the prompts
    seeds: Seeds = (0, 1, 2)
    epochs: Count = 80
    rank: Count = 4
    alphas: Rates = (0.5, 1.0, 8.0)
    learning_rates: Rates = (1e-3, 2e-3)
    windows: tuple[Steps, ...] = (4, 0)  # tokens per training window; 0: whole sentences
    retention_weight: Rate = 5.0
    top_k: Count = 5


class StudyKnowledgeCorrection(Section, frozen=True, kw_only=True):
    """§6, steps 1 to 5, on the project's own base. Trains as finetune_lora, except for these settings."""

    data: File = ""  # sentences that state the fact; empty: the project does not have this study
    retention_data: File = "data/retain.de.txt"
    prompts: str = "data/prompts.yaml"
    groups: tuple[str, ...] = ("knowledge_correction",)  # groups of prompts
    old_data: str = "data/pretrain.de.txt"  # where the divergence from the base is measured
    seeds: Seeds = (0, 1, 2)
    epochs: Count = 80
    rank: Count = 4
    learning_rate: Rate = 2e-3
    recipe_rate: Rate = 2e-4  # learning rate of the document's recipe, on v_proj only (§6, step 3)
    retention_weight: Rate = 5.0


class StudyTrajectory(Section, frozen=True, kw_only=True):
    """§2.3: probabilities of some words after each step of the fact correction."""

    data: str = "data/fact_correction.de.txt"
    document: str = "data/document.yaml"
    seeds: Seeds = (0, 1, 2)
    steps: tuple[Steps, ...] = (0, 10, 30, 50)
    learning_rate: Rate = 2e-3
    batch_size: Count = 4
    windows: tuple[Steps, ...] = (4, 0)


class StudyMethods(Section, frozen=True, kw_only=True):
    """§7 and §9.3: every method on the same data, each with its own stage's settings."""

    old_data: str = "data/pretrain.de.txt"
    new_data: str = "data/finetune.de.txt"
    prompt_words: Count = 2
    seeds: Seeds = (0, 1)


class StudyRank(Section, frozen=True, kw_only=True):
    """§2.4, §5: the effect of rank, alpha and learning rate on the new sentences."""

    old_data: str = "data/pretrain.de.txt"
    new_data: str = "data/finetune.de.txt"
    prompt_words: Count = 2
    seeds: Seeds = (0, 1, 2)
    ranks: Counts = (1, 2, 4, 8, 16, 64)
    alphas: Rates = (0.5, 1.0, 4.0, 8.0, 16.0)
    learning_rates: Rates = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


class StudyForgetting(Section, frozen=True, kw_only=True):
    """§9.3: new knowledge against forgetting, epoch by epoch."""

    old_data: str = "data/pretrain.de.txt"
    new_data: str = "data/finetune.de.txt"
    seeds: Seeds = (0, 1, 2)
    every: Count = 2  # epochs between two measurements


class StudySpectrum(Section, frozen=True, kw_only=True):
    """§2.2: singular values and subspaces of the updates of full fine-tuning and LoRA, and the extracted LoRA."""

    old_data: str = "data/pretrain.de.txt"
    new_data: str = "data/finetune.de.txt"
    seeds: Seeds = (0, 1, 2)  # subspaces are compared between seeds
    ranks: tuple[Annotated[int, Meta(ge=8)], ...] = (8, 64)  # of LoRA; the first and the last are compared
    extracted: Counts = (1, 2, 4, 8, 16, 64)


class StudyQuantization(Section, frozen=True, kw_only=True):
    """§10.1: the quality of the quantized base, by precision."""

    data: str = "data/pretrain.de.txt"  # for perplexity and for the calibration of GPTQ and AWQ
    document: str = "data/document.yaml"
    seeds: Seeds = (0, 1, 2)  # of the base model
    group: Count = 64  # group size: weights of a row that share a scale


class StudyIntrinsicDimension(Section, frozen=True, kw_only=True):
    """§2.2: full fine-tuning in random subspaces of the given dimensions."""

    data: str = "data/finetune.de.txt"
    document: str = "data/document.yaml"
    seeds: Seeds = (0, 1)
    dimensions: Counts = (128, 256, 512)
    learning_rate: Rate = 1e-2  # per weight; scaled up for the subspace's own parameters
    share: Share = 0.9  # of full fine-tuning's accuracy that counts as enough


class Figures(Section, frozen=True, kw_only=True):
    """Figures 1 to 5 and §2.1's attention. Figure 3 trains with the settings of study_trajectory."""

    window: Steps = 0  # Figure 3: tokens per training window; 0: whole sentences
    reach: Rate = 4.0  # Figure 3: the parameter is varied by ± this much
    weight: TwoByTwo = (1.4, 0.5, -0.2, 0.9)  # Figure 4: W of the example
    change: TwoByTwo = (0.5, 0.35, 0.25, 0.1)  # Figure 4: its ΔW
    module: str = "layers.1.self_attn.v_proj"  # Figure 4: module whose ΔW of full fine-tuning is measured

    def __post_init__(self) -> None:
        for key in ("weight", "change"):
            if len(numbers := getattr(self, key)) != 4:
                raise UserError(
                    f"figures.{key} must be the 4 numbers of a 2 × 2 matrix, row by row, got {len(numbers)}. "
                    "Write four."
                )


class Claims(Section, frozen=True, kw_only=True):
    """The document's claims beside what was measured: no settings; `claims: {}` in params.yaml adds the stage."""


Study = (
    StudyFactCorrection
    | StudyKnowledgeCorrection
    | StudyTrajectory
    | StudyMethods
    | StudyRank
    | StudySpectrum
    | StudyIntrinsicDimension
    | StudyQuantization
    | StudyForgetting
)
