"""A file that is not the exported model is told from one that is, and the error says in what it
differs.
"""

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import yaml
from tokenizers import processors

from pipeline.adapters.config import AdapterSpec
from pipeline.data.tokenizers.subword import SubwordTokenizer
from pipeline.data.tokenizers.word import Tokenizer, load_tokenizer
from pipeline.errors import UserError
from pipeline.export.certificate import Candidate, compare, describe
from pipeline.export.llama_cpp import LlamaCpp, candidate, certify, quantize
from pipeline.inference.engine import LoadedModel, load
from pipeline.inference.score import builtin_prompts, difference
from pipeline.project.runner import Event
from tests.helpers.bases import toy_checkpoint, toy_model
from tests.helpers.checkpoints import adapter
from tests.helpers.errors import user_error
from tests.helpers.families import PROMPTS as FAMILY_PROMPTS
from tests.helpers.gguf_files import rewritten, write_adapter, write_llama

pytest.importorskip("llama_cpp_py_sync")
pytest.importorskip("gguf")
Result = TypeVar("Result")
SPEC = AdapterSpec(4, 8, ("q_proj", "k_proj", "down_proj"))
PROMPTS = ("The currency of Bulgaria is", "Two and two are four, and")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy base, an adapter on it, and both as GGUF files."""
    root = tmp_path_factory.mktemp("made")
    model = toy_checkpoint(root / "base", max_position_embeddings=512, tie_word_embeddings=False)
    adapter(root / "adapter", root / "base", SPEC)
    write_llama(root / "base.gguf", model)
    write_adapter(root / "adapter.gguf", root / "adapter", model.config, alpha=8)
    return root


def finished(steps: Generator[Event, None, Result]) -> Result:
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]


def certified(
    load_: Callable[[], LoadedModel], *files: Candidate, tokenizer: Tokenizer | None = None
) -> dict[str, Any]:
    return finished(compare(load_, tokenizer or load_().tokenizer, files, PROMPTS))


def of_base(made: Path, file: Path, kind: str = "f32") -> dict[str, Any]:
    """The certificate of a file as the base; its only entry."""
    (entry,) = certified(lambda: load(made / "base"), candidate(kind, file))["files"]
    return entry  # type: ignore[no-any-return]


def of_adapter(made: Path, base: Path, adapter: Path) -> dict[str, Any]:
    tuned = certified(
        lambda: load(made / "base", made / "adapter"), candidate("f32", base, adapter, "adapter")
    )
    (entry,) = tuned["files"]
    return entry  # type: ignore[no-any-return]


def refused(certify: Callable[..., dict[str, Any]], *arguments: Any) -> str:
    return user_error(certify, *arguments)


def test_the_model_itself_differs_in_nothing(made: Path) -> None:
    for entry in (
        of_base(made, made / "base.gguf"),
        of_adapter(made, made / "base.gguf", made / "adapter.gguf"),
    ):
        assert entry["max_logit_difference"] < 1e-3 and abs(entry["divergence"]) < 1e-6
        assert (entry["same_first_choices"], entry["greedy_tokens"] > 0) == (len(PROMPTS), True)
        assert entry["renders_the_chat_alike"] is None  # llama.cpp has no such template in its list


def test_what_is_exported_is_compared_on_the_users_prompts(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.yaml").write_text(yaml.safe_dump(FAMILY_PROMPTS), encoding="utf-8")
    file = candidate("f32", made / "base.gguf", made / "adapter.gguf", "adapter")

    def result() -> tuple[dict[str, Any], list[str]]:
        tuned, tokenizer = (
            (lambda: load(made / "base", made / "adapter")),
            load_tokenizer(made / "base"),
        )
        return finished(certify(tuned, tokenizer, [file], tmp_path / "prompts.yaml"))

    entries, lines = result()
    assert (entries["gguf"]["prompts_checked"], len(lines)) == (2, 3)
    assert lines[2].split()[0] == "adapter"
    monkeypatch.setattr("pipeline.errors.find_spec", lambda _: None)
    entries, lines = result()
    assert (entries, len(lines)) == ({}, 1)
    assert "nothing was compared. Install one: pip install 'lora-workbench[llama-cpp]'." in lines[0]


def test_the_figures_are_those_of_two_models_compared_here(made: Path, tmp_path: Path) -> None:
    other = toy_checkpoint(
        tmp_path / "other", max_position_embeddings=512, tie_word_embeddings=False
    )
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    other.save_pretrained(tmp_path / "other")
    write_llama(tmp_path / "other.gguf", other)
    entry = of_base(made, tmp_path / "other.gguf", "q8_0")  # so called, its figures are only shown
    expected = difference(load(made / "base"), load(tmp_path / "other"), PROMPTS)
    assert entry["max_logit_difference"] == pytest.approx(expected.max_logit_difference, rel=1e-3)
    assert (
        entry["divergence"] == pytest.approx(expected.divergence, rel=1e-3)
        and entry["divergence"] > 1e-4
    )
    assert entry["same_first_choices"] == expected.same_first_choices


def test_a_base_in_16_bits_is_compared_in_fp32(tmp_path: Path) -> None:
    model = toy_checkpoint(tmp_path / "base", dtype=torch.bfloat16, max_position_embeddings=512)
    write_llama(tmp_path / "base.gguf", model)
    (entry,) = certified(lambda: load(tmp_path / "base"), candidate("f32", tmp_path / "base.gguf"))[
        "files"
    ]
    assert entry["max_logit_difference"] < 1e-3


def test_only_the_context_that_the_file_names_is_compared(made: Path, tmp_path: Path) -> None:
    """As for a model with a sliding window that the program does not have: up to it the two are the
    same.
    """

    class Sliding(LlamaCpp):
        def logits(self, ids: Sequence[int]) -> torch.Tensor:
            logits = super().logits(ids)
            logits[4:] *= 2
            return logits

    short = rewritten(made / "base.gguf", tmp_path / "short.gguf", {"llama.context_length": 4})
    for file, same in ((short, True), (made / "base.gguf", False)):
        sliding = Candidate("f32", "f32", 1, lambda file=file: Sliding(file))  # type: ignore[misc]
        with nullcontext() if same else pytest.raises(UserError, match="its logits differ"):
            certified(lambda: load(made / "base"), sliding)


# Broken on purpose


def test_alpha_doubled_is_refused(made: Path, tmp_path: Path) -> None:
    doubled = rewritten(
        made / "adapter.gguf", tmp_path / "adapter.gguf", {"adapter.lora.alpha": 16.0}
    )
    said = refused(of_adapter, made, made / "base.gguf", doubled)
    assert (
        "adapter is not the exported model in llama.cpp b" in said
        and "its logits differ by up to " in said
    )
    assert "likely causes: the adapter's scale, " in said


@pytest.mark.parametrize("matrix, heads", [("attn_q", 4), ("attn_k", 2)])
def test_q_or_k_in_the_order_of_transformers_is_refused(
    made: Path, tmp_path: Path, matrix: str, heads: int
) -> None:
    def turned_back(name: str, data: Any) -> Any:
        if matrix not in name:
            return data
        rows, width = data.shape
        return data.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)

    said = refused(
        of_base, made, rewritten(made / "base.gguf", tmp_path / "turned.gguf", change=turned_back)
    )
    assert "its logits differ by up to " in said and "the order of the rows of q and k" in said


@pytest.mark.slow
def test_an_adapter_of_another_base_is_refused(made: Path, tmp_path: Path) -> None:
    other = toy_model(
        "llama", max_position_embeddings=512, tie_word_embeddings=False, rope_theta=10_000.0
    )
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    write_llama(tmp_path / "other.gguf", other)
    said = refused(of_adapter, made, tmp_path / "other.gguf", made / "adapter.gguf")
    assert "its logits differ by up to " in said and "another base" in said
    wider = toy_model(
        "llama", max_position_embeddings=512, tie_word_embeddings=False, vocab_size=330
    )
    write_llama(tmp_path / "wider.gguf", wider)
    assert "it has 330 tokens, the exported model 320 (is it another base?)" in refused(
        of_adapter, made, tmp_path / "wider.gguf", made / "adapter.gguf"
    )


FIELDS: dict[str, tuple[Mapping[str, Any], str]] = {
    "BOS twice": (
        {"add_bos_token": True},
        "token 1 is '<s>', ours 'The' (the file adds BOS: a chat that begins with",
    ),
    "EOS after a text": ({"add_eos_token": True}, "is '</s>', ours the end"),
    "no template": ({"chat_template": None}, "it has no chat template"),
    "another template": ({"chat_template": "{{ messages }}"}, "it has another chat template"),
    "other merges": ({"merges": ["a b"]}, "token ids of a rendered chat differ: token "),
}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.sampled(3)
def test_a_file_that_is_read_otherwise_is_refused_also_if_it_is_quantized(
    made: Path, tmp_path: Path, name: str
) -> None:
    fields, said = FIELDS[name]
    keys = {
        f"tokenizer.{key}" if key == "chat_template" else f"tokenizer.ggml.{key}": value
        for key, value in fields.items()
    }
    broken = rewritten(made / "base.gguf", tmp_path / "broken.gguf", keys)
    for kind in ("f32", "q4_k_m"):
        assert said in refused(of_base, made, broken, kind)


def test_a_template_that_knows_no_system_is_judged_without_one(made: Path, tmp_path: Path) -> None:
    """It would write the system's turn as an answer, without the BOS that begins a chat."""
    template = (
        "{% for m in messages %}{{ (bos_token if m['role'] == 'user' else '') + m['content'] + "
        "eos_token }}{% endfor %}"
    )
    loaded = load(made / "base")
    inner = loaded.tokenizer._hf_tokenizer  # type: ignore[union-attr]
    inner.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    inner.chat_template = template
    fields = {"tokenizer.chat_template": template, "tokenizer.ggml.add_bos_token": True}
    file = candidate("f32", rewritten(made / "base.gguf", tmp_path / "bos.gguf", fields))
    (entry,) = certified(lambda: loaded, file, tokenizer=SubwordTokenizer(inner, "toy"))["files"]
    assert "plain_text_difference" not in entry


