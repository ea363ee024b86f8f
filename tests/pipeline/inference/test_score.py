"""Prompts whose completions are compared with the rest of the text."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.data.examples import Example
from pipeline.errors import UserError
from pipeline.inference import score
from pipeline.inference.engine import LoadedModel, load
from pipeline.models.virtual_tokens import PromptTokens
from tests.helpers.checkpoints import WORDS, checkpoint
from tests.helpers.tokenizers import tokenizer_with


def test_the_words_that_are_given_keep_the_white_space_between_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = list[str]()

    def complete(_: LoadedModel, prompt: str, __: int) -> str:
        prompts.append(prompt)
        return "return  1"

    monkeypatch.setattr(score, "complete", complete)
    loaded = LoadedModel("", nn.Identity(), tokenizer_with(tmp_path), tmp_path)  # type: ignore[arg-type]
    example = Example("\tif  x:\u2028  return  1", "f", 1)
    assert [score.completes_correctly(loaded, example, given) for given in (2, 1, 0)] == [
        True,
        False,
        False,
    ]
    assert prompts == ["\tif  x:", "\tif", ""]


def test_a_prompt_and_an_answer_too_long_for_the_positions_are_one_message(tmp_path: Path) -> None:
    loaded = load(checkpoint(tmp_path / "base", max_positions=6))
    prompt, answer = " ".join(WORDS[:4]), " ".join(WORDS[4:7])
    assert len(score.score_answers(loaded, [(prompt, answer)])) == 1
    with pytest.raises(UserError) as error:
        score.score_answers(loaded, [(prompt, answer + " w8")])
    assert str(error.value) == (
        "The prompt 'w0 w1 w2 w3' and its answer without the last token have 7 tokens; base takes "
        "6. Shorten them."
    )


def test_an_example_that_leaves_no_positions_for_virtual_tokens_is_one_message(
    tmp_path: Path,
) -> None:
    loaded = load(checkpoint(tmp_path / "base", max_positions=8))
    loaded.model.set_virtual_tokens(PromptTokens(torch.zeros(3, 64)))
    assert len(score.score(loaded, [Example(" ".join(WORDS[:4]), "f", 1)]).losses) == 4
    with pytest.raises(UserError, match="more than the model's 8 positions less 3 virtual tokens"):
        score.score(loaded, [Example(" ".join(WORDS[:7]), "f", 1)])


def test_the_perplexity_of_a_loss_without_an_exponential_is_infinite(tmp_path: Path) -> None:
    loaded = load(checkpoint(tmp_path / "base"))
    with torch.no_grad():
        loaded.model.get_parameter("lm_head.weight").mul_(10_000)
    assert score.score(loaded, [Example("w1 w2 w3", "f", 1)]).perplexity == math.inf
