"""What `lora new` chooses: the settings that fit, in the order of what they cost, and never one
that the user set.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.calc.sources.open_model import built_in
from pipeline.data.check import DataReport, check
from pipeline.errors import UserError
from pipeline.models.device import fast_precision
from pipeline.project.advice import BATCH
from pipeline.stages.methods.lora import FinetuneLora, rate_for
from pipeline.stages.quickstart import Request, _share
from pipeline.stages.recipe import ON_CPU, ROOM, Machine, Recipe, choose
from pipeline.stages.registry import COUNTED, METHODS
from tests.conftest import Lora
from tests.helpers.json_files import write_json
from tests.helpers.projects import load, refusal

QWEN = built_in("qwen3-0.6b").shapes
DATA = replace(
    check([]),
    examples=1_000,
    tokens=200_000,
    trained_tokens=80_000,
    quantiles={"p50": 150, "p90": 300, "p95": 400, "p99": 500, "max": 900},
    suggested_max_length=512,
)
STAGES = [METHODS["lora"]]
GIB = 2**30


def chosen(
    memory: float, data: DataReport = DATA, precision: str = "bf16", **given: object
) -> Recipe:
    said = {f"training.{key}": value for key, value in given.items()}
    machine = Machine("a device", round(memory * GIB), precision)
    return choose(QWEN, data, 0.1, machine, STAGES, said)


@pytest.mark.parametrize("method", COUNTED)
def test_a_bare_section_has_what_is_chosen_but_for_what_depends_on_data_and_memory(
    tmp_path: Path, method: str
) -> None:
    stage = METHODS[method]
    (tmp_path / "params.yaml").write_text(f"base: model\n{stage.section}: {{}}\n", encoding="utf-8")
    (tmp_path / "model").mkdir()
    write_json(tmp_path / "model/config.json", {"hidden_size": QWEN.hidden})
    bare = load(tmp_path / "params.yaml").section(stage.section)
    recipe = choose(QWEN, DATA, 0.1, Machine("a device", 64 * GIB, "bf16"), [stage], {})
    by_data = {"batch_size", "tokens_per_batch", "max_length", "eval_share", "samples"}
    # the texts are copied into the project
    by_data |= {"retention_data", "retention_weight", "retention_batch_size"}
    chosen_values = {key.partition(".")[2]: value for key, value in recipe.values.items()}
    assert {"window", "epochs", "schedule"} <= chosen_values.keys()
    for key in chosen_values.keys() - by_data:
        assert getattr(bare, key) == chosen_values[key], key


def test_less_memory_costs_smaller_batches_then_recomputation_then_bits_then_length() -> None:
    order = [
        ("training.tokens_per_batch", 16_384),
        ("training.gradient_checkpointing", "none"),
        ("finetune_lora.quantization", "none"),
        ("training.max_length", 960),
    ]
    changed = list[str]()
    for gib in (64, 8, 4, 3, 2.5, 2, 1.75, 1.5, 1.4, 1.3, 1.2):
        try:
            recipe = chosen(gib)
        except UserError:
            break
        assert recipe.peak is not None and recipe.peak <= ROOM * gib * GIB
        of_step = ("batch_size", "gradient_accumulation_steps")
        assert [recipe.values[f"training.{key}"] for key in of_step] == [16, 1], "the same step"
        changed += [
            key for key, plain in order if recipe.values[key] != plain and key not in changed
        ]
    assert changed == [key for key, _ in order][: len(changed)] and len(changed) >= 3


@pytest.mark.parametrize("gib", [6, 8, 10, 12, 16, 64])
def test_batches_have_the_most_tokens_that_fit_without_recomputation(gib: float) -> None:
    recipe = chosen(gib)
    budget = recipe.values["training.tokens_per_batch"]
    assert recipe.values["training.gradient_checkpointing"] == "none"
    if budget < 16_384:
        larger = chosen(gib, tokens_per_batch=2 * budget)
        assert larger.values["training.gradient_checkpointing"] != "none"


def test_a_cpu_begins_with_smaller_batches() -> None:
    machine = Machine("a CPU", 64 * GIB, "bf16", is_cpu=True)
    recipe = choose(QWEN, DATA, 0.1, machine, STAGES, {})
    assert recipe.values["training.tokens_per_batch"] == ON_CPU


def test_where_nothing_fits_is_one_message() -> None:
    with pytest.raises(UserError, match=r"a device has 256\.00 MiB free\. Use a smaller model"):
        chosen(0.25)


def test_what_the_user_set_is_never_replaced() -> None:
    recipe = chosen(64, batch_size=3, epochs=7, max_length=100)
    assert [recipe.values[f"training.{key}"] for key in ("batch_size", "epochs", "max_length")] == [
        3,
        7,
        100,
    ]
    assert recipe.reasons["training.epochs"] == "as you set it"


def test_the_rank_grows_with_the_data_and_alpha_with_the_rank() -> None:
    ranks = [
        chosen(64, replace(DATA, trained_tokens=tokens)).values["finetune_lora.rank"]
        for tokens in (10**4, 4 * 10**7, 8 * 10**7, 10**9)
    ]
    assert ranks == sorted(ranks) and ranks[0] == 16 < ranks[1] < ranks[2] and ranks[3] == 128
    assert chosen(64).values["finetune_lora.alpha"] == 32


def test_a_wider_base_takes_a_lower_rate_and_one_of_8_billion_that_of_a_bare_section() -> None:
    assert [rate_for(width) for width in (64, 576, 1024, 2048, 4096, 8192)] == [
        1e-3,
        1e-3,
        6e-4,
        4e-4,
        2e-4,
        1e-4,
    ]
    assert rate_for(4096) == FinetuneLora.PRETRAINED["learning_rate"]


def test_answers_on_other_texts_are_retained_unless_the_user_says_otherwise() -> None:
    names = ("retention_data", "retention_weight", "retention_batch_size")
    assert [chosen(64).values[f"finetune_lora.{name}"] for name in names] == [
        "data/retain.en.jsonl",
        1,
        4,
    ]
    given = {"finetune_lora.retention_weight": 0}
    off = choose(QWEN, DATA, 0.1, Machine("a device", 64 * GIB, "bf16"), STAGES, given)
    assert (
        not {"finetune_lora.retention_data", "finetune_lora.retention_batch_size"}
        & off.values.keys()
    )


def test_a_cpu_without_bf16_trains_in_fp32_and_is_never_quantized() -> None:
    recipe = chosen(64, precision="fp32")
    assert recipe.values["training.precision"] == "fp32"
    with pytest.raises(UserError, match="a step takes"):
        chosen(1.5, precision="fp32")


def test_a_t4_trains_8_billion_parameters_in_nf4_and_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has 16 GB and compute capability 7.5: no instructions for bf16."""

    def has_bf16(including_emulation: bool = True) -> bool:
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", has_bf16)
    t4 = Machine("Tesla T4", round(14.5 * GIB), fast_precision(torch.device("cuda", 0)))
    recipe = choose(built_in("qwen3-8b").shapes, DATA, 0.1, t4, STAGES, {})
    assert recipe.values["training.precision"] == "fp16"
    assert recipe.values["finetune_lora.quantization"] == "nf4-dq"
    assert recipe.peak is not None and recipe.peak <= ROOM * t4.memory
    small = choose(QWEN, DATA, 0.1, t4, STAGES, {})
    assert small.values["finetune_lora.quantization"] == "none"
    bf16 = choose(QWEN, DATA, 0.1, replace(t4, precision="bf16"), STAGES, {})
    assert small.peak == bf16.peak, "16 bits are 16 bits"


