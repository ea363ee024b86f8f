"""Prompts whose completions are compared with the rest of the text."""

from pathlib import Path

import pytest
from torch import nn

from pipeline.data.examples import Example
from pipeline.inference import score
from pipeline.inference.engine import LoadedModel
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
