"""The tables, the picture and the words of study_fact_correction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

import torch

from pipeline import engine
from pipeline.adapters.attach import switched_off
from pipeline.data import Prompt
from pipeline.engine import Loaded
from pipeline.looks import COLORS
from pipeline.params import FinetuneLora
from pipeline.studies.findings import Figure
from pipeline.studies.runs import DOCUMENT
from pipeline.studies.spoken import Spoken, ask
from pipeline.tables import Cell, Row, Spread, Table, shown

TARGETS = {"v_proj": ("v_proj",), "all": DOCUMENT.target_modules}
POINTS = 0.15  # how near to the document's a probability must come
PERCENT = ".0%"
Setting = tuple[int, float, float]  # window, learning rate, alpha


@dataclass(frozen=True)
class Said:
    """A cell of the document's tables: `model`'s first choice after `prompt`, and its probability."""

    prompt: str
    changes: bool  # whether the correction is meant to change it
    model: str  # original, v_proj or all
    word: str
    probability: float


@dataclass(frozen=True)
class Tuned:
    """An adapter, how it was trained, and what it answers."""

    folder: Path
    settings: FinetuneLora
    spoken: Spoken

    @property
    def targets(self) -> str:
        return next(name for name, modules in TARGETS.items() if modules == self.settings.target_modules)

    @property
    def setting(self) -> Setting:
        return self.settings.window, self.settings.learning_rate, self.settings.alpha


@dataclass(frozen=True)
class Tried:
    """The adapters of every setting that the document leaves open, beside what it claims."""

    before: Spoken
    tuned: Sequence[Tuned]
    claimed: Sequence[Said]

    @cached_property
    def by_setting(self) -> dict[Setting, list[Tuned]]:
        found: dict[Setting, list[Tuned]] = {}
        for one in self.tuned:
            found.setdefault(one.setting, []).append(one)
        return found

    @cached_property
    def nearest(self) -> Setting:
        """The setting with most of the document's first choices; of equals, with the least mean distance."""
        return min(self.by_setting, key=lambda setting: (-self._same_firsts(setting), self._distance(setting)))

    @property
    def of_nearest(self) -> list[Tuned]:
        return self.by_setting[self.nearest]

    def rows(self) -> Table:
        """One row for each cell of the document's tables, measured at the nearest setting."""
        forms = dict.fromkeys(("document", "measured", "least", "greatest"), PERCENT)
        rows = [self._row(said) for said in self.claimed]
        hidden = ("kind", "same_first")
        return Table("rows", f"§6's two tables, at {_said(self.nearest)}", rows, forms, hidden)

    def _row(self, said: Said) -> Row:
        answers = self._answers(said.model, self.nearest)
        measured = Spread.of(one.probability(said.prompt, said.word) for one in answers)
        everywhere = [self._mean(said, setting) for setting in self.by_setting]
        firsts = [one.first(said.prompt) for one in answers]
        return {
            **{"prompt": said.prompt, "kind": "corrected" if said.changes else "unchanged", "model": said.model},
            **{"first_choice": said.word, "document": said.probability, "measured": measured},
            **{"ours": "/".join(dict.fromkeys(firsts)), "same_first": set(firsts) == {said.word}},
            **{"within_15": abs(measured.mean - said.probability) <= POINTS, "least": min(everywhere)},
            "greatest": max(everywhere),
        }

    def settings(self) -> Table:
        """How near each setting comes to the document's tables."""
        rows = [self._setting_row(setting) for setting in self.by_setting]
        forms = {"learning_rate": "g", "alpha": "g", "first_choices": ".1f", "mean_distance": PERCENT}
        return Table("settings", f"Settings that §6 leaves open, {len(self._trained)} cells each", rows, forms)

    def _setting_row(self, setting: Setting) -> Row:
        near = [abs(self._mean(said, setting) - said.probability) <= POINTS for said in self._trained]
        names = dict(zip(("window", "learning_rate", "alpha"), setting, strict=True))
        return {
            **names,
            "first_choices": float(self._same_firsts(setting)),
            "within_15": sum(near),
            "mean_distance": self._distance(setting),
            "nearest": setting == self.nearest,
        }

    def top(self, k: int) -> Table:
        """The likeliest words of the first seed at the nearest setting."""
        firsts = {name: self._answers(name, self.nearest)[0] for name in ("original", *TARGETS)}
        rows: list[Row] = [
            {
                "prompt": prompt,
                "model": name,
                **{f"top_{n}": _choice(c) for n, c in enumerate(spoken.top(prompt, k), 1)},
            }
            for prompt in self.before.by_prompt
            for name, spoken in firsts.items()
        ]
        return Table("top", f"The {k} likeliest words, first seed", rows)

    @property
    def _trained(self) -> list[Said]:
        return [said for said in self.claimed if said.model in TARGETS]

    def _answers(self, model: str, setting: Setting) -> list[Spoken]:
        """One for each seed; the base's is the same for all."""
        if model not in TARGETS:
            return [self.before]
        return [one.spoken for one in self.by_setting[setting] if one.targets == model]

    def _mean(self, said: Said, setting: Setting) -> float:
        return fmean(one.probability(said.prompt, said.word) for one in self._answers(said.model, setting))

    def _same_firsts(self, setting: Setting) -> float:
        """How many of the trained models' cells have the document's first choice, mean over seeds."""
        return sum(
            fmean(one.first(said.prompt) == said.word for one in self._answers(said.model, setting))
            for said in self._trained
        )

    def _distance(self, setting: Setting) -> float:
        return fmean(abs(self._mean(said, setting) - said.probability) for said in self._trained)


