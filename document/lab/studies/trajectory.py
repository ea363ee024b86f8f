"""study_trajectory: probabilities of tisch, sofa, bett and boden by training step of the fact
correction (§2.3).
"""

from collections.abc import Generator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Annotated, Any, NamedTuple

from msgspec.structs import replace

from lab.measures import NextTokenAnswers, ask, check_words, document
from lab.report import COLORS, Figure, Findings
from lab.runner import DOCUMENT, Run, by, checkpoints, describe_window
from lab.studies import study_stage
from lab.tables import Row, Spread, Table, shown
from pipeline.project.params.schema import Count, Rate, Section, Seed, Steps
from pipeline.project.runner import Event, Job, Progress
from pipeline.views.looks import OTHERS

PLACE = "§2.3"
SECTION = "trajectory"
PERCENT = ".1%"
STYLES = (  # of the words, in order: color, line, marker
    (COLORS["full"], "--", "o"),
    (COLORS["lora"], "-", "s"),
    (COLORS["prefix"], ":", "^"),
    (OTHERS[0], "-.", "D"),
)


class StudyTrajectory(Section, frozen=True, kw_only=True):
    """§2.3: probabilities of some words after each step of the fact correction."""

    data: Annotated[str, "the sentences that it trains or measures on"] = (
        "data/fact_correction.de.txt"
    )
    document: Annotated[str, "the document's numbers and answers"] = "data/document.yaml"
    seeds: Annotated[tuple[Seed, ...], "each is a run of its own"] = (0, 1, 2)
    steps: Annotated[tuple[Steps, ...], "steps after which the words are asked"] = (0, 10, 30, 50)
    learning_rate: Annotated[Rate, "learning rate"] = 2e-3
    batch_size: Annotated[Count, "examples a batch"] = 4
    windows: Annotated[tuple[Steps, ...], "tokens per training window; 0: whole sentences"] = (4, 0)


STAGE = study_stage(
    __name__,
    PLACE,
    title="From tisch to sofa, step by step",
    about="from tisch to sofa, step by step",
    settings=StudyTrajectory,
    data=("data", "document"),
)


class Curve(NamedTuple):
    """One run's answers by step; `window`: its training window in tokens."""

    window: int
    seed: int
    answers: Mapping[int, NextTokenAnswers]


def measure(job: Job, settings: StudyTrajectory) -> Generator[Event, None, Findings]:
    """Train with each window and seed, and ask after each step → two tables."""
    claimed = read_document(job, settings)
    prompt, words = claimed["prompt"], words_of(claimed)
    last, curves = max(settings.steps), list[Curve]()
    wanted = list(product(settings.windows, settings.seeds))
    for window, seed in wanted:
        answers = yield from answers_by_step(job, settings, prompt, window, seed, last)
        curves.append(Curve(window, seed, answers))
        yield Progress(len(curves), len(wanted), _run_name(window, seed))

    steps: list[Row] = [
        {
            "step": step,
            "word": word,
            "document": claimed["steps"].get(step, {}).get(word),
            **{
                f"window_{window}": Spread.of(
                    one.answers[step].probability(prompt, word) for one in of_window
                )
                for window, of_window in by(lambda curve: curve.window, curves).items()
            },
        }
        for step, word in product(settings.steps, words)
    ]
    firsts: list[Row] = []
    for curve in curves:
        before = ""
        for step, asked in sorted(curve.answers.items()):
            if (first := asked.first(prompt)) != before:
                firsts.append(
                    {
                        "window": curve.window,
                        "seed": curve.seed,
                        "from_step": step,
                        "first_choice": first,
                    }
                )
                before = first
    tables = (
        Table(
            "steps",
            f"Probabilities after *{prompt}*, by step",
            steps,
            dict.fromkeys(steps[0], PERCENT) | {"step": ""},
        ),
        Table("firsts", "When the first choice changes", firsts),
    )
    return Findings(
        _text(settings, prompt, steps, firsts),
        tables,
        lambda figure: _draw(figure, claimed, curves),
    )


def read_document(job: Job, settings: StudyTrajectory) -> Any:
    """The document's table: `prompt`, and `steps` as step → word → probability. Raises UserError
    for unknown words.
    """
    from pipeline.inference import engine

    claimed = document(job, settings.document, SECTION)
    words = [(claimed["prompt"], word) for word in words_of(claimed)]
    check_words(engine.load(job.artifact("expand_vocab")), words, settings.document)
    return claimed


def words_of(claimed: Mapping[str, Any]) -> list[str]:
    """The words with probabilities in the document."""
    return list(next(iter(claimed["steps"].values())))


def answers_by_step(
    job: Job, settings: StudyTrajectory, prompt: str, window: int, seed: int, last: int
) -> Generator[Event, None, dict[int, NextTokenAnswers]]:
    """Train to step `last` with this window, and ask after every step. Raises UserError.

    An epoch has one step or more, so `last` epochs are enough. More would change nothing, as the
    learning rate is constant and training stops after the last measurement.
    """
    lora = replace(DOCUMENT, data=settings.data, seed=seed, epochs=max(1, last), window=window)
    lora = replace(lora, learning_rate=settings.learning_rate, batch_size=settings.batch_size)
    run = Run(_run_name(window, seed), "finetune_lora", {"finetune_lora": lora})
    return (
        yield from checkpoints(job, run, lambda _: range(last + 1), partial(ask, prompts=[prompt]))
    )


def _run_name(window: int, seed: int) -> str:
    return f"{describe_window(window)}, seed {seed}"


def _text(
    settings: StudyTrajectory, prompt: str, steps: Sequence[Row], firsts: Sequence[Row]
) -> str:
    changes = []
    for window in settings.windows:
        turns = [row["from_step"] for row in firsts if row["window"] == window and row["from_step"]]
        last = [row for row in steps if row["step"] == steps[-1]["step"]]
        words = ", ".join(
            f"{row['word']} {shown(row[f'window_{window}'], PERCENT)}" for row in last
        )
        when = (
            f"at step {' to '.join(map(str, sorted({min(turns), max(turns)})))}"
            if turns
            else "at no step"
        )
        changes.append(f"{describe_window(window)}: {when}; after step {last[0]['step']} {words}")
    return (
        f"How the first choice after *{prompt}* changes: {'; '.join(changes)}. A step is "
        f"{settings.batch_size} windows at a learning rate of {settings.learning_rate:g}. The "
        "document gives neither, and the number of steps depends on both."
    )


def _draw(figure: Figure, claimed: Mapping[str, Any], curves: Sequence[Curve]) -> None:
    """A panel per window with a line per word and seed; markers are the document's numbers."""
    windows = list(dict.fromkeys(curve.window for curve in curves))
    axes = figure.subplots(1, len(windows), sharey=True, squeeze=False)[0]
    for axis, window in zip(axes, windows, strict=True):
        of_window = [curve.answers for curve in curves if curve.window == window]
        for word, (color, line, marker) in zip(words_of(claimed), STYLES, strict=False):
            for number, answers in enumerate(of_window):
                values = [
                    answers[step].probability(claimed["prompt"], word) for step in sorted(answers)
                ]
                axis.plot(
                    sorted(answers), values, line, color=color, label=None if number else word
                )
            by_step = {step: by_word[word] for step, by_word in claimed["steps"].items()}
            axis.plot(
                list(by_step), list(by_step.values()), marker, color=color, markeredgecolor="black"
            )
        axis.set(xlabel="step", title=describe_window(window))
        axis.grid(alpha=0.3)
    axes[0].set(ylabel=f"probability after “{claimed['prompt']}”")
    axes[-1].legend(title="marker: document")
