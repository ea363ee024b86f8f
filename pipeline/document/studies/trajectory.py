"""study_trajectory: how probable tisch, sofa, bett and boden are while the fact correction trains (§2.3)."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from pipeline.document.params import StudyTrajectory
from pipeline.document.studies.shared.next_token import NextTokenAnswers, ask, document, refuse_unsayable
from pipeline.document.studies.shared.report import Figure, Findings, write_report
from pipeline.document.studies.shared.runner import DOCUMENT, Run, delete_runs, evaluate_checkpoints, named
from pipeline.document.tables import Row, Spread, Table, shown
from pipeline.inference import engine
from pipeline.project.palette import COLORS, OTHERS
from pipeline.project.runner import Event, Facts, Job, Progress
from pipeline.stages.finetune import finetune

SECTION = "trajectory"
PERCENT = ".1%"
PALETTE = (COLORS["full"], COLORS["lora"], COLORS["prefix"], OTHERS[0])


@dataclass(frozen=True)
class Curve:
    """What one run says after each step; `window` as it trained."""

    window: int
    seed: int
    said: Mapping[int, NextTokenAnswers]


def trajectory(job: Job) -> Generator[Event, None, Facts]:
    """The correction trained with each window and seed, asked after each step → tables, a picture. Raises UserError."""
    settings = job.project.params.of(StudyTrajectory)
    claimed = document(job.path(settings.document), settings.document, SECTION)
    words = [(claimed["prompt"], word) for word in words_of(claimed)]
    refuse_unsayable(engine.load(job.artifact("expand_vocab")), words, settings.document)
    last, curves = max(settings.steps), list[Curve]()
    wanted = list(product(settings.windows, settings.seeds))
    for window, seed in wanted:
        run = run_of(settings, window, seed, last)
        said = yield from evaluate_checkpoints(
            job, run, lambda _: range(last + 1), partial(ask, prompts=[claimed["prompt"]])
        )
        curves.append(Curve(window, seed, said))
        yield Progress(len(curves), len(wanted), run.name)
    tables = _table(settings, claimed, curves), _firsts(claimed["prompt"], curves)
    delete_runs(job)
    found = Findings("From tisch to sofa, step by step", "§2.3", _text(settings, claimed, tables), tables)
    return write_report(job, found, lambda figure: _draw(figure, claimed, curves))


def run_of(settings: StudyTrajectory, window: int, seed: int, steps: int) -> Run:
    """As many epochs as the steps can need: the rate is constant, so that those after them change nothing."""
    rate, batch = settings.learning_rate, settings.batch_size
    epochs = max(1, steps)
    lora = replace(
        DOCUMENT, data=settings.data, seed=seed, epochs=epochs, learning_rate=rate, batch_size=batch, window=window
    )
    return Run(f"{named(window)}, seed {seed}", "finetune_lora", finetune, {"finetune_lora": lora})


def words_of(claimed: Mapping[str, Any]) -> list[str]:
    """Those that the document has probabilities of."""
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
    forms = dict.fromkeys(rows[0], PERCENT)
    return Table("steps", f"Probabilities after *{claimed['prompt']}*, by step", rows, forms | {"step": ""})


def _spread(curves: Sequence[Curve], window: int, step: int, prompt: str, word: str) -> Spread:
    return Spread.of(curve.said[step].probability(prompt, word) for curve in curves if curve.window == window)


def _firsts(prompt: str, curves: Sequence[Curve]) -> Table:
    """The steps after which the first choice is another word."""
    rows: list[Row] = []
    for curve in curves:
        before = ""
        for step, spoken in sorted(curve.said.items()):
            if (first := spoken.first(prompt)) != before:
                rows.append({"window": curve.window, "seed": curve.seed, "from_step": step, "first_choice": first})
                before = first
    return Table("firsts", "When the first choice changes", rows)


def _text(settings: StudyTrajectory, claimed: Mapping[str, Any], tables: tuple[Table, Table]) -> str:
    steps, firsts = tables
    told = "; ".join(_turn(firsts, steps, window) for window in settings.windows)
    return (
        f"How the first choice after *{claimed['prompt']}* changes: {told}. A step is {settings.batch_size} windows at "
        f"a learning rate of {settings.learning_rate:g}; the document gives neither for its table, and how many steps "
        "the change takes follows from them."
    )


def _turn(firsts: Table, steps: Table, window: int) -> str:
    """When it changes, and how the last step ends."""
    here = [row for row in firsts.rows if row["window"] == window]
    turns = sorted(int(row["from_step"]) for row in here if row["from_step"])  # type: ignore[arg-type]
    last = [row for row in steps.rows if row["step"] == steps.rows[-1]["step"]]
    ends = ", ".join(f"{row['word']} {shown(row[f'window_{window}'], PERCENT)}" for row in last)
    when = "at step " + " to ".join(map(str, sorted({turns[0], turns[-1]}))) if turns else "at no step"
    return f"{named(window)}: {when}; after step {last[0]['step']} {ends}"


def _draw(figure: Figure, claimed: Mapping[str, Any], curves: Sequence[Curve]) -> None:
    """A panel for each window: a line for each word and seed; markers are the document's numbers."""
    windows = list(dict.fromkeys(curve.window for curve in curves))
    axes = figure.subplots(1, len(windows), sharey=True, squeeze=False)[0]
    for axis, window in zip(axes, windows, strict=True):
        for word, color, line, marker in zip(words_of(claimed), PALETTE, ("--", "-", ":", "-."), "os^D", strict=False):
            for number, curve in enumerate(curve for curve in curves if curve.window == window):
                values = [curve.said[step].probability(claimed["prompt"], word) for step in sorted(curve.said)]
                axis.plot(sorted(curve.said), values, line, color=color, label=None if number else word)
            told = {step: said[word] for step, said in claimed["steps"].items()}
            axis.plot(list(told), list(told.values()), marker, color=color, markeredgecolor="black")
        axis.set(xlabel="step", title=named(window))
        axis.grid(alpha=0.3)
    axes[0].set(ylabel=f"probability after “{claimed['prompt']}”")
    axes[-1].legend(title="marker: document")
