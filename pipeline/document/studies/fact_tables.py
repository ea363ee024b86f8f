"""The tables of study_fact_correction."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

import torch

from pipeline.adapters.attach import disable_adapter
from pipeline.data.prompts import Prompt
from pipeline.document.studies.shared.next_token import NextTokenAnswers, ask
from pipeline.document.studies.shared.runner import DOCUMENT, describe_window
from pipeline.document.tables import Cell, Row, Spread, Table
from pipeline.inference import engine
from pipeline.inference.engine import LoadedModel
from pipeline.stages.methods.lora import FinetuneLora

TARGETS = {"v_proj": ("v_proj",), "all": DOCUMENT.target_modules}
POINTS = 0.15  # a probability this close to the document's counts as equal
PERCENT = ".0%"
Setting = tuple[int, float, float]  # window, learning rate, alpha
Pair = tuple[str, str]  # a prompt and the next word


@dataclass(frozen=True)
class DocumentCell:
    """A cell of the document's tables: `model`'s first choice after `prompt`, and its probability."""

    prompt: str
    changes: bool  # whether the correction should change the answer
    model: str  # original, v_proj or all
    word: str
    probability: float


@dataclass(frozen=True)
class Words:
    """The words whose probabilities are measured: the expected ones, and the document's other answers."""

    prompts: Sequence[Prompt]
    claimed: Sequence[DocumentCell]

    @cached_property
    def expected(self) -> list[Pair]:
        """The expected word after each prompt: sofa, wald, ... himmel, garten."""
        return [(prompt.prompt, prompt.corrected) for prompt in self.prompts]

    @cached_property
    def every(self) -> list[Pair]:
        """The expected words, each followed by the answers of the document's corrected models to the same prompt."""
        answers = [(cell.prompt, cell.word) for cell in self.claimed if cell.model in TARGETS]
        pairs = [p for word in self.expected for p in (word, *(answer for answer in answers if answer[0] == word[0]))]
        return list(dict.fromkeys(pairs))

    @cached_property
    def columns(self) -> dict[Pair, str]:
        """The column name of each pair: katze_sofa, or with the full prompt if that name is ambiguous."""
        short = {(prompt, word): f"{prompt.split()[:2][-1]}_{word}" for prompt, word in self.every}
        times = Counter(short.values())
        return {
            pair: name if times[name] == 1 else f"{'_'.join(pair[0].split())}_{pair[1]}" for pair, name in short.items()
        }

    def of(self, rule: str) -> list[str]:
        """The columns of the expected words of the prompts with this rule."""
        return [self.columns[p.prompt, p.corrected] for p in self.prompts if p.rule == rule]

    def probabilities(self, pairs: Iterable[Pair], answers: Sequence[NextTokenAnswers]) -> dict[str, Cell]:
        return {self.columns[pair]: Spread.of(answer.probability(*pair) for answer in answers) for pair in pairs}


@dataclass(frozen=True)
class Tuned:
    """An adapter, the settings it was trained with, and its answers."""

    folder: Path
    settings: FinetuneLora
    answers: NextTokenAnswers

    @property
    def targets(self) -> str:
        return next(name for name, modules in TARGETS.items() if modules == self.settings.target_modules)

    @property
    def setting(self) -> Setting:
        return self.settings.window, self.settings.learning_rate, self.settings.alpha


