"""The calculator: what a fine-tuning trains and needs, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.calc.architecture import Model
    from pipeline.calc.memory import Memory
    from pipeline.calc.method import Configuration


@dataclass(frozen=True)
class Calculation:
    """A model and a step of training it, counted from shapes alone."""

    model: Model
    given: Configuration  # its `method` and `run`

    @property
    def memory(self) -> Memory:
        """Bytes by part, and the peak."""
        from pipeline.calc.memory import predict

        return predict(self.model.shapes, self.given.method, self.given.run)

    def answer(self) -> dict[str, Any]:
        """All results as plain data, sizes in bytes: what `lora calc --json` prints."""
        from pipeline.calc import report
        from pipeline.stages.registry import note_targets

        answer = report.answer(self.model.shapes, self.given.method, self.given.run)
        targets = note_targets(self.model.shapes, self.given.method)
        return {**answer, "notes": [*answer["notes"], *filter(None, [targets])]}


def calc(model: str = "qwen3-8b", method: str = "lora", **options: Any) -> Calculation:
    """Parameters and memory of a fine-tuning, without downloading or loading anything.

    `model`: a built-in name, a folder, a .gguf file or a hub id. `options` as those of `lora calc`:
    rank=8, sequence=2048, batch=1, checkpointing="full", precision="nf4". Raises UserError.
    """
    from pipeline.calc.memory import refuse_impossible
    from pipeline.calc.method import configure
    from pipeline.calc.sources.open_model import open_model
    from pipeline.stages.registry import COUNTED

    loaded = open_model(model)
    given = configure(loaded.shapes, COUNTED, method, **options)
    refuse_impossible(loaded.shapes, given.method, given.run)
    return Calculation(loaded, given)
