"""MiniGPT against a stock OPTForCausalLM, and generation against `generate`."""

import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.data.tokenizers.word import WordTokenizer
from pipeline.errors import UserError
from pipeline.models import generate as generate_module
from pipeline.models.base import set_row_count
from pipeline.models.generate import Draw, Sampling, distribution, draw, generate, next_tokens
from pipeline.models.load import Base, count, load_base, save_base
from pipeline.models.minigpt import KVCache, MiniGPT, MiniGPTConfig
from pipeline.models.save import load_tensors
from tests.helpers.checkpoints import token_ids

TOKENIZER = WordTokenizer.of_words([f"w{i}" for i in range(71)])
CONFIG = MiniGPTConfig(vocab_size=74, pad_id=0, end_id=2)


def model_of(**changes: object) -> MiniGPT:
    torch.manual_seed(0)
    return MiniGPT(MiniGPTConfig(**{**vars(CONFIG), **changes})).eval()


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_opens_the_checkpoint_with_our_logits(tmp_path: Path, tied: bool) -> None:
    model = model_of(tie_embeddings=tied)
    save_base(tmp_path, Base(model, TOKENIZER))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(3, 74, (5, 32))
    with torch.no_grad():
        assert (model(ids) - theirs(ids).logits).abs().max() < 1e-5
        positions = torch.arange(4, 12).expand(5, 8)
        ours, other = (
            model(ids[:, :8], positions),
            theirs(ids[:, :8], position_ids=positions).logits,
        )
    assert (ours - other).abs().max() < 1e-5


def test_the_trained_checkpoint_opens_in_transformers_with_our_logits(finished: Path) -> None:
    for name in (
        "base",
        "expanded",
        "from_scratch",
        "full_finetuned",
        "layer_frozen",
        "lora_merged",
    ):
        folder = finished / "artifacts" / name
        ours, _ = load_base(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
        ids = token_ids(ours.shape.rows, 4, 20, seed=1)
        with torch.no_grad():
            assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-5, name


def test_it_has_about_109_thousand_parameters() -> None:
    V, D, F = 74, 64, 256
    block = 4 * (D * D + D) + (D * F + F) + (F * D + D) + 2 * 2 * D
    assert count(MiniGPT(CONFIG))["total"] == 2 * V * D + 2 * block + 2 * D == 109_568


def test_positions_are_the_sinusoids_of_the_transformer() -> None:
    table = model_of().body.embed_positions.weight
    for position, i in ((0, 0), (5, 3), (31, 31)):
        angle = position / 10_000 ** (2 * i / 64)
        assert table[position + 2, 2 * i] == pytest.approx(math.sin(angle), abs=1e-6)
        assert table[position + 2, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-6)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5))
@torch.no_grad()
def test_a_cache_changes_nothing_however_the_tokens_are_fed(parts: list[int]) -> None:
    model, cache = model_of(), KVCache()
    ids = torch.randint(3, 74, (2, sum(parts)), generator=torch.Generator().manual_seed(0))
    pieces = [model(piece, cache=cache) for piece in torch.split(ids, parts, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_token_never_sees_a_later_one() -> None:
    model = model_of()
    ids = torch.randint(3, 74, (1, 10))
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] - 2) % 71 + 3
    same = (model(ids) == model(changed)).all(dim=-1)[0]
    assert same[:6].all()
    assert not same[6:].any()


