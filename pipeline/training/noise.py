"""LoRA's dropout and NEFTune's noise: numbers that seed, step, rank, batch and layer determine.

So a run that resumes, a step that is repeated and a block that is computed again in backward have
the same numbers, and an adapter of a sweep has those of a run of its own, unless tokens_per_batch
divides their steps in different ways.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.adapters.batched import lora_layers
from pipeline.models.base import CausalLM
from pipeline.models.device import to_device
from pipeline.project.params.sections import Training
from pipeline.training.parallel.collectives import rank


class LearnerNoise:
    """The random numbers of one learner. Outside `during`, as in evaluations, there are none."""

    def __init__(self, settings: Training) -> None:
        self._seed, self._alpha = settings.seed, settings.neftune_alpha
        self._step = self._batch = 0
        self._generators: dict[torch.device, torch.Generator] = {}
        self.lengths: Sequence[int] = ()  # of the batch's sequences

    def begin(self, step: int) -> None:
        """From now on the batches of this step are read, the first one first."""
        self._step, self._batch = step, 0

    @contextmanager
    def during(self, lengths: Sequence[int]) -> Iterator[None]:
        """Inside the block the step's next batch, of sequences of these lengths, is trained on."""
        self.lengths = lengths
        try:
            yield
        finally:
            self.lengths, self._batch = (), self._batch + 1

    def keep(self, layer: str, dropout: float, x: Tensor) -> Tensor | None:
        """Which elements of the layer's input dropout keeps; None where nothing is dropped."""
        if not self.lengths:
            return None
        mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        return mask.bernoulli_(1 - dropout, generator=self._generator(layer, x.device))

    def perturb(self, x: Tensor) -> Tensor:
        """Embeddings x (N, D) with uniform noise in ±alpha/√(L·D), L the length of its sequence.

        NEFTune (Jain et al. 2023, algorithm 1).
        """
        if not self._alpha:
            return x
        noise = torch.empty_like(x, requires_grad=False)
        noise.uniform_(-1, 1, generator=self._generator("embeddings", x.device))
        lengths = torch.tensor(self.lengths)
        bounds = self._alpha / (lengths * x.shape[1]).sqrt()  # of each sequence
        bounds = bounds.repeat_interleave(lengths, output_size=len(x))  # (N,)
        return torch.addcmul(x, noise, to_device(bounds[:, None].to(x.dtype), x.device))

    def _generator(self, layer: str, device: torch.device) -> torch.Generator:
        """A generator for this layer in this batch."""
        place = f"{self._seed}/{self._step}/{rank()}/{self._batch}/{layer}"
        digest = hashlib.sha256(place.encode()).digest()
        generator = self._generators.setdefault(device, torch.Generator(device))
        return generator.manual_seed(int.from_bytes(digest[:8], "big"))


@contextmanager
def training_noise(model: CausalLM, settings: Sequence[Training]) -> Iterator[list[LearnerNoise]]:
    """Inside the block the model has the noise of its learners, in the order of `settings`."""
    noises = [LearnerNoise(section) for section in settings]
    dropping = []
    for learner, name, layer in lora_layers(model):
        if layer.dropout:
            layer.keep = partial(noises[learner].keep, name, layer.dropout)
            dropping.append(layer)

    def perturb(_module: nn.Module, _inputs: object, embeddings: Tensor) -> Tensor:
        # the learners' tokens follow each other, in the order of the learners
        live = [noise for noise in noises if noise.lengths]
        if not live:
            return embeddings
        parts = embeddings.flatten(0, -2).split([sum(noise.lengths) for noise in live])  # type: ignore[no-untyped-call]
        noisy = [noise.perturb(part) for noise, part in zip(live, parts, strict=True)]
        return (torch.cat(noisy) if len(noisy) > 1 else noisy[0]).view_as(embeddings)

    hook = None
    if any(section.neftune_alpha for section in settings):
        hook = model.embeddings.register_forward_hook(perturb)
    try:
        yield noises
    finally:
        for layer in dropping:
            layer.keep = None
        if hook is not None:
            hook.remove()
