"""What several studies or figures measure.

Next-token answers (§6), what a model learned and retained (§9.3), and the change of each parameter
(Figures 1 and 4).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from pipeline.data.answers.prompts import Prompt, read_prompts
from pipeline.data.examples import Example
from pipeline.data.formats import read_examples
from pipeline.errors import UserError
from pipeline.project.runner import Job

if TYPE_CHECKING:  # imported where they are used, since a study's file is read without torch
    from torch import Tensor

    from pipeline.inference.engine import LoadedModel, TokenProbability
    from pipeline.inference.score import EvalScores


@dataclass(frozen=True)
class NextTokenAnswers:
    """The probabilities (V,) of the next token after each prompt."""

    loaded: "LoadedModel"
    by_prompt: "dict[str, Tensor]"

    def probability(self, prompt: str, word: str) -> float:
        """The probability of the word's first token. Check the word with `check_words` first."""
        return float(self.by_prompt[prompt][self.loaded.tokenizer.continuation(prompt, word)[0]])

    def first(self, prompt: str) -> str:
        """The first choice: the word with the highest probability."""
        return self.top(prompt, 1)[0].token

    def top(self, prompt: str, k: int) -> "list[TokenProbability]":
        from pipeline.inference.engine import top_tokens

        return top_tokens(self.loaded, self.by_prompt[prompt], k)


def ask(loaded: "LoadedModel", prompts: Sequence[str]) -> NextTokenAnswers:
    """Run all prompts in one packed batch. Raises UserError for a prompt that cannot be encoded."""
    import torch

    from pipeline.inference.engine import encode
    from pipeline.models.base import packed_hidden_states
    from pipeline.models.generate import finite

    model = loaded.model
    with torch.no_grad():
        hidden = packed_hidden_states(model, [encode(loaded, prompt) for prompt in prompts])
        # (T, D) → (V,)
        by_prompt = [finite(model.logits(states[-1]).float().cpu()).softmax(0) for states in hidden]
    return NextTokenAnswers(loaded, dict(zip(prompts, by_prompt, strict=True)))


def check_words(loaded: "LoadedModel", pairs: Iterable[tuple[str, str]], name: str) -> None:
    """Raises UserError for the first (prompt, word) of file `name` whose word is not in the model's
    vocabulary.
    """
    for prompt, word in pairs:
        if not loaded.tokenizer.continuation(prompt, word):
            raise UserError(
                f"{name}: {word!r}, expected after {prompt!r}, is not in the vocabulary of "
                f"{loaded.name}. Use another word, or add this one with expand_vocab."
            )


def prompts_of(job: Job, name: str, group: str) -> list[Prompt]:
    """The prompts of one group of a prompts file. Raises UserError if there are none."""
    prompts = [prompt for prompt in read_prompts(job.path(name), name) if prompt.group == group]
    if not prompts:
        raise UserError(
            f"{name} has no group {group}, which {job.stage.name} needs. Add it, or use another "
            "file."
        )
    return prompts


def document(job: Job, name: str, section: str) -> Any:
    """A section of the file of the document's tables. Raises UserError if it does not exist."""
    try:
        return yaml.safe_load(job.path(name).read_text(encoding="utf-8"))[section]
    except OSError as error:
        raise UserError(
            f"{name}: {error.strerror}. Name the file of the document's tables."
        ) from None
    except (yaml.YAMLError, ValueError, TypeError, KeyError):
        raise UserError(
            f"{name} has no section {section}. Restore the file: it holds the document's tables."
        ) from None


class Losses(NamedTuple):
    """Of the new and the old sentences, in nats per token; `old_kept` is a share of first
    choices.
    """

    new_loss: float
    old_rise: float
    old_kept: float


class Knowledge(NamedTuple):
    """`Losses`, and the number of new sentences that the model completes word for word."""

    new_loss: float
    new_done: float
    old_rise: float
    old_kept: float


FORMATS = {"new_loss": ".3f", "new_done": ".1f", "old_rise": ".2f", "old_kept": ".0%"}
COLUMNS_EXPLAINED = (
    "*New loss*: mean cross-entropy on the new sentences, in nats per token. *New done*: the "
    "number of new sentences completed word for word. *Old rise*: the increase of the loss on the "
    "old sentences over the base. *Old kept*: the share of next tokens of the old sentences where "
    "the first choice is still the base's."
)


@dataclass(frozen=True)
class RetentionScorer:
    """The sentences to measure models on, and the base's scores on the old ones."""

    old: Sequence[Example]
    new: Sequence[Example]
    before: "EvalScores"
    given: int  # words of a new sentence that serve as the prompt for its completion

    @classmethod
    def of(cls, job: Job, old_data: str, new_data: str, given: int = 2) -> "RetentionScorer":
        """For these data files. Raises UserError for old sentences with words unknown to the
        base.
        """
        from pipeline.inference import engine
        from pipeline.inference.score import score

        base = engine.load(job.artifact("pretrain"))
        old = read_examples(job.path(old_data), old_data)
        return cls(old, read_examples(job.path(new_data), new_data), score(base, old), given)

    def losses(self, loaded: "LoadedModel") -> Losses:
        """The scores that need no generation, of a model that knows the words of old and new
        sentences.
        """
        from pipeline.inference.score import agreement, score

        old, new = score(loaded, self.old, self.before), score(loaded, self.new)
        return Losses(
            new.loss, old.loss - self.before.loss, agreement(old.choices, self.before.choices)
        )

    def measure(self, loaded: "LoadedModel") -> Knowledge:
        """Losses and completions."""
        from pipeline.inference.score import completes_correctly

        new_loss, old_rise, old_kept = self.losses(loaded)
        done = sum(completes_correctly(loaded, example, self.given) for example in self.new)
        return Knowledge(new_loss, float(done), old_rise, old_kept)


@dataclass(frozen=True)
class Changed:
    """A parameter before training and its change, in fp64. A neuron is a row of a matrix (O, I).

    `module`: the full name of its module; `block`: the index of its block, or None outside the
    blocks; `last`: the last part of the module's name.
    """

    name: str
    block: int | None
    before: "Tensor"
    change: "Tensor"

    @property
    def module(self) -> str:
        return self.name.rsplit(".", 1)[0]

    @property
    def last(self) -> str:
        return self.module.rsplit(".", 1)[-1]

    @property
    def relative(self) -> "Tensor":
        """‖Δw‖/‖w‖ of each neuron, (O,)."""
        relative: Tensor = self.change.norm(dim=1) / self.before.norm(dim=1)
        return relative


def changes(job: Job) -> list[Changed]:
    """Every parameter of the expanded base with its change by full fine-tuning."""
    from pipeline.inference import engine

    before, after = (
        engine.load(job.project.artifact(stage)).model
        for stage in ("expand_vocab", "finetune_full")
    )
    blocks = {
        id(module): number
        for number, block in enumerate(before.blocks)
        for module in block.modules()
    }
    changed = []
    for name, parameter in before.named_parameters():
        module, old = (
            before.get_submodule(name.rsplit(".", 1)[0]),
            parameter.detach().cpu().double(),
        )
        new = after.get_parameter(name).detach().cpu().double()
        changed.append(Changed(name, blocks.get(id(module)), old, new - old))
    return changed


def module_name(block: int | None, last: str) -> str:
    """Such as "v_proj of block 1"."""
    return last if block is None else f"{last} of block {block}"
