"""Encoded answers as a data set, and their log-probabilities under the reference."""

import hashlib
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.adapters.attach import disable_adapter
from pipeline.data.examples import Window
from pipeline.data.preferences import encode_answers, encode_pairs
from pipeline.data.windows import Corpus, window_of
from pipeline.files import artifact, base_model
from pipeline.models.base import CausalLM
from pipeline.models.device import placed_for_inference
from pipeline.models.load import Base
from pipeline.models.save import load_tensors, save_tensors
from pipeline.project import provenance
from pipeline.project.cache import Cache, Damaged
from pipeline.project.params.sections import Training
from pipeline.project.runner import Event, Facts, Job, Note, Progress
from pipeline.training.data import build_corpora
from pipeline.training.parallel.collectives import (
    all_reduce,
    broadcast_tensors,
    is_main_process,
    rank,
    world_size,
)
from pipeline.training.parallel.sharding import before_training
from pipeline.training.preferences.batches import Answers, batch_of
from pipeline.training.preferences.losses import PreferenceLoss, likelihood

SCORED_TOGETHER = 8  # sequences in one forward of the reference
REFERENCE = "reference_log_probs"  # in the cache, beside the stages, and in the run folder
TENSORS = "log_probs.safetensors"


class _Mismatched(Sequence[Window]):
    """Each answer of the corpus, then the answer of the previous example behind its prompt.

    Each example has at most `longest` tokens; what is put together is cut there.
    """

    def __init__(self, corpus: Corpus, longest: int) -> None:
        self._corpus, self._longest = corpus, longest

    def __len__(self) -> int:
        return 2 * len(self._corpus)

    def __getitem__(self, number: int) -> Window:  # type: ignore[override]
        index, is_mismatched = divmod(number, 2)
        if not is_mismatched:
            return self._corpus[index]
        # before the first, the last
        row, before = (self._corpus.stored(n % len(self._corpus)) for n in (index, index - 1))
        prompt, answer = row[: _first_trained(row)], before[_first_trained(before) :]
        return window_of(np.concatenate([prompt, answer])[: self._longest])


def _first_trained(stored: npt.NDArray[np.int32]) -> int:
    return int(np.argmax(stored >= 0))


def build_answers(
    job: Job, settings: Training, loss: PreferenceLoss, base: Base
) -> Generator[Event, None, tuple[Answers, Answers | None]]:
    """(training set, evaluation set or None).

    Raises UserError as `build_corpora`, and for rows of another kind.
    """
    encode = encode_answers if loss == "kto" else encode_pairs
    training, held_out = yield from build_corpora(job, settings, base, encode)
    longest = base.model.max_length
    answers = _answers_of(training, loss, longest)
    return answers, None if held_out is None else _answers_of(held_out, loss, longest)


