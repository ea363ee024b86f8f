"""study_spectrum: how few directions hold what fine-tuning changes, which they are, and the LoRA extracted (§2.2).

As Hu et al. 2021, §7.2, but of the updates themselves: the strongest directions of s·BA, not those of A alone, which
stays near to what was drawn. Adapters of one seed may begin alike, so that those of different seeds are compared.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from pipeline.adapters.attach import disable_adapter
from pipeline.adapters.low_rank import LowRank, directions
from pipeline.adapters.peft.updates import load_update
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
    together,
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

Updates = Mapping[str, LowRank]  # of one adapter, by module


def spectrum(job: Job) -> Generator[Event, None, Facts]:
    """Full fine-tuning and LoRA of two ranks with each seed → four tables and a picture. Raises UserError."""
    settings = job.project.params.of(StudySpectrum)
    base = job.artifact("expand_vocab")
    measures = retention_scorer(job, settings.old_data, settings.new_data)
    full, sweeps = _full(settings), _sweeps(settings)
    folders = yield from run_stage(job, [*full, *sweeps])
    tuned = [folders[run.name] for run in full]
    updates = {run.name: [load_update(at).low_rank for at, _ in adapters(run, folders[run.name])] for run in sweeps}
    spectra = dict(_spectra(base, tuned, updates))
    knows = yield from _extracted(job, settings, base, tuned, measures)
    shared = _overlaps(updates)
    tables = (
        spectrum_tables.energy(spectra),
        spectrum_tables.subspaces(shared),
        spectrum_tables.grid(shared[0]),
        spectrum_tables.quality(knows, [measures.measure(engine.load(folder)) for folder in tuned]),
    )
    delete_runs(job)
    found = Findings("What fine-tuning changes", "§2.2", spectrum_tables.in_words(*tables), tables)
    return write_report(job, found, lambda figure: spectrum_tables.draw(figure, *tables), (12, 4))


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
    return [together(f"LoRA, r = {rank}", replace(base, rank=rank), seed=settings.seeds) for rank in settings.ranks]


def _spectra(
    base: Path, tuned: Sequence[Path], updates: Mapping[str, Sequence[Updates]]
) -> Iterator[tuple[str, list[list[Measured]]]]:
    """Of each change; and of matrices of normal numbers, of the same shapes."""
    yield (
        FULL,
        [[_measured(delta) for delta in diff_checkpoints(base, folder).deltas if delta.is_matrix] for folder in tuned],
    )
    weights = {delta.name.removesuffix(".weight"): delta for delta in diff_checkpoints(base, base).deltas}
    for name, of in updates.items():
        yield name, [[measure_update(m, one, weights[m].weight) for m, one in adapter.items()] for adapter in of]
    generator = torch.Generator().manual_seed(0)
    matrices = [delta for delta in weights.values() if delta.is_matrix]
    yield (
        RANDOM,
        [[_measured(replace(delta, change=_normal(delta.shape, generator))) for delta in matrices] for _ in tuned],
    )


def _measured(delta: Delta) -> Measured:
    """With every singular value: the rank of 90% may lie beyond those that a command looks for."""
    return measure(delta, min(delta.shape))[0]


def _normal(shape: Sequence[int], generator: torch.Generator) -> Read:
    return in_blocks(torch.randn(*shape, generator=generator))


def _extracted(
    job: Job, settings: StudySpectrum, base: Path, tuned: Sequence[Path], measures: RetentionScorer
) -> Generator[Event, None, dict[int, list[tuple[float, Knowledge]]]]:
    """What each rank's LoRA holds of all that changed, and what it knows, by seed; 0: embeddings and head alone."""
    found: dict[int, list[tuple[float, Knowledge]]] = {rank: [] for rank in (0, *settings.extracted)}
    for number, folder in enumerate(tuned, 1):
        for rank in settings.extracted:
            out = job.run / PARTS / f"extracted-{rank}"
            one = drain(extract(base, folder, out, rank))
            loaded = engine.load(base, out)
            found[rank].append((one.held, measures.measure(loaded)))
        with disable_adapter(loaded.model):
            found[0].append((_of_ends(one), measures.measure(loaded)))
        yield Progress(number, len(tuned), "LoRA extracted")
    return found


def _of_ends(found: Extracted) -> float:
    """The share of all that changed that lies in embedding and head."""
    squares = {one.name: one.change**2 for one in found.spectra.tensors}
    return sum(squares[name] for name in found.in_full) / sum(squares.values())


def _overlaps(updates: Mapping[str, Sequence[Updates]]) -> list[Overlaps]:
    """First and last rank, of different seeds where there are several; two seeds of each; random subspaces."""
    names = list(updates)
    (low, of_low), (high, of_high) = ((name, updates[name]) for name in (names[0], names[-1]))
    apart = list(zip(of_low, [*of_high[1:], of_high[0]], strict=True))
    found = [
        Overlaps(f"{low} and {_rank(high)}", [_overlap(*pair) for pair in apart]),
        Overlaps(f"{low}, two seeds", [_overlap(*pair) for pair in pairwise(of_low)]),
        Overlaps(f"{high}, two seeds", [_overlap(*pair) for pair in pairwise(of_high)]),
        Overlaps(RANDOM, [_overlap(*pair) for pair in zip(*_drawn(of_low), strict=True)]),
    ]
    return [one for one in found if one.pairs]


def _rank(name: str) -> str:
    return name.removeprefix("LoRA, r = ")


def _drawn(adapters: Sequence[Updates]) -> tuple[list[Updates], list[Updates]]:
    """Two adapters of normal numbers for each that is given."""
    generator = torch.Generator().manual_seed(0)

    def drawn(adapter: Updates) -> Updates:
        pairs = {n: [torch.randn(t.shape, generator=generator) for t in (one.a, one.b)] for n, one in adapter.items()}
        return {name: LowRank(a, b, 1.0) for name, (a, b) in pairs.items()}

    return [drawn(adapter) for adapter in adapters], [drawn(adapter) for adapter in adapters]


def _overlap(one: Updates, other: Updates) -> Tensor:
    """(2, 8, 8): outputs, inputs."""
    found = []
    for name, update in one.items():
        sides = zip(directions(update), directions(other[name]), strict=True)
        found.append(torch.stack([overlaps(mine, theirs)[:SQUARE, :SQUARE] for mine, theirs in sides]))
    return torch.stack(found).mean(0)
