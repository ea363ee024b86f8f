"""The methods of the document's §7 and §10 as runs of their stages, for the studies that compare them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from pipeline.document.studies.shared.runner import Run
from pipeline.project.params.load import Params


@dataclass(frozen=True)
class Method:
    """A stage with changed settings.

    `color`: the key of its color in COLORS. `faster`: factor on the section's learning rate.
    """

    stage: str
    changes: Mapping[str, Any]
    color: str
    faster: float = 1.0

    def run(self, name: str, params: Params, seed: int, **more: Any) -> Run:
        """The stage's training with one seed; `more` overrides further keys of its section."""
        base = params.section(self.stage)
        changes = {"learning_rate": base.learning_rate * self.faster, **self.changes, **more}
        section: Any = replace(base, seed=seed, **changes)
        return Run(f"{name}, seed {seed}", self.stage, {self.stage: section})


LORA = "finetune_lora"
METHODS = {
    "training from scratch": Method("train_from_scratch", {}, "scratch"),
    "full fine-tuning": Method("finetune_full", {}, "full"),
    "layer freezing": Method("finetune_freeze", {}, "freeze"),
    "LoRA": Method(LORA, {}, "lora"),
    "LoRA, new rows": Method(LORA, {"train_embeddings": "new_rows"}, "lora"),
    "LoRA, matrices alone": Method(LORA, {"train_embeddings": "none"}, "lora"),
    "QLoRA": Method(LORA, {"quantization": "nf4-dq"}, "lora"),
    "DoRA": Method(LORA, {"dora": True}, "lora"),
    "LoRA+": Method(LORA, {"loraplus_ratio": 16.0}, "lora"),  # B has the higher rate, as in the paper
    "LoRA+, A faster": Method(LORA, {"loraplus_ratio": 1 / 16}, "lora"),  # B has the lower rate, as in the document
    "LoRA+, A 16 × faster": Method(LORA, {"loraplus_ratio": 1 / 16}, "lora", 16.0),  # B has LoRA's rate, all else 16 ×
    "prefix tuning": Method("finetune_prefix", {}, "prefix"),
    "prompt tuning": Method("finetune_prompt", {}, "prompt"),
}
