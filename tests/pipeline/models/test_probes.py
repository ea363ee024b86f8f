"""Probes decide by what the numbers mean: another device's rounding is none of a model's faults, a
leak is.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.inference.batched_model import BatchedModel
from pipeline.inference.engine import LoadedModel
from pipeline.inference.model_pool import ResidentBase
from pipeline.models import generate
from pipeline.models.transformers_model import TransformersModel
from pipeline.project import probes
from pipeline.project.runner import Event, Note, Progress, _with_findings
from pipeline.stages.registry import open_project
from tests.helpers.checkpoints import small_minigpt
from tests.helpers.projects import note_texts
from tests.helpers.real import toy
from tests.helpers.rounding import OtherRounding

Body = Callable[..., Tensor]


def deep(family: str, std: float) -> TransformersModel:
    """36 blocks of width 512 in bf16."""
    width = {
        "hidden_size": 512,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    return toy(family, torch.bfloat16, std, num_hidden_layers=36, head_dim=64, **width).eval()


def replace_body(model: TransformersModel, body: Body) -> None:
    model.run_body = body  # type: ignore[method-assign]


@pytest.mark.parametrize("std", [0.02, 0.05])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mixtral"])
@pytest.mark.sampled(3)
@pytest.mark.slow
def test_another_rounding_is_not_taken_for_a_leak_nor_a_leak_for_rounding(
    family: str, std: float
) -> None:
    model = deep(family, std)
    resident = ResidentBase.__new__(ResidentBase)
    resident.loaded = LoadedModel("base", model, None, Path())  # type: ignore[arg-type]
    with OtherRounding():
        assert (
            model.supports_packing and model.supports_prefix and generate._reads_side_by_side(model)
        )
        assert BatchedModel(resident).works

    def mixing(
        inputs: Tensor, positions: Any = None, segments: Any = None, cache: Any = None, **_: Any
    ) -> Tensor:
        return TransformersModel.run_body(
            model, inputs, positions, None, None if segments else cache
        )

    replace_body(model, mixing)
    for known in ("supports_packing", "supports_prefix"):
        del model.__dict__[known]
    with OtherRounding():
        assert not model.supports_packing and not model.supports_prefix
        assert not generate._reads_side_by_side(model)


@pytest.mark.parametrize("reach", [5, 40, 60])
def test_what_leaks_later_than_a_short_sequence_is_long_is_found(reach: int) -> None:
    model = toy("llama", max_position_embeddings=400).eval()

    def leaking(
        inputs: Tensor, positions: Any = None, segments: Any = None, *_: Any, **__: Any
    ) -> Tensor:
        hidden = TransformersModel.run_body(model, inputs, positions, segments)
        return hidden + 0.3 * F.pad(hidden, (0, 0, reach, 0))[:, : hidden.shape[1]]

    replace_body(model, leaking)
    # such a model has a state, too, which goes from chunk to chunk
    model.config.linear_conv_kernel_dim = 4
    assert not model.supports_packing


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_oss"])
def test_a_model_of_few_positions_is_tried_within_them(family: str) -> None:
    assert toy(family, max_position_embeddings=8, sliding_window=4).eval().supports_packing


@pytest.mark.parametrize("positions", [1, 3, 4])
def test_a_model_of_too_few_positions_to_be_tried_reads_one_sequence_at_a_time(
    positions: int,
) -> None:
    assert small_minigpt(max_positions=positions).eval().supports_packing == (positions > 3)


def test_a_token_whose_embedding_is_zero_has_hidden_states_of_zero() -> None:
    model = toy("llama", torch.bfloat16).eval()
    with torch.no_grad():
        model.embeddings.get_parameter("weight")[1] = 0  # as torch begins with that of a pad token
    assert model.supports_packing and model.supports_prefix


def test_what_a_model_raises_alone_is_not_taken_for_an_answer() -> None:
    model = toy("llama").eval()

    def broken(*_: Any, **__: Any) -> Tensor:
        raise KeyError("scales")

    replace_body(model, broken)
    with pytest.raises(KeyError, match="scales"):
        _ = model.supports_packing


def test_an_error_is_said_once_with_what_is_slower(caplog: pytest.LogCaptureFixture) -> None:
    def failing() -> Tensor:
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    with caplog.at_level(logging.WARNING):
        assert [probes.attempt("a kernel", "training is slower", failing) for _ in range(2)] == [
            None,
            None,
        ]
    assert caplog.messages == [
        "a kernel: RuntimeError: no kernel image is available; training is slower"
    ]


def test_a_run_takes_what_is_found_into_its_log(caplog: pytest.LogCaptureFixture) -> None:
    with probes.held() as found:
        probes.record("a kernel", "it is not here", "training is slower")
    assert [*map(str, found)] == [
        "a kernel: it is not here; training is slower"
    ] and not caplog.messages


def test_memory_that_ran_out_says_nothing_of_a_path() -> None:
    def full() -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        probes.attempt("a kernel", "slower", full)


def test_a_run_tells_a_finding_once_and_after_what_was_said_before(project: Path) -> None:
    stage = open_project(project / "params.yaml").stage("pretrain")

    def work() -> Iterator[Event]:
        yield Note("begun")
        for _ in range(2):
            probes.record("a kernel", "it is not here", "training is slower")
            yield Progress(1, 2)
        probes.record("another", "it is not here", "training is slower")

    told = note_texts(_with_findings(stage, work()))
    first, second = (
        f"pretrain: {tried}: it is not here; training is slower"
        for tried in ("a kernel", "another")
    )
    assert told == ["begun", first, second]
