"""What a model says next, for the studies that ask prompts of many models."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from pipeline.data.examples import Prompt, read_prompts
from pipeline.errors import UserError
from pipeline.inference.engine import LoadedModel, TokenProbability, encode, top_tokens
from pipeline.models.base import packed_hidden_states
from pipeline.models.generate import finite
from pipeline.project.runner import Job


@dataclass(frozen=True)
class NextTokenAnswers:
    """The probabilities of the next token after each prompt, (V,)."""

    loaded: LoadedModel
    by_prompt: dict[str, Tensor]

    def probability(self, prompt: str, word: str) -> float:
        """Of a word that is one token; `refuse_unsayable` says of which there is none."""
        return float(self.by_prompt[prompt][self.loaded.tokenizer.continuation(prompt, word)[0]])

    def first(self, prompt: str) -> str:
        """The likeliest word."""
        return self.top(prompt, 1)[0].token

    def top(self, prompt: str, k: int) -> list[TokenProbability]:
        return top_tokens(self.loaded, self.by_prompt[prompt], k)


@torch.no_grad()
def ask(loaded: LoadedModel, prompts: Sequence[str]) -> NextTokenAnswers:
    """All prompts read together. Raises UserError for one that cannot be asked."""
    model = loaded.model
    hidden = packed_hidden_states(model, [encode(loaded, prompt) for prompt in prompts])
    found = [finite(model.logits(each[-1]).float().cpu()).softmax(0) for each in hidden]
    return NextTokenAnswers(loaded, dict(zip(prompts, found, strict=True)))


def refuse_unsayable(loaded: LoadedModel, pairs: Iterable[tuple[str, str]], name: str) -> None:
    """Raises UserError for the first (prompt, word) of file `name` whose word the model's tokenizer cannot say."""
    for prompt, word in pairs:
        if not loaded.tokenizer.continuation(prompt, word):
            raise UserError(
                f"{name}: {word!r}, which is to follow {prompt!r}, is no word of {loaded.name}. Name one that it "
                "knows, or add this one with expand_vocab."
            )


def prompts_of(job: Job, name: str, group: str) -> list[Prompt]:
    """Those of one group of a prompts file. Raises UserError where it has none."""
    found = [prompt for prompt in read_prompts(job.path(name), name) if prompt.group == group]
    if not found:
        raise UserError(
            f"{name} has no group {group}, of which {job.stage.name} asks. Write one, or name another file."
        )
    return found


def document(path: Path, name: str, section: str) -> Any:
    """A section of the document's tables. Raises UserError where the file has none."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        found = tree[section]
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}. Name the document's tables.") from None
    except (yaml.YAMLError, ValueError, TypeError, KeyError):
        raise UserError(f"{name} has no section {section}. Restore the file: it holds the document's tables.") from None
    return found
