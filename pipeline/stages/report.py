"""report.md and its picture, from the numbers that evaluate measured."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.answers.match import Match, describe
from pipeline.evaluation.comparison import (
    TASKS,
    by_variant,
    comparison,
    stages_by_variant,
    task_scores,
)
from pipeline.evaluation.samples import match_of
from pipeline.project.gate import Verdict, read_verdict
from pipeline.project.logs.run_log import Step, epoch_means, flat_from
from pipeline.project.params.sections import Evaluate
from pipeline.project.stage_graph import Project, Stage

SCRATCH = (
    "*Training from scratch* starts from random weights and learns old and new sentences together. "
    "It never was the base, so it has forgotten nothing: its change, KL and kept answers say how "
    "far from it such a model is.\n"
)


def draw_comparison(
    path: Path, project: Project, curves: Mapping[str, Sequence[Step]], metrics: Mapping[str, Any]
) -> None:
    """The loss curves and trainable parameters of all methods, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    compare(figure, stages_by_variant(project), curves, metrics)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


def compare(
    figure: Any,
    stages: Mapping[str, Stage],
    curves: Mapping[str, Sequence[Step]],
    metrics: Mapping[str, Any],
) -> None:
    """Left the loss curves, marked where each is flat; right the trainable parameters."""
    left, right = figure.subplots(1, 2)
    looks = {variant: stages[variant].look for variant in curves}
    for variant, steps in curves.items():
        look, title = looks[variant], stages[variant].title
        assert look is not None
        means, flat = epoch_means(steps), flat_from(steps)
        epochs = sorted({step.epoch for step in steps})
        label = f"{title}, flat from {flat}" if flat else title
        left.plot(epochs, means, label=label, linestyle=look.dash, color=look.color, linewidth=1.8)
        if flat:
            x, y = epochs[flat - 1], means[flat - 1]
            left.plot(x, y, "|", color=look.color, markersize=14, markeredgewidth=2)
    left.set(
        xlabel="epoch", ylabel="training loss (nats per token)", title="Training loss", yscale="log"
    )
    left.yaxis.set_major_formatter("{x:g}")  # no powers: their digits are too small in print
    left.grid(alpha=0.3)
    if curves:  # none where a base is evaluated alone
        left.legend(labelspacing=0.25)
    counts = [metrics[variant]["trainable"] for variant in curves]
    titles = [stages[variant].title.replace(" ", "\n") for variant in curves]
    colors = [look.color for look in looks.values() if look]
    hatches = [look.hatch for look in looks.values() if look]
    bars = right.bar(titles, counts, color=colors, hatch=hatches, edgecolor="white", linewidth=0)
    labels = [
        f"{metrics[v]['trainable']:,}\n{metrics[v]['trainable_percent']:.1f}%" for v in curves
    ]
    right.bar_label(bars, labels, padding=2)
    right.yaxis.set_major_formatter("{x:,.0f}")
    right.set(
        ylabel="parameters", title="Trainable parameters", ylim=(0, 1.18 * max(counts, default=1))
    )


def write_report(
    path: Path,
    project: Project,
    metrics: Mapping[str, Any],
    predictions: Mapping[str, Any],
    samples: Mapping[str, Any],
) -> None:
    """The comparison as a page to read."""
    titles = {variant: stage.title for variant, stage in stages_by_variant(project).items()}
    verdict, metrics = read_verdict(metrics), by_variant(metrics)
    columns, rows = comparison(metrics)
    headings = [column.replace("\n", " ") for column in columns]
    parts = ["# What was learned, what was forgotten\n"]
    if verdict:
        parts.append(_gate_part(verdict, titles))
    parts += [
        _table(headings, _titled(rows, titles, 0)),
        _findings(metrics, columns, project.params.evaluate, titles),
        "![Loss curves and trainable parameters](finetuning_comparison.png)\n",
    ]
    task_columns, task_rows = task_scores(metrics)
    if task_rows:
        parts.append(
            f"## Tasks\n\n{TASKS}\n\n" + _table(task_columns, _titled(task_rows, titles, 1))
        )
    for group, rule in _groups(predictions):
        parts.append(_prompt_table(predictions, group, rule, titles))
    parts += [*_answers_part(metrics, titles), *_sample_tables(samples, titles)]
    path.write_text("\n".join(parts), encoding="utf-8")


def _gate_part(verdict: Verdict, titles: Mapping[str, str]) -> str:
    if not verdict.broken:
        return f"**Limits:** kept by {', '.join(titles[name] for name in verdict.models)}.\n"
    columns, rows = verdict.table()
    return "**Limits broken:**\n\n" + _table(columns, _titled(rows, titles, 0))


def _answers_part(metrics: Mapping[str, Any], titles: Mapping[str, str]) -> Iterator[str]:
    """Each model's count of sample answers as expected; nothing if the data has no prompts."""
    counts = {name: numbers["answers"] for name, numbers in metrics.items() if "answers" in numbers}
    if not any(map(describe, counts.values())):
        return
    lines = []
    for name, numbers in counts.items():
        differs = numbers.get("differs", {}).items()
        fields = [f"`{_escaped(field) or 'no JSON'}` {n}" for field, n in differs]
        which = f"; differ in {', '.join(fields)}" if fields else ""
        lines.append(f"- **{titles[name]}**: {describe(numbers)}{which}\n")
    yield "## Answers\n\n" + "".join(lines)


def _titled(rows: Sequence[Sequence[str]], titles: Mapping[str, str], at: int) -> list[list[str]]:
    """The rows with the variant's title in column `at`."""
    return [[*row[:at], titles[row[at]], *row[at + 1 :]] for row in rows]