def test_a_file_that_does_not_end_where_the_model_ends_is_refused(made: Path) -> None:
    loaded = load(made / "base")
    ends = SubwordTokenizer(loaded.tokenizer._hf_tokenizer, "toy", (7,))  # type: ignore[union-attr]
    file = candidate("f32", made / "base.gguf")
    with pytest.raises(UserError, match=f"it does not stop at {re.escape(ends.word(7))}"):
        certified(lambda: loaded, file, tokenizer=ends)


def test_a_model_that_begins_plain_texts_but_no_chats_with_bos_is_noted(
    made: Path, tmp_path: Path
) -> None:
    """The file has one flag for both, and chats count."""
    loaded, template = (
        load(made / "base"),
        "{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}",
    )
    inner = loaded.tokenizer._hf_tokenizer  # type: ignore[union-attr]
    inner.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    file = made / "base.gguf"
    inner.chat_template = None
    plain = rewritten(file, tmp_path / "plain.gguf", {"tokenizer.chat_template": None})
    with pytest.raises(UserError, match="token 1 is 'The', ours '<s>'"):
        certified(lambda: loaded, candidate("f32", plain), tokenizer=SubwordTokenizer(inner, "toy"))
    inner.chat_template = template
    chats = rewritten(file, tmp_path / "chats.gguf", {"tokenizer.chat_template": template})
    certificate = certified(
        lambda: loaded, candidate("f32", chats), tokenizer=SubwordTokenizer(inner, "toy")
    )
    assert certificate["files"][0]["plain_text_difference"]["token"] == 1
    assert (
        describe(certificate)[-1]
        == "f32 reads chats as we do, but not plain texts: token 1 is 'The', ours '<s>'."
    )


