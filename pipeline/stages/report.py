"""report.md and the document's Figure 2, from the numbers that evaluate measured."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.evaluation.limits import MINIMUMS
from pipeline.project.logs.run_log import Step, epoch_means, flat_from
from pipeline.project.params.sections import Evaluate
from pipeline.project.stage_graph import Project, Stage

COLUMNS = (  # of the comparison, in two lines each; sizes follow, with their unit
    *("trained\nparams", "share\nof all", "new\nloss", "new\ncompleted", "old\nloss", "old loss\nchange"),
    *("KL from\nbase", "answers\nkept", "prefers\nchosen"),
)
LEGEND = (  # a heading, and the line that explains it
    ("new\nloss", "new: the sentences trained on, or held out from training. loss: nats per token."),
    ("new\ncompleted", "completed: new sentences finished word for word."),
    ("old\nloss", "old: texts that were not trained on now. change: against the base."),
    ("KL from\nbase", "KL: of the next-token predictions, on old sentences."),
    ("answers\nkept", "answers kept: old next-token first choices that are still the base's."),
    ("prefers\nchosen", "prefers chosen: held-out pairs whose chosen answer is likelier per token, before → after."),
    ("", "size: weights to store; an adapter's beside one copy of its base."),
)

SCRATCH = (
    "*Training from scratch* starts from random weights and learns old and new sentences together. It never was the "
    "base, so it has forgotten nothing: its change, KL and kept answers say how far from it such a model is.\n"
)
MISSING = "–"
TASK_COLUMNS = ("task", "model", "score", "95% interval", "change", "its interval", "n")
TASKS = (
    "score: mean over the n examples, from 0 to 1. change: from the base's, example\nby example. Intervals: bootstrap."
)
UNITS = ((10**9, "GB"), (10**6, "MB"), (1000, "kB"))


def draw_comparison(
    path: Path, project: Project, curves: Mapping[str, Sequence[Step]], metrics: Mapping[str, Any]
) -> None:
    """The document's Figure 2, of all methods, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    compare(figure, stages_by_variant(project), curves, metrics)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


def stages_by_variant(project: Project) -> dict[str, Stage]:
    """The stage that made each of the project's variants, with its title and look."""
    return {name: project.readable[adapter or base] for name, (base, adapter) in project.variants.items()}


def compare(
    figure: Any, stages: Mapping[str, Stage], curves: Mapping[str, Sequence[Step]], metrics: Mapping[str, Any]
) -> None:
    """Left the loss curves, with a stroke from where each is flat; right the trainable parameters."""
    left, right = figure.subplots(1, 2)
    looks = {variant: stages[variant].look for variant in curves}
    for variant, steps in curves.items():
        look = looks[variant]
        assert look is not None
        means, flat, epochs = epoch_means(steps), flat_from(steps), sorted({step.epoch for step in steps})
        label = f"{stages[variant].title}, flat from {flat}" if flat else stages[variant].title
        left.plot(epochs, means, label=label, linestyle=look.dash, color=look.color, linewidth=1.8)
        if flat:
            left.plot(epochs[flat - 1], means[flat - 1], "|", color=look.color, markersize=14, markeredgewidth=2)
    left.set(xlabel="epoch", ylabel="training loss (nats per token)", title="Training loss", yscale="log")
    left.yaxis.set_major_formatter("{x:g}")  # no powers: their digits are too small in print
    left.grid(alpha=0.3)
    if curves:  # none where a base is evaluated alone
        left.legend(labelspacing=0.25)
    counts = [metrics[variant]["trainable"] for variant in curves]
    bars = right.bar(
        [stages[variant].title.replace(" ", "\n") for variant in curves],
        counts,
        color=[look.color for look in looks.values() if look],
        hatch=[look.hatch for look in looks.values() if look],
        edgecolor="white",
        linewidth=0,
    )
    labels = [f"{metrics[v]['trainable']:,}\n{metrics[v]['trainable_percent']:.1f}%" for v in curves]
    right.bar_label(bars, labels, padding=2)
    right.yaxis.set_major_formatter("{x:,.0f}")
    right.set(ylabel="parameters", title="Trainable parameters", ylim=(0, 1.18 * max(counts, default=1)))


