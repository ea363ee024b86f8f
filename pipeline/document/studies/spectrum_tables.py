"""The tables, the picture and the words of study_spectrum."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from pipeline.document.studies.shared.report import Figure
from pipeline.document.studies.shared.retention_score import FORMATS, Knowledge, spreads
from pipeline.document.tables import Row, Spread, Table, shown, spread
from pipeline.project.palette import COLORS
from pipeline.weights.spectrum import Measured

SHOWN = (1, 2, 4, 8, 16)  # ranks whose share of a change is shown
HIDDEN = ("rank_2", "rank_16", "stable_rank", "effective_rank")  # for who reads the file: a terminal is narrow
SQUARE = 8  # directions of each side that are compared
FULL, RANDOM = "full", "random"
KINDS = {  # of matrices, by the last part of their name
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), "attention"),
    **dict.fromkeys(("fc1", "fc2"), "feed-forward"),
    **{"embed_tokens": "embedding", "lm_head": "head"},
}
Spectra = Mapping[str, Sequence[Sequence[Measured]]]  # by what changed them, a seed each


@dataclass(frozen=True)
class Overlaps:
    """φ(i, j) of two adapters' strongest directions, mean over modules, for outputs and inputs: (2, 8, 8) a pair."""

    name: str
    pairs: Sequence[Tensor]

    def at(self, side: int, i: int, j: int) -> Spread:
        return Spread.of(float(one[side, i - 1, j - 1]) for one in self.pairs)


def energy(spectra: Spectra) -> Table:
    rows: list[Row] = []
    for name, seeds in spectra.items():
        for kind in dict.fromkeys(KINDS.values()):
            of = [[one for one in seed if KINDS.get(_last(one.name)) == kind] for seed in seeds]
            if all(of):
                rows.append({"change": name, "matrices": kind, **_row(of, relative=name != RANDOM)})
    forms = {"relative": ".1%", **{f"rank_{rank}": ".0%" for rank in SHOWN}, "stable_rank": ".1f", "rank_of_90": ".1f"}
    return Table("energy", "Share of ‖ΔW‖² that the nearest matrix of a rank holds", rows, forms, HIDDEN)


def _row(of: Sequence[Sequence[Measured]], relative: bool) -> Row:
    """Means over the matrices, their spread over seeds."""
    return {
        "relative": _mean([[one.relative for one in seed] for seed in of]) if relative else None,
        **{f"rank_{rank}": _mean([[one.energy(rank) for one in seed] for seed in of]) for rank in SHOWN},
        "stable_rank": _mean([[one.stable_rank for one in seed] for seed in of]),
        "effective_rank": _mean([[one.effective_rank for one in seed] for seed in of]),
        "rank_of_90": _mean([[one.rank_of(0.9) for one in seed] for seed in of]),
    }


def _mean(by_seed: Sequence[Sequence[float | None]]) -> Spread | None:
    """Over what is known; None where of a seed nothing is."""
    known = [[one for one in seed if one is not None] for seed in by_seed]
    return Spread.of(fmean(seed) for seed in known) if all(known) else None


def _last(name: str) -> str:
    return name.removesuffix(".weight").rsplit(".", 1)[-1]


def subspaces(shared: Sequence[Overlaps]) -> Table:
    places = ((1, 1), (1, SQUARE), (2, 2), (4, 4), (SQUARE, SQUARE))
    rows: list[Row] = [
        {"pair": one.name, "side": side, **{f"phi_{i}_{j}": one.at(number, i, j) for i, j in places}}
        for one in shared
        for number, side in enumerate(("outputs", "inputs"))
    ]
    return Table("subspaces", "φ(i, j) of the strongest directions", rows, dict.fromkeys(rows[0], ".0%"))


def grid(one: Overlaps) -> Table:
    """Of inputs, all of φ."""
    sizes = range(1, SQUARE + 1)
    rows: list[Row] = [{"i": i, **{f"j_{j}": one.at(1, i, j).mean for j in sizes}} for i in sizes]
    return Table("grid", f"φ(i, j) of the inputs, {one.name}", rows, {f"j_{j}": ".0%" for j in sizes})


def quality(found: Mapping[int, Sequence[tuple[float, Knowledge]]], tuned: Sequence[Knowledge]) -> Table:
    rows: list[Row] = [
        {"rank": str(rank), "held": Spread.of(held for held, _ in of), **spreads([knows for _, knows in of])}
        for rank, of in found.items()
    ]
    rows.append({"rank": "tuned", "held": None, **spreads(tuned)})
    title = "The LoRA extracted from full fine-tuning, with embeddings and head in full"
    return Table("extracted", title, rows, {"held": ".1%", **FORMATS})