def embeddings(prompts: Sequence[Prompt], before: Spoken, tuned: Sequence[Tuned]) -> Table:
    """How probable each prompt's word is, where embeddings and head train in full, in new rows, or not at all."""
    groups: dict[tuple[str, bool, str], list[Spoken]] = {}
    for one in tuned:
        key = one.settings.train_embeddings, one.settings.retain_weight > 0, one.targets
        groups.setdefault(key, []).append(one.spoken)
    rows = [
        {"train_embeddings": "", "retain": False, "model": "original", **_probabilities(prompts, [before])},
        *(
            {"train_embeddings": kind, "retain": retain, "model": targets, **_probabilities(prompts, answers)}
            for (kind, retain, targets), answers in groups.items()
        ),
    ]
    return Table("embeddings", "What else trains, and what retaining keeps", rows, dict.fromkeys(rows[0], PERCENT))


def _probabilities(prompts: Sequence[Prompt], answers: Sequence[Spoken]) -> dict[str, Cell]:
    """The word that should come, by itself: sofa, wald, ... himmel, garten."""
    return {_column(p): Spread.of(one.probability(p.prompt, p.corrected) for one in answers) for p in prompts}


def _column(prompt: Prompt) -> str:
    return f"{prompt.prompt.split()[1]}_{prompt.corrected}"


@torch.no_grad()
def parts(prompts: Sequence[Prompt], before: Spoken, tuned: Sequence[Tuned]) -> Table:
    """How probable each word is with only one part of what was trained, the other put back as it was."""
    asked, base = [p.prompt for p in prompts], before.loaded
    by_part: dict[tuple[str, str], list[Spoken]] = {}
    for one in tuned:
        for part, spoken in _by_part(one, base, asked).items():
            by_part.setdefault((one.targets, part), []).append(spoken)
    rows: list[Row] = [
        {"model": targets, "trained": part, **_probabilities(prompts, answers)}
        for (targets, part), answers in by_part.items()
    ]
    return Table("parts", "Which part of the training does it", rows, dict.fromkeys(rows[0], PERCENT))


def _by_part(one: Tuned, base: Loaded, asked: Sequence[str]) -> Mapping[str, Spoken]:
    loaded = engine.load(base.base, one.folder)
    found = {"both": one.spoken}
    with switched_off(loaded.model):
        found["embeddings and head"] = ask(loaded, asked)
    for ours, theirs in ((loaded.model.embeddings, base.model.embeddings), (loaded.model.head, base.model.head)):
        ours.load_state_dict(theirs.state_dict())
    return {**found, "A and B": ask(loaded, asked)}


def _choice(choice: engine.Choice) -> str:
    return f"{choice.token} {choice.probability:.0%}"


def _said(setting: Setting) -> str:
    window, rate, alpha = setting
    return f"window {window or 'none'}, learning rate {rate:g}, alpha {alpha:g}"


def in_words(rows: Table, settings: Table, embeddings: Table, parts: Table) -> str:
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
            _bleeding(embeddings),
            _by_parts(parts),
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


def _mean(table: Table, where: Mapping[str, Cell], columns: Sequence[str]) -> float:
    """The mean of some columns of the one row that has these values."""
    row = next(row for row in table.rows if all(row[name] == value for name, value in where.items()))
    return fmean(cell.mean for name in columns if isinstance(cell := row[name], Spread))


def _bleeding(table: Table) -> str:
    words = [name for name in table.columns if isinstance(table.rows[0][name], Spread)]
    changed, kept = words[:4], words[4:]
    said = []
    for kind, about in (
        ("all", "all of embeddings and head"),
        ("new_rows", "only their new rows"),
        ("none", "neither"),
    ):
        for retain in (False, True):
            where: dict[str, Cell] = {"train_embeddings": kind, "retain": retain, "model": "all"}
            corrected, unrelated = _mean(table, where, changed), _mean(table, where, kept)
            said.append(
                f"{about} training{', and retaining' if retain else ''}: corrected {corrected:.0%}, unrelated "
                f"{unrelated:.0%}"
            )
    return f"Mean probability of the words that should come, LoRA on all four projections: {'; '.join(said)}."


def _by_parts(table: Table) -> str:
    words = [name for name in table.columns if isinstance(table.rows[0][name], Spread)][4:]
    said = [
        f"{row['model']}, {row['trained']}: {fmean(c.mean for n in words if isinstance(c := row[n], Spread)):.0%}"
        for row in table.rows
    ]
    return (
        "What bleeds into the unrelated prompts is seen when one part of what was trained is put back as it was "
        f"(mean probability of the three words that should stay): {'; '.join(said)}."
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
            ends = [[c.mean - c.low for c in cells], [c.high - c.mean for c in cells]]
            hatch = ("", "//", "..")[number]
            axis.bar(
                places,
                [c.mean for c in cells],
                0.24,
                yerr=ends,
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