def test_greedy_generation_is_that_of_transformers(finished: Path) -> None:
    folder = finished / "artifacts/base"
    ours, tokenizer = load_base(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    for text in ("die katze", "der hund läuft", "bulgarien"):
        ids = tokenizer.encode(text)
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[
            0, len(ids) :
        ].tolist()
        found = list(generate(ours, ids, tokenizer.end_ids, 12))
        assert found == [token for token in expected if token != tokenizer.end_id]


@given(st.floats(0.2, 3), st.integers(0, 80), st.floats(0.05, 1), st.integers(0, 10**6))
def test_sampling_has_the_distribution_of_transformers(
    temperature: float, k: int, p: float, seed: int
) -> None:
    logits = torch.randn(74, generator=torch.Generator().manual_seed(seed)) * 3
    expected = TemperatureLogitsWarper(temperature)(None, logits[None])
    if 0 < k < 74:
        expected = TopKLogitsWarper(k)(None, expected)
    if p < 1:
        expected = TopPLogitsWarper(p)(None, expected)
    torch.testing.assert_close(
        distribution(logits, Sampling(temperature, k, p)),
        expected[0].softmax(0),
        atol=1e-5,
        rtol=1e-4,
    )


@given(
    st.lists(
        st.tuples(st.floats(0.2, 3), st.integers(0, 80), st.floats(0.05, 1)), min_size=1, max_size=4
    ),
    st.integers(0, 10**6),
)
def test_rows_sorted_on_an_accelerator_have_the_same_distributions(
    settings: list[tuple[float, int, float]], seed: int
) -> None:
    logits = torch.randn(len(settings), 74, generator=torch.Generator().manual_seed(seed)) * 3
    samplings = [Sampling(*each) for each in settings]
    torch.testing.assert_close(
        generate_module._sorted_distributions(logits, samplings),
        torch.stack([*map(distribution, logits, samplings)]),
        atol=1e-6,
        rtol=1e-4,
    )


def test_one_number_of_its_generator_draws_a_rows_token() -> None:
    logits = torch.randn(5, 74, generator=torch.Generator().manual_seed(1)) * 3
    samplings = [
        *(Sampling(0.8, seed=1), Sampling(1.0, 5, 0.9, 2), Sampling()),
        *(Sampling(2.0, seed=4), Sampling(1.0, top_p=0.5, seed=5)),
    ]

    def draws(seed: int) -> list[Draw]:
        return [(each, torch.Generator().manual_seed(seed + each.seed)) for each in samplings]

    for seed in range(200):
        found = draw(logits, draws(seed)).tolist()
        for n, (row, sampling, id_) in enumerate(zip(logits, samplings, found, strict=True)):
            assert draw(row[None], [draws(seed)[n]]).tolist() == [id_], "others change nothing"
            if sampling.temperature == 0:
                assert id_ == int(row.argmax())
                continue
            probabilities = distribution(row, sampling).double()
            number = float(torch.rand(1, generator=draws(seed)[n][1]))
            before = float(probabilities[:id_].sum())
            assert probabilities[id_] > 0
            assert before - 1e-6 <= number <= before + float(probabilities[id_]) + 1e-6


def test_rows_that_are_not_finite_have_no_next_token() -> None:
    logits = torch.randn(4, 74)
    logits[1, 5], logits[2], logits[3, 0] = torch.nan, torch.nan, torch.inf
    for sampling in (Sampling(), Sampling(1.0), Sampling(1.0, 5), Sampling(1.0, 0, 0.9)):
        draws = [(sampling, torch.Generator()) for _ in logits]
        found = [token.id for token in next_tokens(logits, draws)]
        assert found[0] >= 0 and found[1:] == [-1] * 3


@pytest.mark.slow
def test_a_seed_decides_a_sample_and_draws_follow_the_distribution() -> None:
    model = model_of()
    drawn = [
        next(iter(generate(model, (5,), {2}, 1, Sampling(1.0, 3, 1.0, seed))), 2)
        for seed in range(400)
    ]
    assert drawn == [
        next(iter(generate(model, (5,), {2}, 1, Sampling(1.0, 3, 1.0, seed))), 2)
        for seed in range(400)
    ]
    with torch.no_grad():
        probabilities = distribution(model(torch.tensor([[5]]))[0, -1], Sampling(1.0, 3))
    for token in probabilities.nonzero().flatten().tolist():
        share = drawn.count(token) / len(drawn)
        assert share == pytest.approx(float(probabilities[token]), abs=0.1)


def test_generation_stops_at_the_last_position() -> None:
    model = model_of()
    with torch.no_grad():
        model.lm_head.weight[2] = 0  # the end token is never the likeliest
    assert len(list(generate(model, (5, 6, 7), {2}, 100))) == 32 - 3


@pytest.mark.parametrize("p", [1e-320, 1e-45, 1e-9])
def test_the_likeliest_token_is_left_however_small_top_p_is(p: float) -> None:
    found = distribution(torch.tensor([0.5, 2.0, 1.0]), Sampling(1.0, top_p=p))
    assert found.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_sampling_out_of_range_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match="sampling needs"):
        Sampling(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [False, True])
def test_resizing_keeps_old_rows_bit_for_bit(tied: bool) -> None:
    model = model_of(tie_embeddings=tied)
    larger = model_of(tie_embeddings=tied)
    set_row_count(larger, 90)
    for end, before in (
        (larger.body.embed_tokens, model.body.embed_tokens),
        (larger.lm_head, model.lm_head),
    ):
        assert end.weight.shape == (90, 64)
        assert torch.equal(end.weight[:74], before.weight)
        assert not end.weight[74:].any()
    assert (larger.lm_head.weight is larger.body.embed_tokens.weight) == tied
    assert (larger.shape.rows, larger.config.tie_embeddings) == (90, tied)


@pytest.mark.parametrize(
    ("key", "value"),
    [("activation_function", "relu"), ("model_type", "llama"), ("do_layer_norm_before", False)],
)
def test_a_config_that_means_another_model_is_refused(key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{key} is .*; MiniGPT needs"):
        MiniGPTConfig.from_opt({**CONFIG.to_opt(), key: value}, "config.json")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocab_size": True}, "vocab_size must be a whole number from 1, got True"),
        ({"word_embed_proj_dim": 8}, "word_embed_proj_dim differs from hidden_size"),
        ({"num_attention_heads": 5}, "hidden_size must be a multiple of 2 × num_attention_heads"),
    ],
)
def test_a_config_of_impossible_sizes_is_refused_with_what_to_do(
    changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=rf"{reason}.*\. Copy it again\."):
        MiniGPTConfig.from_opt({**CONFIG.to_opt(), **changes}, "config.json")


def test_a_file_that_only_safetensors_rejects_is_refused_with_what_to_do(tmp_path: Path) -> None:
    header = b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}'  # no tensor has byte 0
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"ab")
    with pytest.raises(UserError, match=r"cannot be read: .*\. Create or copy it again\."):
        load_tensors(path)


def test_a_checkpoint_that_does_not_fit_its_config_is_refused(tmp_path: Path) -> None:
    save_base(tmp_path, Base(model_of(), TOKENIZER))
    config = tmp_path / "config.json"
    config.write_text(
        config.read_text(encoding="utf-8").replace('"ffn_dim": 256', '"ffn_dim": 128'),
        encoding="utf-8",
    )
    with pytest.raises(
        UserError, match=r"does not fit: model.decoder.layers.0.fc1.bias has shape \[256\]"
    ):
        load_base(tmp_path)
