"""What an evaluation measured: its files, as plain values."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UserError
from pipeline.evaluation.comparison import (
    LEGEND,
    MISSING,
    beside,
    by_variant,
    comparison,
    stages_by_variant,
    task_scores,
)
from pipeline.files.artifact import read_json
from pipeline.inference.catalog import BASES, VERDICT
from pipeline.project.gate import Verdict, read_verdict
from pipeline.project.stage_graph import Project, Stage
from pipeline.views.stages import apart

METRICS = "metrics.json"
SCRATCH = "scratch"  # a variant that never was the base, so it cannot have forgotten least
# keys of a variant's numbers that are whole numbers, if they are there
COUNTS = (
    "parameters",
    "bytes",
    "trainable",
    "old_prompts_kept",
    "old_prompts",
    "prompts_corrected",
    "prompts_to_correct",
)
# headings of the comparison, in a sentence
IN_WORDS = {
    "learned": {
        "new\ncompleted": "{} new sentences completed",
        "new\nloss": "loss {} on new sentences",
        "prefers\nchosen": "chosen answers preferred {}",
    },
    "kept": {
        "answers\nkept": "{} of old answers",
        "old\nloss": "loss {} on old sentences",
        "old loss\nchange": "{} from the base",
        "KL from\nbase": "KL {}",
    },
}
Numbers = Mapping[str, Any]  # a variant's part of metrics.json


@dataclass(frozen=True)
class Measure:
    """A quantity that models are compared by. `falls`: less is better. `share`: from 0 to 1, shown
    in percent.
    """

    name: str
    value: Callable[[Numbers], Any]
    falls: bool = False
    share: bool = False
    interval: Callable[[Numbers], Any] = lambda _: None

    def of(self, numbers: Numbers) -> float | None:
        """Of one model; None if it was not measured, or is not finite."""
        try:
            value = float(self.value(numbers))
        except (KeyError, TypeError, ValueError, ArithmeticError):
            return None
        return value if isfinite(value) else None

    def format(self, value: float) -> str:
        return f"{value:.0%}" if self.share else f"{value:.4g}".replace("-", "−")

    def better(self, value: float) -> float:
        """A number that is larger the better the value is."""
        return -value if self.falls else value


LEARNED = (  # the first in which models differ is the scatter's x
    Measure(
        "answers as expected", lambda n: n["answers"]["as_expected"] / n["answers"]["n"], share=True
    ),
    Measure("similarity of long answers", lambda n: n["answers"]["similar"]["rouge_l"], share=True),
    Measure(
        "new sentences completed", lambda n: n["new_completed"] / n["new_sentences"], share=True
    ),
    Measure(
        "chosen answers preferred", lambda n: n["preferences"]["after"]["accuracy"], share=True
    ),
    Measure("loss on new sentences", lambda n: n["new_loss"], falls=True),
)
KEPT = (  # and the first of these its y
    Measure("old answers kept", lambda n: n["forgetting"]["answers_kept"], share=True),
    Measure("rise of the old loss", lambda n: n["forgetting"]["loss_rise"], falls=True),
    Measure("KL from the base", lambda n: n["forgetting"]["divergence"], falls=True),
)


def _task_measure(task: str) -> Measure:
    def interval(numbers: Numbers) -> tuple[float, float]:
        scores = numbers["tasks"][task]
        return float(scores["low"]), float(scores["high"])

    return Measure(task, lambda n: n["tasks"][task]["score"], share=True, interval=interval)


@dataclass(frozen=True)
class Method:
    """A model that was evaluated. `cells`: heading of `comparison` → its text. `verdict`: None
    without limits.
    """

    name: str
    stage: Stage
    path: Path
    # an adapter's base; for others the expanded base, which is prompted beside them
    base: Path | None
    numbers: Numbers
    cells: Mapping[str, str]
    verdict: Verdict | None
    apart: tuple[str, ...] = ()  # how its settings differ from the params file's

    @property
    def broken(self) -> list[str]:
        """The limits that it breaks, each with what was measured."""
        return self.verdict.reasons if self.verdict else []

    @property
    def size(self) -> str:
        """The weights to store: `17 kB`."""
        heading = next(name for name in self.cells if name.startswith("size"))
        return f"{self.cells[heading]} {heading.partition('(')[2].rstrip(')')}"

    @property
    def run(self) -> str:
        """The run of its training; "" if it was not trained."""
        return self.stage.name if self.stage.trains else ""

    @property
    def trained(self) -> bool:
        """Whether it was trained from the base: not the base itself, nor an adapter merged into
        it.
        """
        return self.stage.method not in (*BASES, "merge")


@dataclass(frozen=True)
class Evaluation:
    """metrics.json: its methods in the DAG's order, and the measures that compare them."""

    methods: Sequence[Method]
    learned: Sequence[Measure]
    kept: Sequence[Measure]
    tasks: Sequence[Measure]
    limits: Verdict | None

    @property
    def forgot_least(self) -> Method | None:
        """The trained model that kept most; of two that kept as much the one whose old loss rose
        less.
        """
        trained = [m for m in self.methods if m.trained and m.name != SCRATCH]

        def kept(method: Method) -> list[float]:
            values = [(measure, measure.of(method.numbers)) for measure in self.kept]
            return [-inf if value is None else measure.better(value) for measure, value in values]

        measured = (m for m in trained if any(map(isfinite, kept(m))))
        return max(measured, key=kept, default=None)

    @property
    def verdict(self) -> str:
        """The gate's badge: the models that keep the limits, or how many limits are broken.

        Empty without limits.
        """
        if self.limits is None:
            return ""
        if self.limits.broken:
            return f"✗ {self.limits.counted} broken"
        return f"✓ limits kept by {', '.join(self.limits.models)}"


