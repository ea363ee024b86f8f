"""The tables of study_fact_correction."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

import torch

from pipeline.adapters.attach import disable_adapter
from pipeline.data.examples import Prompt
from pipeline.document.studies.shared.next_token import NextTokenAnswers, ask
from pipeline.document.studies.shared.runner import DOCUMENT, named
from pipeline.document.tables import Cell, Row, Spread, Table
from pipeline.inference import engine
from pipeline.inference.engine import LoadedModel
from pipeline.project.params.sections import FinetuneLora

TARGETS = {"v_proj": ("v_proj",), "all": DOCUMENT.target_modules}
POINTS = 0.15  # how near to the document's a probability must come
PERCENT = ".0%"
Setting = tuple[int, float, float]  # window, learning rate, alpha
Pair = tuple[str, str]  # a prompt, and a word after it


@dataclass(frozen=True)
class Said:
    """A cell of the document's tables: `model`'s first choice after `prompt`, and its probability."""

    prompt: str
    changes: bool  # whether the correction is meant to change it
    model: str  # original, v_proj or all
    word: str
    probability: float


@dataclass(frozen=True)
class Words:
    """What is asked after the prompts: the words that should come, and those that the document has in their place."""

    prompts: Sequence[Prompt]
    claimed: Sequence[Said]

    @cached_property
    def due(self) -> list[Pair]:
        """The word that should come after each prompt: sofa, wald, ... himmel, garten."""
        return [(prompt.prompt, prompt.corrected) for prompt in self.prompts]

    @cached_property
    def every(self) -> list[Pair]:
        """The same, and what a corrected model of the document says instead."""
        others = [(said.prompt, said.word) for said in self.claimed if said.model in TARGETS]
        found = [pair for due in self.due for pair in (due, *(other for other in others if other[0] == due[0]))]
        return list(dict.fromkeys(found))

    @cached_property
    def columns(self) -> dict[Pair, str]:
        """What each is called in the tables: katze_sofa, or by the whole prompt where that is another's name too."""
        short = {(prompt, word): f"{prompt.split()[:2][-1]}_{word}" for prompt, word in self.every}
        times = Counter(short.values())
        return {
            pair: name if times[name] == 1 else f"{'_'.join(pair[0].split())}_{pair[1]}" for pair, name in short.items()
        }

    def of(self, rule: str) -> list[str]:
        """The columns of the words that should come after the prompts with this rule."""
        return [self.columns[p.prompt, p.corrected] for p in self.prompts if p.rule == rule]

    def probabilities(self, pairs: Iterable[Pair], answers: Sequence[NextTokenAnswers]) -> dict[str, Cell]:
        return {self.columns[pair]: Spread.of(one.probability(*pair) for one in answers) for pair in pairs}


@dataclass(frozen=True)
class Tuned:
    """An adapter, how it was trained, and what it answers."""

    folder: Path
    settings: FinetuneLora
    spoken: NextTokenAnswers

    @property
    def targets(self) -> str:
        return next(name for name, modules in TARGETS.items() if modules == self.settings.target_modules)

    @property
    def setting(self) -> Setting:
        return self.settings.window, self.settings.learning_rate, self.settings.alpha


@dataclass(frozen=True)
class Tried:
    """The adapters of every setting that the document leaves open, beside what it claims."""

    before: NextTokenAnswers
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
        return Table("rows", f"§6's two tables, trained on {_said(self.nearest)}", rows, forms, hidden)

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
        forms = {"learning_rate": "g", "alpha": "g", "first_choices": ".1f", "distance": PERCENT}
        title = f"Settings that §6 leaves open, {len(self._trained)} cells each"
        return Table("settings", title, rows, forms, ("window",))

    def _setting_row(self, setting: Setting) -> Row:
        near = [abs(self._mean(said, setting) - said.probability) <= POINTS for said in self._trained]
        window, rate, alpha = setting
        return {
            **{"trains_on": named(window), "window": window, "learning_rate": rate, "alpha": alpha},
            "first_choices": float(self._same_firsts(setting)),
            "within_15": sum(near),
            "distance": self._distance(setting),
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

    def _answers(self, model: str, setting: Setting) -> list[NextTokenAnswers]:
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


def embeddings(words: Words, before: NextTokenAnswers, tuned: Sequence[Tuned]) -> Table:
    """How probable each prompt's word is, where embeddings and head train in full, in new rows, or not at all."""
    groups: dict[tuple[str, bool, str], list[NextTokenAnswers]] = {}
    for one in tuned:
        key = one.settings.train_embeddings, one.settings.retention_weight > 0, one.targets
        groups.setdefault(key, []).append(one.spoken)
    rows = [
        {"train_embeddings": "", "retain": False, "model": "original", **words.probabilities(words.due, [before])},
        *(
            {
                "train_embeddings": kind,
                "retain": retain,
                "model": targets,
                **words.probabilities(words.due, answers),
            }
            for (kind, retain, targets), answers in groups.items()
        ),
    ]
    return Table("embeddings", "What else trains, and what retaining keeps", rows, dict.fromkeys(rows[0], PERCENT))


@torch.no_grad()
def parts(words: Words, before: NextTokenAnswers, tuned: Sequence[Tuned]) -> Table:
    """How probable each word is with only one part of what was trained, the other put back as it was."""
    asked, base = [p.prompt for p in words.prompts], before.loaded
    by_part: dict[tuple[str, str], list[NextTokenAnswers]] = {}
    for one in tuned:
        for part, spoken in _by_part(one, base, asked).items():
            by_part.setdefault((one.targets, part), []).append(spoken)
    rows: list[Row] = [
        {"model": targets, "trained": part, **words.probabilities(words.every, answers)}
        for (targets, part), answers in by_part.items()
    ]
    return Table("parts", "Which part of the training does it", rows, dict.fromkeys(rows[0], PERCENT))


def _by_part(one: Tuned, base: LoadedModel, asked: Sequence[str]) -> Mapping[str, NextTokenAnswers]:
    loaded = engine.load(base.base, one.folder)
    found = {"both": one.spoken}
    with disable_adapter(loaded.model):
        found["embeddings and head"] = ask(loaded, asked)
    for ours, theirs in ((loaded.model.embeddings, base.model.embeddings), (loaded.model.head, base.model.head)):
        ours.load_state_dict(theirs.state_dict())
    return {**found, "A and B": ask(loaded, asked)}


def _choice(choice: engine.TokenProbability) -> str:
    return f"{choice.token} {choice.probability:.0%}"


def _said(setting: Setting) -> str:
    window, rate, alpha = setting
    return f"{named(window)}, learning rate {rate:g}, alpha {alpha:g}"