@dataclass(frozen=True)
class GridSearch:
    """The adapters of all settings of the grid, compared with the document's tables."""

    before: NextTokenAnswers
    tuned: Sequence[Tuned]
    claimed: Sequence[DocumentCell]

    @cached_property
    def by_setting(self) -> dict[Setting, list[Tuned]]:
        groups: dict[Setting, list[Tuned]] = {}
        for adapter in self.tuned:
            groups.setdefault(adapter.setting, []).append(adapter)
        return groups

    @cached_property
    def nearest(self) -> Setting:
        """The setting with the most first choices equal to the document's; ties go to the smallest mean distance."""
        return min(self.by_setting, key=lambda setting: (-self._equal_first_choices(setting), self._distance(setting)))

    @property
    def of_nearest(self) -> list[Tuned]:
        return self.by_setting[self.nearest]

    def rows(self) -> Table:
        """One row per cell of the document's tables, measured at the nearest setting."""
        formats = dict.fromkeys(("document", "measured", "least", "greatest"), PERCENT)
        rows = [self._row(cell) for cell in self.claimed]
        hidden = ("kind", "same_first")
        return Table("rows", f"§6's two tables, trained on {_describe_setting(self.nearest)}", rows, formats, hidden)

    def _row(self, cell: DocumentCell) -> Row:
        answers = self._answers(cell.model, self.nearest)
        measured = Spread.of(answer.probability(cell.prompt, cell.word) for answer in answers)
        all_means = [self._mean(cell, setting) for setting in self.by_setting]
        firsts = [answer.first(cell.prompt) for answer in answers]
        return {
            **{"prompt": cell.prompt, "kind": "corrected" if cell.changes else "unchanged", "model": cell.model},
            **{"first_choice": cell.word, "document": cell.probability, "measured": measured},
            **{"ours": "/".join(dict.fromkeys(firsts)), "same_first": set(firsts) == {cell.word}},
            **{"within_15": abs(measured.mean - cell.probability) <= POINTS, "least": min(all_means)},
            "greatest": max(all_means),
        }

    def settings(self) -> Table:
        """How close each setting comes to the document's tables."""
        rows = [self._setting_row(setting) for setting in self.by_setting]
        formats = {"learning_rate": "g", "alpha": "g", "first_choices": ".1f", "distance": PERCENT}
        title = f"Settings that §6 leaves open, {len(self._corrected_cells)} cells each"
        return Table("settings", title, rows, formats, ("window",))

    def _setting_row(self, setting: Setting) -> Row:
        within = [abs(self._mean(cell, setting) - cell.probability) <= POINTS for cell in self._corrected_cells]
        window, rate, alpha = setting
        return {
            **{"trains_on": describe_window(window), "window": window, "learning_rate": rate, "alpha": alpha},
            "first_choices": float(self._equal_first_choices(setting)),
            "within_15": sum(within),
            "distance": self._distance(setting),
            "nearest": setting == self.nearest,
        }

    def top(self, k: int) -> Table:
        """The top-k words of the first seed at the nearest setting."""
        firsts = {name: self._answers(name, self.nearest)[0] for name in ("original", *TARGETS)}
        rows: list[Row] = [
            {
                "prompt": prompt,
                "model": name,
                **{f"top_{n}": _format_choice(c) for n, c in enumerate(answers.top(prompt, k), 1)},
            }
            for prompt in self.before.by_prompt
            for name, answers in firsts.items()
        ]
        return Table("top", f"The top {k} words, first seed", rows)

    @property
    def _corrected_cells(self) -> list[DocumentCell]:
        return [cell for cell in self.claimed if cell.model in TARGETS]

    def _answers(self, model: str, setting: Setting) -> list[NextTokenAnswers]:
        """The answers for each seed; a single one for the base, which has no seeds here."""
        if model not in TARGETS:
            return [self.before]
        return [adapter.answers for adapter in self.by_setting[setting] if adapter.targets == model]

    def _mean(self, cell: DocumentCell, setting: Setting) -> float:
        return fmean(answer.probability(cell.prompt, cell.word) for answer in self._answers(cell.model, setting))

    def _equal_first_choices(self, setting: Setting) -> float:
        """The number of corrected models' cells with the document's first choice, mean over seeds."""
        return sum(
            fmean(answer.first(cell.prompt) == cell.word for answer in self._answers(cell.model, setting))
            for cell in self._corrected_cells
        )

    def _distance(self, setting: Setting) -> float:
        return fmean(abs(self._mean(cell, setting) - cell.probability) for cell in self._corrected_cells)


def embeddings(words: Words, before: NextTokenAnswers, tuned: Sequence[Tuned]) -> Table:
    """The probability of each expected word if embeddings and head train in full, in new rows, or not at all."""
    groups: dict[tuple[str, bool, str], list[NextTokenAnswers]] = {}
    for adapter in tuned:
        key = adapter.settings.train_embeddings, adapter.settings.retention_weight > 0, adapter.targets
        groups.setdefault(key, []).append(adapter.answers)
    rows = [
        {"train_embeddings": "", "retain": False, "model": "original", **words.probabilities(words.expected, [before])},
        *(
            {
                "train_embeddings": kind,
                "retain": retain,
                "model": targets,
                **words.probabilities(words.expected, answers),
            }
            for (kind, retain, targets), answers in groups.items()
        ),
    ]
    return Table(
        "embeddings",
        "Effect of training embeddings and head, and of retain texts",
        rows,
        dict.fromkeys(rows[0], PERCENT),
    )


@torch.no_grad()
def parts(words: Words, before: NextTokenAnswers, tuned: Sequence[Tuned]) -> Table:
    """The probability of each word with only one trained part, the other reset to the base."""
    texts, base = [p.prompt for p in words.prompts], before.loaded
    by_part: dict[tuple[str, str], list[NextTokenAnswers]] = {}
    for adapter in tuned:
        for part, answers in _answers_by_part(adapter, base, texts).items():
            by_part.setdefault((adapter.targets, part), []).append(answers)
    rows: list[Row] = [
        {"model": targets, "trained": part, **words.probabilities(words.every, answers)}
        for (targets, part), answers in by_part.items()
    ]
    return Table("parts", "Effect of each trained part alone", rows, dict.fromkeys(rows[0], PERCENT))


def _answers_by_part(adapter: Tuned, base: LoadedModel, texts: Sequence[str]) -> Mapping[str, NextTokenAnswers]:
    loaded = engine.load(base.base, adapter.folder)
    answers = {"both": adapter.answers}
    with disable_adapter(loaded.model):
        answers["embeddings and head"] = ask(loaded, texts)
    loaded.model.embeddings.load_state_dict(base.model.embeddings.state_dict())
    loaded.model.head.load_state_dict(base.model.head.state_dict())
    return {**answers, "A and B": ask(loaded, texts)}


def _format_choice(choice: engine.TokenProbability) -> str:
    return f"{choice.token} {choice.probability:.0%}"


def _describe_setting(setting: Setting) -> str:
    window, rate, alpha = setting
    return f"{describe_window(window)}, learning rate {rate:g}, alpha {alpha:g}"
