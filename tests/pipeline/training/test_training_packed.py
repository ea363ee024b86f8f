"""Packed sequences do not see each other, logits are computed only at labels, and every label has
the same weight.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from pipeline.calc.settings import chunk_rows
from pipeline.models.transformers_model import TransformersModel, from_config
from pipeline.project.logs.run_log import Step
from pipeline.project.params.sections import Training
from pipeline.training import losses
from pipeline.training.batches import Batch, Batches, collate
from pipeline.training.optimizer import FlatOptimizer
from pipeline.training.step import loss_of
from tests.helpers.families import FAMILIES
from tests.helpers.real import (
    ROWS,
    gradient_of,
    listed,
    loss_alone,
    stock,
    toy,
    trained,
    windows_of,
)

LENGTHS = (7, 1, 12, 5, 2, 19)
CONVOLVES: dict[str, Any] = {  # its short convolutions cross the border between two sequences
    "model_type": "lfm2",
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "layer_types": ["conv", "full_attention"],
    "block_auto_adjust_ff_dim": False,
}


def half(length: int) -> int:
    return length // 2


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def fast_decoding(
    model: TransformersModel, lengths: Sequence[int]
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the sequences, each alone, in stock transformers: a mean over
    labels.
    """
    theirs, found = stock(model), windows_of(lengths, half)
    labels = sum(length - half(length) for length in lengths)
    loss = torch.stack([loss_alone(theirs, window) for window in found]).sum() / labels
    torch.autograd.backward(loss)
    return loss.item(), gradients(theirs)


def assert_same_gradient(
    model: TransformersModel, batches: list[Batch], lengths: Sequence[int]
) -> None:
    loss, expected = fast_decoding(model, lengths)
    found = gradient_of(model.train(), batches, FlatOptimizer(model))
    ours = gradients(model)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.norm == pytest.approx(
        float(torch.cat([g.flatten() for g in expected.values()]).norm()), rel=1e-4
    )
    assert ours.keys() == expected.keys()
    for name, wanted in expected.items():
        assert_close(
            ours[name], wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()) + 1e-7, msg=name
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_pitfall_16_a_packed_batch_is_its_sequences_one_at_a_time(name: str) -> None:
    """Loss and every gradient; Gemma's windows, of 5 tokens, are shorter than most sequences."""
    model = toy(name)
    assert model.supports_packing
    batch = collate(windows_of(LENGTHS, half))
    assert batch.segments == LENGTHS and batch.ids.shape == (1, sum(LENGTHS))
    assert_same_gradient(model, [batch], LENGTHS)


@settings(max_examples=12)
@given(st.lists(st.integers(1, 14), min_size=1, max_size=6))
def test_pitfall_16_whatever_the_lengths(lengths: list[int]) -> None:
    assert_same_gradient(toy("gemma2"), [collate(windows_of(lengths, half))], lengths)


def test_pitfall_16_a_token_changed_in_one_sequence_changes_no_number_of_another() -> None:
    model, batch = toy("llama"), collate(windows_of(LENGTHS))
    assert batch.segments is not None
    other = batch.ids.clone()
    other[0, 8] = (other[0, 8] + 1) % ROWS  # the first token of the third sequence
    with torch.no_grad():
        before, after = (
            model.hidden_states(ids, batch.positions, batch.segments)[0]
            for ids in (batch.ids, other)
        )
    same = (before == after).all(dim=-1)
    assert [bool(part.all()) for part in torch.split(same, list(LENGTHS))] == [
        True,
        True,
        False,
        True,
        True,
        True,
    ]


def test_a_model_that_cannot_read_end_to_end_gets_one_sequence_at_a_time_with_the_same_result() -> (
    None
):
    model = from_config(CONVOLVES, torch.float32)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    assert not model.supports_packing
    batch = collate(windows_of(LENGTHS, half))
    assert [part.ids.shape for part in batch.unpack()] == [(1, length) for length in LENGTHS]
    assert_same_gradient(model, [batch], LENGTHS)


def test_sequences_of_one_length_stack_and_are_read_at_once_by_any_model() -> None:
    model = from_config(CONVOLVES, torch.float32)
    batch = collate(windows_of((6, 6, 6), half))
    assert batch.segments is None and batch.unpack() == [batch]
    assert_same_gradient(model, [batch], (6, 6, 6))


# Logits


