"""How many steps, how the rate rises, and how often a checkpoint is written."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments

from pipeline.errors import UserError
from pipeline.project.params.sections import Training
from pipeline.project.runner import Progress, checkpoints, discard_checkpoints, run
from pipeline.stages.registry import open_project
from pipeline.training.batches import Batches
from pipeline.training.optimizer import rate
from tests.helpers.errors import user_error
from tests.helpers.projects import BRIEF, STAGES, make, make_base, new_project
from tests.helpers.real import listed, toy, trained, windows_of


@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 200))
def test_max_steps_overrides_epochs_as_in_transformers(
    epochs: int, per_epoch: int, steps: int
) -> None:
    assert Training(epochs=epochs).total_steps(per_epoch) == epochs * per_epoch
    assert Training(epochs=epochs, max_steps=steps).total_steps(per_epoch) == steps


@pytest.mark.parametrize("steps", [2, 7])
def test_training_takes_max_steps_steps_whether_epochs_have_fewer_or_more(steps: int) -> None:
    """Three an epoch; the third epoch is shuffled as it would be if `epochs` had asked for it."""
    records, longer = (
        trained(toy("llama"), Batches(listed(windows_of((4, 4, 5, 6, 3))), 2, 0), given)[0]
        for given in (Training(epochs=2, max_steps=steps), Training(epochs=3))
    )
    assert [record.step for record in records] == list(range(1, steps + 1))
    assert [record.epoch for record in records] == [1 + n // 3 for n in range(steps)]
    assert records == longer[:steps]


@given(st.floats(0.001, 0.99), st.integers(2, 5000))
def test_a_warmup_ratio_is_the_steps_that_transformers_makes_of_it(
    ratio: float, total: int
) -> None:
    theirs = TrainingArguments(
        "unused", warmup_steps=ratio, report_to=[], use_cpu=True
    ).get_warmup_steps(total)
    settings = Training(warmup_ratio=ratio, schedule="linear")
    assert settings.warmup(total) == theirs
    same = Training(warmup_steps=theirs, schedule="linear")
    for step in {1, theirs, min(theirs + 1, total), total}:
        assert math.isclose(rate(settings, step, total), rate(same, step, total))


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(new_project(tmp_path_factory.mktemp("options") / "p"), BRIEF)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["warmup_steps=3", "warmup_ratio=0.1"],
            "finetune_lora.warmup_steps is 3 and warmup_ratio 0.1, but only one",
        ),
        (["warmup_ratio=1"], "finetune_lora.warmup_ratio must be below 1, got 1"),
        (["epochs=-1"], "finetune_lora.epochs must be at least 1, got -1"),
        (
            ["max_steps=4", "warmup_steps=4"],
            "finetune_lora.warmup_steps must be below 4, the total number of training",
        ),
        (
            ["max_steps=1", "warmup_ratio=0.1"],
            "warmup_ratio 0.1 of 1 steps, rounded up, leaves none after the warm-up",
        ),
        (["save_steps=-1"], "finetune_lora.save_steps must be at least 0, got -1"),
        (
            ["save_total_limit=2"],
            "finetune_lora.save_total_limit is 2, but save_steps is 0, so that nothing is kept",
        ),
        (["load_best=true"], "finetune_lora.load_best is true, but there is no evaluation set"),
        (["load_best=2"], "finetune_lora.load_best must be true or false, got 2"),
        (
            ["optimizer=lion"],
            "finetune_lora.optimizer must be one of adamw, adamw-8bit, paged-adamw-8bit, sgd, muon",
        ),
        (
            ["layers_to_transform=first"],
            "finetune_lora.layers_to_transform must be numbers of blocks from 0, such as 3, 8-15 "
            "or last 8, or a list of these, got 'first'",
        ),
        (["layers_to_transform=9"], "layers_to_transform: '9' is not among the model's 2 blocks"),
        (["exclude_modules=[fc9]"], "exclude_modules: 'fc9' matches no layer of target_modules"),
        (["modules_to_save=[fc9]"], "modules_to_save: no module of the model is named fc9"),
        (
            ["modules_to_save=[fc1]", "quantization=nf4", "precision=bf16"],
            "is quantized and cannot train in full. Remove it, or set quantization to none.",
        ),
        (["adam_beta1=1"], "finetune_lora.adam_beta1 must be below 1, got 1"),
        (["adam_beta2=-0.1"], "finetune_lora.adam_beta2 must be at least 0, got -0.1"),
        (["adam_epsilon=0"], "finetune_lora.adam_epsilon must be more than 0, got 0"),
        (
            ["optimizer=sgd", "adam_beta2=0.95"],
            "finetune_lora.adam_beta2 is 0.95, but optimizer sgd does not read it. Remove it, or "
            "set optimizer to adamw or",
        ),
        (["schedule=step"], "finetune_lora.schedule must be one of constant, linear, cosine, cos"),
        (["min_lr_ratio=1"], "finetune_lora.min_lr_ratio must be below 1, got 1"),
        (
            ["schedule=inverse_sqrt", "min_lr_ratio=0.1"],
            "finetune_lora.min_lr_ratio is 0.1, but schedule inverse_sqrt does not read it. Remove "
            "it, or set schedule to linear or cosine or",
        ),
        (["num_cycles=0"], "finetune_lora.num_cycles must be at least 1, got 0"),
        (
            ["schedule=cosine", "num_cycles=2"],
            "finetune_lora.num_cycles is 2, but schedule cosine does not read it. Remove it, or "
            "set schedule to cosine_with_restarts.",
        ),
        (["power=0"], "finetune_lora.power must be more than 0, got 0"),
        (["power=2"], "finetune_lora.power is 2, but schedule constant does not read it."),
        (["decay_ratio=1.5"], "finetune_lora.decay_ratio must be at most 1, got 1.5"),
        (["decay_ratio=0.5"], "finetune_lora.decay_ratio is 0.5, but schedule constant does not"),
        (["weight_decay=-0.1"], "finetune_lora.weight_decay must be at least 0, got -0.1"),
        (["lora_dropout=1"], "finetune_lora.lora_dropout must be below 1, got 1"),
        (["neftune_alpha=-5"], "finetune_lora.neftune_alpha must be at least 0, got -5"),
        (["neftune_noise_alpha=-5"], "finetune_lora.neftune_noise_alpha must be at least 0"),
    ],
)
def test_a_bad_value_is_one_message(mini: Path, overrides: list[str], message: str) -> None:
    said = user_error(
        make, mini, ["finetune_lora"], [f"finetune_lora.{override}" for override in overrides]
    )
    assert message in said


def abandoned(root: Path, overrides: list[str], last: int, **options: Any) -> None:
    """Run finetune_lora, and leave it after step `last` as if killed."""
    project = open_project(root / "params.yaml", overrides)
    events: Iterator[Any] = run(project, STAGES["finetune_lora"], force=True, **options)
    next(event for event in events if isinstance(event, Progress) and event.done == last)
    events.close()  # type: ignore[attr-defined]


def test_the_command_line_says_how_often_a_checkpoint_to_resume_from_is_written(
    mini: Path,
) -> None:
    discard_checkpoints(mini / "runs/finetune_lora")
    abandoned(mini, [], 7, checkpoint_every=4)
    assert [path.name for path in checkpoints(mini / "runs/finetune_lora")] == [
        "checkpoint-000000004"
    ]


def test_steps_that_take_long_are_saved_sooner(mini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    discard_checkpoints(mini / "runs/finetune_lora")
    monkeypatch.setattr("pipeline.training.loop.MOST_LOST", 0.0)
    abandoned(mini, [], 7)
    assert [path.name for path in checkpoints(mini / "runs/finetune_lora")] == [
        "checkpoint-000000007"
    ]


def test_a_grid_that_contradicts_what_is_set_names_its_adapter(mini: Path) -> None:
    given = ["finetune_lora.warmup_steps=3", "finetune_sweep.grid={warmup_ratio: [0.1]}"]
    with pytest.raises(
        UserError, match=r"finetune_sweep, warmup_ratio-0.1: warmup_steps is 3 and warmup_ratio 0.1"
    ):
        make(mini, ["finetune_sweep"], given)
