"""What prompt and prefix tuning share: only virtual tokens before every sequence train (the document's §7)."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

from pipeline.adapters.peft import attach_virtual_tokens, save_virtual
from pipeline.calc.method import FinetuningMethod
from pipeline.models.device import placed_for_inference
from pipeline.models.load import DTYPES, Base
from pipeline.project.runner import Event, Facts, Job
from pipeline.stages.finetune import Attached


def attach_virtual(job: Job, settings: Any, base: Base, counted: FinetuningMethod) -> Generator[Event, None, Attached]:
    """Put virtual tokens of the stage's kind before every sequence; they are saved in PEFT's format."""
    yield from ()
    model = base.model
    dtype = DTYPES[settings.adapter_precision]
    with placed_for_inference(model):  # it computes their first keys and values
        attach_virtual_tokens(
            model, job.stage.method, settings.virtual_tokens, len(base.tokenizer), settings.seed, dtype
        )

    def save(out: Path) -> Facts:
        save_virtual(out, model, "artifacts/expanded")
        return {}

    return Attached(counted, save)
