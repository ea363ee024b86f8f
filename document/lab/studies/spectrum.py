"""study_spectrum: singular values and subspaces of the updates of fine-tuning, and the extracted
LoRA (§2.2).

Like Hu et al. 2021, §7.2, but with the top singular directions of s·BA instead of A, which stays
near its random initialization. Adapters of the same seed may share their initialization, so
adapters of different seeds are compared.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from operator import attrgetter, methodcaller
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta, structs

from lab.measures import FORMATS, Knowledge, RetentionScorer
from lab.report import COLORS, Figure, Findings, error_bars
from lab.runner import DOCUMENT, PARTS, by, drain, full_runs, sweep_run, train
from lab.studies import study_stage
from lab.tables import Row, Spread, Table, shown, spreads
from pipeline.project.params.schema import Count, Section, Seed
from pipeline.project.runner import Event, Job, Progress
from pipeline.stages.methods.full import FinetuneFull

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.adapters.low_rank import LowRank
    from pipeline.weights.spectrum import Measured

    Updates = Mapping[str, LowRank]  # module → update, of one adapter
    Spectra = Mapping[str, Sequence[Sequence[Measured]]]  # change → measurements by seed

PLACE = "§2.2"
RANKS = (1, 2, 4, 8, 16)  # whose share of a change is in the table
SQUARE = 8  # top directions compared
FULL, RANDOM = "full", "random"
KINDS = {  # last part of a matrix's name → its kind
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), "attention"),
    **dict.fromkeys(("fc1", "fc2"), "feed-forward"),
    "embed_tokens": "embedding",
    "lm_head": "head",
}


class StudySpectrum(Section, frozen=True, kw_only=True):
    """§2.2: singular values and subspaces of the updates of full fine-tuning and LoRA, and the
    extracted LoRA.
    """

    old_data: Annotated[str, "sentences of the base, on which forgetting is measured"] = (
        "data/pretrain.de.txt"
    )
    new_data: Annotated[str, "the sentences trained on"] = "data/finetune.de.txt"
    seeds: Annotated[tuple[Seed, ...], "subspaces are compared between seeds"] = (0, 1, 2)
    ranks: Annotated[
        tuple[Annotated[int, Meta(ge=8)], ...], "of LoRA; the first and the last are compared"
    ] = (8, 64)
    extracted: Annotated[tuple[Count, ...], "ranks of the extracted LoRA"] = (1, 2, 4, 8, 16, 64)


STAGE = study_stage(
    __name__,
    PLACE,
    title="What fine-tuning changes",
    about="how few directions hold what fine-tuning changes, and the LoRA extracted from it",
    settings=StudySpectrum,
    data=("old_data", "new_data"),
)


def measure(job: Job, settings: StudySpectrum) -> Generator[Event, None, Findings]:
    """Train full fine-tuning and LoRA of two ranks with each seed → four tables."""
    from pipeline.adapters.low_rank import load_update
    from pipeline.inference import engine

    base = job.artifact("expand_vocab")
    scorer = RetentionScorer.of(job, settings.old_data, settings.new_data)
    lora = structs.replace(DOCUMENT, data=settings.new_data)
    full = full_runs(FULL, FinetuneFull(data=settings.new_data), settings.seeds)
    sweeps = [
        sweep_run(f"LoRA, r = {r}", structs.replace(lora, rank=r), {"seed": settings.seeds})
        for r in settings.ranks
    ]
    made = by(lambda one: one.run, (yield from train(job, [*full, *sweeps])))
    tuned = [made[run.name][0].folder for run in full]
    updates = {
        run.name: [load_update(one.folder).low_rank for one in made[run.name]] for run in sweeps
    }
    spectra = spectra_of(base, tuned, updates)
    extracted = yield from _extract_ranks(job, settings.extracted, base, tuned, scorer)
    phi = _overlaps(updates)
    of_tuned = spreads(Knowledge._fields, [scorer.measure(engine.load(folder)) for folder in tuned])

    pairs = ((1, 1), (1, SQUARE), (2, 2), (4, 4), (SQUARE, SQUARE))
    subspaces = [
        {
            "pair": name,
            "side": side,
            **{f"phi_{i}_{j}": _at(by_pair, number, i, j) for i, j in pairs},
        }
        for name, by_pair in phi.items()
        for number, side in enumerate(("outputs", "inputs"))
    ]
    first, directions = next(iter(phi)), range(1, SQUARE + 1)
    grid = [
        {"i": i, **{f"j_{j}": float(_at(phi[first], 1, i, j)) for j in directions}}
        for i in directions
    ]
    quality: list[Row] = [
        {"rank": str(rank), **spreads(("held", *Knowledge._fields), by_seed)}
        for rank, by_seed in extracted.items()
    ]
    quality.append({"rank": "tuned", "held": None, **of_tuned})
    title = "The LoRA extracted from full fine-tuning, with embeddings and head in full"
    tables = (
        energy(spectra),
        Table(
            "subspaces",
            "φ(i, j) of the top directions",
            subspaces,
            dict.fromkeys(subspaces[0], ".0%"),
        ),
        Table(
            "grid", f"φ(i, j) of the inputs, {first}", grid, {f"j_{j}": ".0%" for j in directions}
        ),
        Table("extracted", title, quality, {"held": ".1%", **FORMATS}),
    )
    rows = tables[0].rows
    return Findings(
        _text(rows, subspaces, quality),
        tables,
        lambda figure: _draw(figure, rows, grid, quality),
        size=(12, 4),
    )


def spectra_of(
    base: Path, tuned: Sequence[Path], updates: "Mapping[str, Sequence[Updates]]"
) -> "Spectra":
    """The singular values of each change, and of normal random matrices of the same shapes."""
    import torch

    from pipeline.weights.diff import Delta, diff_checkpoints
    from pipeline.weights.spectrum import in_blocks, measure, measure_update

    def in_full(delta: Delta) -> "Measured":
        """With all singular values, as the rank that holds 90% may be high."""
        return measure(delta, min(delta.shape))[0]

    weights = {
        delta.name.removesuffix(".weight"): delta for delta in diff_checkpoints(base, base).deltas
    }
    spectra = {
        FULL: [
            [in_full(delta) for delta in diff_checkpoints(base, at).deltas if delta.is_matrix]
            for at in tuned
        ]
    }
    for name, by_seed in updates.items():
        spectra[name] = [
            [measure_update(m, one, weights[m].weight) for m, one in each.items()]
            for each in by_seed
        ]
    generator = torch.Generator().manual_seed(0)
    matrices = [delta for delta in weights.values() if delta.is_matrix]
    spectra[RANDOM] = [
        [
            in_full(replace(d, change=in_blocks(torch.randn(*d.shape, generator=generator))))
            for d in matrices
        ]
        for _ in tuned
    ]
    return spectra


def energy(spectra: "Spectra") -> Table:
    """Means over the matrices of a kind, as a Spread over seeds."""
    quantities: dict[str, Callable[[Measured], float | None]] = {
        "relative": attrgetter("relative"),
        **{f"rank_{rank}": methodcaller("energy", rank) for rank in RANKS},
        "stable_rank": attrgetter("stable_rank"),
        "effective_rank": attrgetter("effective_rank"),
        "rank_of_90": methodcaller("rank_of", 0.9),
    }
    rows: list[Row] = []
    for change, seeds in spectra.items():
        for kind in dict.fromkeys(KINDS.values()):
            by_seed = [
                [
                    m
                    for m in seed
                    if KINDS.get(m.name.removesuffix(".weight").rsplit(".", 1)[-1]) == kind
                ]
                for seed in seeds
            ]
            if not all(by_seed):
                continue
            row: dict[str, Any] = {"change": change, "matrices": kind}
            for name, of in quantities.items():
                # Without the matrices that did not change: they have no spectrum.
                values = [[value for m in seed if (value := of(m)) is not None] for seed in by_seed]
                row[name] = Spread.of(map(fmean, values)) if all(values) else None
            # no weight was changed by it
            rows.append(row if change != RANDOM else {**row, "relative": None})
    formats = {"relative": ".1%", **dict.fromkeys((f"rank_{rank}" for rank in RANKS), ".0%")}
    formats |= {"stable_rank": ".1f", "rank_of_90": ".1f"}
    # only in the CSV file, since a terminal is narrow
    hidden = ("rank_2", "rank_16", "stable_rank", "effective_rank")
    return Table(
        "energy", "Share of ‖ΔW‖² that the nearest matrix of a rank holds", rows, formats, hidden
    )


def _extract_ranks(
    job: Job, ranks: Sequence[int], base: Path, tuned: Sequence[Path], scorer: RetentionScorer
) -> Generator[Event, None, dict[int, list[tuple[float, ...]]]]:
    """Rank → the extracted LoRA's share of ‖ΔW‖² and its scores, by seed; rank 0: only embeddings
    and head.
    """
    from pipeline.adapters.attach import disable_adapter
    from pipeline.inference import engine
    from pipeline.weights.extract import extract

    results: dict[int, list[tuple[float, ...]]] = {rank: [] for rank in (0, *ranks)}
    for number, folder in enumerate(tuned, 1):
        for rank in ranks:
            out = job.run / PARTS / f"extracted-{rank}"
            extracted = drain(extract(base, folder, out, rank))
            loaded = engine.load(base, out)
            results[rank].append((extracted.held, *scorer.measure(loaded)))
        squares = {tensor.name: tensor.change**2 for tensor in extracted.spectra.tensors}
        in_full = sum(squares[name] for name in extracted.in_full) / sum(squares.values())
        # the last rank's: each has the same embeddings and head in full
        with disable_adapter(loaded.model):
            results[0].append((in_full, *scorer.measure(loaded)))
        yield Progress(number, len(tuned), "LoRA extracted")
    return results


def overlaps(one: "Tensor", other: "Tensor") -> "Tensor":
    """φ(i, j) = ‖UᵢᵀVⱼ‖² / min(i, j), (k, l), for orthonormal U (n, k) and V (n, l).

    Of the first i columns of U and j of V. Hu et al. 2021, section 7.2: 1 if the smaller subspace
    lies in the larger, 0 if they are orthogonal. The expected value for two random subspaces is
    max(i, j) / n.
    """
    import torch

    shared = (one.T @ other).square().cumsum(0).cumsum(1)
    sizes = torch.arange(1, max(shared.shape) + 1)
    return shared / torch.minimum(sizes[: len(shared), None], sizes[None, : shared.shape[1]])


def directions(update: "LowRank") -> "tuple[Tensor, Tensor]":
    """Left (O, k) and right (I, k) singular vectors of s·BA, largest σ first; k = min(O, I, R)."""
    from pipeline.adapters.low_rank import svd

    left, _, right = svd(update)
    return left, right.T


def _overlaps(updates: "Mapping[str, Sequence[Updates]]") -> "dict[str, list[Tensor]]":
    """φ of two adapters for each seed: first and last rank with different seeds, two seeds of each
    rank, and random.
    """
    import torch

    from pipeline.adapters.low_rank import LowRank

    def phi(one: "Updates", other: "Updates") -> "Tensor":
        """φ(i, j) for i, j ≤ 8 of outputs and inputs, mean over modules: (2, 8, 8)."""
        by_module = []
        for name, update in one.items():
            sides = zip(directions(update), directions(other[name]), strict=True)
            by_module.append(
                torch.stack([overlaps(mine, theirs)[:SQUARE, :SQUARE] for mine, theirs in sides])
            )
        return torch.stack(by_module).mean(0)

    generator = torch.Generator().manual_seed(0)

    def random(adapter: "Updates") -> "Updates":
        """Random normal A and B of the same shapes."""
        pairs = {
            n: [torch.randn(t.shape, generator=generator) for t in (one.a, one.b)]
            for n, one in adapter.items()
        }
        return {name: LowRank(a, b, 1.0) for name, (a, b) in pairs.items()}

    names = list(updates)
    low, high = names[0], names[-1]
    lows, highs = updates[low], updates[high]
    shifted = [*highs[1:], highs[0]]  # seed n is compared with seed n + 1
    pairs = {
        f"{low} and {high.removeprefix('LoRA, r = ')}": [
            phi(*pair) for pair in zip(lows, shifted, strict=True)
        ],
        f"{low}, two seeds": [phi(*pair) for pair in pairwise(lows)],
        f"{high}, two seeds": [phi(*pair) for pair in pairwise(highs)],
        RANDOM: [
            phi(*pair)
            for pair in zip(
                [random(one) for one in lows], [random(one) for one in lows], strict=True
            )
        ],
    }
    return {name: by_pair for name, by_pair in pairs.items() if by_pair}


def _at(by_pair: "Sequence[Tensor]", side: int, i: int, j: int) -> Spread:
    return Spread.of(float(pair[side, i - 1, j - 1]) for pair in by_pair)


def _text(energy: Sequence[Row], subspaces: Sequence[Row], extracted: Sequence[Row]) -> str:
    by_kind = {(row["change"], row["matrices"]): row for row in energy}
    full = " ".join(
        f"In {kind} matrices rank 8 holds {shown(by_kind[FULL, kind]['rank_8'], '.0%')} of the "
        f"change by full fine-tuning, against {shown(by_kind[RANDOM, kind]['rank_8'], '.0%')} of a "
        "random matrix; 90% of the change takes rank "
        f"{shown(by_kind[FULL, kind]['rank_of_90'], '.0f')}."
        for kind in ("attention", "feed-forward")
    )
    lora = " and ".join(
        f"{shown(row['rank_2'], '.0%')} with {name.removeprefix('LoRA, ')}"
        for (name, _), row in by_kind.items()
        if name not in (FULL, RANDOM)
    )
    last = f"phi_{SQUARE}_{SQUARE}"
    overlaps = "; ".join(
        f"{row['pair']}: {shown(row['phi_1_1'], '.0%')} and {shown(row[last], '.0%')}"
        for row in subspaces
        if row["side"] == "inputs"
    )
    *ranks, tuned = extracted
    losses = ", ".join(f"{shown(row['new_loss'], '.2f')} at rank {row['rank']}" for row in ranks)
    paragraphs = (
        "*Relative*: ‖ΔW‖/‖W‖. *Rank n*: the share of ‖ΔW‖² in its best approximation of rank n. "
        "*Rank of 90*: the smallest rank that holds 90%. All are means over the matrices. "
        "*Random*: a normal random matrix of the same shape, which has no low-rank structure.",
        f"{full} Of what LoRA learned, rank 2 holds {lora}.",
        "φ(i, j), from 0 to 1, is the share of the top i directions of one that lies in the span "
        f"of the top j of the other (§7.2 of the LoRA paper). φ(1, 1) and φ({SQUARE}, {SQUARE}) of "
        f"the inputs: {overlaps}.",
        f"The loss on the new sentences is {shown(tuned['new_loss'], '.2f')} after full "
        f"fine-tuning. With the LoRA extracted from it, it is {losses}. At any rank the changes of "
        "norms and biases are missing: LoRA cannot represent them.",
    )
    return "\n\n".join(paragraphs)


def _draw(
    figure: Figure, energy: Sequence[Row], grid: Sequence[Row], extracted: Sequence[Row]
) -> None:
    """Three panels: the share of each rank, φ(i, j), and the loss by rank."""
    left, middle, right = figure.subplots(1, 3)
    lines, colors = (
        {"attention": "-", "feed-forward": "--"},
        {FULL: COLORS["full"], RANDOM: "#999999"},
    )
    for row in (row for row in energy if row["matrices"] in lines):
        change, kind = row["change"], row["matrices"]
        style = {
            "color": colors.get(change, COLORS["lora"]),
            "marker": "o" if change in colors else "s",
        }
        shares = [row[f"rank_{rank}"] for rank in RANKS]
        left.plot(RANKS, shares, lines[kind], label=f"{change}, {kind}", **style)
    left.set(xscale="log", xlabel="rank", ylabel="share of ‖ΔW‖²", ylim=(0, 1.02))
    left.set_xticks(RANKS, [str(rank) for rank in RANKS])
    left.minorticks_off()
    left.grid(alpha=0.3)
    left.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    values, ticks, bounds = (
        [list(row.values())[1:] for row in grid],
        range(1, SQUARE + 1),
        (0.5, SQUARE + 0.5),
    )
    image = middle.imshow(
        values, vmin=0, vmax=1, cmap="cividis", origin="lower", extent=(*bounds, *bounds)
    )
    middle.set(
        title="φ(i, j), inputs, two ranks",
        xlabel="j, of the higher rank",
        ylabel="i, of the lower rank",
    )
    middle.set(xticks=ticks, yticks=ticks)
    figure.colorbar(image, ax=middle)
    *ranks, tuned = extracted
    error_bars(
        right,
        range(len(ranks)),
        [row["new_loss"] for row in ranks],
        color=COLORS["lora"],
        marker="o",
    )
    right.axhline(tuned["new_loss"], color=COLORS["full"], linestyle="--", label="full fine-tuning")
    right.set(xlabel="rank of the extracted LoRA", ylabel="new loss (nats per token)", yscale="log")
    right.set_xticks(range(len(ranks)), [row["rank"] for row in ranks])
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
