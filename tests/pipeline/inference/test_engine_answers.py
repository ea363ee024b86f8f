"""The probability of each token, the spectrum of an update; chat templates."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.adapters.attach import adapter_layers
from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.lora import factors
from pipeline.adapters.low_rank import singular_values, spectra
from pipeline.data.tokenizers import chat_template
from pipeline.errors import UserError
from pipeline.inference import engine
from pipeline.models.generate import Sampling, generate, stream
from pipeline.models.load import load_base
from tests.helpers.checkpoints import adapter, checkpoint, minigpt, token_ids
from tests.helpers.json_files import edit_json, read_json, write_json
from tests.helpers.projects import make

ENDS = {2}  # of the word tokenizer
IDS = token_ids(74, 2, 11)
SPEC = AdapterSpec(3, 6.0, ("fc1", "k_proj", "q_proj", "v_proj"))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.5, 10, 0.9, seed=4)])
@torch.no_grad()
def test_a_streamed_token_has_the_models_own_probability_before_temperature_and_cuts(
    tmp_path: Path, sampling: Sampling
) -> None:
    model, prompt = load_base(checkpoint(tmp_path / "base")).model, (5, 6)
    drawn = list(stream(model, prompt, ENDS, 8, sampling))
    ids = [*prompt, *(token.id for token in drawn)]
    expected = model(torch.tensor([ids]))[0].softmax(-1)
    for position, token in enumerate(drawn, len(prompt) - 1):
        assert token.probability == pytest.approx(float(expected[position, token.id]), abs=1e-5)
    assert [token.id for token in drawn] == list(generate(model, prompt, ENDS, 8, sampling))


def test_a_stream_shows_the_end_token_that_generate_leaves_out(tmp_path: Path) -> None:
    model = minigpt(load_base(checkpoint(tmp_path / "base")).model)
    with torch.no_grad():  # the last norm outputs ones, for which only the end token has a logit
        model.body.final_layer_norm.weight.zero_()
        model.body.final_layer_norm.bias.fill_(1)
        model.lm_head.weight.zero_()[2] = 1
    for ends in (ENDS, {70, 2}):
        assert [token.id for token in stream(model, (5,), ends, 9)] == [2]
        assert list(generate(model, (5,), ends, 9)) == []
    assert list(generate(model, (5,), {70}, 9)) == [2] * 9


@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_singular_values_of_the_product_are_found_without_it(
    rank: int, wide: int, high: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((rank, wide), (high, rank))
    )
    expected = torch.linalg.svdvals(b @ a)
    result = singular_values(a, b)
    assert len(result) == min(rank, wide, high)
    torch.testing.assert_close(expected[: len(result)], result)
    assert (expected[len(result) :] < 1e-9).all()


def test_the_spectrum_of_an_adapter_is_that_of_its_updates_in_the_models_order(
    tmp_path: Path,
) -> None:
    base = checkpoint(tmp_path / "base", layers=11)
    folder = adapter(tmp_path / "a", base, SPEC)
    layers = dict(adapter_layers(engine.load(base, folder).model))
    result = spectra(folder)
    assert {module.name for module in result} == set(layers)
    assert [module.name.split(".")[3] for module in result] == [
        str(i) for i in range(11) for _ in range(4)
    ]
    for module in result:
        left, right = factors(layers[module.name])
        full = torch.linalg.svdvals(layers[module.name].scale * left @ right)[: module.rank]
        torch.testing.assert_close(torch.tensor(module.values), full, atol=1e-5, rtol=1e-4)
        assert module.share_of_first == pytest.approx(
            float(full[0] ** 2 / full.square().sum()), abs=1e-5
        )


def test_an_update_of_zero_has_a_spectrum_of_zeros(project: Path) -> None:
    make(
        project, ["finetune_lora"], ["finetune_lora.epochs=1", "finetune_lora.learning_rate=1e-30"]
    )
    result = spectra(project / "artifacts/lora_adapter")
    assert max(value for module in result for value in module.values) < 1e-20


def test_the_spectrum_of_a_changed_adapter_is_refused(project: Path) -> None:
    folder = project / "artifacts/lora_adapter"
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="was changed after the artifact was made"):
        spectra(folder)


def with_template(folder: Path, template: str) -> Path:
    """The checkpoint with a chat template, a beginning-of-text token, and a tokenizer that would
    add it itself.
    """
    checkpoint(folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    edit_json(folder / "tokenizer_config.json", bos_token="<eos>")
    path = folder / "tokenizer.json"
    tree = read_json(path)
    tree["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<eos>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [2], "tokens": ["<eos>"]}},
    }
    write_json(path, tree)
    return folder


TURN = "{{ bos_token }} {{ messages[0]['content'] }}{% if add_generation_prompt %} w9{% endif %}"


def test_a_chat_prompt_is_what_transformers_renders_with_one_beginning_of_text(
    tmp_path: Path,
) -> None:
    folder = with_template(tmp_path / "chat", TURN)
    loaded = engine.load(folder)
    assert chat_template.has_template(folder)
    ids = engine.encode(loaded, chat_template.render(folder, "w1 w2"))
    theirs = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "w1 w2"}]
    assert list(ids) == theirs.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False
    )
    assert ids.count(2) == 1
    assert theirs("w1").input_ids[0] == 2, "this tokenizer would double it"


def test_a_template_that_changed_is_read_anew_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    folder = with_template(tmp_path / "chat", TURN)
    chat_template.render(folder, "w1")
    (folder / "chat_template.jinja").write_text("w7 w8", encoding="utf-8")
    assert chat_template.render(folder, "w1") == "w7 w8"
    (folder / "chat_template.jinja").write_text("{% if %}", encoding="utf-8")
    with pytest.raises(UserError, match="its chat template fails"):
        chat_template.render(folder, "w1")


def test_a_chat_prompt_with_a_special_token_is_refused(tmp_path: Path) -> None:
    folder = with_template(tmp_path / "chat", TURN)
    with pytest.raises(
        UserError, match=rf"^the prompt contains <eos>, a special token of {folder}"
    ):
        chat_template.render(folder, "w1 <eos> w2")
    inner = Tokenizer(models.WordLevel({"w1": 0, "<end>": 1}))
    inner.normalizer, inner.pre_tokenizer = (
        normalizers.Lowercase(),
        pre_tokenizers.WhitespaceSplit(),
    )
    inner.add_special_tokens([AddedToken("<End>", normalized=True, special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner)
    fast.chat_template = "{{ messages[0].content }}"
    turns = [{"role": "user", "content": "w1 <END>"}]
    assert 2 in fast(turns[0]["content"]).input_ids, "it matches in lower case"
    with pytest.raises(UserError, match=r"^messages\[0\] contains <end>"):
        chat_template.render_one(
            lambda conversations: chat_template.render_with(fast, conversations, "toy"),
            turns,
            False,
        )


def test_a_model_without_a_template_does_not_chat(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "plain")
    assert not chat_template.has_template(folder)
    with pytest.raises(UserError, match=r"has no chat template. Prompt it without chat"):
        chat_template.render(folder, "w1")
