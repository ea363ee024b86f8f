"""study_spectrum: singular values and subspaces of the updates of fine-tuning, and the extracted LoRA (§2.2).

Like Hu et al. 2021, §7.2, but with the top singular directions of s·BA instead of A, which stays near its random
initialization. Adapters of the same seed may share their initialization, so adapters of different seeds are compared.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from pipeline.adapters.attach import disable_adapter
from pipeline.adapters.low_rank import LowRank, directions, load_update
from pipeline.document.params import StudySpectrum
from pipeline.document.studies import spectrum_tables
from pipeline.document.studies.shared.report import Findings, write_report
from pipeline.document.studies.shared.retention_score import Knowledge, RetentionScorer, retention_scorer
from pipeline.document.studies.shared.runner import (
    DOCUMENT,
    PARTS,
    Run,
    adapters,
    delete_runs,
    drain,
    run_stage,
    sweep_run,
)
from pipeline.document.studies.spectrum_tables import FULL, RANDOM, SQUARE, Overlaps
from pipeline.inference import engine
from pipeline.project.params.sections import FinetuneFull
from pipeline.project.runner import Event, Facts, Job, Progress
from pipeline.stages.finetune import finetune
from pipeline.weights.diff import Delta, diff_checkpoints
from pipeline.weights.extract import Extracted, extract
from pipeline.weights.spectrum import Measured, in_blocks, measure, measure_update, overlaps
from pipeline.weights.svd import Read

Updates = Mapping[str, LowRank]  # module → update, of one adapter


def spectrum(job: Job) -> Generator[Event, None, Facts]:
    """Train full fine-tuning and LoRA of two ranks with each seed → four tables and a picture. Raises UserError."""
    settings = job.project.params.of(StudySpectrum)
    base = job.artifact("expand_vocab")
    scorer = retention_scorer(job, settings.old_data, settings.new_data)
    full, sweeps = _full(settings), _sweeps(settings)
    folders = yield from run_stage(job, [*full, *sweeps])
    tuned = [folders[run.name] for run in full]
    updates = {run.name: [load_update(at).low_rank for at, _ in adapters(run, folders[run.name])] for run in sweeps}
    spectra = dict(_spectra(base, tuned, updates))
    extracted = yield from _extract_ranks(job, settings, base, tuned, scorer)
    pairs = _overlaps(updates)
    tables = (
        spectrum_tables.energy(spectra),
        spectrum_tables.subspaces(pairs),
        spectrum_tables.grid(pairs[0]),
        spectrum_tables.quality(extracted, [scorer.measure(engine.load(folder)) for folder in tuned]),
    )
    delete_runs(job)
    findings = Findings("What fine-tuning changes", "§2.2", spectrum_tables.describe(*tables), tables)
    return write_report(job, findings, lambda figure: spectrum_tables.draw(figure, *tables), (12, 4))


def _full(settings: StudySpectrum) -> list[Run]:
    return [
        Run(
            f"full, seed {seed}",
            "finetune_full",
            finetune,
            {"finetune_full": FinetuneFull(data=settings.new_data, seed=seed)},
        )
        for seed in settings.seeds
    ]


def _sweeps(settings: StudySpectrum) -> list[Run]:
    base = replace(DOCUMENT, data=settings.new_data)
    return [sweep_run(f"LoRA, r = {rank}", replace(base, rank=rank), seed=settings.seeds) for rank in settings.ranks]


def _spectra(
    base: Path, tuned: Sequence[Path], updates: Mapping[str, Sequence[Updates]]
) -> Iterator[tuple[str, list[list[Measured]]]]:
    """The singular values of each change, and of normal random matrices of the same shapes."""
    yield (
        FULL,
        [
            [_measure_fully(delta) for delta in diff_checkpoints(base, folder).deltas if delta.is_matrix]
            for folder in tuned
        ],
    )
    weights = {delta.name.removesuffix(".weight"): delta for delta in diff_checkpoints(base, base).deltas}
    for name, by_seed in updates.items():
        yield name, [[measure_update(m, one, weights[m].weight) for m, one in adapter.items()] for adapter in by_seed]
    generator = torch.Generator().manual_seed(0)
    matrices = [delta for delta in weights.values() if delta.is_matrix]
    yield (
        RANDOM,
        [[_measure_fully(replace(delta, change=_normal(delta.shape, generator))) for delta in matrices] for _ in tuned],
    )


def _measure_fully(delta: Delta) -> Measured:
    """Measure with all singular values, as the rank that holds 90% may be high."""
    return measure(delta, min(delta.shape))[0]


def _normal(shape: Sequence[int], generator: torch.Generator) -> Read:
    return in_blocks(torch.randn(*shape, generator=generator))


def _extract_ranks(
    job: Job, settings: StudySpectrum, base: Path, tuned: Sequence[Path], scorer: RetentionScorer
) -> Generator[Event, None, dict[int, list[tuple[float, Knowledge]]]]:
    """Rank → the extracted LoRA's share of the change and its scores, by seed; rank 0: only embeddings and head."""
    results: dict[int, list[tuple[float, Knowledge]]] = {rank: [] for rank in (0, *settings.extracted)}
    for number, folder in enumerate(tuned, 1):
        for rank in settings.extracted:
            out = job.run / PARTS / f"extracted-{rank}"
            extracted = drain(extract(base, folder, out, rank))
            loaded = engine.load(base, out)
            results[rank].append((extracted.held, scorer.measure(loaded)))
        with disable_adapter(loaded.model):
            results[0].append((_embedding_share(extracted), scorer.measure(loaded)))
        yield Progress(number, len(tuned), "LoRA extracted")
    return results


