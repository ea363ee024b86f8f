"""The words and the picture of study_fact_correction."""

from collections.abc import Sequence
from statistics import fmean

from pipeline.document.studies.fact_tables import PERCENT, POINTS, Words
from pipeline.document.studies.shared.report import Figure
from pipeline.document.tables import Row, Spread, Table, min_max, shown
from pipeline.project.palette import COLORS


def in_words(words: Words, rows: Table, settings: Table, embeddings: Table, parts: Table) -> str:
    """What the tables show."""
    near = [row for row in rows.rows if row["within_15"]]
    far = [row for row in rows.rows if not row["within_15"]]
    same = [row for row in rows.rows if row["same_first"]]
    return "\n\n".join(
        [
            f"Of the {len(rows.rows)} cells of the document's two tables {len(same)} have the same first choice with "
            f"every seed, and {len(near)} a probability within 15 points, at the setting of {len(settings.rows)} tried "
            "that comes nearest to them (the document gives rank and epochs; window, learning rate and alpha it leaves "
            "open). *Least* and *greatest* are over all of those settings.",
            "Further off: " + "; ".join(map(_why, far)) + "." if far else "None is further off.",
            _bleeding(words, embeddings),
            _by_parts(words, parts),
        ]
    )


def _why(row: Row) -> str:
    """A row that is far from the document's, and whether any setting reaches it."""
    document, least, greatest = (float(row[name]) for name in ("document", "least", "greatest"))  # type: ignore[arg-type]
    reached = least - POINTS <= document <= greatest + POINTS
    return (
        f"*{row['prompt']}* → {row['first_choice']} ({row['model']}): {shown(row['measured'], PERCENT)}, the document "
        f"has {document:.0%}; the settings tried give {least:.0%} to {greatest:.0%}"
        + (", so that it depends on them" if reached else ", so that none of them explains it")
    )


def _mean(row: Row, columns: Sequence[str]) -> str:
    """The mean probability of some columns; a dash where no prompt has such a rule."""
    cells = [cell for name in columns if isinstance(cell := row[name], Spread)]
    return f"{fmean(cell.mean for cell in cells):.0%}" if cells else "–"


def _bleeding(words: Words, table: Table) -> str:
    by_kind = {(row["train_embeddings"], row["retain"]): row for row in table.rows if row["model"] == "all"}
    said = []
    for kind, about in (
        ("all", "all of embeddings and head"),
        ("new_rows", "only their new rows"),
        ("none", "neither"),
    ):
        for retain in (False, True):
            corrected, unrelated = (_mean(by_kind[kind, retain], words.of(r)) for r in ("must_change", "must_keep"))
            said.append(
                f"{about} training{', and retaining' if retain else ''}: corrected {corrected}, unrelated {unrelated}"
            )
    return f"Mean probability of the words that should come, LoRA on all four projections: {'; '.join(said)}."


def _by_parts(words: Words, table: Table) -> str:
    kept = words.of("must_keep")
    said = [f"{row['model']}, {row['trained']}: {_mean(row, kept)}" for row in table.rows]
    return (
        "What bleeds into the unrelated prompts is seen when one part of what was trained is put back as it was "
        f"(mean probability of the {len(kept)} words that should stay): {'; '.join(said)}."
    )


def draw(figure: Figure, rows: Table) -> None:
    """Bars for each prompt and model; a black stroke is the document's number."""
    axes = figure.subplots(1, 2, sharey=True, width_ratios=(4, 3))
    colors = {"original": COLORS["scratch"], "v_proj": COLORS["freeze"], "all": COLORS["lora"]}
    for axis, kind in zip(axes, ("corrected", "unchanged"), strict=True):
        here = [row for row in rows.rows if row["kind"] == kind]
        prompts = list(dict.fromkeys(str(row["prompt"]) for row in here))
        for number, (model, color) in enumerate(colors.items()):
            own = [row for row in here if row["model"] == model]
            places = [prompts.index(str(row["prompt"])) + 0.27 * (number - 1) for row in own]
            cells = [cell for row in own if isinstance(cell := row["measured"], Spread)]
            hatch = ("", "//", "..")[number]
            axis.bar(
                places,
                [c.mean for c in cells],
                0.24,
                yerr=min_max(cells),
                color=color,
                hatch=hatch,
                edgecolor="white",
                label=model,
            )
            axis.hlines(
                [row["document"] for row in own], [p - 0.13 for p in places], [p + 0.13 for p in places], color="black"
            )
            for place, row in zip(places, own, strict=True):
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
                axis.annotate(row["first_choice"], (place, 0.02), rotation=90, ha="center", fontsize=7, bbox=box)
        axis.set_xticks(range(len(prompts)), [prompt.replace(" ", "\n", 2) for prompt in prompts], fontsize=8)
        axis.set_title("Corrected facts" if kind == "corrected" else "Unchanged knowledge")
    axes[0].set_ylabel("probability of the document's first choice")
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, title="stroke: the document")
