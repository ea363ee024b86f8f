"""Retention loss: KL divergence from the base on other texts (Learning without Forgetting, Li & Hoiem 2017)."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from pipeline.adapters.attach import disable_adapter
from pipeline.data.examples import Example, Window
from pipeline.data.masking import encode
from pipeline.data.read import iter_examples
from pipeline.data.windows import Dataset, InMemoryDataset
from pipeline.errors import UserError
from pipeline.models.base import CausalLM
from pipeline.models.device import move_for_inference
from pipeline.models.generate import generate
from pipeline.models.load import Base
from pipeline.project.runner import Event, Job, Note
from pipeline.training.batches import Batch, Batches
from pipeline.training.losses import chunked_mean, divergence


class RetentionSettings(Protocol):
    """The keys of a method's section that retention takes."""

    @property
    def seed(self) -> int: ...
    @property
    def max_length(self) -> int: ...
    @property
    def retention_data(self) -> str: ...
    @property
    def retention_weight(self) -> float: ...
    @property
    def retention_batch_size(self) -> int: ...
    @property
    def retains(self) -> bool: ...


COMPLETION = 32  # tokens that the base generates for a prompt, at most


class RetentionLoss:
    """KL(base‖model) in nats per token, and its weight in the loss. The base is the model with its adapter disabled.

    Of parameters that train in full beside the adapter (embeddings, head) it keeps a copy of the original values.
    """

    def __init__(self, model: CausalLM, texts: Dataset, settings: RetentionSettings) -> None:
        self.weight = settings.retention_weight
        self._model = model
        self._batches = Batches(texts, settings.retention_batch_size, settings.seed)
        adapter_parameters = {
            id(p)
            for name, p in model.named_parameters()
            if name.endswith((".lora_A", ".lora_B", ".magnitude", ".rows"))
        }
        full = [p for p in model.parameters() if p.requires_grad and id(p) not in adapter_parameters]
        self._originals = [(p, p.detach().clone()) for p in full]

    def batches(self, number: int) -> list[Batch]:
        """The batches of step `number`."""
        return self._batches[number]

    def locations(self, number: int) -> list[str]:
        """`file:line` of the texts of step `number`."""
        return self._batches.locations(number)

    def divergence(self, batch: Batch) -> Tensor:
        """KL(base‖model), the mean over all tokens of the batch: a scalar with gradient."""
        model = self._model
        with torch.no_grad(), self._as_base():
            before = model.hidden_states(batch.ids, batch.positions, batch.segments).flatten(0, 1)  # (N, D)
        after = model.hidden_states(batch.ids, batch.positions, batch.segments).flatten(0, 1)
        head = [p for p in model.head.parameters() if p.requires_grad]
        return chunked_mean(divergence(model.logits, self._base_logits), after, before, trained=head)

    def _base_logits(self, hidden: Tensor) -> Tensor:
        with self._as_base():
            return self._model.logits(hidden)

    @contextmanager
    def _as_base(self) -> Iterator[None]:
        self._originals = [(p, original.to(p.device)) for p, original in self._originals]  # the model may have moved
        trained = [(p, p.data) for p, _ in self._originals]
        with disable_adapter(self._model):
            for p, original in self._originals:
                p.data = original
            try:
                yield
            finally:
                for p, data in trained:
                    p.data = data


def load_retention_texts(job: Job, settings: RetentionSettings, base: Base) -> Generator[Event, None, Dataset | None]:
    """The texts of finetune_lora.retention_data, encoded; the base completes prompts. None if unset.

    Raises UserError for a weight without a file.
    """
    if settings.retention_weight and not settings.retention_data:
        raise UserError(
            "finetune_lora.retention_weight is set, but finetune_lora.retention_data is not. Set it to a data file."
        )
    if not settings.retains:
        return None
    windows, locations = [], []
    examples = list(iter_examples(job.path(settings.retention_data), settings.retention_data, prompts=True))
    if prompts := sum(map(_is_prompt, examples)):
        yield Note(f"{job.stage.name}: the base completes {prompts} prompts of {settings.retention_data}")
        move_for_inference(base.model)
    for example in examples:
        ids = _complete_prompt(example, base) if _is_prompt(example) else _encode_text(example, settings, base)
        windows.append(Window(0, ids, ids))  # the divergence counts every token, so every token is a label
        locations.append(example.location)
    base.model.to("cpu")  # the training loop moves it to its device, or shards it
    return InMemoryDataset(windows, locations)


def _is_prompt(example: Example) -> bool:
    return example.prompt == example.text


def _encode_text(example: Example, settings: RetentionSettings, base: Base) -> tuple[int, ...]:
    """The ids without the last one: it is the end token, after which predictions do not matter."""
    return encode(example, base.tokenizer, settings.max_length, base.model.shape.positions).ids[:-1]


def _complete_prompt(example: Example, base: Base) -> tuple[int, ...]:
    model, tokenizer = base
    ids = tokenizer.encode(example.text)
    return (*ids, *generate(model, ids, tokenizer.end_ids, COMPLETION))