def _findings(
    metrics: Mapping[str, Any],
    columns: Sequence[str],
    settings: Evaluate,
    titles: Mapping[str, str],
) -> str:
    new, old = "what training held out", ""
    if settings.new_data:
        new = f"`{settings.new_data}`, the sentences trained on"
    if settings.old_data:
        old = f"; *old*: `{settings.old_data}`"
    explained = (
        (
            "answers\nas data",
            "*Answers as data*: greedy answers to prompts of the new data that are as expected: "
            "exactly, after white space, or as JSON; of long free texts the mean ROUGE-L, from 0 "
            "to 1.",
        ),
        (
            "new\ncompleted",
            "*Completed*: new sentences completed word for word, and ended, from their first "
            f"{settings.prompt_words} words.",
        ),
        (
            "old\nloss",
            "*Change*: of the old loss from the base's. *KL*: mean KL(base‖variant) of the "
            "next-token predictions on the old sentences, in nats. *Answers kept*: next-token "
            "first choices on the old sentences that are still the base's.",
        ),
        (
            "prefers\nchosen",
            "*Prefers chosen*: held-out pairs whose chosen answer has the higher mean "
            "log-probability per token, before and after training.",
        ),
    )
    words = [
        f"*New*: {new}{old}. *Loss*: mean cross-entropy, in nats per token.",
        *(text for heading, text in explained if heading in columns),
        "*Size*: weights to store for this variant; an adapter's are stored beside one copy of its "
        "base.\n",
    ]
    lines = [" ".join(words)]
    if "scratch" in metrics:
        lines.append(SCRATCH)
    for name, numbers in metrics.items():
        if "measured_as" in numbers:
            lines.append(
                f"*{titles[name]}*: the numbers of *{titles[numbers['measured_as']]}*. Its "
                "certificate says that both answer alike, so it was not measured again.\n"
            )
    for name, numbers in metrics.items():
        if "final_loss" in numbers:
            lines.append(_curve_line(titles[name], numbers))
    return "\n".join([*lines, ""])


def _curve_line(title: str, numbers: Mapping[str, Any]) -> str:
    flat = numbers["flat_from_epoch"]
    when = f"is flat from epoch {flat}" if flat else "has not flattened"
    parts = [
        f"- **{title}**: the training loss {when} (every later epoch within 5% of the whole drop) "
        f"and ends with an epoch at {numbers['final_loss']:.3f}"
    ]
    if "new_completed" in numbers:
        parts.append(
            f"{numbers['new_completed']} of {numbers['new_sentences']} new sentences are completed"
        )
    if "old_prompts" in numbers:
        kept, old = numbers["old_prompts_kept"], numbers["old_prompts"]
        corrected, wrong = numbers["prompts_corrected"], numbers["prompts_to_correct"]
        parts.append(f"{kept} of {old} prompts that must keep their answer do")
        parts.append(f"{corrected} of {wrong} that a correction changes have the corrected one")
    return "; ".join(parts) + "."


def _groups(predictions: Mapping[str, Any]) -> list[tuple[str, str]]:
    first = next(iter(predictions.values()))
    return list(dict.fromkeys((entry["group"], entry["rule"]) for entry in first))


def _prompt_table(
    predictions: Mapping[str, Any], group: str, rule: str, titles: Mapping[str, str]
) -> str:
    """A row per prompt of a group and rule: its answer, and every variant's first choice."""
    changes = rule == "must_change"
    columns = ["prompt", "answer", *(["corrected"] if changes else [])]
    columns += [titles[name] for name in predictions]
    rows = []
    for entries in zip(*predictions.values(), strict=True):
        asked = entries[0]
        if (asked["group"], asked["rule"]) == (group, rule):
            answers = [asked["answer"], *([asked["corrected"]] if changes else [])]
            cells = [f"*{_escaped(asked['prompt'])}*", *map(_escaped, answers)]
            rows.append([*cells, *map(_first_choice, entries)])
    ticked = ", ✓ where it is the corrected one" if changes else ""
    note = f"First choices; **bold** where it is not the answer{ticked}.\n"
    return f"## {group}: {rule}\n\n{note}\n" + _table(columns, rows)


def _sample_tables(samples: Mapping[str, Any], titles: Mapping[str, str]) -> Iterator[str]:
    """A table of every variant's answer for each sample prompt."""
    for number, entries in enumerate(zip(*(samples[name] for name in titles), strict=False), 1):
        asked = f"Prompt: {_escaped(entries[0]['question'])}\n\n"
        rows = [["in the data", "", _escaped(entries[0]["reference"])]]
        for name, entry in zip(titles, entries, strict=True):
            rows.append([titles[name], _verdict(match_of(entry)), _escaped(entry["answer"])])
        yield f"## Sample answer {number}\n\n{asked}" + _table(["model", "", "answer"], rows)


def _verdict(compared: Match) -> str:
    """The sign of an answer, with the JSON fields that differ or the similarity of a long text."""
    if compared.rouge_l is not None:
        return f"{compared.sign} {compared.rouge_l:.2f}"
    return " ".join([compared.sign, *map(_escaped, filter(None, compared.differs))])


def _first_choice(entry: Mapping[str, Any]) -> str:
    """The expected words, or else the likeliest token, and its probability."""
    if entry["top_k"] is None:
        return "unknown word"
    if entry["first"]:
        return f"{_escaped(entry['answer'])} ({entry['probability']:.0%})"
    if entry["corrected_first"]:
        return f"**{_escaped(entry['corrected'])} ({entry['corrected_probability']:.0%})** ✓"
    best = entry["top_k"][0]
    return f"**{_escaped(best['token'].strip() or best['token'])} ({best['probability']:.0%})**"


def _escaped(text: str) -> str:
    return repr(text)[1:-1].replace("<", "&lt;").replace("|", "\\|")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
