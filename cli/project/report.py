"""`lora report`, and what other commands print of an evaluation: metrics, limits and answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.options import DEFAULT_PARAMS, ParamsOption, group, project_of

if TYPE_CHECKING:
    from pipeline.project.stage_graph import Project, Stage

app = group()
# samples.json: model → its answers, to the same questions
Samples = Mapping[str, Sequence[Mapping[str, Any]]]
UNKNOWN_WORDS = "not asked: it does not know all of these words"
MOST_CHARACTERS = 300  # of a text; report.md has all of it
MOST = 3  # commands that are named one by one; of more, `dvc repro` takes the place


@app.command()
def report(params: ParamsOption = DEFAULT_PARAMS) -> None:
    """Show the last comparison, and where the report is."""
    from cli.console import print_line
    from pipeline.errors import UserError
    from pipeline.views.evaluations import read_metrics
    from pipeline.views.reports import read_pages
    from pipeline.views.stages import outdated

    project = project_of(params)
    path, metrics, others = read_metrics(project)
    if not metrics and not others:
        raise UserError(f"{path}: nothing is evaluated yet. Run {project.command('evaluate')}.")
    print_metrics(metrics, path, {stage.variant: numbers for stage, numbers in others.items()})
    for stage, numbers in others.items():
        _note_on(project, stage, numbers)
    if metrics:
        written = path.with_name("report.md")
        yours = f"These came with the project; {project.command('evaluate')} makes yours."
        print_line(f"report: {written}" if written.exists() else yours)
    pages = [
        page
        for page in read_pages(project)
        if page.key != "evaluate"
        and page.key in project.stages
        and not project.stages[page.key].group
    ]
    for page in pages:
        print_line(f"{page.title}: {page.path}")
    for name in ("evaluate", *(page.key for page in pages)):
        old = outdated(project, [name])
        if name in old:
            warn_outdated(project, f"{project.artifact_name(name)} is", old[name], old)


def _print_answers(folder: Path, names: Sequence[str], counts: Sequence[str]) -> None:
    """The `counts`, and the sample answers of the models `names`; nothing without counts."""
    from cli.console import print_line
    from pipeline.errors import UserError
    from pipeline.files.artifact import read_json

    if not counts:
        return
    for line in counts:
        print_line(line)
    if not (folder / "samples.json").exists():  # a measured adapter's answers are counted alone
        return
    try:
        print_answers(read_json(folder / "samples.json", "Run `lora evaluate`"), names)
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{folder / 'samples.json'} holds no answers. Run `lora evaluate` again."
        ) from None
    print_line("")


def _note_on(project: "Project", stage: "Stage", numbers: Mapping[str, Any]) -> None:
    """A note on a model that the last evaluation lacks: how to evaluate it, or what it breaks."""
    from cli.console import print_note
    from pipeline.inference.catalog import VERDICT

    is_readable = stage.name in project.readable
    command = (
        "lora evaluate"
        if is_readable
        else f"lora evaluate --adapter {project.artifact_name(stage.name)}"
    )
    if VERDICT not in numbers:
        print_note(f"{stage.variant} is not evaluated yet. Run `{command}`.")
    elif numbers[VERDICT] and numbers[VERDICT].broken:
        print_note(numbers[VERDICT].warning(stage.variant))


def print_metrics(
    metrics: Mapping[str, Any], path: Path, others: Mapping[str, Any] | None = None
) -> None:
    """The comparison, the tasks and the verdict of an evaluation, read from `path`.

    `others`: what is known of models that it lacks. Raises UserError.
    """
    from cli.console import print_line, print_table
    from pipeline.errors import UserError
    from pipeline.evaluation.comparison import (
        TASKS,
        by_variant,
        certified,
        comparison,
        legend,
        task_scores,
    )

    try:
        models = {**by_variant(metrics), **(others or {})}
        columns, rows = comparison(models)
        task_columns, task_rows = task_scores(models)
        counts = [
            f"{name}: {line}"
            for name in models
            for line in count_lines(models, name, "the data's prompts")
        ]
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        raise UserError(f"{path} holds other metrics. Run `lora evaluate` again.") from None
    print_table(columns, rows, right=columns[1:])
    print_line("\n".join(["", legend(columns), *certified(models), ""]))
    if task_rows:
        print_table(task_columns, task_rows, right=task_columns[2:])
        print_line(f"\n{TASKS}\n")
    _print_answers(path.parent, [*models], counts)
    print_gate(metrics)


def print_gate(metrics: Mapping[str, Any]) -> None:
    """Whether the models keep evaluate.limits, and a table of what was broken."""
    from cli.console import print_line, print_table
    from pipeline.project.gate import read_verdict

    verdict = read_verdict(metrics)
    if verdict is None:
        return
    if not verdict.broken:
        print_line(f"limits: kept by {', '.join(verdict.models)}\n")
        return
    columns, rows = verdict.table()
    print_line("limits broken:")
    print_table(columns, rows, right=("measured",))
    print_line("")


def refuse_broken(project: "Project", shown: bool = False) -> None:
    """Raises UserError if the last evaluation broke evaluate.limits.

    `shown`: the table of what was broken was printed already.
    """
    from pipeline.files.artifact import read_json

    metrics = read_json(project.artifact("evaluate") / "metrics.json", "Run `lora evaluate`")
    if not shown:
        print_gate(metrics)
    refuse_verdict(metrics)


def refuse_verdict(metrics: Mapping[str, Any]) -> None:
    """Raises UserError, with the next step, if these metrics break evaluate.limits."""
    from pipeline.errors import UserError
    from pipeline.project.gate import read_verdict

    verdict = read_verdict(metrics)
    if verdict and verdict.broken:
        raise UserError(verdict.error)


def warn_outdated(
    project: "Project", subject: str, reasons: Sequence[str], stages: Mapping[str, object]
) -> None:
    """One line on stderr: what is out of date, why, and the commands that make it again."""
    from cli.console import print_note

    commands = [f"`{project.graph.stages[name].command}`" for name in stages]
    again = "`dvc repro`" if len(commands) > MOST and project.has_dvc else ", then ".join(commands)
    print_note(f"{subject} out of date: {', '.join(reasons)}. Run {again}.")


def count_lines(metrics: Mapping[str, Any], name: str, where: str) -> list[str]:
    """How many of a model's answers are as expected, and of the base's; where the rest differ."""
    from pipeline.data.answers.match import describe

    counts, before = (metrics.get(model, {}).get("answers", {}) for model in (name, "base"))
    if not (found := describe(counts)):
        return []
    base = f"; the base: {describe(before)}" if name != "base" and describe(before) else ""
    lines = [f"answers to {where}: {found}{base}"]
    if fields := counts.get("differs"):
        numbers = ", ".join(f"{field or 'no JSON'} {number}" for field, number in fields.items())
        lines.append(f"differ in: {numbers}")
    return lines


def print_answers(samples: Samples, names: Sequence[str], most: int | None = None) -> None:
    """Each question with the expected answer and those of the models `names`.

    `most`: questions at most, with wrong answers of the last model first; None: all.
    """
    from cli.console import print_line
    from pipeline.evaluation.samples import match_of

    models = [name for name in names if samples.get(name)]
    if not models:
        return
    last = samples[models[-1]]
    numbers = sorted(range(len(last)), key=lambda number: match_of(last[number]).as_expected)
    width = max(len(name) for name in (*models, "expected"))
    for number in sorted(numbers[:most]):
        print_line(f"\n> {_shorten(last[number]['question'])}")
        print_line(f"  {'expected':{width}}  {_shorten(last[number]['reference'])}")
        for name in models:
            # by the prompt: a model is asked only questions all of whose words it knows
            same = [row for row in samples[name] if row["prompt"] == last[number]["prompt"]]
            sign, answer = " ", UNKNOWN_WORDS
            if same:
                sign, answer = match_of(same[0]).sign, same[0]["answer"]
            print_line(f"{sign} {name:{width}}  {_shorten(answer)}")


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MOST_CHARACTERS else f"{line[:MOST_CHARACTERS]}…"
