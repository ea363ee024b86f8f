"""The tables, the picture and the text of study_spectrum."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from pipeline.document.studies.shared.report import Figure
from pipeline.document.studies.shared.retention_score import FORMATS, Knowledge, spreads
from pipeline.document.tables import Row, Spread, Table, min_max, shown, spread
from pipeline.stages.registry import COLORS
from pipeline.weights.spectrum import Measured

RANKS = (1, 2, 4, 8, 16)  # whose share of a change is in the table
HIDDEN = ("rank_2", "rank_16", "stable_rank", "effective_rank")  # only in the CSV file, since a terminal is narrow
SQUARE = 8  # top directions compared
FULL, RANDOM = "full", "random"
KINDS = {  # last part of a matrix's name → its kind
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), "attention"),
    **dict.fromkeys(("fc1", "fc2"), "feed-forward"),
    **{"embed_tokens": "embedding", "lm_head": "head"},
}
Spectra = Mapping[str, Sequence[Sequence[Measured]]]  # change → measurements by seed


@dataclass(frozen=True)
class Overlaps:
    """φ(i, j) of two adapters' top directions, for outputs and inputs, mean over modules: (2, 8, 8) per pair."""

    name: str
    pairs: Sequence[Tensor]

    def at(self, side: int, i: int, j: int) -> Spread:
        return Spread.of(float(pair[side, i - 1, j - 1]) for pair in self.pairs)


def energy(spectra: Spectra) -> Table:
    rows: list[Row] = []
    for name, seeds in spectra.items():
        for kind in dict.fromkeys(KINDS.values()):
            by_seed = [[m for m in seed if KINDS.get(_last_name(m.name)) == kind] for seed in seeds]
            if all(by_seed):
                rows.append({"change": name, "matrices": kind, **_row(by_seed, relative=name != RANDOM)})
    formats = {
        "relative": ".1%",
        **{f"rank_{rank}": ".0%" for rank in RANKS},
        "stable_rank": ".1f",
        "rank_of_90": ".1f",
    }
    return Table("energy", "Share of ‖ΔW‖² that the nearest matrix of a rank holds", rows, formats, HIDDEN)


def _row(by_seed: Sequence[Sequence[Measured]], relative: bool) -> Row:
    """Means over the matrices, as a Spread over seeds."""
    return {
        "relative": _mean([[m.relative for m in seed] for seed in by_seed]) if relative else None,
        **{f"rank_{rank}": _mean([[m.energy(rank) for m in seed] for seed in by_seed]) for rank in RANKS},
        "stable_rank": _mean([[m.stable_rank for m in seed] for seed in by_seed]),
        "effective_rank": _mean([[m.effective_rank for m in seed] for seed in by_seed]),
        "rank_of_90": _mean([[m.rank_of(0.9) for m in seed] for seed in by_seed]),
    }


def _mean(by_seed: Sequence[Sequence[float | None]]) -> Spread | None:
    """The means over the values that are not None; None if a seed has no values."""
    values = [[value for value in seed if value is not None] for seed in by_seed]
    return Spread.of(fmean(seed) for seed in values) if all(values) else None


def _last_name(name: str) -> str:
    return name.removesuffix(".weight").rsplit(".", 1)[-1]


def subspaces(overlaps: Sequence[Overlaps]) -> Table:
    pairs = ((1, 1), (1, SQUARE), (2, 2), (4, 4), (SQUARE, SQUARE))
    rows: list[Row] = [
        {"pair": overlap.name, "side": side, **{f"phi_{i}_{j}": overlap.at(number, i, j) for i, j in pairs}}
        for overlap in overlaps
        for number, side in enumerate(("outputs", "inputs"))
    ]
    return Table("subspaces", "φ(i, j) of the top directions", rows, dict.fromkeys(rows[0], ".0%"))


def grid(overlap: Overlaps) -> Table:
    """φ(i, j) of the inputs for all i and j."""
    sizes = range(1, SQUARE + 1)
    rows: list[Row] = [{"i": i, **{f"j_{j}": overlap.at(1, i, j).mean for j in sizes}} for i in sizes]
    return Table("grid", f"φ(i, j) of the inputs, {overlap.name}", rows, {f"j_{j}": ".0%" for j in sizes})


def quality(extracted: Mapping[int, Sequence[tuple[float, Knowledge]]], tuned: Sequence[Knowledge]) -> Table:
    rows: list[Row] = [
        {"rank": str(rank), "held": Spread.of(held for held, _ in by_seed), **spreads([score for _, score in by_seed])}
        for rank, by_seed in extracted.items()
    ]
    rows.append({"rank": "tuned", "held": None, **spreads(tuned)})
    title = "The LoRA extracted from full fine-tuning, with embeddings and head in full"
    return Table("extracted", title, rows, {"held": ".1%", **FORMATS})


