"""How many held-out answers are right after training in one setting, against the best of many, and
what was kept.

`python -m bench.recipe_runs` trains, for hours; this reads what it measured.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from bench.measure import Row
from bench.recipe_settings import CHOSEN, Setting, of_rows

RUNS = Path(__file__).with_name("recipe.csv")
WIDTH = 160  # of the table, on any terminal
# of the best setting's right answers; of the base's first choices on other text
LEAST_RIGHT, LEAST_KEPT = 0.75, 0.85


@dataclass(frozen=True)
class Measured:
    """A model after an epoch of a run; `rows` are trained on."""

    task: str
    rows: int
    setting: Setting  # as it trained
    seed: int
    epoch: int
    right: float  # share of the held-out answers; mean similarity where answers are only similar
    kept: float
    seconds: float  # of processor time since the run began, without measuring
    losses: tuple[float, float]  # on each half of the held-out rows
    scores: tuple[float, ...]  # of each held-out row

    @property
    def is_last(self) -> bool:
        return self.epoch == self.setting.epochs

    @property
    def halves(self) -> tuple[float, float]:
        """`right` of each half of the held-out rows."""
        middle = len(self.scores) // 2
        return mean(self.scores[:middle]), mean(self.scores[middle:])


def read_runs(path: Path) -> list[Measured]:
    """What was measured, also of the untrained base (epoch 0); once of what was measured again
    after a stop.
    """
    with path.open(newline="") as file:
        read = [_measured(row) for row in csv.DictReader(file)]
    return list({(each.task, each.setting, each.seed, each.epoch): each for each in read}.values())


def _measured(row: Mapping[str, str]) -> Measured:
    kinds = Setting.__annotations__
    setting = Setting(**{name: kinds[name](row[name]) for name in Setting._fields})
    losses = float(row["loss_first"] or "inf"), float(row["loss_second"] or "inf")
    scores = tuple(float(score) / 100 for score in row["scores"].split()) or (0.0, 0.0)
    seconds = float(row["train_seconds"] or 0)
    numbers = float(row["right"]), float(row["kept"]), seconds
    return Measured(
        row["task"],
        int(row["rows"]),
        setting,
        int(row["seed"]),
        int(row["epoch"]),
        *numbers,
        losses,
        scores,
    )


@dataclass(frozen=True)
class Outcome:
    """A setting on a task, the mean of its seeds. `share`: of the right answers of the task's best
    setting.
    """

    right: float
    share: float
    kept: float
    seconds: float
    seeds: int

    @property
    def good(self) -> bool:
        return self.share >= LEAST_RIGHT and self.kept >= LEAST_KEPT


Outcomes = dict[Setting, dict[str, Outcome]]  # by setting and task


def outcomes(measured: Sequence[Measured]) -> Outcomes:
    """Of every setting with which a task was trained to the end."""
    runs: dict[str, dict[Setting, list[Measured]]] = {}
    for each in measured:
        if each.is_last and each.epoch:
            runs.setdefault(each.task, {}).setdefault(of_rows(each.setting, each.rows), []).append(
                each
            )

    found: Outcomes = {}
    for task, by_setting in runs.items():
        best = max(mean(each.right for each in own) for own in by_setting.values())
        for setting, own in by_setting.items():
            right = mean(each.right for each in own)
            kept, seconds = mean(each.kept for each in own), mean(each.seconds for each in own)
            share = right / best if best else 0.0
            found.setdefault(setting, {})[task] = Outcome(right, share, kept, seconds, len(own))
    return found


def good_settings(found: Outcomes) -> list[Setting]:
    """Those that are good on every task; a setting that was not tried on all of them is left
    out.
    """
    tasks = {task for by_task in found.values() for task in by_task}
    tried = [setting for setting, by_task in found.items() if by_task.keys() == tasks]
    return [
        setting for setting in tried if all(outcome.good for outcome in found[setting].values())
    ]


def stopping(measured: Sequence[Measured]) -> dict[str, float]:
    """Rule of stopping → share of right answers, the mean of all runs of which several epochs were
    measured.

    An epoch is chosen on the first half of the held-out rows and counted on the second half, so
    that luck in choosing does not count.
    """
    runs: dict[tuple[str, Setting, int], list[Measured]] = {}
    for each in measured:
        runs.setdefault((each.task, each.setting, each.seed), []).append(each)
    several = [sorted(run, key=lambda each: each.epoch) for run in runs.values() if len(run) > 1]
    if not several:
        return {}

    chosen = {
        "the last epoch": [run[-1] for run in several],
        "the lowest loss": [min(run, key=lambda each: each.losses[0]) for run in several],
        # of epochs with as many right answers the later one
        "the most right answers": [
            max(run, key=lambda each: (each.halves[0], each.epoch)) for run in several
        ],
        "the best epoch, known afterwards": [
            max(run, key=lambda each: each.halves[1]) for run in several
        ],
    }
    return {rule: mean(each.halves[1] for each in run) for rule, run in chosen.items()}


def recipe() -> Iterator[Row]:
    """The setting that `lora train` chooses, task by task; prints what all settings came to."""
    measured = read_runs(RUNS)
    found = outcomes(measured)
    _print_tables(measured, found)
    for task, outcome in found[CHOSEN].items():
        right, kept = f"{task}: {outcome.right:.0%} right", f"{task}: other first choices kept"
        best = f"the best setting, {outcome.right / outcome.share if outcome.share else 0:.0%}"
        is_met = outcome.share >= LEAST_RIGHT
        yield Row(
            right, outcome.seconds, best, outcome.share, f"at least {LEAST_RIGHT:g} ×", is_met
        )
        yield Row(
            kept,
            0,
            "the base",
            outcome.kept,
            f"at least {LEAST_KEPT:g} ×",
            outcome.kept >= LEAST_KEPT,
        )


def _print_tables(measured: Sequence[Measured], found: Outcomes) -> None:
    console, good = Console(width=WIDTH), good_settings(found)
    console.print(
        "right, share of the best setting's right, other first choices kept; ×: not good; Σ: "
        "seconds"
    )
    untrained = {each.task: each for each in measured if not each.epoch}
    table = Table("", *untrained, "Σ", "", box=None)
    table.add_row("untrained", *(f"{each.right:.0%}" for each in untrained.values()))
    for setting in sorted(found):
        own = found[setting]
        cells = [_cell(own[task]) if task in own else "" for task in untrained]
        seconds = sum(outcome.seconds for outcome in own.values())
        table.add_row(
            describe(setting), *cells, f"{seconds:,.0f}", "good on all" if setting in good else ""
        )
    console.print(table)

    rules = Table("stopping at", "right", box=None)
    for rule, right in stopping(measured).items():
        rules.add_row(rule, f"{right:.1%}")
    console.print(rules)


def _cell(outcome: Outcome) -> str:
    return (
        f"{outcome.right:.0%} {outcome.share:.2f} {outcome.kept:.0%}{'' if outcome.good else ' ×'}"
    )


def describe(setting: Setting) -> str:
    """In a few characters, such as `0.001 r16 5 ep retain 1×4`, with 4 retention texts a step of
    weight 1.
    """
    retained = f" retain {setting.retention_weight:g}×{setting.retention_batch_size}" * bool(
        setting.retention_weight
    )
    alpha = f" α{setting.alpha}" * (setting.alpha != 2 * setting.rank)
    schedule = f" {setting.schedule}" * (setting.schedule != "linear")
    return (
        f"{setting.learning_rate:g} r{setting.rank}{alpha}{schedule} {setting.epochs} ep{retained}"
    )