def in_words(energy: Table, subspaces: Table, _grid: Table, extracted: Table) -> str:
    """What the tables show."""
    return "\n\n".join(
        [
            "*Relative*: ‖ΔW‖/‖W‖. *Rank n*: the share of ‖ΔW‖² that the nearest matrix of rank n holds; *rank of 90*: "
            "the least rank that holds 90%. Means over the matrices. *Random* is a matrix of normal numbers of the "
            "same shape: what a rank holds of a change that has no structure.",
            _concentrated(energy),
            _shared(subspaces),
            _enough(extracted),
        ]
    )


def _concentrated(energy: Table) -> str:
    """Rank 8 of each change, beside the same of a random one."""
    by = {(str(row["change"]), str(row["matrices"])): row for row in energy.rows}
    full = [
        f"In {kind} matrices rank 8 holds {shown(row['rank_8'], '.0%')} of what full fine-tuning changed, and "
        f"{shown(by[RANDOM, kind]['rank_8'], '.0%')} of a random matrix; 90% of the change takes rank "
        f"{shown(row['rank_of_90'], '.0f')}."
        for (change, kind), row in by.items()
        if change == FULL and kind in ("attention", "feed-forward")
    ]
    lora = [
        f"{shown(row['rank_2'], '.0%')} with {name.removeprefix('LoRA, ')}"
        for (name, _), row in by.items()
        if name not in (FULL, RANDOM)
    ]
    return f"{' '.join(full)} Of what LoRA learned, rank 2 holds {' and '.join(lora)}."


def _shared(subspaces: Table) -> str:
    """The strongest direction and the strongest eight, beside random ones."""
    rows = [row for row in subspaces.rows if row["side"] == "inputs"]
    whole = f"phi_{SQUARE}_{SQUARE}"
    said = "; ".join(f"{row['pair']}: {shown(row['phi_1_1'], '.0%')} and {shown(row[whole], '.0%')}" for row in rows)
    return (
        "φ(i, j), from 0 to 1, is the share of the first i directions of one that lies in the space of the first j of "
        f"the other (the LoRA paper's §7.2). φ(1, 1) and φ({SQUARE}, {SQUARE}) of the inputs: {said}."
    )


def _enough(extracted: Table) -> str:
    """What each extracted rank knows."""
    *ranks, tuned = extracted.rows
    said = ", ".join(f"{shown(row['new_loss'], '.2f')} at rank {row['rank']}" for row in ranks)
    return (
        f"The loss on the new sentences is {shown(tuned['new_loss'], '.2f')} after full fine-tuning, and with the LoRA "
        f"that is extracted from it {said}. Norms and biases are missing at any rank: LoRA does not hold them."
    )


def draw(figure: Figure, energy: Table, _subspaces: Table, grid: Table, extracted: Table) -> None:
    """How much each rank holds; φ; the loss by rank."""
    left, middle, right = figure.subplots(1, 3)
    _draw_energy(left, energy)
    values = [[row[f"j_{j}"] for j in range(1, SQUARE + 1)] for row in grid.rows]
    ends = (0.5, SQUARE + 0.5)
    image = middle.imshow(values, vmin=0, vmax=1, cmap="cividis", origin="lower", extent=(*ends, *ends))
    middle.set(title="φ(i, j), inputs, two ranks", xlabel="j, of the higher rank", ylabel="i, of the lower rank")
    middle.set(xticks=range(1, SQUARE + 1), yticks=range(1, SQUARE + 1))
    figure.colorbar(image, ax=middle)
    *ranks, tuned = extracted.rows
    cells = [spread(row["new_loss"]) for row in ranks]
    bars = [[c.mean - c.low for c in cells], [c.high - c.mean for c in cells]]
    right.errorbar(range(len(ranks)), [c.mean for c in cells], yerr=bars, color=COLORS["lora"], marker="o")
    right.axhline(spread(tuned["new_loss"]).mean, color=COLORS["full"], linestyle="--", label="full fine-tuning")
    right.set(xlabel="rank of the extracted LoRA", ylabel="new loss (nats a token)", yscale="log")
    right.set_xticks(range(len(ranks)), [str(row["rank"]) for row in ranks])
    right.grid(alpha=0.3)
    right.legend(fontsize=8)


def _draw_energy(axis: Figure, energy: Table) -> None:
    looks = {"attention": "-", "feed-forward": "--"}
    colors = {FULL: COLORS["full"], RANDOM: "#999999"}
    for row in energy.rows:
        change, kind = str(row["change"]), str(row["matrices"])
        if kind in looks:
            shares = [spread(row[f"rank_{rank}"]).mean for rank in SHOWN]
            color = colors.get(change, COLORS["lora"])
            marker = "o" if change in colors else "s"
            axis.plot(SHOWN, shares, looks[kind], marker=marker, color=color, label=f"{change}, {kind}")
    axis.set(xscale="log", xlabel="rank", ylabel="share of ‖ΔW‖²", ylim=(0, 1.02))
    axis.set_xticks(SHOWN, [str(rank) for rank in SHOWN])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
