"""Keep what the base knows: its answers on other texts are a part of the loss (the idea of Li & Hoiem 2017)."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.adapters.attach import disable_adapter
from pipeline.data.examples import Example, Window, iter_examples
from pipeline.data.masking import encode
from pipeline.data.windows import Dataset, InMemoryDataset
from pipeline.errors import UserError
from pipeline.models.base import CausalLM
from pipeline.models.device import move_for_inference
from pipeline.models.generate import generate
from pipeline.models.load import Base
from pipeline.project.params.sections import FinetuneLora
from pipeline.project.runner import Event, Job, Note
from pipeline.training.batches import Batch, Batches
from pipeline.training.losses import divergence, mean_of

COMPLETION = 32  # tokens that the base adds to a prompt at most


class RetentionLoss:
    """KL(base‖model) in nats a token, weighted. The base is the same model with its adapter off: no second copy.

    What trains in full beside the adapter (embeddings, head) is kept as it was, since nothing else has it.
    """

    def __init__(self, model: CausalLM, texts: Dataset, settings: FinetuneLora) -> None:
        self.weight = settings.retain_weight
        self._model = model
        self._batches = Batches(texts, settings.retain_batch, settings.seed)
        added = {
            id(p)
            for name, p in model.named_parameters()
            if name.endswith((".lora_A", ".lora_B", ".magnitude", ".rows"))
        }
        full = [p for p in model.parameters() if p.requires_grad and id(p) not in added]
        self._originals = [(p, p.detach().clone()) for p in full]

    def batches(self, number: int) -> list[Batch]:
        """The texts of step `number`."""
        return self._batches[number]

    def places(self, number: int) -> list[str]:
        """Where the texts of step `number` stand in their file."""
        return self._batches.places(number)

    def divergence(self, batch: Batch) -> Tensor:
        """Mean over all tokens of the batch."""
        model = self._model
        with torch.no_grad(), self._off():
            before = model.hidden_states(batch.ids, batch.positions, batch.segments).flatten(0, 1)  # (N, D)
        after = model.hidden_states(batch.ids, batch.positions, batch.segments).flatten(0, 1)
        head = [p for p in model.head.parameters() if p.requires_grad]
        return mean_of(divergence(model.logits, self._base_logits), after, before, trained=head)

    def _base_logits(self, hidden: Tensor) -> Tensor:
        with self._off():
            return self._model.logits(hidden)

    @contextmanager
    def _off(self) -> Iterator[None]:
        self._originals = [(p, original.to(p.device)) for p, original in self._originals]  # it may have moved since
        trained = [(p, p.data) for p, _ in self._originals]
        with disable_adapter(self._model):
            for p, original in self._originals:
                p.data = original
            try:
                yield
            finally:
                for p, data in trained:
                    p.data = data


def retain_of(job: Job, settings: FinetuneLora, base: Base) -> Generator[Event, None, Dataset | None]:
    """The texts to retain, a prompt alone completed by the base itself; None where none are asked for.

    Raises UserError for a weight without a file.
    """
    if settings.retain_weight and not settings.retain:
        raise UserError("finetune_lora.retain_weight is set, but no file is. Name one in finetune_lora.retain.")
    if not settings.retains:
        return None
    found, places = [], []
    examples = list(iter_examples(job.path(settings.retain), settings.retain, prompts=True))
    if prompts := sum(map(_is_prompt, examples)):
        yield Note(f"{job.stage.name}: the base completes {prompts} prompts of {settings.retain}")
        move_for_inference(base.model)
    for example in examples:
        ids = _completed(example, base) if _is_prompt(example) else _read(example, settings, base)
        found.append(Window(0, ids, ids))  # every token is one on which answers are compared
        places.append(example.place)
    base.model.to("cpu")  # the training loop moves it, or shares it out
    return InMemoryDataset(found, places)


def _is_prompt(example: Example) -> bool:
    return example.prompt == example.text


def _read(example: Example, settings: FinetuneLora, base: Base) -> tuple[int, ...]:
    """Its ids, but for the end: what follows that is nobody's business."""
    return encode(example, base.tokenizer, settings.max_length, base.model.shape.positions).ids[:-1]


def _completed(example: Example, base: Base) -> tuple[int, ...]:
    model, tokenizer = base
    ids = tokenizer.encode(example.text)
    return (*ids, *generate(model, ids, tokenizer.end_ids, COMPLETION))