def _embedding_share(extracted: Extracted) -> float:
    """The share of ‖ΔW‖² in embeddings and head."""
    squares = {tensor.name: tensor.change**2 for tensor in extracted.spectra.tensors}
    return sum(squares[name] for name in extracted.in_full) / sum(squares.values())


def _overlaps(updates: Mapping[str, Sequence[Updates]]) -> list[Overlaps]:
    """Pairs to compare: first and last rank with different seeds, two seeds of each rank, random subspaces."""
    names = list(updates)
    (low, low_updates), (high, high_updates) = ((name, updates[name]) for name in (names[0], names[-1]))
    shifted = list(zip(low_updates, [*high_updates[1:], high_updates[0]], strict=True))  # seed n with seed n + 1
    overlaps_ = [
        Overlaps(f"{low} and {_rank(high)}", [_overlap(*pair) for pair in shifted]),
        Overlaps(f"{low}, two seeds", [_overlap(*pair) for pair in pairwise(low_updates)]),
        Overlaps(f"{high}, two seeds", [_overlap(*pair) for pair in pairwise(high_updates)]),
        Overlaps(RANDOM, [_overlap(*pair) for pair in zip(*_random_updates(low_updates), strict=True)]),
    ]
    return [overlap for overlap in overlaps_ if overlap.pairs]


def _rank(name: str) -> str:
    return name.removeprefix("LoRA, r = ")


def _random_updates(adapters: Sequence[Updates]) -> tuple[list[Updates], list[Updates]]:
    """Two random normal adapters with the shapes of each given one."""
    generator = torch.Generator().manual_seed(0)

    def random(adapter: Updates) -> Updates:
        pairs = {n: [torch.randn(t.shape, generator=generator) for t in (one.a, one.b)] for n, one in adapter.items()}
        return {name: LowRank(a, b, 1.0) for name, (a, b) in pairs.items()}

    return [random(adapter) for adapter in adapters], [random(adapter) for adapter in adapters]


def _overlap(one: Updates, other: Updates) -> Tensor:
    """φ(i, j) for i, j ≤ 8 of outputs and inputs, mean over modules: (2, 8, 8)."""
    by_module = []
    for name, update in one.items():
        sides = zip(directions(update), directions(other[name]), strict=True)
        by_module.append(torch.stack([overlaps(mine, theirs)[:SQUARE, :SQUARE] for mine, theirs in sides]))
    return torch.stack(by_module).mean(0)