def in_words(method: Method) -> Iterator[str]:
    """What a model costs, what it learned and kept, in a line each."""
    numbers = method.numbers
    parameters = f"{numbers.get('parameters', 0):,} parameters"
    beside = ""
    if "trainable" in numbers:
        share = method.cells.get("share\nof all", "")
        parameters = f"trained {numbers['trainable']:,} of {parameters}, {share}"
        beside = " beside one copy of its base" * (method.stage.kind == "adapter")
    yield f"{parameters}; {method.size} to store{beside}"
    for label, forms in IN_WORDS.items():
        known = [(forms[name], method.cells.get(name, MISSING)) for name in forms]
        facts = [form.format(text) for form, text in known if text != MISSING]
        if facts:
            yield f"{label:<8}{', '.join(facts)}"
    names = ("old_prompts_kept", "old_prompts", "prompts_corrected", "prompts_to_correct")
    kept, old, right, wrong = (numbers.get(name, 0) for name in names)
    if old or wrong:
        yield f"prompts {kept} of {old} keep their answer, {right} of {wrong} have the corrected one"


def numbers_page(method: Method) -> str:
    """All numbers of a model and what they mean, as Markdown."""
    rows = []
    for heading, text in method.cells.items():
        rows.append(f"| {heading.replace(chr(10), ' ')} | {text} |")
    notes = [f"- {text}" for heading, text in LEGEND if not heading or heading in method.cells]
    head = [f"# {method.stage.title}\n", f"`{method.path}`", "", "| | |", "|---|---:|"]
    return "\n".join([*head, *rows, "", *notes])


class Metrics(NamedTuple):
    """The last evaluation's metrics.json, {} without one.

    `others`: trained models that it lacks, with what else is known of them.
    """

    path: Path
    metrics: dict[str, Any]
    others: dict[Stage, dict[str, Any]]


def read_metrics(project: Project) -> Metrics:
    """Raises UserError for a file that is not JSON."""
    path = project.artifact("evaluate") / METRICS
    metrics = read_json(path, "Run `lora evaluate` again") if path.exists() else {}
    return Metrics(path, metrics, beside(project, metrics))


def read_evaluation(project: Project) -> Evaluation | None:
    """The project's last evaluation, with what is known of adapters that the params file lacks.

    None if there is nothing.

    Raises UserError for a file that holds something else.
    """
    path, metrics, known = read_metrics(project)
    unlisted = project.unlisted().values()
    others = {stage: known[stage] for stage in known if stage in unlisted}
    others |= {stage: metrics[stage.variant] for stage in unlisted if stage.variant in metrics}
    if not metrics and not others:
        return None
    try:
        every_variant = {
            **by_variant(metrics),
            **{stage.variant: numbers for stage, numbers in others.items()},
        }
        stages = {**stages_by_variant(project), **{stage.variant: stage for stage in others}}
        marks = apart(project)
        columns, rows = comparison(every_variant)
        limits = read_verdict(metrics)
        if limits is None and "gate" in metrics:
            raise ValueError("a gate of another shape")
        texts = {name: dict(zip(columns[1:], cells, strict=True)) for name, *cells in rows}
        verdicts = {name: read_verdict(metrics, name) for name in metrics}
        verdicts |= {stage.variant: numbers.get(VERDICT) for stage, numbers in others.items()}
        methods = [
            _method(
                project,
                stage,
                every_variant[name],
                texts[name],
                verdicts[name],
                marks.get(stage.name, ()),
            )
            for name, stage in stages.items()
            if name in texts
        ]
        tasks = dict.fromkeys(
            task for method in methods for task in method.numbers.get("tasks", {})
        )
        every = [method.numbers for method in methods]
        evaluation = Evaluation(
            methods,
            _distinct(LEARNED, every),
            _distinct(KEPT, every),
            [_task_measure(name) for name in tasks],
            limits,
        )
        # what has another shape is met here, and not while a screen is drawn
        task_scores(by_variant(metrics))
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError):
        raise UserError(f"{path} holds other metrics. Run `lora evaluate` again.") from None
    return evaluation


def _method(
    project: Project,
    stage: Stage,
    numbers: Numbers,
    cells: Mapping[str, str],
    verdict: Verdict | None,
    marks: tuple[str, ...],
) -> Method:
    if not all(isinstance(numbers.get(key, 0), int) for key in COUNTS):
        raise TypeError(f"{stage.variant} has counts that are no whole numbers")
    path = project.artifact(stage.name)
    base_stage, _ = project.variants.get(stage.variant, ("expand_vocab", None))
    base: Path | None = project.artifact(base_stage)
    if base == path:
        before = project.artifact("expand_vocab")
        base = before if stage.method not in BASES and before.is_dir() else None
    return Method(stage.variant, stage, path, base, numbers, cells, verdict, marks)


def _distinct(measures: Sequence[Measure], every: Sequence[Numbers]) -> list[Measure]:
    """The measures that some model has, first those in which models differ."""
    values = {m.name: {v for v in map(m.of, every) if v is not None} for m in measures}
    return sorted((m for m in measures if values[m.name]), key=lambda m: len(values[m.name]) < 2)
