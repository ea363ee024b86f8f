"""Encoded answers as the sequences of a data set, and their log-probabilities under the reference."""

import hashlib
import json
from collections.abc import Generator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.adapters.attach import disable_adapter
from pipeline.data.examples import Window
from pipeline.data.masking import Encoded
from pipeline.data.preferences import AnswerEncoder, PairEncoder
from pipeline.data.windows import Corpus, as_window
from pipeline.files import artifact, base_model
from pipeline.models.device import move_for_inference
from pipeline.models.load import Base
from pipeline.models.save import load_tensors, save_tensors
from pipeline.project import provenance
from pipeline.project.cache import Cache, Damaged
from pipeline.project.params.sections import Training
from pipeline.project.runner import Event, Facts, Job, Note, Progress
from pipeline.training.data import build_corpora
from pipeline.training.preferences.losses import Answers, PreferenceLoss, batch_of, likelihood

SCORED_TOGETHER = 8  # sequences in one forward of the reference
REFERENCE = "reference_log_probs"  # in the cache, beside the stages, and in the run folder
TENSORS = "log_probs.safetensors"


class _Pairs(Sequence[Window]):
    """The corpus as sequences: chosen and rejected alternate."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus

    def __len__(self) -> int:
        return len(self._corpus)

    def __getitem__(self, number: int) -> Window:  # type: ignore[override]
        return as_window(self._corpus[number])


class _Mismatched(_Pairs):
    """Each answer of the corpus, then the previous example's answer behind the prompt of this one."""

    def __len__(self) -> int:
        return 2 * len(self._corpus)

    def __getitem__(self, number: int) -> Window:  # type: ignore[override]
        index, other = divmod(number, 2)
        if not other:
            return as_window(self._corpus[index])
        one, before = (self._corpus[n % len(self._corpus)] for n in (index, index - 1))  # before the first, the last
        begin, end = one.trained.index(True), before.trained.index(True)
        ids = one.ids[:begin] + before.ids[end:]
        return as_window(Encoded(ids, (False,) * begin + before.trained[end:]))


def build_answers(
    job: Job, settings: Training, loss: PreferenceLoss, base: Base
) -> Generator[Event, None, tuple[Answers, Answers | None]]:
    """(training set, evaluation set or None). Raises UserError as `build_corpora`, and for rows of another kind."""
    if loss != "kto":
        corpora = yield from build_corpora(job, settings, base, PairEncoder)
        return _of_pairs(corpora[0]), None if corpora[1] is None else _of_pairs(corpora[1])
    encoders: list[AnswerEncoder] = []

    def encoder(*how: Any) -> AnswerEncoder:
        encoders.append(AnswerEncoder(*how))
        return encoders[-1]

    corpora = yield from build_corpora(job, settings, base, encoder)
    answers = [
        Answers(_Mismatched(corpus), corpus.location, corpus.parts, desirable=made.desirable)
        for corpus, made in zip(corpora, encoders, strict=False)
        if corpus is not None
    ]
    return answers[0], answers[1] if len(answers) > 1 else None


def _of_pairs(corpus: Corpus) -> Answers:
    parts = tuple((range(run.start // 2, run.stop // 2), weight) for run, weight in corpus.parts)
    return Answers(_Pairs(corpus), lambda number: corpus.location(2 * number), parts)


def with_reference(
    job: Job, base: Base, answers: tuple[Answers, Answers | None], as_base: bool
) -> Generator[Event, None, tuple[Answers, Answers | None]]:
    """The same with each answer's log-probability under the reference: the model as it is, or `as_base` its base.

    They are kept in the cache by what they depend on: a run that resumes, or has another loss, computes none.
    """
    given = [one for one in answers if one is not None]
    if not job.input_facts:  # a trial: a step takes the same time and memory whatever the reference says
        training, *held_out = (replace(one, reference=torch.zeros(len(one.windows))) for one in given)
        return training, held_out[0] if held_out else None
    facts = _reference_facts(job, given, as_base)
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    cache, folder = Cache(job.project.cache), job.run / REFERENCE
    if not _restored(cache, key, folder):
        total = sum(len(one.windows) for one in given)
        yield Note(f"{job.stage.name}: log-probabilities of {total:,} answers under the reference are computed once")
        with artifact.writing(folder) as out:
            with disable_adapter(base.model) if as_base else nullcontext():
                values = yield from _log_probs(base, given, total)
            save_tensors(out / TENSORS, {str(n): value for n, value in enumerate(values)})
            artifact.seal(out, facts)
        with suppress(OSError):  # the run goes on without the cache
            cache.store(REFERENCE, key, folder)
    found = load_tensors(folder / TENSORS)
    training, *held_out = (replace(one, reference=found[str(n)]) for n, one in enumerate(given))
    return training, held_out[0] if held_out else None


def _reference_facts(job: Job, answers: Sequence[Answers], as_base: bool) -> Facts:
    settings, inputs = job.project.section(job.stage), job.input_facts["inputs"]
    sequences = hashlib.sha256()
    for one in answers:
        for window in one.windows:
            sequences.update(json.dumps([window.ids, window.labels]).encode())
    return {
        "base": inputs[base_model.shared_name(job.project.artifact_name("expand_vocab"))],
        "adapter": "" if as_base else inputs[base_model.shared_name(settings.init_from)],
        "settings": [settings.precision, settings.quantization, settings.adapter_precision],
        "sequences": sequences.hexdigest(),
        "code": provenance.code_digest(__name__),
        "versions": dict(job.input_facts["versions"]),
    }


def _restored(cache: Cache, key: str, folder: Path) -> bool:
    try:
        return cache.restore(REFERENCE, key, folder)
    except (Damaged, OSError):
        return False


@torch.no_grad()
def _log_probs(base: Base, answers: Sequence[Answers], total: int) -> Generator[Event, None, list[Tensor]]:
    """Of each sequence of each data set, the summed log-probability of its answer, in fp32 on the CPU."""
    model, done, values = base.model, 0, list[Tensor]()
    move_for_inference(model)
    for one in answers:
        sums = []
        for start in range(0, len(one.windows), SCORED_TOGETHER):
            batch = batch_of(one, range(start, min(start + SCORED_TOGETHER, len(one.windows))))
            sums.append(likelihood(model, batch.to(model.device)).summed.cpu())
            done += len(sums[-1])
            yield Progress(done, total, "reference")
        values.append(torch.cat(sums))
    model.to("cpu")  # the training loop moves it to its device, or shards it
    return values