def _answers_of(corpus: Corpus, loss: PreferenceLoss, longest: int) -> Answers:
    if loss == "kto":
        windows = _Mismatched(corpus, longest)
        desirable = [*map(bool, corpus.desirable)]
        return Answers(windows, corpus.location, corpus.parts, desirable=desirable)
    parts = tuple((range(run.start // 2, run.stop // 2), weight) for run, weight in corpus.parts)
    whole = loss == "orpo"
    return Answers(corpus, lambda number: corpus.location(2 * number), parts, whole=whole)


def with_reference(
    job: Job, base: Base, answers: tuple[Answers, Answers | None], as_base: bool
) -> Generator[Event, None, tuple[Answers, Answers | None]]:
    """The same with each answer's log-probability under the reference.

    The reference is the model as it is, or `as_base` its base. Log-probabilities are kept in the
    cache by what they depend on: a run that resumes, or has another loss, computes none.
    """
    given = [data for data in answers if data is not None]
    values = {str(n): torch.zeros(len(data.windows)) for n, data in enumerate(given)}
    total = sum(map(len, values.values()))
    if job.key:  # else a trial: a step takes the same time and memory whatever the reference says
        store = _Kept(job, given, as_base) if is_main_process() else None
        known = broadcast_tensors(store.read() if store else {})

        def compute() -> Iterator[Event]:
            with disable_adapter(base.model) if as_base else nullcontext():
                yield from _log_probs(base.model, given, values, total)
            if store:
                store.write(values)

        if not known:
            yield Note(
                f"{job.stage.name}: log-probabilities of {total:,} answers under the reference "
                "are computed once"
            )
            yield from before_training(job, base.model, compute())
        values = known or values
    training, *held_out = (replace(data, reference=values[str(n)]) for n, data in enumerate(given))
    return training, held_out[0] if held_out else None


class _Kept:
    """Log-probabilities in the run folder and in the cache, by what they depend on."""

    def __init__(self, job: Job, answers: Sequence[Answers], as_base: bool) -> None:
        self._facts = _reference_facts(job, answers, as_base)
        compared = {**self._facts, "versions": provenance.public(self._facts["versions"])}
        self._key = hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()
        self._cache, self._folder = Cache(job.project.cache), job.run / REFERENCE

    def read(self) -> dict[str, Tensor]:
        """By the number of the data set; empty if there are none."""
        with suppress(Damaged, OSError):
            if self._cache.restore(REFERENCE, self._key, self._folder):
                return load_tensors(self._folder / TENSORS)
        return {}

    def write(self, values: Mapping[str, Tensor]) -> None:
        with artifact.writing(self._folder) as out:
            save_tensors(out / TENSORS, values)
            artifact.seal(out, self._facts)
        with suppress(OSError):  # the run goes on without the cache
            self._cache.store(REFERENCE, self._key, self._folder)


def _reference_facts(job: Job, answers: Sequence[Answers], as_base: bool) -> Facts:
    settings, inputs = job.project.section(job.stage), job.input_facts["inputs"]
    sequences = hashlib.sha256()
    for data in answers:
        for window in data.windows:
            sequences.update(json.dumps([window.ids, window.labels]).encode())
    return {
        "base": inputs[base_model.shared_name(job.project.artifact_name("expand_vocab"))],
        "adapter": "" if as_base else inputs[base_model.shared_name(settings.init_from)],
        "settings": [settings.precision, settings.quantization, settings.adapter_precision],
        "sequences": sequences.hexdigest(),
        "code": provenance.code_digest(__name__),
        "versions": dict(job.input_facts["versions"]),
    }


@torch.no_grad()
def _log_probs(
    model: CausalLM, answers: Sequence[Answers], values: Mapping[str, Tensor], total: int
) -> Iterator[Event]:
    """Fill `values`, zeros: the summed log-probability of each answer of each data set, in fp32.

    Each rank computes its share.
    """
    done = 0
    for data, sums in zip(answers, values.values(), strict=True):
        for first in range(0, len(sums), SCORED_TOGETHER * world_size()):
            start = first + SCORED_TOGETHER * rank()
            part = range(len(sums))[start : start + SCORED_TOGETHER]
            # a sharded model runs on all ranks at once: one without answers reads the first
            batch = batch_of(data, part or range(1)).to(model.device)
            # `cpu` waits for the device, so that progress is what is done
            sums[part.start : part.stop] = likelihood(model, batch).summed.cpu()
            done += len(part)
            yield Progress(done, total, "reference")
        all_reduce(sums)


@torch.no_grad()
def preferred(model: CausalLM, pairs: Answers, log_probs: Tensor | None = None) -> dict[str, float]:
    """How well a model prefers the chosen answers, by mean log-probability per token.

    `accuracy`: the share of pairs whose chosen answer has the higher one. `margin`: the mean
    difference, in nats per token. Sums would nearly always prefer the shorter answer. `log_probs`:
    the sums, (2n,), where they are known. Otherwise all of it is computed on this rank: after
    training the others are gone.
    """
    indices = range(len(pairs.windows))
    starts = range(0, len(indices), SCORED_TOGETHER)
    parts = [batch_of(pairs, indices[start : start + SCORED_TOGETHER]) for start in starts]
    if log_probs is None:
        with placed_for_inference(model):
            sums = [likelihood(model, part.to(model.device)).summed for part in parts]
            log_probs = torch.cat(sums).cpu()
    counts = chain.from_iterable(part.counts for part in parts)
    means = (log_probs / torch.tensor([*counts])).double()
    margins = means[::2] - means[1::2]
    return {"accuracy": (margins > 0).double().mean().item(), "margin": margins.mean().item()}
