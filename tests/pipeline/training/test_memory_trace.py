"""The trainer's step, traced without weights, against the calculator's formula: same modules, loss
and optimizer.
"""

from dataclasses import replace

import pytest

from bench.memory import shortened
from pipeline.calc.families import architecture
from pipeline.calc.memory import predict
from pipeline.calc.method import FinetuningMethod
from pipeline.calc.settings import OPTIMIZERS, TrainingConfig
from pipeline.stages.methods.freeze import Freeze
from pipeline.stages.methods.full import Full
from pipeline.stages.methods.lora import Lora
from pipeline.training.memory.trace import traced_peak

STEP = TrainingConfig(batch=1, sequence=2048, cpu=True, loss="chunked", chunk=256, label_share=0.4)
SHORT = replace(STEP, batch=4, sequence=256, attention="short", checkpointing="none")


@pytest.mark.parametrize("blocks", [6, pytest.param(36, marks=pytest.mark.slow)])
@pytest.mark.parametrize("adapter", ["fp32", "bf16"])
@pytest.mark.parametrize("run", [
    replace(STEP, checkpointing="none"), replace(STEP, checkpointing="selective"), STEP, SHORT,
    replace(STEP, checkpointing="none", cpu=False), replace(STEP, checkpointing="selective", cpu=False),
], ids=["none", "selective", "full", "short", "gpu-none", "gpu-selective"])  # fmt: skip
@pytest.mark.sampled(5)
def test_qwen3_8bs_step_fits_the_calculator_within_one_percent(
    run: TrainingConfig, adapter: str, blocks: int
) -> None:
    """Exact shapes under fake tensors, LoRA r = 8 on q, k, v, o; the model has 36 blocks."""
    config, run = shortened("qwen3-8b", blocks), replace(run, adapter_precision=adapter)
    formula = predict(architecture(config, "qwen3-8b"), Lora(), run).peak
    assert formula == pytest.approx(traced_peak(config, Lora(), run), rel=0.01)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "name", ["llama-3.2-1b", "smollm2-135m", "qwen2.5-0.5b", "mistral-7b-v0.1"]
)
@pytest.mark.parametrize(
    "method",
    [
        Full(),
        Freeze(),
        Lora(targets=("all-linear",)),
        Lora(embeddings="all"),
    ],
    ids=["full", "freeze", "all-linear", "embeddings"],
)
@pytest.mark.sampled(5)
@pytest.mark.slow
def test_other_models_and_methods_fit_within_three_percent(
    name: str, method: FinetuningMethod, checkpointing: str
) -> None:
    precision = "fp32" if "smol" in name else "bf16"
    config, run = (
        shortened(name, 3),
        replace(SHORT, precision=precision, checkpointing=checkpointing),
    )
    formula = predict(architecture(config, name), method, run).peak
    assert formula == pytest.approx(traced_peak(config, method, run), rel=0.03)


REFINED = {
    "dora": Lora(targets=("all-linear",), dora=True),
    "pissa": Lora(targets=("all-linear",), pissa=True),
    "dora from pissa": Lora(targets=("all-linear",), dora=True, pissa=True),
    "dropout": Lora(targets=("all-linear",), lora_dropout=0.1),
    "dora with dropout": Lora(targets=("all-linear",), dora=True, pissa=True, lora_dropout=0.1),
    "patterns": Lora(
        targets=("all-linear",), rank_pattern=(("q_proj", 64), (r".*[01]\.mlp\..*", 2)), rslora=True
    ),
}


@pytest.mark.parametrize("adapter", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("name", REFINED)
@pytest.mark.sampled(5)
@pytest.mark.slow
def test_refinements_of_lora_fit_within_three_percent(
    name: str, checkpointing: str, adapter: str
) -> None:
    config = shortened("smollm2-135m", 3)
    run = replace(SHORT, checkpointing=checkpointing, adapter_precision=adapter)
    formula = predict(architecture(config, name), REFINED[name], run).peak
    assert formula == pytest.approx(traced_peak(config, REFINED[name], run), rel=0.03)


@pytest.mark.slow
def test_dora_pissa_and_dropout_need_more_than_lora_and_the_formula_says_how_much() -> None:
    """With activations rather than logits at the peak, the formula predicts the difference."""
    config = shortened("smollm2-135m", 4)
    run = replace(SHORT, precision="fp32", label_share=0.01)
    shapes, plain = architecture(config, "four"), Lora(targets=("all-linear",))
    base = predict(shapes, plain, run).peak, traced_peak(config, plain, run)
    for name in ("dora", "pissa", "dropout"):
        more = (
            predict(shapes, REFINED[name], run).peak - base[0],
            traced_peak(config, REFINED[name], run) - base[1],
        )
        assert more[0] == pytest.approx(more[1], rel=0.1), name
        assert more[1] > 0.01 * base[1]


@pytest.mark.slow
def test_our_step_needs_less_than_the_libraries() -> None:
    """Logits only at labels and in chunks, norms that save their input, LoRA added in place."""
    config = shortened("qwen3-8b", 6)
    ours = traced_peak(config, Lora(), replace(STEP, checkpointing="none"))
    theirs = TrainingConfig(batch=1, sequence=2048, checkpointing="none", trainer="torch")
    assert ours < 0.85 * traced_peak(config, Lora(), theirs)


@pytest.mark.parametrize("optimizer", OPTIMIZERS[:2] + OPTIMIZERS[3:])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.sampled(4)
@pytest.mark.slow
def test_an_optimizers_state_and_update_fit_within_half_a_percent(
    optimizer: str, precision: str
) -> None:
    """Of a full model on four tokens: state and update are the step."""
    config = shortened("smollm2-135m", 3)
    run = replace(
        SHORT, batch=1, sequence=4, precision=precision, optimizer=optimizer, neftune_alpha=5.0
    )
    for method in (Full(), Lora(rank=64, targets=("all-linear",))):
        formula = predict(architecture(config, optimizer), method, run)
        assert formula.peak == pytest.approx(traced_peak(config, method, run), rel=0.005)


def test_the_update_of_8_bit_moments_is_the_peak_where_a_step_is_small() -> None:
    """The moments of a million weights are in fp32 at once."""
    run = replace(SHORT, batch=1, sequence=4, precision="fp32", optimizer="adamw-8bit")
    shapes = architecture(shortened("smollm2-135m", 3), "small")
    assert (
        predict(shapes, Lora(rank=64, targets=("all-linear",)), run).where == "optimizer's update"
    )


def test_paged_state_is_not_on_the_device_but_what_is_updated_is() -> None:
    shapes = architecture(shortened("smollm2-135m", 3), "small")
    eight, paged = (
        predict(shapes, Full(), replace(STEP, precision="fp32", optimizer=name))
        for name in OPTIMIZERS[1:3]
    )
    assert eight.optimizer - paged.optimizer == pytest.approx(
        2 * (1 + 4 / 256) * shapes.total, rel=1e-6
    )
    assert 0 < paged.optimizer < 2**18, "the tables of the code"
