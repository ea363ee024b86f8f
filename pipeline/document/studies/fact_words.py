"""The text and the picture of study_fact_correction."""

from collections.abc import Sequence
from statistics import fmean

from pipeline.document.studies.fact_tables import PERCENT, POINTS, Words
from pipeline.document.studies.shared.report import Figure
from pipeline.document.tables import Row, Spread, Table, min_max, shown
from pipeline.stages.registry import COLORS


def describe(words: Words, rows: Table, settings: Table, embeddings: Table, parts: Table) -> str:
    """The tables' results as Markdown paragraphs."""
    near = [row for row in rows.rows if row["within_15"]]
    far = [row for row in rows.rows if not row["within_15"]]
    same = [row for row in rows.rows if row["same_first"]]
    return "\n\n".join(
        [
            f"Of the {len(rows.rows)} cells of the document's two tables, {len(same)} have the same first choice with "
            f"every seed, and {len(near)} a probability within 15 points of the document's. This is at the closest of "
            f"{len(settings.rows)} settings tried: the document gives rank and epochs, but not window, learning rate "
            "and alpha. *Least* and *greatest* are over all settings.",
            "Cells further off: " + "; ".join(map(_describe_cell, far)) + "." if far else "No cell is further off.",
            _describe_embeddings(words, embeddings),
            _describe_parts(words, parts),
        ]
    )


def _describe_cell(row: Row) -> str:
    """A cell far from the document's number, and whether any setting reaches it."""
    document, least, greatest = (float(row[name]) for name in ("document", "least", "greatest"))  # type: ignore[arg-type]
    reached = least - POINTS <= document <= greatest + POINTS
    return (
        f"*{row['prompt']}* → {row['first_choice']} ({row['model']}): {shown(row['measured'], PERCENT)}, the document "
        f"has {document:.0%}; over all settings {least:.0%} to {greatest:.0%}, "
        + ("so it depends on the setting" if reached else "so no setting reaches it")
    )


def _mean(row: Row, columns: Sequence[str]) -> str:
    """The mean probability over some columns; a dash if there are none."""
    cells = [cell for name in columns if isinstance(cell := row[name], Spread)]
    return f"{fmean(cell.mean for cell in cells):.0%}" if cells else "–"


def _describe_embeddings(words: Words, table: Table) -> str:
    by_kind = {(row["train_embeddings"], row["retain"]): row for row in table.rows if row["model"] == "all"}
    parts = []
    for kind, trained in (
        ("all", "embeddings and head in full"),
        ("new_rows", "only their new rows"),
        ("none", "neither"),
    ):
        for retain in (False, True):
            corrected, unrelated = (_mean(by_kind[kind, retain], words.of(r)) for r in ("must_change", "must_keep"))
            parts.append(
                f"{trained}{', with retain texts' if retain else ''}: corrected {corrected}, unrelated {unrelated}"
            )
    return f"Mean probability of the expected words, LoRA on all four projections, training {'; '.join(parts)}."


def _describe_parts(words: Words, table: Table) -> str:
    unrelated = words.of("must_keep")
    parts = [f"{row['model']}, {row['trained']}: {_mean(row, unrelated)}" for row in table.rows]
    return (
        "To see which part changes the unrelated answers, the other part is reset to the base. Mean probability of the "
        f"{len(unrelated)} words that should stay: {'; '.join(parts)}."
    )


def draw(figure: Figure, rows: Table) -> None:
    """One bar per prompt and model; a black stroke is the document's number."""
    axes = figure.subplots(1, 2, sharey=True, width_ratios=(4, 3))
    colors = {"original": COLORS["scratch"], "v_proj": COLORS["freeze"], "all": COLORS["lora"]}
    for axis, kind in zip(axes, ("corrected", "unchanged"), strict=True):
        of_kind = [row for row in rows.rows if row["kind"] == kind]
        prompts = list(dict.fromkeys(str(row["prompt"]) for row in of_kind))
        for number, (model, color) in enumerate(colors.items()):
            of_model = [row for row in of_kind if row["model"] == model]
            positions = [prompts.index(str(row["prompt"])) + 0.27 * (number - 1) for row in of_model]
            cells = [cell for row in of_model if isinstance(cell := row["measured"], Spread)]
            hatch = ("", "//", "..")[number]
            axis.bar(
                positions,
                [c.mean for c in cells],
                0.24,
                yerr=min_max(cells),
                color=color,
                hatch=hatch,
                edgecolor="white",
                label=model,
            )
            axis.hlines(
                [row["document"] for row in of_model],
                [p - 0.13 for p in positions],
                [p + 0.13 for p in positions],
                color="black",
            )
            for position, row in zip(positions, of_model, strict=True):
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
                axis.annotate(row["first_choice"], (position, 0.02), rotation=90, ha="center", fontsize=7, bbox=box)
        axis.set_xticks(range(len(prompts)), [prompt.replace(" ", "\n", 2) for prompt in prompts], fontsize=8)
        axis.set_title("Corrected facts" if kind == "corrected" else "Unchanged knowledge")
    axes[0].set_ylabel("probability of the document's first choice")
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, title="stroke: the document")
