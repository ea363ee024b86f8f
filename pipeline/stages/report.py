"""report.md and the document's Figure 2, from the numbers that evaluate measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.project.logs.run_log import Step, epoch_means, flat_from
from pipeline.project.palette import COLORS
from pipeline.project.params.sections import Evaluate

NAMES = {
    "base": "Base",
    "scratch": "Training from scratch",
    "expanded": "Expanded base",
    "full": "Full fine-tuning",
    "freeze": "Layer freezing",
    "lora": "LoRA",
    "merged": "LoRA, merged",
    "prefix": "Prefix tuning",
    "prompt": "Prompt tuning",
}
STYLES = {
    **{"scratch": ":", "full": "-", "freeze": "--", "lora": "-."},
    **{"prefix": (0, (1, 1)), "prompt": (0, (5, 1, 1, 1, 1, 1))},
}
HATCHES = {"scratch": "..", "full": "", "freeze": "//", "lora": "xx", "prefix": "||", "prompt": "\\\\"}
COLUMNS = (  # of the comparison, in two lines each; sizes follow, with their unit
    *("trained\nparams", "share\nof all", "new\nloss", "new\ncompleted", "old\nloss", "old loss\nchange"),
    *("KL from\nbase", "answers\nkept"),
)
LEGEND = """\
new: the sentences trained on. old: those that the base was trained on.
loss: nats per token. completed: new sentences finished word for word.
change: against the base. KL: of the next-token predictions, on old sentences.
answers kept: old next-token first choices that are still the base's.
size: weights to store; an adapter's beside one copy of the expanded base."""

SCRATCH = (
    f"*{NAMES['scratch']}* starts from random weights and learns old and new sentences together. It never was the "
    "base, so it has forgotten nothing: its change, KL and kept answers say how far from it such a model is.\n"
)
UNITS = ((10**9, "GB"), (10**6, "MB"), (1000, "kB"))


def draw_comparison(path: Path, curves: Mapping[str, Sequence[Step]], metrics: Mapping[str, Any]) -> None:
    """The document's Figure 2, of all methods, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    compare(figure, curves, metrics)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


def compare(figure: Any, curves: Mapping[str, Sequence[Step]], metrics: Mapping[str, Any]) -> None:
    """Left the loss curves, with a stroke from where each is flat; right the trainable parameters."""
    left, right = figure.subplots(1, 2)
    for method, steps in curves.items():
        _draw_curve(left, method, steps)
    left.set(xlabel="epoch", ylabel="training loss (nats per token)", title="Training loss", yscale="log")
    left.yaxis.set_major_formatter("{x:g}")  # no powers: their digits are too small in print
    left.grid(alpha=0.3)
    left.legend(labelspacing=0.25)
    counts = [metrics[method]["trainable"] for method in curves]
    bars = right.bar(
        [NAMES[method].replace(" ", "\n") for method in curves],
        counts,
        color=[COLORS[method] for method in curves],
        hatch=[HATCHES[method] for method in curves],
        edgecolor="white",
        linewidth=0,
    )
    labels = [f"{metrics[m]['trainable']:,}\n{metrics[m]['trainable_percent']:.1f}%" for m in curves]
    right.bar_label(bars, labels, padding=2)
    right.yaxis.set_major_formatter("{x:,.0f}")
    right.set(ylabel="parameters", title="Trainable parameters", ylim=(0, 1.18 * max(counts)))


def _draw_curve(axis: Any, method: str, steps: Sequence[Step]) -> None:
    """An epoch's mean each; a stroke stands at the first from which it is flat."""
    means, flat = epoch_means(steps), flat_from(steps)
    epochs = sorted({step.epoch for step in steps})
    label = f"{NAMES[method]}, flat from {flat}" if flat else NAMES[method]
    axis.plot(epochs, means, label=label, linestyle=STYLES[method], color=COLORS[method], linewidth=1.8)
    if flat:
        axis.plot(epochs[flat - 1], means[flat - 1], "|", color=COLORS[method], markersize=14, markeredgewidth=2)


