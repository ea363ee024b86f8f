"""Generation's one token at a time against the model's own forward."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pipeline.adapters.attach import adapter_layers, attach
from pipeline.adapters.config import AdapterSpec
from pipeline.models.base import PackedCache, SequenceCache
from pipeline.models.generate import generate, last_states
from pipeline.models.kernels.decode import SHORT, fast_decoding, fewer_calls
from pipeline.models.transformers_model import TransformersModel, from_config
from tests.helpers.families import FAMILIES, OTHERS

COMMON = {  # hidden 64: oneDNN packs these shapes as it packs large ones
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SHAPED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},  # biases of q, k, v alone
    "qwen3": {},  # norms of the heads
    "gemma": {},  # norms that count from 1, one group of heads
    "mistral": {"sliding_window": 6},
}


def model_of(kind: str, **settings: Any) -> TransformersModel:
    torch.manual_seed(0)
    common = COMMON if "n_layer" not in settings else {}
    model = from_config(
        {"model_type": kind, "vocab_size": 120, "pad_token_id": 0, **common, **settings},
        torch.bfloat16,
    ).eval()
    for p in model.parameters():
        nn.init.normal_(p, 0.3 if p.dim() == 1 else 0.15)
    return model


@torch.no_grad()
def step_by_step(model: TransformersModel, ids: list[int], prompt: int) -> Tensor:
    """Hidden states of ids after `prompt` of them, one at a time."""
    cache = model.new_cache()
    parts = [ids[:prompt], *([one] for one in ids[prompt:])]
    return torch.cat(
        [model.hidden_states(torch.tensor([part]), cache=cache) for part in parts], 1
    ).float()


def both(model: TransformersModel) -> tuple[Tensor, Tensor, int]:
    """With and without; how many modules were changed."""
    ids = torch.randint(1, 100, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    wanted = step_by_step(model, ids, 5)
    with fast_decoding(model) as count:
        if not count:
            pytest.skip("this build of torch packs no weights")
        found = step_by_step(model, ids, 5)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert_close(step_by_step(model, ids, 5), wanted, rtol=0, atol=0)
    return found, wanted, count


def assert_alike(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("kind", SHAPED)
def test_a_block_for_one_token_is_the_same_block(kind: str) -> None:
    found, wanted, count = both(model_of(kind, **SHAPED[kind]))
    assert_alike(found, wanted)
    # the blocks, the body and the head: what is joined is not packed a second time
    assert count == 3 + 2


ROPE = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
GROWING = {**ROPE, "llama_4_scaling_beta": 2.0, "original_max_position_embeddings": 8}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 6}),
        # of its layers one has the config's window
        ("qwen2", {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 2}),
        # queries that grow with their position
        (
            "ministral3",
            {"rope_parameters": GROWING, "max_position_embeddings": 32, "sliding_window": None},
        ),
    ],
)
@torch.no_grad()
def test_several_sequences_at_once_are_read_as_each_alone(
    kind: str, settings: dict[str, Any]
) -> None:
    model = model_of(kind, **settings)
    rows = [torch.randint(1, 100, (24,)).tolist() for _ in range(2)]
    wanted = [step_by_step(model, row, 1)[0] for row in rows]
    cache = PackedCache([SequenceCache(24), SequenceCache(24)])
    found = []
    with fast_decoding(model):
        for tokens in zip(*rows, strict=True):
            found.append(last_states(model, cache, [[token] for token in tokens]).float())
            cache.advance([1, 1])
    for number, alone in enumerate(wanted):
        assert_alike(torch.stack([read[number] for read in found]), alone)


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_every_family_reads_on_as_it_did(name: str) -> None:
    family = (FAMILIES | OTHERS)[name]
    found, wanted, _ = both(model_of(family.kind, **family.config))
    assert_alike(found, wanted)


@pytest.mark.parametrize(
    "targets", [("v_proj",), ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj")]
)
def test_an_adapter_is_counted_and_one_that_comes_later_too(targets: tuple[str, ...]) -> None:
    model = model_of("llama")
    before = both(model)[0]
    attach(model, AdapterSpec(4, 8, targets))
    for _, layer in adapter_layers(model):
        nn.init.normal_(layer.lora_B, 0.3)
    found, wanted, _ = both(model)
    assert_alike(found, wanted)
    assert (found - before).norm() > 0.1 * before.norm()


def test_weights_that_change_are_packed_anew() -> None:
    model = model_of("llama")
    both(model)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(3)
        model.get_parameter("model.layers.0.self_attn.k_proj.weight").neg_()
    assert_alike(*both(model)[:2])


def test_a_block_that_is_put_together_otherwise_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = LlamaDecoderLayer.forward
    monkeypatch.setattr(
        LlamaDecoderLayer, "forward", lambda *given, **named: plain(*given, **named) * 0.5
    )
    found, wanted, count = both(model_of("llama"))
    assert_alike(found, wanted)
    assert count == 3 * 7 + 1


def test_two_generations_from_one_model_do_not_disturb_each_other() -> None:
    model = model_of("llama")
    alone = [list(generate(model, prompt, (), 12)) for prompt in ([3, 4, 5], [9, 8])]
    first, second = (generate(model, prompt, (), 12) for prompt in ([3, 4, 5], [9, 8]))
    together = [[next(first)], [next(second)]]
    for _ in range(6):
        together[0].append(next(first))
        together[1].append(next(second))
    together[0] += list(first)
    together[1] += list(second)
    assert together == alone
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("bias", [True, False])
def test_packed_linears_multiply_as_the_plain_ones(bias: bool) -> None:
    model = nn.Sequential(
        nn.Linear(32, 64, bias=bias), nn.SiLU(), nn.Linear(64, 8, bias=bias)
    ).bfloat16()
    x = torch.randn(1, 3, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = model(x)
        with fast_decoding(model) as count:
            if not count:
                pytest.skip("this build of torch packs no weights")
            assert count == 2
            assert_close(model(x), wanted, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("inputs", [64, SHORT, SHORT + 32, 2048])
def test_a_row_is_summed_alone_as_beside_others(inputs: int) -> None:
    # sums that cancel: what is left of them is the rounding of their order
    half, rows = torch.randn(96, inputs // 2).bfloat16(), torch.randn(5, inputs // 2).bfloat16()
    linear = nn.Linear(inputs, 96, bias=False, dtype=torch.bfloat16)
    linear.weight.data = torch.cat([half, -half.flip(1)], 1)
    x = torch.cat([rows, rows.flip(1)], 1)
    with torch.no_grad(), fast_decoding(linear) as count:
        if not count:
            pytest.skip("this build of torch packs no weights")
        together = linear(x)
        assert together.abs().max() > 0
        assert_close(torch.cat([linear(x[n : n + 1]) for n in range(5)]), together, rtol=0, atol=0)


def test_the_norm_in_fewer_calls_gives_the_bits_of_the_norm_that_it_stands_for() -> None:
    llama, gemma = (
        model_of(kind).get_submodule("model.layers.0.input_layernorm")
        for kind in ("llama", "gemma")
    )
    x = torch.randn(300, 64).bfloat16()
    with torch.no_grad():
        assert fewer_calls(llama) is not llama
        assert_close(fewer_calls(llama)(x), llama(x), rtol=0, atol=0)
        assert fewer_calls(gemma) is gemma


@torch.no_grad()
def test_a_cache_grows_in_place_and_others_read_it() -> None:
    model = model_of("llama")
    ids = torch.randint(1, 100, (140,), generator=torch.Generator().manual_seed(2)).tolist()
    cache, plain, wanted = model.new_cache(), model.new_cache(), step_by_step(model, ids, 5)
    model.hidden_states(torch.tensor([ids]), cache=plain)
    found = [model.hidden_states(torch.tensor([ids[:5]]), cache=cache)]
    # 64 fast tokens, past the buffer's first size, then three at once and three alone
    for start in (5, 75):
        with fast_decoding(model) as count:
            if not count:
                pytest.skip("this build of torch packs no weights")
            assert count == 3 + 2
            found += [
                model.hidden_states(torch.tensor([[id_]]), cache=cache)
                for id_ in ids[start : start + 64]
            ]
        more = ids[start + 64 : start + 70]
        found += [
            model.hidden_states(torch.tensor([part]), cache=cache)
            for part in (more[:3], *([one] for one in more[3:]))
        ]
    together = torch.cat(found, 1).float()
    assert_alike(together, wanted)
    for layer, other in zip(cache.layers, plain.layers, strict=True):
        assert_alike(layer.keys.float(), other.keys.float())
        assert_alike(layer.values.float(), other.values.float())


def test_linears_in_fp32_are_not_packed() -> None:
    with fast_decoding(nn.Sequential(nn.Linear(4, 4))) as count:
        assert count == 0
