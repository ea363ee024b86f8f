"""study_trajectory: probabilities of tisch, sofa, bett and boden by training step of the fact correction (§2.3)."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from msgspec.structs import replace

from pipeline.document.params import StudyTrajectory
from pipeline.document.studies.shared.next_token import NextTokenAnswers, ask, check_words, document
from pipeline.document.studies.shared.report import Figure, Findings, write_report
from pipeline.document.studies.shared.runner import DOCUMENT, Run, delete_runs, describe_window, evaluate_checkpoints
from pipeline.document.tables import Row, Spread, Table, shown
from pipeline.inference import engine
from pipeline.project.palette import OTHERS
from pipeline.project.runner import Event, Facts, Job, Progress
from pipeline.stages.registry import COLORS

SECTION = "trajectory"
PERCENT = ".1%"
PALETTE = (COLORS["full"], COLORS["lora"], COLORS["prefix"], OTHERS[0])


@dataclass(frozen=True)
class Curve:
    """One run's answers by step; `window`: its training window in tokens."""

    window: int
    seed: int
    answers: Mapping[int, NextTokenAnswers]


def run(job: Job) -> Generator[Event, None, Facts]:
    """Train with each window and seed, and ask after each step → two tables and a picture. Raises UserError."""
    settings = job.project.params.of(StudyTrajectory)
    claimed = document(job.path(settings.document), settings.document, SECTION)
    words = [(claimed["prompt"], word) for word in words_of(claimed)]
    check_words(engine.load(job.artifact("expand_vocab")), words, settings.document)
    last, curves = max(settings.steps), list[Curve]()
    wanted = list(product(settings.windows, settings.seeds))
    for window, seed in wanted:
        run = run_of(settings, window, seed, last)
        answers = yield from evaluate_checkpoints(
            job, run, lambda _: range(last + 1), partial(ask, prompts=[claimed["prompt"]])
        )
        curves.append(Curve(window, seed, answers))
        yield Progress(len(curves), len(wanted), run.name)
    tables = _table(settings, claimed, curves), _firsts(claimed["prompt"], curves)
    delete_runs(job)
    findings = Findings("From tisch to sofa, step by step", "§2.3", _text(settings, claimed, tables), tables)
    return write_report(job, findings, lambda figure: _draw(figure, claimed, curves))


def run_of(settings: StudyTrajectory, window: int, seed: int, steps: int) -> Run:
    """A run of at least `steps` steps: an epoch has one step or more. Further epochs change nothing, as the learning
    rate is constant and training is stopped after the last evaluation."""
    rate, batch = settings.learning_rate, settings.batch_size
    epochs = max(1, steps)
    lora = replace(
        DOCUMENT, data=settings.data, seed=seed, epochs=epochs, learning_rate=rate, batch_size=batch, window=window
    )
    return Run(f"{describe_window(window)}, seed {seed}", "finetune_lora", {"finetune_lora": lora})


def words_of(claimed: Mapping[str, Any]) -> list[str]:
    """The words with probabilities in the document."""
    return list(next(iter(claimed["steps"].values())))


def _table(settings: StudyTrajectory, claimed: Mapping[str, Any], curves: Sequence[Curve]) -> Table:
    rows: list[Row] = [
        {
            "step": step,
            "word": word,
            "document": claimed["steps"].get(step, {}).get(word),
            **{
                f"window_{window}": _spread(curves, window, step, claimed["prompt"], word)
                for window in settings.windows
            },
        }
        for step in settings.steps
        for word in words_of(claimed)
    ]
    formats = dict.fromkeys(rows[0], PERCENT)
    return Table("steps", f"Probabilities after *{claimed['prompt']}*, by step", rows, formats | {"step": ""})


def _spread(curves: Sequence[Curve], window: int, step: int, prompt: str, word: str) -> Spread:
    return Spread.of(curve.answers[step].probability(prompt, word) for curve in curves if curve.window == window)


def _firsts(prompt: str, curves: Sequence[Curve]) -> Table:
    """The steps at which the first choice changes, for each run."""
    rows: list[Row] = []
    for curve in curves:
        before = ""
        for step, answers in sorted(curve.answers.items()):
            if (first := answers.first(prompt)) != before:
                rows.append({"window": curve.window, "seed": curve.seed, "from_step": step, "first_choice": first})
                before = first
    return Table("firsts", "When the first choice changes", rows)


def _text(settings: StudyTrajectory, claimed: Mapping[str, Any], tables: tuple[Table, Table]) -> str:
    steps, firsts = tables
    changes = "; ".join(_describe_change(firsts, steps, window) for window in settings.windows)
    return (
        f"How the first choice after *{claimed['prompt']}* changes: {changes}. A step is {settings.batch_size} windows "
        f"at a learning rate of {settings.learning_rate:g}. The document gives neither, and the number of steps "
        "depends on both."
    )


def _describe_change(firsts: Table, steps: Table, window: int) -> str:
    """The steps at which the first choice changes, and the probabilities after the last step."""
    of_window = [row for row in firsts.rows if row["window"] == window]
    turns = sorted(int(row["from_step"]) for row in of_window if row["from_step"])  # type: ignore[arg-type]
    last = [row for row in steps.rows if row["step"] == steps.rows[-1]["step"]]
    probabilities = ", ".join(f"{row['word']} {shown(row[f'window_{window}'], PERCENT)}" for row in last)
    when = "at step " + " to ".join(map(str, sorted({turns[0], turns[-1]}))) if turns else "at no step"
    return f"{describe_window(window)}: {when}; after step {last[0]['step']} {probabilities}"


def _draw(figure: Figure, claimed: Mapping[str, Any], curves: Sequence[Curve]) -> None:
    """A panel per window with a line per word and seed; markers are the document's numbers."""
    windows = list(dict.fromkeys(curve.window for curve in curves))
    axes = figure.subplots(1, len(windows), sharey=True, squeeze=False)[0]
    for axis, window in zip(axes, windows, strict=True):
        for word, color, line, marker in zip(words_of(claimed), PALETTE, ("--", "-", ":", "-."), "os^D", strict=False):
            for number, curve in enumerate(curve for curve in curves if curve.window == window):
                values = [curve.answers[step].probability(claimed["prompt"], word) for step in sorted(curve.answers)]
                axis.plot(sorted(curve.answers), values, line, color=color, label=None if number else word)
            document_values = {step: by_word[word] for step, by_word in claimed["steps"].items()}
            axis.plot(
                list(document_values), list(document_values.values()), marker, color=color, markeredgecolor="black"
            )
        axis.set(xlabel="step", title=describe_window(window))
        axis.grid(alpha=0.3)
    axes[0].set(ylabel=f"probability after “{claimed['prompt']}”")
    axes[-1].legend(title="marker: document")