def test_the_examples_a_step_are_those_of_the_accumulation_that_the_user_set() -> None:
    reasons = chosen(64, gradient_accumulation_steps=4).reasons
    assert reasons["training.batch_size"] == "64 examples a step: an epoch has 15 steps"


@pytest.mark.parametrize("devices, batch", [(1, 16), (2, 32), (8, 32)])
def test_several_gpus_share_more_examples_a_step_up_to_what_lora_takes(
    devices: int, batch: int
) -> None:
    machine = Machine("a device", 64 * GIB, "bf16", gpus=devices, devices=devices)
    recipe = choose(QWEN, DATA, 0.1, machine, STAGES, {})
    assert recipe.values["training.batch_size"] == batch <= BATCH, "`lora advise` agrees"
    assert recipe.values["finetune_lora.learning_rate"] == rate_for(QWEN.hidden)
    shared = f" for {devices} GPUs, at the learning rate for one" if devices > 1 else ""
    steps = -(-900 // batch)
    assert recipe.reasons["training.batch_size"] == (
        f"{batch} examples a step{shared}: an epoch has {steps} steps"
    )
    few = choose(QWEN, replace(DATA, examples=60), 0.1, machine, STAGES, {})
    assert few.values["training.batch_size"] == 2, "an epoch keeps its steps"


def test_lora_train_counts_the_processes_of_all_machines(
    cli: Lora, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(request: Request, *_: object, **__: object) -> Iterator[None]:
        raise UserError(f"{request.devices} devices")
        yield

    monkeypatch.setattr("pipeline.stages.quickstart.begin", begin)
    train = ("train", "--devices", "4", "--nnodes", "2", "--rdzv-endpoint", "localhost:1")
    assert refusal(cli(*train, cwd=Path())) == "error: 8 devices\n"


def test_one_process_beside_other_gpus_is_told_what_they_would_take() -> None:
    alone = Machine("a device", 64 * GIB, "bf16", gpus=8)
    recipe = choose(QWEN, DATA, 0.1, alone, STAGES, {})
    assert recipe.values == chosen(64).values
    assert recipe.reasons["training.batch_size"] == (
        "16 examples a step: an epoch has 57 steps; for --devices 8 set 32"
    )


@pytest.mark.parametrize("count", [501, 10**4, 10**6, 4_100_000, 10**8])
def test_of_any_number_of_examples_some_are_held_out(count: int) -> None:
    assert 50 <= _share([], {}, count) * count <= 210


def test_few_examples_are_seen_more_often_and_in_smaller_steps() -> None:
    small, large = (
        chosen(64, replace(DATA, examples=60)),
        chosen(64, replace(DATA, examples=50_000)),
    )
    keys = ("training.epochs", "training.batch_size")
    assert [small.values[key] for key in keys] == [3, 2] and [
        large.values[key] for key in keys
    ] == [1, 16]
