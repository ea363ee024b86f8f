"""What prompt and prefix tuning share: only virtual tokens before every sequence train (the document's §7)."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

from pipeline.adapters.peft.virtual_tokens import VirtualSpec, attach_virtual_tokens, cast_virtual_tokens, save_virtual
from pipeline.calc.method import FinetuningMethod
from pipeline.models.load import DTYPES, Base
from pipeline.project.runner import Event, Facts, Job
from pipeline.stages.finetune import Attached


def attach_virtual(job: Job, settings: Any, base: Base, counted: FinetuningMethod) -> Generator[Event, None, Attached]:
    """Put virtual tokens of the stage's kind before every sequence; they are saved in PEFT's format."""
    yield from ()
    model = base.model
    spec = VirtualSpec(job.stage.method, settings.virtual_tokens)
    attach_virtual_tokens(model, spec, len(base.tokenizer), settings.seed)
    assert model.virtual is not None
    cast_virtual_tokens(model.virtual, DTYPES[settings.adapter_precision])

    def save(out: Path) -> Facts:
        save_virtual(out, model, "artifacts/expanded")
        return {}

    return Attached(counted, save)