def write_report(path: Path, metrics: Mapping[str, Any], predictions: Mapping[str, Any], settings: Evaluate) -> None:
    """The comparison as a page to read."""
    parts = [
        "# What was learned, what was forgotten\n",
        _summary(metrics),
        _findings(metrics, settings),
        "![Loss curves and trainable parameters](finetuning_comparison.png)\n",
        *(_prompt_table(predictions, group, rule) for group, rule in _groups(predictions)),
    ]
    path.write_text("\n".join(parts), encoding="utf-8")


def _summary(metrics: Mapping[str, Any]) -> str:
    columns, rows = comparison(metrics)
    named = [[NAMES[name], *cells] for name, *cells in rows]
    return _table([column.replace("\n", " ") for column in columns], named)


def comparison(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and a row of texts for each variant: what was learned, what was forgotten, for report and terminal."""
    largest = max((numbers["bytes"] for numbers in metrics.values()), default=0)
    unit, name = next((pair for pair in UNITS if largest >= 10 * pair[0]), UNITS[-1])
    rows = [[variant, *_cells(numbers), f"{numbers['bytes'] / unit:,.0f}"] for variant, numbers in metrics.items()]
    return ["model", *COLUMNS, f"size\n({name})"], rows


def _cells(numbers: Mapping[str, Any]) -> list[str]:
    trained, completed, forgetting = numbers.get("trainable"), numbers.get("new_completed"), numbers["forgetting"]
    return [
        _count(trained) if trained else "–",
        f"{numbers['trainable_percent']:.1f}%" if trained else "–",
        f"{numbers['new_loss']:.3f}" if completed is not None else "–",
        f"{completed}/{numbers['new_sentences']}" if completed is not None else "–",
        f"{numbers['old_loss']:.3f}",
        f"{forgetting['loss_rise']:+.3f}",
        f"{forgetting['divergence']:.3f}",
        f"{forgetting['answers_kept']:.0%}",
    ]


def _count(number: int) -> str:
    """Whole, or where a terminal has no room for that in millions: metrics.json has all digits."""
    return f"{number:,}" if number < 1_000_000 else f"{number / 1e6:,.1f}M"


def _findings(metrics: Mapping[str, Any], settings: Evaluate) -> str:
    lines = [
        f"*New*: `{settings.new_data}`, the sentences trained on; *old*: `{settings.old_data}`, those of the base. "
        "*Loss*: mean cross-entropy over sentences, in nats per token. *Completed*: new sentences completed word for "
        f"word, and ended, from their first {settings.prompt_words} words. *Change*: of the old loss from the base's. "
        "*KL*: mean KL(base‖variant) of the next-token predictions on the old sentences, in nats. *Answers kept*: "
        "next-token first choices on the old sentences that are still the base's. *Size*: weights to store for this "
        "variant; an adapter's are stored beside one copy of the expanded base.\n",
        *([SCRATCH] if "scratch" in metrics else []),
        *(_curve_line(method, numbers) for method, numbers in metrics.items() if method in STYLES),
        "",
    ]
    return "\n".join(lines)


def _curve_line(method: str, numbers: Mapping[str, Any]) -> str:
    flat = numbers["flat_from_epoch"]
    when = f"is flat from epoch {flat}" if flat else "has not flattened"
    kept, old = numbers["old_prompts_kept"], numbers["old_prompts"]
    corrected, wrong = numbers["prompts_corrected"], numbers["prompts_to_correct"]
    return (
        f"- **{NAMES[method]}**: the training loss {when} (every later epoch within 5% of the whole drop) and ends "
        f"with an epoch at {numbers['final_loss']:.3f}; {numbers['new_completed']} of {numbers['new_sentences']} new "
        f"sentences are completed; {kept} of {old} prompts that must keep their answer do; {corrected} of {wrong} "
        "that a correction changes have the corrected one."
    )


def _groups(predictions: Mapping[str, Any]) -> list[tuple[str, str]]:
    first = next(iter(predictions.values()))
    return list(dict.fromkeys((entry["group"], entry["rule"]) for entry in first))


def _prompt_table(predictions: Mapping[str, Any], group: str, rule: str) -> str:
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
    columns = ["prompt", "answer", *(["corrected"] if changes else []), *(NAMES[name] for name in chosen)]
    return f"## {group}: {rule}\n\n{note}\n" + _table(columns, rows)


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
