"""Retention loss: KL divergence from the base on other texts.

Learning without Forgetting, Li & Hoiem 2017.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from pipeline.adapters.attach import disable_adapter
from pipeline.adapters.lora import AdapterLayer
from pipeline.data.examples import Example, Window
from pipeline.data.formats import iter_examples
from pipeline.data.masking import encode
from pipeline.data.windows import Dataset, InMemoryDataset
from pipeline.errors import UserError
from pipeline.models.base import CausalLM
from pipeline.models.generate import generate_all
from pipeline.models.load import Base
from pipeline.project.runner import Event, Job, Note
from pipeline.training.batches import Batch, Batches
from pipeline.training.losses import Head, divergence, mean_loss
from pipeline.training.parallel.sharding import before_training


class RetentionSettings(Protocol):
    """The keys of a method's section that retention takes."""

    @property
    def seed(self) -> int: ...
    @property
    def max_length(self) -> int: ...
    @property
    def tokens_per_batch(self) -> int: ...
    @property
    def templated(self) -> bool: ...
    @property
    def retention_data(self) -> str: ...
    @property
    def retention_weight(self) -> float: ...
    @property
    def retention_batch_size(self) -> int: ...
    @property
    def retains(self) -> bool: ...


COMPLETION = 32  # tokens that the base generates for a prompt, at most
# A context in which a model computes as its base.
AsBase = Callable[[], AbstractContextManager[None]]


class RetentionLoss:
    """KL(base‖model) in nats per token, and its weight in the loss.

    The base is the model with its adapter disabled. Of parameters that train in full beside the
    adapter (embeddings, head) it keeps a copy of the original values. `as_base`: a context in which
    the model computes as its base, for a model that knows one of its own. `first`: the steps of the
    run that this one continues.
    """

    def __init__(
        self,
        model: CausalLM,
        texts: Dataset,
        settings: RetentionSettings,
        as_base: AsBase | None = None,
        first: int = 0,
    ) -> None:
        self.weight = settings.retention_weight
        size, tokens = settings.retention_batch_size, settings.tokens_per_batch
        self.batches = Batches(texts, size, settings.seed, 1, first, tokens)
        self._model, self.as_base = model, as_base or self._without_adapter
        self._originals: list[tuple[nn.Parameter, Tensor]] = []
        if as_base:
            return
        with_layer = set[nn.Parameter]()  # switched off with its adapter layer
        for module in model.modules():
            if isinstance(module, AdapterLayer):
                with_layer.update(module.adapter_parameters().values())
        for p in model.parameters():
            if p.requires_grad and p not in with_layer:
                self._originals.append((p, p.detach().clone()))

    def divergence(self, batch: Batch) -> Tensor:
        """KL(base‖model), the mean over all tokens of the batch: a scalar with gradient."""
        return self.divergences(batch, [batch.ids.numel()], [self._model.logits])[0]

    def divergences(self, batch: Batch, counts: Sequence[int], heads: Sequence[Head]) -> Tensor:
        """(L,): the same for each part of the batch, of `counts` tokens, with its own head."""
        model = self._model
        with torch.no_grad(), self.as_base():
            before = batch.read_by(model)  # (N, D)
        after = batch.read_by(model)

        # of the base only the hidden states are kept: its logits are computed chunk by chunk
        def base_logits(hidden: Tensor) -> Tensor:
            with self.as_base():
                return model.logits(hidden)

        rows, targets = (torch.split(states, [*counts]) for states in (after, before))
        means = []
        for head, x, y in zip(heads, rows, targets, strict=True):
            means.append(mean_loss(model, divergence(head, base_logits), x, y))
        return torch.stack(means)

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        # the model may have moved
        self._originals = [(p, original.to(p.device)) for p, original in self._originals]
        trained = [(p, p.data) for p, _ in self._originals]
        with disable_adapter(self._model):
            for p, original in self._originals:
                p.data = original
            try:
                yield
            finally:
                for p, data in trained:
                    p.data = data


def load_retention_texts(
    job: Job, settings: RetentionSettings, base: Base, as_base: AsBase = nullcontext
) -> Generator[Event, None, Dataset | None]:
    """The texts of retention_data, encoded; None if it is unset. The base completes prompts.

    `as_base`: as of RetentionLoss, for a base that is sharded first and then has its adapter.
    Raises UserError for a weight without a file.
    """
    if settings.retention_weight and not settings.retention_data:
        raise UserError(
            f"{job.stage.section}.retention_weight is set, but {job.stage.section}.retention_data "
            "is not. Set it to a data file."
        )
    if not settings.retains:
        return None
    path, name = job.path(settings.retention_data), settings.retention_data
    examples = list(iter_examples(path, name, prompts=True, templated=settings.templated))
    prompts = {
        n: _encode_prompt(example, base, settings.max_length)
        for n, example in enumerate(examples)
        if example.prompt == example.text
    }
    windows = []
    for n, example in enumerate(examples):
        ids = prompts.get(n)
        if not ids:
            positions = base.model.shape.positions
            # without the last id: it is the end token, after which predictions do not matter
            ids = encode(example, base.tokenizer, settings.max_length, positions).ids[:-1]
        # the divergence counts every token, so every token is a label
        windows.append(Window(0, ids, ids))

    def complete() -> Iterator[Event]:
        yield Note(
            f"{job.stage.name}: the base completes {len(prompts)} prompts of "
            f"{settings.retention_data}"
        )
        limits = [COMPLETION] * len(prompts)
        with as_base():
            answers = generate_all(base.model, [*prompts.values()], base.tokenizer.end_ids, limits)
        for (n, ids), answer in zip(prompts.items(), answers, strict=True):
            text = (*ids, *answer)
            windows[n] = Window(0, text, text)

    if prompts:
        yield from before_training(job, base.model, complete())
    return InMemoryDataset(windows, [example.location for example in examples])


def _encode_prompt(prompt: Example, base: Base, max_length: int) -> tuple[int, ...]:
    """The ids of a prompt alone, cut at `max_length` as a text is. Raises UserError as for one."""
    text = replace(prompt, prompt=None, templated=False)
    length = len(encode(text, base.tokenizer, max_length, base.model.shape.positions).ids)
    return base.tokenizer.encode(prompt.text)[:length]
