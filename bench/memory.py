"""The formula's peak against the traced peak, over a grid of settings."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from bench.measure import Row
from pipeline.calc.families import architecture
from pipeline.calc.memory import predict
from pipeline.calc.method import FinetuningMethod, with_options
from pipeline.calc.settings import TrainingConfig
from pipeline.calc.sources.open_model import entry
from pipeline.stages.methods.lora import Lora
from pipeline.stages.registry import COUNTED
from pipeline.training.memory.trace import traced_peak


@dataclass(frozen=True)
class Corner:
    """One setting of the grid."""

    model: str
    method: str
    batch: int
    sequence: int
    checkpointing: str
    loss: str
    precision: str

    def settings(self) -> tuple[dict[str, Any], FinetuningMethod, TrainingConfig]:
        """(config, method, run); models have their real widths and vocabularies, but 8 blocks to
        keep tracing fast.
        """
        run = TrainingConfig(
            self.batch,
            self.sequence,
            self.precision,
            checkpointing=self.checkpointing,
            loss=self.loss,
            chunk=512,
            trainer="torch",
        )
        targets = ("all-linear",) if self.model.startswith("smollm") else ("attention",)
        return shortened(self.model, 8), with_options(COUNTED, targets=targets)[self.method], run


SIZES = ((1, 2048), (4, 512))
CORNERS = [
    Corner(model, method, batch, sequence, checkpointing, loss, precision)
    for (model, precision), method, (batch, sequence), (checkpointing, loss) in product(
        (
            ("qwen3-8b", "bf16"),
            ("llama-3.2-1b", "bf16"),
            ("gemma-3-1b", "bf16"),
            ("smollm2-135m", "fp32"),
        ),
        ("full", "freeze", "lora"),
        SIZES,
        (("none", "full"), ("full", "full"), ("none", "chunked")),
    )
]


@dataclass(frozen=True)
class CornerResult:
    """Traced and predicted peak of a corner, in bytes."""

    corner: Corner
    traced: int
    formula: int

    @property
    def error(self) -> float:
        return self.formula / self.traced - 1


def worst(corners: Sequence[Corner]) -> list[CornerResult]:
    """Results of the corners, largest error first."""
    results = []
    for corner in corners:
        config, method, run = corner.settings()
        formula = predict(architecture(config, corner.model), method, run).peak
        results.append(CornerResult(corner, traced_peak(config, method, run), formula))
    return sorted(results, key=lambda result: -abs(result.error))


def memory() -> Iterator[Row]:
    """Time of the formula and of a trace, and the largest error over the grid."""
    model, config, times = (
        architecture(entry("qwen3-8b")["config"], "qwen3-8b"),
        entry("qwen3-8b")["config"],
        [],
    )
    for run in (
        lambda: predict(model, Lora(), TrainingConfig(trainer="torch")),
        lambda: traced_peak(config, Lora(), TrainingConfig(trainer="torch")),
    ):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    formula, traced = times
    yield Row(
        "predict Qwen3-8B, LoRA", formula, "traced", traced / formula, "under 30 ms", formula < 0.03
    )
    start = time.perf_counter()
    results = worst(CORNERS)
    error, corner = results[0].error, results[0].corner
    where = (
        f"{corner.model}, {corner.method}, {corner.loss} logits, {corner.checkpointing} "
        "checkpointing"
    )
    name = f"formula against {len(results)} traced steps, worst {error:+.2%}: {where}"
    yield Row(
        name,
        time.perf_counter() - start,
        "traced peak",
        results[0].formula / results[0].traced,
        "3%",
        abs(error) < 0.03,
    )


def shortened(name: str, blocks: int) -> dict[str, Any]:
    """A built-in model's config with fewer blocks."""
    config: dict[str, Any] = entry(name)["config"]
    key = "n_layer" if "n_layer" in config else "num_hidden_layers"
    short = {**config, key: min(blocks, config[key])}
    if dense := config.get("first_k_dense_replace"):  # those before the experts: keep some of both
        short["first_k_dense_replace"] = min(dense, blocks // 2)
    if kinds := config.get("layer_types"):
        short["layer_types"] = kinds[:blocks]
    return short
