"""What the calculator prints: formulas are computed from their own text, and lines are those that a
user reads.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.calc import fit, parallel
from pipeline.calc.fit import GIB, gpu
from pipeline.calc.memory import inference, predict
from pipeline.calc.method import FinetuningMethod, configure, projections, trainable
from pipeline.calc.report import answer, capped, cells_of, explain, gib, smallest
from pipeline.calc.settings import (
    LOGITS,
    TrainingConfig,
    check_options,
    chunk_rows,
    option,
    options_of,
)
from pipeline.calc.sources.open_model import built_in
from pipeline.calc.time import estimate
from pipeline.errors import UserError
from pipeline.stages.methods.freeze import Freeze
from pipeline.stages.methods.full import COUNTED as FULL
from pipeline.stages.methods.lora import COUNTED as LORA
from pipeline.stages.methods.lora import Lora
from pipeline.stages.registry import COUNTED
from tests.helpers.json_files import read_json

QWEN = built_in("qwen3-8b").shapes


def lines_of(model: Any, method: FinetuningMethod, run: TrainingConfig) -> dict[str, str]:
    return dict(explain(model, method, run, predict(model, method, run)))


def value_of(formula: str) -> float:
    """The formula without its words."""
    text = re.sub(r"[A-Za-z,]+ ?", "", re.sub(r"(?<=[0-9]),(?=[0-9])", "", formula)).replace(
        "×", "*"
    )
    return float(eval(text))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("qwen3-8b", LORA),
        ("qwen3-8b", Lora(rank=4, targets=("all-linear",), dora=True)),
        ("qwen3-30b-a3b", Lora(targets=("feed_forward", "attention"))),
    ],
)
def test_the_formula_of_a_projection_gives_its_parameters(name: str, method: Lora) -> None:
    model = built_in(name).shapes
    lines = lines_of(model, method, TrainingConfig())
    for projection in projections(model, method):
        each, total = lines[projection.name].split("; ")
        formula, result = each.split(" = ")
        assert value_of(formula) == value_of(result) == projection.parameters_each
        assert (
            value_of(result + total.split(" = ")[0])
            == value_of(total.split(" = ")[1])
            == projection.parameters
        )
        assert ("magnitude" in formula) == method.dora


@pytest.mark.parametrize("precision", ["bf16", "fp32", "int8", "nf4", "nf4-dq", "gptq"])
def test_the_formula_of_the_weights_gives_their_bytes(precision: str) -> None:
    line = lines_of(QWEN, LORA, TrainingConfig(precision=precision))["weights"]
    formula, size, _ = line.split(" = ")
    assert value_of(re.sub(r"\(.*?\)", "", formula)) == pytest.approx(value_of(size), rel=1e-3)
    assert f"({precision}" in line and ("(embeddings, head, norms, biases)" in line) == (
        precision not in ("bf16", "fp32")
    )
    assert ("for scales" in line) == (precision in ("int8", "nf4", "nf4-dq", "gptq"))


def test_a_precision_without_scales_is_explained_without_them() -> None:
    quantized, rest = f"{QWEN.quantizable:,}", f"{QWEN.total - QWEN.quantizable:,}"
    for precision, text in (
        (
            "fp8",
            f"{quantized} × 1 B (fp8: 8 bit) + {rest} × 2 B (embeddings, head, norms, biases) = ",
        ),
        (
            "nf4",
            f"{quantized} × 0.5625 B (nf4: 4 bit + 0.5 for scales) + {rest} × 2 B (embeddings, "
            "head, norms, biases) = ",
        ),
        ("bf16", f"{QWEN.total:,} × 2 B (bf16) = "),
    ):
        assert lines_of(QWEN, LORA, TrainingConfig(precision=precision))["weights"].startswith(text)


def test_the_table_of_positions_is_explained_where_there_is_one() -> None:
    mini = built_in("minigpt").shapes
    line = lines_of(mini, LORA, TrainingConfig(sequence=16, precision="fp32"))["weights"]
    assert (
        line
        == f"109,568 × 4 B (fp32) + {mini.fixed_positions:,} × 4 B (table of positions) = "
        + line.split(" = ", 1)[1]
    )


def test_activations_are_explained_by_what_is_checkpointed() -> None:
    size = "2 × 1,024 × 4,096 × 2 B = 16.0 MiB"
    for checkpointing, text in (
        (
            "full",
            f"36 blocks keep their input, {size} each (0.56 GiB); and what the peak's phase works "
            "with = ",
        ),
        (
            "selective",
            f"18 of 36 blocks keep their input, {size} each; the others every tensor that "
            "backward needs = ",
        ),
        (
            "none",
            "36 blocks keep every tensor that backward needs, counted operation by operation, in "
            f"units of {size} = ",
        ),
    ):
        run = TrainingConfig(2, 1024, checkpointing=checkpointing)
        assert lines_of(QWEN, LORA, run)["activations"].startswith(text)


def test_logits_adapter_and_optimizer_are_explained_with_their_values() -> None:
    run = TrainingConfig(2, 1024, optimizer="adamw", loss="chunked", chunk=512)
    lines = lines_of(QWEN, LORA, run)
    assert lines["logits"].startswith(
        "512 labels × 151,936 words × (2 B logits + 4 B in fp32, 4 B log-softmax"
    )
    assert "; 0.29 GiB for each 4 B)" in lines["logits"]
    assert lines["adapter"].startswith("7,667,712 × 4 B (fp32) = ")
    assert lines["gradients"].startswith("alive at the peak, of 7,667,712 × 4 B + 0 × 2 B = ")
    assert lines["optimizer"].startswith(
        "adamw: 2 bytes of state a trained byte, of 30,670,848 B = "
    )
    assert lines["trainable"] == "7,667,712 added + 0 of the base = 7,667,712"
    full = lines_of(QWEN, FULL, TrainingConfig(trainer="torch"))
    assert full["trainable"] == "0 added + 8,190,735,360 of the base = 8,190,735,360"
    assert full["logits"].startswith("2,048 labels")
    assert full["overhead"] == "CUDA context and kernels, assumed = 0 B = 0.00 GiB"
    assert full["peak"].startswith("the sum, in phase “")


def test_the_answer_has_every_part_of_the_contract() -> None:
    method = Lora(rank=4, alpha=8, rslora=True)
    run = TrainingConfig(2, 512, checkpointing="selective")
    found = answer(QWEN, method, run)
    memory = predict(QWEN, method, run)
    assert found["memory"] == {**memory.parts(), "peak": memory.peak, "peak_at": memory.where}
    assert found["inference"] == inference(QWEN, method, run)
    assert (found["rank"], found["alpha"], found["scale"]) == (4, 8, 4)
    assert (found["source"], found["assumptions"]["checkpointing"]) == (QWEN.source, "selective")
    assert found["parameters"]["components"] == QWEN.components()
    q = found["projections"][0]
    assert (q["A"], q["B"], q["rank"], q["experts"]) == ([4, 4096], [4096, 4], 4, 1)
    assert "rtx4090" in found["fits"] and "h100" in found["fits"] and "rtx4060" not in found["fits"]
    notes = answer(QWEN, Lora(rank=2000), run)["notes"]
    assert len(notes) == 2 and "takes every projection as 4,096 × 4,096" in notes[1]
    assert (
        answer(QWEN, FULL, TrainingConfig(checkpointing="none"))["assumptions"]["checkpointing"]
        is False
    )
    sparse = answer(built_in("mixtral-8x7b").shapes, Lora(rank=2, targets=("feed_forward",)), run)
    assert sparse["projections"][0]["parameters_each"] == 8 * 4 * (4096 + 2 * 14336)


def test_a_projection_is_a_row_of_its_shapes() -> None:
    _, k, *_ = projections(QWEN, LORA)
    assert cells_of(k) == ("k_proj", "4,096 → 1,024", "8 × 4,096", "1,024 × 8", "36", "1,474,560")
    up = projections(built_in("qwen3-30b-a3b").shapes, Lora(targets=("feed_forward",)))[0]
    assert cells_of(up)[4:] == ("48 × 128 experts", "352,321,536")


def test_sizes_are_in_the_unit_that_suits_them() -> None:
    sizes = (0, 512, 103_000, 2**20 // 4, 10 * 2**20, 11 * 2**20, 3 * GIB // 2)
    assert [gib(size) for size in sizes] == [
        "0",
        "0.5 KiB",
        "100.6 KiB",
        "0.25 MiB",
        "10.00 MiB",
        "0.01",
        "1.50",
    ]
    assert (capped(7, 8), capped(8, 8), capped(4096, 4096), capped("bf16", None)) == (
        "7",
        "8 or more",
        "4,096 or more",
        "bf16",
    )
    assert capped(1234, None) == "1,234"
    assert smallest(gpu("rtx4090").bytes) == gpu("rtx4090").label
    assert smallest(gpu("rtx4060").bytes) == gpu("rtx4060").label
    assert smallest(10**15) == "none of these"


# settings


@pytest.mark.parametrize("vocabulary", [50, 32_000, 50_257, 151_936, 262_144, 10**7])
def test_a_chunk_has_as_many_whole_64s_of_labels_as_the_logits_allow(vocabulary: int) -> None:
    rows = chunk_rows(vocabulary)
    assert type(rows) is int and rows % 64 == 0 and rows >= 64
    assert rows == 64 or 4 * vocabulary * rows <= LOGITS
    assert 4 * vocabulary * (rows + 64) > LOGITS


def test_an_option_has_a_default_a_help_and_a_rule() -> None:
    @dataclass
    class Settings:
        count: int = option(3, "How many.", least=2, unit=10)
        kind: str = option("a", "Which.", choices=("a", "b"))
        other: int = 5

    assert (Settings().count, Settings().kind) == (3, "a")
    found = options_of(Settings)
    assert [*found] == [*options_of(Settings())] == ["count", "kind"]
    assert (found["count"].default, found["count"].help, found["count"].least) == (
        3,
        "How many.",
        2,
    )
    check_options(Settings(20))
    with pytest.raises(
        UserError, match="count must be a whole number from 2 to 2,147,483,647, got 1"
    ):
        check_options(Settings(19))
    with pytest.raises(UserError, match="kind must be one of a, b, got 'c'"):
        check_options(Settings(20, "c"))


# the optimizer's update


def test_the_update_may_be_the_peak() -> None:
    """torch's foreach AdamW copies all that it updates; adamw-8bit has a chunk of its moments in
    fp32.
    """
    run = TrainingConfig(1, 16, trainer="torch-foreach", checkpointing="full")
    found, fused = (predict(QWEN, FULL, r) for r in (run, TrainingConfig(1, 16, trainer="torch")))
    assert found.where == "optimizer's update" != fused.where
    trained = 2 * QWEN.total
    assert (found.gradients, found.activations, found.logits) == (trained, 0, 0)
    assert found.optimizer == 2 * trained + trained and found.peak == sum(found.parts().values())


def test_8_bit_moments_need_a_chunk_of_them_in_fp32_and_paged_ones_the_state_of_that_chunk() -> (
    None
):
    """17 bytes per parameter: both moments in fp32, codes and edges in 4 bytes, and a bool."""
    # which encode and decode
    model, tables = built_in("smollm2-135m").shapes, 2 * (2 * 256 * 4 + 2**16)
    runs = [TrainingConfig(1, 1, optimizer=f"{paged}adamw-8bit") for paged in ("", "paged-")]
    state = 2 * (1 + 4 / 256)  # bytes: two moments of 8 bit, each with its share of a scale in fp32
    for method, in_fp32 in (
        (Lora(rank_pattern=((r".*\.0\..*q_proj", 9),)), 0),
        (Freeze(1, False), 8),
    ):  # a 16-bit base has weights and gradients in fp32 too
        count = trainable(model, method)
        chunk = min(2**24, -(-count // 256) * 256)
        plain, paged = (predict(model, method, run) for run in runs)
        assert plain.where == paged.where == "optimizer's update"
        assert plain.optimizer == round((in_fp32 + state) * count) + tables + 17 * chunk
        assert paged.optimizer == in_fp32 * count + tables + 17 * chunk + round(state * chunk)


# several GPUs


NOTES = [
    "replicated, sharded: each GPU has sequences of its own; tensor: all compute the same ones",
    "sharded: two blocks are whole at a time; trainable weights, embeddings and head are on every "
    "GPU",
    "moved: bytes that each GPU receives in a step, and sends, in rings, at the link's full "
    "bandwidth",
    "step: at least so long, with products at the GPU's peak and gathering behind them; sums are "
    "waited for",
]


def test_the_notes_say_what_the_numbers_of_several_gpus_assume() -> None:
    asked: dict[str, Any] = {"sequence": 64}
    found = parallel.answer(
        QWEN, configure(QWEN, COUNTED, "lora", **asked), parallel.parse_devices("2xh100")
    )
    assert found["notes"] == NOTES
    assert found["model"] == "qwen3-8b"
    assert {(row["layout"], row["method"]) for row in found["runs"]} >= {
        ("tensor", "full"),
        ("sharded", "QLoRA"),
    }
    full = configure(QWEN, COUNTED, "full", precision="fp32", **asked)
    assert parallel.answer(QWEN, full, parallel.parse_devices("2xh100"), sharded=True)["notes"] == [
        *NOTES[:2],
        "full, sharded: as FSDP2 does it; this project's trainer shards frozen weights only",
        NOTES[2],
        "no speed: the table has 16-bit and TF32 peaks; use --precision bf16 or tf32",
        NOTES[3],
    ]
    few = configure(built_in("qwen2.5-0.5b").shapes, COUNTED, "lora", **asked)
    unknown = parallel.answer(
        built_in("qwen2.5-0.5b").shapes, few, parallel.parse_devices("4x24GB")
    )
    assert unknown["notes"] == [
        "tensor: 14 heads cannot be divided among 4 GPUs",
        *NOTES[:2],
        "no speed: of 24 GiB only the memory is known",
    ]
    for row in unknown["runs"]:
        assert row["exchange_seconds"] is row["seconds"] is row["tokens_per_second"] is None


def test_a_sharded_run_has_the_least_number_of_its_own_layout() -> None:
    run, card = TrainingConfig(), gpu("a100-40")
    count = parallel.least("sharded", QWEN, FULL, run, card)
    assert count is not None
    sizes = [parallel.shard(QWEN, FULL, run, n).peak for n in (count - 1, count)]
    assert sizes[0] > card.bytes >= sizes[1]
    assert parallel.least("tensor", QWEN, FULL, run, card) != count


# devices and methods


def test_a_device_has_the_values_of_its_row_in_the_table() -> None:
    table = read_json(Path(fit.__file__).parent / "presets/gpus.json")
    devices = fit.gpus.__wrapped__()  # not what was read before
    assert sorted(devices) == sorted(table)
    assert [device.bytes for device in devices.values()] == sorted(
        device.bytes for device in devices.values()
    )
    for name, row in table.items():
        found = devices[name]
        assert (found.name, found.label, found.via) == (name, row["label"], row.get("via", ""))
        assert (found.tflops, found.gbps, found.link) == (
            row.get("tflops"),
            row.get("gbps"),
            row.get("link"),
        )
        assert found.bytes == pytest.approx(row["mib"] * 2**20 * row.get("usable", 1), abs=1)
        assert found.bf16 is row.get("bf16", True)
    assert devices["t4"].bf16 is False and devices["h100"].bf16 is True
    of_24 = fit.of_size(24)
    assert (of_24.name, of_24.label, of_24.bytes, of_24.tflops) == ("fit", "24 GiB", 24 * GIB, None)
    with pytest.raises(UserError, match=r"gpu 'zzzzzz' is not known. Known: rtx4060, "):
        gpu("zzzzzz")


def test_projections_that_share_a_last_name_keep_the_one_before() -> None:
    found = projections(built_in("gpt2").shapes, Lora(targets=("all-linear",)))
    assert [p.name for p in found] == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]


def test_a_method_takes_the_options_that_its_section_of_params_has() -> None:
    section = SimpleNamespace(last_blocks=3, learning_rate=1.0)
    assert Freeze(1, False).with_params(section) == Freeze(3, False)
    assert Freeze(1, False).params() == {"last_blocks": 1, "train_embeddings": False}


# time


def test_a_device_whose_memory_is_the_peak_fits() -> None:
    run = TrainingConfig(1, 64)
    peak = predict(QWEN, LORA, run).peak
    devices = [gpu("h100")._replace(bytes=size, name=str(size)) for size in (peak - 1, peak)]
    found = estimate(QWEN, LORA, run, 1000, devices, 2.0)
    assert [device["fits"] for device in found["gpus"]] == [False, True]
    assert found["flops"] > 0 and found["tokens"] == 1000 and found["price"] == 2
    for device in found["gpus"]:
        low, high = device["hours"]
        assert device["cost"] == (2 * low, 2 * high) and low < high