def write_report(
    path: Path,
    project: Project,
    metrics: Mapping[str, Any],
    predictions: Mapping[str, Any],
    samples: Mapping[str, Any],
) -> None:
    """The comparison as a page to read."""
    titles = {variant: stage.title for variant, stage in stages_by_variant(project).items()}
    gate, metrics = metrics.get("gate"), by_variant(metrics)
    columns, rows = comparison(metrics)
    task_columns, task_rows = task_scores(metrics)
    parts = [
        "# What was learned, what was forgotten\n",
        *([_gate_part(gate, titles)] if gate else []),
        _table([column.replace("\n", " ") for column in columns], [[titles[name], *cells] for name, *cells in rows]),
        _findings(metrics, columns, project.params.evaluate, titles),
        "![Loss curves and trainable parameters](finetuning_comparison.png)\n",
        *([f"## Tasks\n\n{TASKS}\n\n" + _table(task_columns, _titled(task_rows, titles, 1))] if task_rows else []),
        *(_prompt_table(predictions, group, rule, titles) for group, rule in _groups(predictions)),
        *_sample_tables(samples, titles),
    ]
    path.write_text("\n".join(parts), encoding="utf-8")


def by_variant(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Each variant's numbers: what metrics.json holds beside its `gate`."""
    return {name: numbers for name, numbers in metrics.items() if name != "gate"}


def task_scores(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and a row of texts for each task and variant, for report and terminal; no rows without tasks."""
    rows = [
        [task, variant, f"{scores['score']:.3f}", _interval(scores), *_difference(scores), f"{scores['n']:,}"]
        for task in dict.fromkeys(task for numbers in metrics.values() for task in numbers.get("tasks", {}))
        for variant, numbers in metrics.items()
        for scores in (numbers["tasks"][task],)
    ]
    return list(TASK_COLUMNS), rows


def _difference(scores: Mapping[str, Any]) -> tuple[str, str]:
    difference = scores.get("difference")
    return (f"{difference['score']:+.3f}", _interval(difference, "+")) if difference else (MISSING, "")


def _interval(numbers: Mapping[str, Any], sign: str = "") -> str:
    return f"{numbers['low']:{sign}.3f} to {numbers['high']:{sign}.3f}"


def broken_limits(gate: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and a row of texts for each limit that was broken, for report and terminal."""
    rows = [
        [
            one["variant"],
            one["limit"],
            f"at {'least' if one['limit'].partition('.')[0] in MINIMUMS else 'most'} {one['wanted']:g}",
            "not measured" if one["value"] is None else f"{one['value']:.6g}",
        ]
        for one in gate["broken"]
    ]
    return ["model", "limit", "wanted", "measured"], rows


def _gate_part(gate: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    if gate["passed"]:
        return f"**Limits:** kept by {', '.join(titles[name] for name in gate['variants'])}.\n"
    columns, rows = broken_limits(gate)
    return "**Limits broken:**\n\n" + _table(columns, _titled(rows, titles, 0))


def _titled(rows: Sequence[Sequence[str]], titles: Mapping[str, str], at: int) -> list[list[str]]:
    """The rows with the variant's title in column `at`."""
    return [[titles[cell] if n == at else cell for n, cell in enumerate(row)] for row in rows]


def comparison(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and a row of texts for each variant: what was learned, what was forgotten, for report and terminal.

    A column that was measured of no variant is left out.
    """
    largest = max((numbers["bytes"] for numbers in metrics.values()), default=0)
    unit, name = next((pair for pair in UNITS if largest >= 10 * pair[0]), UNITS[-1])
    rows = [[variant, *_cells(numbers), f"{numbers['bytes'] / unit:,.0f}"] for variant, numbers in metrics.items()]
    columns = ["model", *COLUMNS, f"size\n({name})"]
    shown = [n for n in range(len(columns)) if any(row[n] != MISSING for row in rows)]
    return [columns[n] for n in shown], [[row[n] for n in shown] for row in rows]


def legend(columns: Sequence[str]) -> str:
    """What the columns of `comparison` mean, a line each."""
    return "\n".join(line for heading, line in LEGEND if not heading or heading in columns)


def _cells(numbers: Mapping[str, Any]) -> list[str]:
    trained, forgetting, preferences = map(numbers.get, ("trainable", "forgetting", "preferences"))
    return [
        _count(trained) if trained else MISSING,
        f"{numbers['trainable_percent']:.1f}%" if trained else MISSING,
        f"{numbers['new_loss']:.3f}" if "new_loss" in numbers else MISSING,
        f"{numbers['new_completed']}/{numbers['new_sentences']}" if "new_completed" in numbers else MISSING,
        f"{numbers['old_loss']:.3f}" if forgetting else MISSING,
        f"{forgetting['loss_rise']:+.3f}" if forgetting else MISSING,
        f"{forgetting['divergence']:.3f}" if forgetting else MISSING,
        f"{forgetting['answers_kept']:.0%}" if forgetting else MISSING,
        " → ".join(f"{preferences[when]['accuracy']:.0%}" for when in ("before", "after")) if preferences else MISSING,
    ]


def _count(number: int) -> str:
    """Whole, or where a terminal has no room for that in millions: metrics.json has all digits."""
    return f"{number:,}" if number < 1_000_000 else f"{number / 1e6:,.1f}M"


def _findings(metrics: Mapping[str, Any], columns: Sequence[str], settings: Evaluate, titles: Mapping[str, str]) -> str:
    new = f"`{settings.new_data}`, the sentences trained on" if settings.new_data else "what training held out"
    old = f"; *old*: `{settings.old_data}`" if settings.old_data else ""
    words = (
        (
            "new\ncompleted",
            "*Completed*: new sentences completed word for word, and ended, from their first "
            f"{settings.prompt_words} words.",
        ),
        (
            "old\nloss",
            "*Change*: of the old loss from the base's. *KL*: mean KL(base‖variant) of the next-token "
            "predictions on the old sentences, in nats. *Answers kept*: next-token first choices on the old sentences "
            "that are still the base's.",
        ),
        (
            "prefers\nchosen",
            "*Prefers chosen*: held-out pairs whose chosen answer has the higher mean log-probability per token, "
            "before and after training.",
        ),
    )
    lines = [
        " ".join(
            [
                f"*New*: {new}{old}. *Loss*: mean cross-entropy, in nats per token.",
                *(text for heading, text in words if heading in columns),
                "*Size*: weights to store for this variant; an adapter's are stored beside one copy of its base.\n",
            ]
        ),
        *([SCRATCH] if "scratch" in metrics else []),
        *(_curve_line(titles[name], numbers) for name, numbers in metrics.items() if "final_loss" in numbers),
        "",
    ]
    return "\n".join(lines)


def _curve_line(title: str, numbers: Mapping[str, Any]) -> str:
    flat = numbers["flat_from_epoch"]
    when = f"is flat from epoch {flat}" if flat else "has not flattened"
    parts = [
        f"- **{title}**: the training loss {when} (every later epoch within 5% of the whole drop) and ends "
        f"with an epoch at {numbers['final_loss']:.3f}"
    ]
    if "new_completed" in numbers:
        parts.append(f"{numbers['new_completed']} of {numbers['new_sentences']} new sentences are completed")
    if "old_prompts" in numbers:
        kept, old = numbers["old_prompts_kept"], numbers["old_prompts"]
        corrected, wrong = numbers["prompts_corrected"], numbers["prompts_to_correct"]
        parts.append(f"{kept} of {old} prompts that must keep their answer do")
        parts.append(f"{corrected} of {wrong} that a correction changes have the corrected one")
    return "; ".join(parts) + "."


def _groups(predictions: Mapping[str, Any]) -> list[tuple[str, str]]:
    first = next(iter(predictions.values()))
    return list(dict.fromkeys((entry["group"], entry["rule"]) for entry in first))


def _prompt_table(predictions: Mapping[str, Any], group: str, rule: str, titles: Mapping[str, str]) -> str:
    chosen = {
        name: [entry for entry in entries if (entry["group"], entry["rule"]) == (group, rule)]
        for name, entries in predictions.items()
    }
    changes = rule == "must_change"
    rows = [
        [f"*{e[0]['prompt']}*", e[0]["answer"], *([e[0]["corrected"]] if changes else []), *map(_first_choice, e)]
        for e in zip(*chosen.values(), strict=True)
    ]
    note = (
        "First choices; **bold** where it is not the answer" + (", ✓ where it is the corrected one" * changes) + ".\n"
    )
    columns = ["prompt", "answer", *(["corrected"] if changes else []), *(titles[name] for name in chosen)]
    return f"## {group}: {rule}\n\n{note}\n" + _table(columns, rows)


def _sample_tables(samples: Mapping[str, Any], titles: Mapping[str, str]) -> Iterator[str]:
    """A table of every variant's answer for each sample prompt."""
    for number, entries in enumerate(zip(*(samples[name] for name in titles), strict=False), 1):
        asked = f"Prompt: {_escaped(entries[0]['question'])}\n\n"
        rows = [["in the data", _escaped(entries[0]["reference"])]]
        rows += [[titles[name], _escaped(entry["answer"])] for name, entry in zip(titles, entries, strict=True)]
        yield f"## Sample answer {number}\n\n{asked}" + _table(["model", "answer"], rows)


def _first_choice(entry: Mapping[str, Any]) -> str:
    """The expected words with the probability of all of them, or the likeliest token with its own."""
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