def test_every_difference_is_named_at_once(made: Path, tmp_path: Path) -> None:
    fields = {"tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": None}
    said = refused(of_base, made, rewritten(made / "base.gguf", tmp_path / "broken.gguf", fields))
    assert "it has no chat template; token ids of " in said


def test_logits_that_are_no_numbers_are_refused(made: Path, tmp_path: Path) -> None:
    def broken(name: str, data: Any) -> Any:
        return data * 1e30 if "ffn_down" in name else data

    said = refused(
        of_base, made, rewritten(made / "base.gguf", tmp_path / "inf.gguf", change=broken)
    )
    assert "its logits differ by up to " in said


@pytest.mark.slow
def test_a_quantized_file_is_shown_and_not_judged(tmp_path: Path) -> None:
    model = toy_checkpoint(
        tmp_path / "base", max_position_embeddings=512, hidden_size=256, intermediate_size=256
    )
    write_llama(tmp_path / "f32.gguf", model)
    list(quantize(tmp_path / "f32.gguf", tmp_path / "q2_k.gguf", "q2_k"))
    files = [candidate(kind, tmp_path / f"{kind}.gguf") for kind in ("f32", "q2_k")]
    certificate = certified(lambda: load(tmp_path / "base"), *files)
    exact, quantized = certificate["files"]
    assert quantized["divergence"] > 0.01 > exact["divergence"]
    lines = describe(certificate)
    assert lines[0].startswith("llama.cpp b") and [line.split()[0] for line in lines[1:]] == [
        "format",
        "f32",
        "q2_k",
    ]
    assert (
        max(map(len, lines)) <= 80
        and f"{quantized['same_first_choices']} of {len(PROMPTS)}" in lines[3]
    )


