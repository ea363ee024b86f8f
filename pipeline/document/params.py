"""The sections of params.yaml that say how the document's statements are measured: one a study, and the figures'.

What a study does not say itself, such as the batch size, is the document's (§9.2), or the pipeline's own stages'.
"""

from dataclasses import dataclass
from typing import Annotated

from pipeline.errors import UserError
from pipeline.project.params.schema import AllowDuplicates, AtLeast, Count, File, Rate, Seed, Share, Steps

Seeds = tuple[Seed, ...]
Rates = tuple[Rate, ...]
Counts = tuple[Count, ...]
TwoByTwo = Annotated[tuple[float, ...], AllowDuplicates()]  # row by row


@dataclass(frozen=True)
class StudyFactCorrection:
    """§6: V-only against all projections, at settings that the document leaves open, and with less that trains."""

    data: str = "data/fact_correction.de.txt"
    retention_data: str = "data/retain.de.txt"
    prompts: str = "data/prompts.yaml"
    document: str = "data/document.yaml"  # what the document says of each prompt
    seeds: Seeds = (0, 1, 2)
    epochs: Count = 80
    rank: Count = 4
    alphas: Rates = (0.5, 1.0, 8.0)
    learning_rates: Rates = (1e-3, 2e-3)
    windows: tuple[Steps, ...] = (4, 0)  # tokens a training window holds; 0: whole sentences
    retention_weight: Rate = 5.0
    top_k: Count = 5


@dataclass(frozen=True)
class StudyKnowledgeCorrection:
    """§6, steps 1 to 5, on whatever base the project has; training as finetune_lora says, but for these."""

    data: File = ""  # sentences that state the fact; none: the project has no such study
    retention_data: File = "data/retain.de.txt"
    prompts: str = "data/prompts.yaml"
    groups: tuple[str, ...] = ("knowledge_correction",)  # of the prompts
    old_data: str = "data/pretrain.de.txt"  # on which the divergence from the base is taken
    seeds: Seeds = (0, 1, 2)
    epochs: Count = 80
    rank: Count = 4
    learning_rate: Rate = 2e-3
    recipe_rate: Rate = 2e-4  # of the recipe as the document writes it, on v_proj alone (§6, step 3)
    retention_weight: Rate = 5.0


@dataclass(frozen=True)
class StudyTrajectory:
    """§2.3: how probable some words are after so many steps of the fact correction."""

    data: str = "data/fact_correction.de.txt"
    document: str = "data/document.yaml"
    seeds: Seeds = (0, 1, 2)
    steps: tuple[Steps, ...] = (0, 10, 30, 50)
    learning_rate: Rate = 2e-3
    batch_size: Count = 4
    windows: tuple[Steps, ...] = (4, 0)


@dataclass(frozen=True)
class StudyMethods:
    """§7 and §9.3: every method on the same data, each as its own stage's section says."""

    old_data: str = "data/pretrain.de.txt"
    new_data: str = "data/finetune.de.txt"
    prompt_words: Count = 2
    seeds: Seeds = (0, 1)


@dataclass(frozen=True)
class StudyRank:
    """§2.4, §5: what rank, alpha and learning rate change, on the new sentences."""

    old_data: str = "data/pretrain.de.txt"
    new_data: str = "data/finetune.de.txt"
    prompt_words: Count = 2
    seeds: Seeds = (0, 1, 2)
    ranks: Counts = (1, 2, 4, 8, 16, 64)
    alphas: Rates = (0.5, 1.0, 4.0, 8.0, 16.0)
    learning_rates: Rates = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class StudyForgetting:
    """§9.3: what is gained and what is lost, epoch by epoch."""

    old_data: str = "data/pretrain.de.txt"
    new_data: str = "data/finetune.de.txt"
    seeds: Seeds = (0, 1, 2)
    every: Annotated[int, AtLeast(1)] = 2  # epochs between two measurements


@dataclass(frozen=True)
class StudySpectrum:
    """§2.2: how few directions hold what full fine-tuning and LoRA change, and which; the LoRA that is extracted."""

    old_data: str = "data/pretrain.de.txt"
    new_data: str = "data/finetune.de.txt"
    seeds: Seeds = (0, 1, 2)  # subspaces are compared between them
    ranks: tuple[Annotated[int, AtLeast(8)], ...] = (8, 64)  # of LoRA; the first and the last are compared
    extracted: Counts = (1, 2, 4, 8, 16, 64)


@dataclass(frozen=True)
class StudyQuantization:
    """§10.1: what a base that is kept in fewer bits still knows, by precision."""

    data: str = "data/pretrain.de.txt"  # on which perplexity is taken, and by whose inputs GPTQ and AWQ are calibrated
    document: str = "data/document.yaml"
    seeds: Seeds = (0, 1, 2)  # of the base
    group: Count = 64  # weights of a row that share a scale


@dataclass(frozen=True)
class StudyIntrinsicDimension:
    """§2.2: full fine-tuning in random subspaces of so many dimensions."""

    data: str = "data/finetune.de.txt"
    document: str = "data/document.yaml"
    seeds: Seeds = (0, 1)
    dimensions: Counts = (128, 256, 512)
    learning_rate: Rate = 1e-2  # as far as a weight moves in a step
    share: Share = 0.9  # of what full fine-tuning brings


@dataclass(frozen=True)
class Figures:
    """Figures 1 to 5 and §2.1's attention; what trains for Figure 3 does so as study_trajectory says."""

    window: Steps = 0  # Figure 3: tokens of a training window on the way from tisch to sofa; 0: whole sentences
    reach: Rate = 4.0  # Figure 3: how far to each side one parameter is varied
    weight: TwoByTwo = (1.4, 0.5, -0.2, 0.9)  # Figure 4: W of the example
    change: TwoByTwo = (0.5, 0.35, 0.25, 0.1)  # Figure 4: its ΔW
    module: str = "layers.1.self_attn.v_proj"  # Figure 4: whose ΔW of full fine-tuning is measured

    def __post_init__(self) -> None:
        for key in ("weight", "change"):
            if len(numbers := getattr(self, key)) != 4:
                raise UserError(
                    f"figures.{key} must be the 4 numbers of a 2 × 2 matrix, row by row, got {len(numbers)}. "
                    "Write four."
                )


@dataclass(frozen=True)
class Claims:
    """What the document claims, and how each claim is measured."""

    data: str = "data/claims.yaml"


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
