"""LoRA layers and row training, against plain mathematics."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.adapters.attach import attach, resolve, short_targets
from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.lora import (
    DoRALinear,
    EmbeddingRows,
    HeadRows,
    LoRAEmbedding,
    LoRALinear,
    factors,
    weight_of,
)
from pipeline.errors import UserError
from pipeline.models.quantized_linear import QuantizedLinear
from pipeline.project.params.sections import Init
from pipeline.weights.edits import AddLowRank
from tests.helpers.checkpoints import small_minigpt


def layer_of(
    out: int, inputs: int, rank: int, alpha: float, bias: bool = True, folds: bool = True
) -> LoRALinear:
    torch.manual_seed(0)
    layer = LoRALinear(
        nn.Linear(inputs, out, bias=bias).requires_grad_(False), rank, alpha / rank
    ).double()
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
    expected = (
        x @ base.weight.T + (shape[3] / shape[2]) * (x @ A.T @ B.T) + (base.bias if bias else 0)
    )
    torch.testing.assert_close(layer(x), expected)


@given(shapes, st.booleans())
def test_gradients_are_those_of_the_formulas(
    shape: tuple[int, int, int, float], folds: bool
) -> None:
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
def test_merged_rows_answer_like_base_plus_adapter_and_leave_it_alone(
    shape: tuple[int, int, int, float],
) -> None:
    layer = layer_of(*shape, bias=False)
    weight, x = weight_of(layer.base).detach(), torch.randn(4, shape[1], dtype=torch.float64)
    before, (left, right) = weight.clone(), factors(layer)
    edit = AddLowRank(left, right, layer.scale)
    parts = [edit(weight[rows], rows) for rows in (slice(0, 1), slice(1, None))]
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


def test_a_head_without_bias_and_a_table_that_scales_its_rows_are_replaced_too() -> None:
    table, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    ids, rows = torch.tensor([7, 2]), nn.Parameter(torch.randn(2, 4))
    weight, x = head.weight.detach().clone(), torch.randn(2, 3, 4)
    weight[ids] = rows.detach()
    torch.testing.assert_close(HeadRows(head, ids, rows)(x), F.linear(x, weight))
    table.embed_scale = torch.tensor(2.5)  # as Gemma's, whose forward multiplies by it
    found = EmbeddingRows(table, ids, rows)(torch.tensor([7, 0, 2]))
    assert torch.equal(found, torch.stack((2.5 * rows[0], table.weight[0], 2.5 * rows[1])))


def embedding_of(rank: int, scale: float) -> LoRAEmbedding:
    torch.manual_seed(0)
    return LoRAEmbedding(nn.Embedding(10, 4).requires_grad_(False), rank, scale)


def test_an_embeddings_update_is_of_the_rows_it_looks_up_with_the_tables_own_scale() -> None:
    layer, tokens = embedding_of(3, 1.5), torch.tensor([[1, 9, 1], [0, 4, 5]])
    assert torch.equal(layer(tokens), layer.base(tokens)), "A starts with zeros"
    assert layer.lora_A.shape == (3, 10) and not layer.lora_A.any()
    assert layer.lora_B.shape == (4, 3) and 0 < layer.lora_B.abs().max() < 0.05
    nn.init.normal_(layer.lora_A)
    table, update = weight_of(layer.base), 1.5 * (layer.lora_B @ layer.lora_A).T
    torch.testing.assert_close(layer(tokens), (table + update)[tokens])
    left, right = factors(layer)
    torch.testing.assert_close(1.5 * left @ right, update)
    layer.base.embed_scale = torch.tensor(2.0)
    torch.testing.assert_close(layer(tokens), (table + 2 * update)[tokens])
    layer.enabled = False
    assert torch.equal(layer(tokens), layer.base(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_a_layer_gives_out_has_the_dtype_of_the_base(dtype: torch.dtype) -> None:
    linear, table, x = (
        nn.Linear(8, 6).to(dtype),
        nn.Embedding(10, 8).to(dtype),
        torch.randn(2, 3, 8).to(dtype),
    )
    ids, rows = torch.tensor([7, 2]), nn.Parameter(torch.randn(2, 8))
    layers = [kind(linear, 2, 1.0, torch.float32) for kind in (LoRALinear, DoRALinear)]
    for layer in layers:
        for folds in (True, False):
            layer.folds = folds
            assert layer(x).dtype == dtype
    tables = (LoRAEmbedding(table, 2, 1.0, torch.float32), EmbeddingRows(table, ids, rows))
    assert all(other(torch.tensor([[7, 1]])).dtype == dtype for other in tables)
    assert HeadRows(nn.Linear(8, 10).to(dtype), ids, rows)(x).dtype == dtype
    assert all(
        p.dtype == torch.float32
        for each in (*layers, *tables)
        for p in each.adapter_parameters().values()
    )


def base_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "conv1d":
        base: nn.Module = Conv1D(6, 8)
        return base
    linear = nn.Linear(8, 6).requires_grad_(False)
    return QuantizedLinear(linear, "int8", torch.device("cpu")) if kind == "int8" else linear


KEPT = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1], dtype=torch.bool)


@pytest.mark.parametrize("init", ["document", "pissa"])
@pytest.mark.parametrize("base", ["linear", "conv1d", "int8"])
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
@torch.no_grad()
def test_dropout_is_on_the_input_of_the_update_alone(
    kind: type[LoRALinear], base: str, init: Init
) -> None:
    """As in PEFT: W x + s·ΔW·dropout(x), where ΔW of DoRA is all that it adds to W, and PiSSA's is
    BA − B₀A₀.
    """
    layer = kind(base_of(base), 2, 0.5, None, init, 0.25)
    A0, B0 = (
        p.clone() if init == "pissa" else torch.zeros_like(p) for p in (layer.lora_A, layer.lora_B)
    )
    layer.lora_B.add_(torch.randn(6, 2))
    x = torch.randn(2, 3, 8)
    without = layer(x)
    layer.keep = lambda x: KEPT.expand(x.shape)
    dropped = torch.where(KEPT, x, 0) / 0.75
    W = weight_of(layer.base).T if base == "conv1d" else weight_of(layer.base)
    frozen = W - 0.5 * B0 @ A0  # what PEFT's layer holds as its weight
    update = 0.5 * layer.lora_B @ layer.lora_A
    if isinstance(layer, DoRALinear):
        whole = frozen + update
        update = (layer.magnitude / whole.norm(dim=1))[:, None] * whole - frozen
    bias: Tensor = layer.base.bias  # type: ignore[assignment]
    torch.testing.assert_close(
        layer(x), x @ frozen.T + dropped @ update.T + bias, atol=1e-5, rtol=1e-4
    )
    layer.keep = lambda _: None  # such as in an evaluation
    assert torch.equal(layer(x), without)
    torch.testing.assert_close(without, x @ (frozen + update).T + bias, atol=1e-5, rtol=1e-4)
    layer.enabled = False
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
@torch.no_grad()
def test_a_quantized_weight_is_dequantized_in_the_precision_of_the_input(
    kind: type[LoRALinear],
) -> None:
    """Where a merge is compared in fp32, x is wider than the base in 16 bits."""
    base = QuantizedLinear(nn.Linear(8, 6, bias=False).bfloat16(), "int8", torch.device("cpu"))
    layer, x = kind(base, 2, 0.5, torch.float32, dropout=0.25), torch.randn(2, 3, 8)
    layer.folds = False
    torch.testing.assert_close(layer(x), base(x))
    layer.keep = lambda x: KEPT.expand(x.shape)
    torch.testing.assert_close(layer(x), base(x))


def test_with_dropout_too_a_new_layer_answers_exactly_like_its_base() -> None:
    layer, x = LoRALinear(base_of("linear"), 2, 0.5, dropout=0.25), torch.randn(2, 3, 8)
    layer.keep = lambda x: KEPT.expand(x.shape)
    assert torch.equal(layer(x), layer.base(x))


def test_kernels_get_an_update_only_where_the_layer_is_no_more_than_one() -> None:
    layer = LoRALinear(base_of("linear"), 2, 0.5)
    base, A, B, scale = layer.linear_update() or pytest.fail("a plain layer")
    assert (base, scale) == (layer.base, 0.5) and A is layer.lora_A and B is layer.lora_B
    layer.keep = lambda _: None
    assert layer.linear_update() is None
    layer.keep, layer.enabled = None, False
    assert layer.linear_update() is None
    assert LoRALinear(base_of("conv1d"), 2, 0.5).linear_update() is None
    assert LoRALinear(base_of("int8"), 2, 0.5).linear_update() is not None
    assert LoRALinear(base_of("linear"), 2, 0.5, init="pissa").linear_update() is None
    dora: LoRALinear = DoRALinear(base_of("linear"), 2, 0.5)
    assert dora.linear_update() is None


def test_the_update_is_folded_into_small_weights_alone() -> None:
    assert (
        LoRALinear(nn.Linear(256, 255), 1, 1.0).folds
        and not LoRALinear(nn.Linear(256, 256), 1, 1.0).folds
    )
    assert (
        LoRALinear(base_of("int8"), 1, 1.0).folds
        and not LoRALinear(base_of("conv1d"), 1, 1.0).folds
    )


def test_a_layer_without_options_has_no_dropout_and_its_weights_dtype() -> None:
    for layer in (
        LoRALinear(base_of("linear").half(), 2, 0.5),
        DoRALinear(base_of("linear").half(), 2, 0.5),
    ):
        assert layer.dropout == 0 and layer.lora_A.dtype == layer.lora_B.dtype == torch.float16
        assert (layer.lora_A.shape, layer.lora_B.shape, layer.scale) == ((2, 8), (6, 2), 0.5)
        assert {*layer.state_dict()} >= {"lora_A", "lora_B"} and not {"squares", "initial_A"} & {
            *layer.state_dict()
        }
    assert LoRAEmbedding(nn.Embedding(10, 4).half(), 2, 1.0).lora_B.dtype == torch.float16


@torch.no_grad()
def test_pissa_is_one_product_of_twice_the_rank_which_begins_at_zero() -> None:
    layer = LoRALinear(base_of("linear"), 2, 0.5, init="pissa")
    A, B = layer.pair()
    assert (A.shape, B.shape) == ((4, 8), (6, 4))
    torch.testing.assert_close(B @ A, torch.zeros(6, 8), atol=1e-6, rtol=0)
    before = layer.lora_B @ layer.lora_A
    layer.lora_B.add_(1)
    A, B = layer.pair()
    torch.testing.assert_close(B @ A, layer.lora_B @ layer.lora_A - before, atol=1e-5, rtol=1e-5)
    assert not {"initial_A", "neg_initial_B"} & {*layer.state_dict()}


ATTENTION = [
    f"model.decoder.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in ("k", "v", "q", "out")
]
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
    model = small_minigpt()
    found = resolve(model, wanted)
    assert sorted(found) == sorted(expected)
    assert resolve(model, short_targets(model, found)) == found


@pytest.mark.parametrize(
    "wanted", [["q_porj"], ["q_proj", "gate_proj"], ["embed_tokens"], ["proj"]]
)
def test_a_target_that_matches_nothing_is_refused_with_what_exists(wanted: list[str]) -> None:
    with pytest.raises(
        UserError,
        match=r"matches no linear layer. The model has fc1, fc2, k_proj, lm_head, out_proj",
    ):
        resolve(small_minigpt(), wanted)


def test_a_module_cannot_be_trained_twice() -> None:
    for spec in (
        AdapterSpec(2, 2.0, ("lm_head",), saved=("embed_tokens", "lm_head")),
        AdapterSpec(2, 2.0, ("lm_head",), rows={"lm_head": (3,)}),
    ):
        with pytest.raises(UserError, match="lm_head already trains in full or row by row"):
            attach(small_minigpt(), spec)
    with pytest.raises(UserError, match="lm_head already trains in full or row by row"):
        attach(
            small_minigpt(tied=True), AdapterSpec(2, 2.0, ("lm_head",), rows={"embed_tokens": (3,)})
        )
