"""LoRA layers and row training, against plain mathematics."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.adapters.attach import attach, resolve, short_targets
from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.lora import EmbeddingRows, HeadRows, LoRALinear, factors, weight_of
from pipeline.errors import UserError
from pipeline.models.minigpt import MiniGPT, MiniGPTConfig
from pipeline.weights.streaming import merged_rows


def layer_of(out: int, inputs: int, rank: int, alpha: float, bias: bool = True, folds: bool = True) -> LoRALinear:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(inputs, out, bias=bias).requires_grad_(False), rank, alpha / rank).double()
    layer.folds = folds
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer


shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.floats(0.1, 32))


@given(shapes, st.booleans(), st.booleans())
def test_forward_is_the_base_plus_the_scaled_low_rank_update(
    shape: tuple[int, int, int, float], bias: bool, folds: bool
) -> None:
    layer = layer_of(*shape, bias, folds)
    x = torch.randn(3, 2, shape[1], dtype=torch.float64)
    base, A, B = layer.base, layer.lora_A, layer.lora_B
    assert isinstance(base, torch.nn.Linear)
    expected = x @ base.weight.T + (shape[3] / shape[2]) * (x @ A.T @ B.T) + (base.bias if bias else 0)
    torch.testing.assert_close(layer(x), expected)


@given(shapes, st.booleans())
def test_gradients_are_those_of_the_documents_section_4_3(shape: tuple[int, int, int, float], folds: bool) -> None:
    layer = layer_of(*shape, folds=folds)
    x = torch.randn(5, shape[1], dtype=torch.float64)
    upstream = torch.randn(5, shape[0], dtype=torch.float64)  # dL/dh, one row a token
    layer(x).backward(upstream)
    A, B, s = layer.lora_A, layer.lora_B, layer.scale
    torch.testing.assert_close(B.grad, s * upstream.T @ (x @ A.T))
    torch.testing.assert_close(A.grad, s * B.T @ upstream.T @ x)
    assert layer.base.weight.grad is None


def test_a_new_layer_answers_like_its_base() -> None:
    base = nn.Linear(8, 5)
    x = torch.randn(3, 8)
    assert torch.equal(LoRALinear(base, 4, 0.25)(x), base(x))


@given(shapes)
def test_merged_rows_answer_like_base_plus_adapter_and_leave_it_alone(shape: tuple[int, int, int, float]) -> None:
    layer = layer_of(*shape, bias=False)
    weight, x = weight_of(layer.base).detach(), torch.randn(4, shape[1], dtype=torch.float64)
    before, (left, right) = weight.clone(), factors(layer)
    parts = [merged_rows(weight[rows], left[rows], right, layer.scale) for rows in (slice(0, 1), slice(1, None))]
    torch.testing.assert_close(F.linear(x, torch.cat(parts)), layer(x), atol=1e-4, rtol=1e-5)
    assert torch.equal(weight, before)


def test_rows_replace_exactly_the_rows_they_name() -> None:
    table, head = nn.Embedding(10, 4), nn.Linear(4, 10)
    ids, rows = torch.tensor([7, 2]), nn.Parameter(torch.randn(2, 4))
    expected = table.weight.detach().clone()
    expected[ids] = rows.detach()
    tokens, x = torch.tensor([[1, 2, 7, 9]]), torch.randn(3, 4)
    assert torch.equal(EmbeddingRows(table, ids, rows)(tokens), expected[tokens])
    weight = head.weight.detach().clone()
    weight[ids] = rows.detach()
    torch.testing.assert_close(HeadRows(head, ids, rows)(x), F.linear(x, weight, head.bias))


def model_of(tied: bool = False) -> MiniGPT:
    torch.manual_seed(0)
    return MiniGPT(MiniGPTConfig(vocab_size=20, pad_id=0, end_id=2, d_model=16, feed_forward=32, tie_embeddings=tied))


ATTENTION = [f"model.decoder.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in ("k", "v", "q", "out")]
FEED_FORWARD = [f"model.decoder.layers.{i}.{n}" for i in (0, 1) for n in ("fc1", "fc2")]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (["attention"], ATTENTION),
        (["q_proj", "k_proj", "v_proj", "o_proj"], ATTENTION),
        (["feed_forward"], FEED_FORWARD),
        (["all-linear"], ATTENTION + FEED_FORWARD),
        (["attention", "fc1", "fc2"], ATTENTION + FEED_FORWARD),
        (["o_proj"], [ATTENTION[3], ATTENTION[7]]),
        (["layers.1.self_attn.v_proj"], [ATTENTION[5]]),
        (["lm_head"], ["lm_head"]),
    ],
)
def test_targets_mean_what_they_say(wanted: list[str], expected: list[str]) -> None:
    model = model_of()
    found = resolve(model, wanted)
    assert sorted(found) == sorted(expected)
    assert resolve(model, short_targets(model, found)) == found


@pytest.mark.parametrize("wanted", [["q_porj"], ["q_proj", "gate_proj"], ["embed_tokens"], ["proj"]])
def test_a_target_that_matches_nothing_is_refused_with_what_exists(wanted: list[str]) -> None:
    with pytest.raises(UserError, match=r"matches no linear layer. The model has fc1, fc2, k_proj, lm_head, out_proj"):
        resolve(model_of(), wanted)


def test_a_module_cannot_be_trained_twice() -> None:
    for spec in (
        AdapterSpec(2, 2.0, ("lm_head",), saved=("embed_tokens", "lm_head")),
        AdapterSpec(2, 2.0, ("lm_head",), rows={"lm_head": (3,)}),
    ):
        with pytest.raises(UserError, match="lm_head already trains in full or row by row"):
            attach(model_of(), spec)
    with pytest.raises(UserError, match="lm_head already trains in full or row by row"):
        attach(model_of(tied=True), AdapterSpec(2, 2.0, ("lm_head",), rows={"embed_tokens": (3,)}))
