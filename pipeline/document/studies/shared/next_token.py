"""Next-token probabilities, for the studies that compare many models on prompts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from pipeline.data.prompts import Prompt, read_prompts
from pipeline.errors import UserError
from pipeline.inference.engine import LoadedModel, TokenProbability, encode, top_tokens
from pipeline.models.base import packed_hidden_states
from pipeline.models.generate import finite
from pipeline.project.runner import Job


@dataclass(frozen=True)
class NextTokenAnswers:
    """The probabilities (V,) of the next token after each prompt."""

    loaded: LoadedModel
    by_prompt: dict[str, Tensor]

    def probability(self, prompt: str, word: str) -> float:
        """The probability of the word's first token. Check the word with `check_words` first."""
        return float(self.by_prompt[prompt][self.loaded.tokenizer.continuation(prompt, word)[0]])

    def first(self, prompt: str) -> str:
        """The first choice: the word with the highest probability."""
        return self.top(prompt, 1)[0].token

    def top(self, prompt: str, k: int) -> list[TokenProbability]:
        return top_tokens(self.loaded, self.by_prompt[prompt], k)


@torch.no_grad()
def ask(loaded: LoadedModel, prompts: Sequence[str]) -> NextTokenAnswers:
    """Run all prompts in one packed batch. Raises UserError for a prompt that cannot be encoded."""
    model = loaded.model
    hidden = packed_hidden_states(model, [encode(loaded, prompt) for prompt in prompts])
    by_prompt = [finite(model.logits(states[-1]).float().cpu()).softmax(0) for states in hidden]  # (T, D) → (V,)
    return NextTokenAnswers(loaded, dict(zip(prompts, by_prompt, strict=True)))


def check_words(loaded: LoadedModel, pairs: Iterable[tuple[str, str]], name: str) -> None:
    """Raises UserError for the first (prompt, word) of file `name` whose word is not in the model's vocabulary."""
    for prompt, word in pairs:
        if not loaded.tokenizer.continuation(prompt, word):
            raise UserError(
                f"{name}: {word!r}, expected after {prompt!r}, is not in the vocabulary of {loaded.name}. Use another "
                "word, or add this one with expand_vocab."
            )


def prompts_of(job: Job, name: str, group: str) -> list[Prompt]:
    """The prompts of one group of a prompts file. Raises UserError if there are none."""
    prompts = [prompt for prompt in read_prompts(job.path(name), name) if prompt.group == group]
    if not prompts:
        raise UserError(f"{name} has no group {group}, which {job.stage.name} needs. Add it, or use another file.")
    return prompts


def document(path: Path, name: str, section: str) -> Any:
    """A section of the file of the document's tables. Raises UserError if it does not exist."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        content = tree[section]
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}. Name the file of the document's tables.") from None
    except (yaml.YAMLError, ValueError, TypeError, KeyError):
        raise UserError(f"{name} has no section {section}. Restore the file: it holds the document's tables.") from None
    return content