class Program:
    """A program without a tokenizer of its own."""

    name = "program 1"

    def __init__(self, loaded: LoadedModel, wrong: float = 0) -> None:
        self._loaded, self._wrong = loaded, wrong

    def logits(self, ids: Any) -> torch.Tensor:
        with torch.no_grad():
            model = self._loaded.model
            return model.logits(model.hidden_states(torch.tensor([ids]))[0]) * (1 + self._wrong)

    def encode(self, _: str) -> None:
        return None

    def generate(self, _: Any, limit: int) -> tuple[list[int], float]:
        return [7] * limit, 12.0


def test_any_program_that_gives_logits_can_be_compared(made: Path) -> None:
    loaded = load(made / "base")
    right = Candidate("adapter", "f16", 2**20, lambda: nullcontext(Program(loaded)))
    certificate = certified(lambda: loaded, right)
    assert certificate["files"][0]["first_greedy_difference"]["token"] == 1
    assert (
        "differs from token 1" in describe(certificate)[-1]
        and "program 1" in describe(certificate)[0]
    )
    wrong = Candidate("adapter", "f16", 2**20, lambda: nullcontext(Program(loaded, 0.1)))
    assert "adapter is not the exported model in program 1" in refused(
        certified, lambda: loaded, wrong
    )


def test_the_template_of_the_adapter_counts_and_not_its_bases(made: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    loaded = load(made / "base")
    inner = load_tokenizer(made / "base")
    inner._hf_tokenizer.chat_template = template  # type: ignore[union-attr]
    file = rewritten(
        made / "base.gguf", tmp_path / "own.gguf", {"tokenizer.chat_template": template}
    )
    assert certified(lambda: loaded, candidate("f32", file), tokenizer=inner)["files"]
    assert "another chat template" in refused(of_base, made, file)


def test_builtin_prompts_are_sentences_and_a_longer_text() -> None:
    prompts = builtin_prompts()
    assert len(prompts) == 17 and len(prompts[-1].split()) > 200