def describe(energy: Table, subspaces: Table, _grid: Table, extracted: Table) -> str:
    """The tables' results as Markdown paragraphs."""
    return "\n\n".join(
        [
            "*Relative*: ‖ΔW‖/‖W‖. *Rank n*: the share of ‖ΔW‖² in its best approximation of rank n. *Rank of 90*: the "
            "smallest rank that holds 90%. All are means over the matrices. *Random*: a normal random matrix of the "
            "same shape, which has no low-rank structure.",
            _describe_energy(energy),
            _describe_subspaces(subspaces),
            _describe_extracted(extracted),
        ]
    )


def _describe_energy(energy: Table) -> str:
    """The share of rank 8 of each change, compared with a random matrix."""
    by_kind = {(str(row["change"]), str(row["matrices"])): row for row in energy.rows}
    full = [
        f"In {kind} matrices rank 8 holds {shown(row['rank_8'], '.0%')} of the change by full fine-tuning, against "
        f"{shown(by_kind[RANDOM, kind]['rank_8'], '.0%')} of a random matrix; 90% of the change takes rank "
        f"{shown(row['rank_of_90'], '.0f')}."
        for (change, kind), row in by_kind.items()
        if change == FULL and kind in ("attention", "feed-forward")
    ]
    lora = [
        f"{shown(row['rank_2'], '.0%')} with {name.removeprefix('LoRA, ')}"
        for (name, _), row in by_kind.items()
        if name not in (FULL, RANDOM)
    ]
    return f"{' '.join(full)} Of what LoRA learned, rank 2 holds {' and '.join(lora)}."


def _describe_subspaces(subspaces: Table) -> str:
    """The overlap of the top direction and of the top eight, compared with random ones."""
    rows = [row for row in subspaces.rows if row["side"] == "inputs"]
    last = f"phi_{SQUARE}_{SQUARE}"
    overlaps = "; ".join(f"{row['pair']}: {shown(row['phi_1_1'], '.0%')} and {shown(row[last], '.0%')}" for row in rows)
    return (
        "φ(i, j), from 0 to 1, is the share of the top i directions of one that lies in the span of the top j of the "
        f"other (§7.2 of the LoRA paper). φ(1, 1) and φ({SQUARE}, {SQUARE}) of the inputs: {overlaps}."
    )


def _describe_extracted(extracted: Table) -> str:
    """The loss of the extracted LoRA by rank."""
    *ranks, tuned = extracted.rows
    losses = ", ".join(f"{shown(row['new_loss'], '.2f')} at rank {row['rank']}" for row in ranks)
    return (
        f"The loss on the new sentences is {shown(tuned['new_loss'], '.2f')} after full fine-tuning. With the LoRA "
        f"extracted from it, it is {losses}. At any rank the changes of norms and biases are missing: LoRA cannot "
        "represent them."
    )


def draw(figure: Figure, energy: Table, _subspaces: Table, grid: Table, extracted: Table) -> None:
    """Three panels: the share of each rank, φ(i, j), and the loss by rank."""
    left, middle, right = figure.subplots(1, 3)
    _draw_energy(left, energy)
    values = [[row[f"j_{j}"] for j in range(1, SQUARE + 1)] for row in grid.rows]
    bounds = (0.5, SQUARE + 0.5)
    image = middle.imshow(values, vmin=0, vmax=1, cmap="cividis", origin="lower", extent=(*bounds, *bounds))
    middle.set(title="φ(i, j), inputs, two ranks", xlabel="j, of the higher rank", ylabel="i, of the lower rank")
    middle.set(xticks=range(1, SQUARE + 1), yticks=range(1, SQUARE + 1))
    figure.colorbar(image, ax=middle)
    *ranks, tuned = extracted.rows
    cells = [spread(row["new_loss"]) for row in ranks]
    right.errorbar(range(len(ranks)), [c.mean for c in cells], yerr=min_max(cells), color=COLORS["lora"], marker="o")
    right.axhline(spread(tuned["new_loss"]).mean, color=COLORS["full"], linestyle="--", label="full fine-tuning")
    right.set(xlabel="rank of the extracted LoRA", ylabel="new loss (nats per token)", yscale="log")
    right.set_xticks(range(len(ranks)), [str(row["rank"]) for row in ranks])
    right.grid(alpha=0.3)
    right.legend(fontsize=8)


def _draw_energy(axis: Figure, energy: Table) -> None:
    line_styles = {"attention": "-", "feed-forward": "--"}
    colors = {FULL: COLORS["full"], RANDOM: "#999999"}
    for row in energy.rows:
        change, kind = str(row["change"]), str(row["matrices"])
        if kind in line_styles:
            shares = [spread(row[f"rank_{rank}"]).mean for rank in RANKS]
            color = colors.get(change, COLORS["lora"])
            marker = "o" if change in colors else "s"
            axis.plot(RANKS, shares, line_styles[kind], marker=marker, color=color, label=f"{change}, {kind}")
    axis.set(xscale="log", xlabel="rank", ylabel="share of ‖ΔW‖²", ylim=(0, 1.02))
    axis.set_xticks(RANKS, [str(rank) for rank in RANKS])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