@contextmanager
def rows_of(head: nn.Module) -> Iterator[list[int]]:
    """The number of rows of each call of the head inside the context."""
    rows: list[int] = []
    hook = head.register_forward_pre_hook(
        lambda _, args: rows.append(args[0].numel() // args[0].shape[-1])
    )
    try:
        yield rows
    finally:
        hook.remove()


# tied and not: the head trains in full in both
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_logits_are_made_at_labels_alone_and_a_chunk_at_a_time(name: str) -> None:
    model, lengths = toy(name), (50, 41, 60, 3) * 4
    model.config.max_position_embeddings = 64
    batch = collate(windows_of(lengths, half))
    assert batch.tokens > losses.CHUNK
    optimizer = FlatOptimizer(model.train())
    with rows_of(model.head) as rows:
        gradient_of(model, [batch], optimizer)
    assert sum(rows) == batch.tokens < batch.ids.numel()
    assert max(rows) <= losses.CHUNK
    optimizer.clear()
    assert_same_gradient(model, [batch], lengths)


def test_an_accelerator_computes_256_mib_of_logits_at_once() -> None:
    assert [chunk_rows(vocabulary) for vocabulary in (49_152, 151_936, 10**9)] == [1344, 384, 64]
    model = toy("llama")
    assert losses.chunk_of(model, 2 * losses.CHUNK + 2) == -(-(2 * losses.CHUNK + 2) // 3)
    assert losses.chunk_of(model.to("meta"), 9) == chunk_rows(model.shape.rows) > losses.CHUNK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 41), st.booleans())
@example(17, 5, True)
def test_losses_and_gradients_in_chunks_are_those_of_all_logits_at_once(
    dtype: torch.dtype, rows: int, size: int, trains: bool
) -> None:
    torch.manual_seed(rows)
    head = nn.Linear(8, 23, dtype=dtype).requires_grad_(trains)
    hidden = torch.randn(rows, 8).to(dtype).requires_grad_()
    labels = torch.randint(0, 23, (rows,))
    wide = nn.Linear(8, 23).requires_grad_(trains)
    wide.load_state_dict(head.state_dict())
    exact = hidden.detach().float().requires_grad_()
    expected = torch.nn.functional.cross_entropy(wide(exact), labels)
    torch.autograd.backward(expected * 3)
    loss = losses.chunked_mean(
        losses.cross_entropy(head), hidden, labels, size, list(head.parameters()) if trains else ()
    )
    torch.autograd.backward(loss * 3)
    rtol, atol = (1e-4, 1e-6) if dtype == torch.float32 else (0.03, 0.01)
    assert_close(loss, expected, rtol=rtol, atol=atol)
    for ours, theirs in zip((hidden, *head.parameters()), (exact, *wide.parameters()), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None and theirs.grad is not None:
            assert_close(ours.grad.float(), theirs.grad, rtol=rtol, atol=atol)


def test_in_bf16_the_loss_is_that_of_fp32_within_its_rounding() -> None:
    batch = collate(windows_of((50, 41, 60, 3) * 4, half))
    with torch.no_grad():
        rounded, exact = (
            float(loss_of(toy("llama", d, std=0.1), batch)) for d in (torch.bfloat16, torch.float32)
        )
    assert rounded == pytest.approx(exact, rel=0.01)
    assert rounded != exact


# Accumulation


UNLIKE = (1, 19, 2, 14, 3, 11, 1, 17, 5, 2, 13, 1)


def of_batches(batch_size: int, accumulate: int) -> tuple[list[Step], dict[str, Tensor]]:
    model = toy("llama", std=0.1)
    batches = Batches(listed(windows_of(UNLIKE)), batch_size, 0, accumulate)
    records, _ = trained(model, batches, Training(epochs=3, learning_rate=1e-3))
    return records, {name: p.detach() for name, p in model.named_parameters()}


def test_pitfall_17_accumulation_is_weighted_by_tokens() -> None:
    expected, weights = of_batches(4, 1)
    for batch_size, accumulate in ((2, 2), (1, 4)):
        found, others = of_batches(batch_size, accumulate)
        assert [record.tokens for record in found] == [record.tokens for record in expected]
        assert [record.loss for record in found] == pytest.approx(
            [record.loss for record in expected], rel=1e-4
        )
        assert [record.grad_norm for record in found] == pytest.approx(
            [r.grad_norm for r in expected], rel=1e-3
        )
        for name, weight in others.items():
            assert_close(weight, weights[name], rtol=1e-3, atol=2e-4, msg=name)


def test_pitfall_17_a_mean_of_means_would_be_another_number() -> None:
    model, batches = toy("llama"), Batches(listed(windows_of(UNLIKE)), 2, 0, 2)
    optimizer = FlatOptimizer(model.train())
    for step in range(len(batches)):
        with torch.no_grad():
            parts = [(float(loss_of(model, batch)), batch.tokens) for batch in batches[step]]
        found = gradient_of(model, batches[step], optimizer).loss
        assert found == pytest.approx(
            sum(loss * n for loss, n in parts) / sum(n for _, n in parts), rel=1e-5
        )
        assert found != pytest.approx(sum(loss for loss, _ in parts) / len(parts), rel=1e-2)
        optimizer.clear()
