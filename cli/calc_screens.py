"""What `lora calc` prints: a table for people, `--json` and `--csv` for programs."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.text import Text

from cli.console import print_json, stdout, table
from pipeline.calc import answer as calc
from pipeline.calc.fit import Gpu, changes, gpu, gpus, largest
from pipeline.calc.memory import Memory, predict
from pipeline.calc.parameters import document_count, notes, projections, trainable, why_they_differ
from pipeline.calc.settings import Method, Run
from pipeline.calc.sources import Model, built_in, names
from pipeline.errors import UserError

GIB, MIB = 2**30, 2**20
PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "overhead")
SHADES = dict(zip(PARTS, ("blue", "green", "yellow", "magenta", "cyan", "red", "bright_black"), strict=True))


@dataclass(frozen=True)
class Output:
    """Where an answer goes: one JSON document, CSV rows, or a table on the terminal."""

    json: bool
    csv: bool

    def __post_init__(self) -> None:
        if self.json and self.csv:
            raise UserError("--json and --csv exclude each other.")

    def rows(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> bool:
        """Print rows as JSON or CSV; False where neither was asked for."""
        if self.json:
            print_json([dict(zip(columns, row, strict=True)) for row in rows])
        elif self.csv:
            import csv

            csv.writer(sys.stdout, lineterminator="\n").writerows([columns, *rows])
        return self.json or self.csv


@dataclass(frozen=True)
class Question:
    """A model and one configuration of it."""

    model: Model
    method: Method
    run: Run


def models(out: Output) -> None:
    """`--list`."""
    found = [(name, built_in(name).shapes) for name in names()]
    columns = ("name", "parameters", "published", "family", "blocks", "width", "source")
    rows = [(n, s.total, s.published, s.family, len(s.blocks), s.hidden, s.source) for n, s in found]
    if not out.rows(columns, rows):
        shown = [(n, f"{t:,}", p, f, str(b), f"{w:,}") for n, t, p, f, b, w, _ in rows]
        stdout.print(table(columns[:6], shown, right=("parameters", "blocks", "width")))


def document(out: Output) -> None:
    """`--document`."""
    from pipeline.calc.document import claims

    found = claims()
    columns = ("section", "what", "document", "exact", "agrees", "why")
    if out.rows(columns, [(c.section, c.what, c.document, c.exact, c.agrees, c.why) for c in found]):
        return
    reasons: dict[str, int] = {}
    rows = []
    for claim in found:
        mark = "" if claim.agrees else f"≠ {reasons.setdefault(claim.why, len(reasons) + 1)}"
        rows.append((f"§{claim.section}", claim.what, claim.document, claim.exact, mark))
    stdout.print(table(("", "what", "document", "exact", ""), rows, right=("document", "exact")))
    stdout.print()
    for reason, number in reasons.items():
        stdout.print(f"{number}  {reason}.", markup=False)
    wrong = sum(not claim.agrees for claim in found)
    stdout.print(f"\n{len(found)} numbers, {len(found) - wrong} hold (rounded ones within 5%), {wrong} do not.")


def overview(out: Output, question: Question) -> None:
    """The one screen: parameters, memory of four methods, and what holds each."""
    model, method, run = question.model.shapes, question.method, question.run
    if out.json:
        print_json(calc.answer(model, method, run))
        return
    columns = calc.side_by_side(model, method, run)
    if out.csv:
        head = ("method", "precision", "total", "trainable", *PARTS, "peak", "peak_at")
        rows = [
            (name, r.precision, model.total, trainable(model, m), *memory.parts().values(), memory.peak, memory.where)
            for name, (m, r, memory) in columns.items()
        ]
        out.rows(head, rows)
        return
    _parameters(question)
    _memory(columns)
    _holders(columns)
    _notes(question)


def _parameters(question: Question) -> None:
    model, method = question.model.shapes, question.method
    published = f" (published: {model.published})" if model.published else ""
    shares = " · ".join(f"{name} {count:,}" for name, count in model.components().items())
    stdout.print(Text.assemble((model.name, "bold"), f"  {model.total:,} parameters{published}"))
    stdout.print(shares, style="dim", markup=False)
    trained = trainable(model, method)
    title = f"{_title(method)}: {trained:,} trainable, {100 * trained / model.total:.4g}%"
    stdout.print(Text.assemble("\n", (title, "bold")))
    found = projections(model, method) if method.kind == "lora" else []
    rows = [
        (
            p.name,
            f"{p.inputs:,} → {p.outputs:,}",
            f"{p.rank} × {p.inputs:,}",
            f"{p.outputs:,} × {p.rank}",
            f"{p.count} × {p.experts} experts" if p.experts > 1 else f"{p.count}",
            f"{p.parameters:,}",
        )
        for p in found
    ]
    if rows:
        names_ = ("projection", "in → out", "A", "B", "count", "parameters")
        stdout.print(table(names_, rows, right=names_[1:]))
    simplified = document_count(model, method)
    if simplified is not None and simplified != trained:
        why = why_they_differ(model, method)
        stdout.print(f"by the document's rule (§3): {simplified:,}; {why}", style="dim", markup=False)


def _title(method: Method) -> str:
    if method.kind == "lora":
        name = "DoRA" if method.dora else "rsLoRA" if method.rslora else "LoRA"
        ends = {"none": "", "all": ", embeddings and head", "new_rows": f", {method.new_rows} new rows"}
        return f"{name} r={method.rank} on {', '.join(method.targets)}{ends[method.embeddings]}"
    if method.kind == "freeze":
        ends_ = " , embeddings and head" if method.train_embeddings else ""
        return f"freeze, last {method.last_blocks} blocks{ends_}".replace(" ,", ",")
    if method.kind in ("prefix", "prompt"):
        return f"{method.kind} tuning, {method.virtual_tokens} virtual tokens"
    return "full fine-tuning"


Columns = dict[str, tuple[Method, Run, Memory]]


def _memory(columns: Columns) -> None:
    """Parts in GiB, one column a method, and a bar each."""
    run = next(reversed(columns.values()))[1]
    how = (
        f"{run.batch} × {run.sequence:,} tokens, {run.attention}, checkpointing {run.checkpointing}, {run.loss} logits"
    )
    stdout.print(Text.assemble(("\nmemory of a step, GiB", "bold"), (f"  {how}", "dim")))
    parts = [[memory.parts()[part] for _, _, memory in columns.values()] for part in PARTS]
    rows = [(part, *map(_gib, sizes)) for part, sizes in zip(PARTS, parts, strict=True) if any(sizes)]
    rows.append(("peak", *(_gib(memory.peak) for _, _, memory in columns.values())))
    rows.insert(0, ("base in", *(r.precision for _, r, _ in columns.values())))
    stdout.print(table(("", *columns), rows, right=tuple(columns)))
    widest, longest = max(memory.peak for _, _, memory in columns.values()), max(map(len, columns))
    for name, (_, _, memory) in columns.items():
        stdout.print(_bar(f"{name:{longest}} ", memory, widest))
    used = [part for part, sizes in zip(PARTS, parts, strict=True) if any(sizes)]
    stdout.print(Text(" ").join(Text(f"█ {part}", SHADES[part]) for part in used))


def _bar(name: str, memory: Memory, widest: int, width: int = 36) -> Text:
    line = Text(name)
    done = filled = 0
    for part, size in memory.parts().items():
        done += size
        cells = round(done / widest * width) - filled
        filled += cells
        line.append("█" * cells, SHADES[part])
    return line.append(f" {_gib(memory.peak)}").append(f"  {memory.where}", "dim")


def _holders(columns: Columns) -> None:
    """Which common GPUs hold each method, by size class."""
    classes = _classes()
    stdout.print(Text.assemble(("\nfits on", "bold"), ("  ● holds the peak, · does not; sizes in GB", "dim")))
    rows = [
        (name, *("●" if memory.peak <= one.bytes else "·" for one in classes.values()))
        for name, (_, _, memory) in columns.items()
    ]
    stdout.print(table(("", *classes), rows, right=tuple(classes)))


def _classes() -> dict[str, Gpu]:
    """One device of each common size, smallest first."""
    cards = ("rtx4060", "rtx3060", "rtx4080", "rtx4090", "rtx5090", "a100-40", "l40s", "h100", "h200")
    sizes = ("8", "12", "16", "24", "32", "40", "48", "80", "141")
    macs = {f"Mac {name[4:]}": found for name, found in gpus().items() if name.startswith("mac-")}
    return {**{size: gpus()[card] for size, card in zip(sizes, cards, strict=True)}, **macs}


def _notes(question: Question) -> None:
    model = question.model.shapes
    said = [*model.notes, *notes(model, question.method)]
    for note in said:
        stdout.print(f"note: {note}", style="dim", markup=False)


def _gib(size: float) -> str:
    """GiB with two decimals; what is smaller than that in MiB or KiB, so that a tiny model has numbers too."""
    if size == 0:
        return "0"
    if size < 0.01 * GIB:
        return f"{size / MIB:.2f} MiB" if size >= 0.1 * MIB else f"{size / 1024:.1f} KiB"
    return f"{size / GIB:.2f}"


def sweep(out: Output, question: Question, key: str, values: list[str]) -> None:
    """`--sweep`: one row a value."""
    model = question.model.shapes
    rows: list[tuple[Any, ...]] = []
    for value, method, run in calc.swept(question.method, question.run, key, values):
        memory = predict(model, method, run)
        trained = trainable(model, method)
        rows.append((value, trained, round(100 * trained / model.total, 4), *memory.parts().values(), memory.peak))
    columns = (key, "trainable", "percent", *PARTS, "peak")
    if out.rows(columns, rows):
        return
    shown = [(str(row[0]), f"{row[1]:,}", f"{row[2]:g}", _unit(row[-1]), _smallest(row[-1])) for row in rows]
    heads = (key, "trainable", "%", "peak", "smallest device")
    stdout.print(table(heads, shown, right=heads[:4]))
    stdout.print(
        f"{question.model.shapes.name}, {_title(question.method)}; --csv has every part", style="dim", markup=False
    )


def _smallest(size: int) -> str:
    """The label of the smallest NVIDIA device that holds so many bytes."""
    cards = (one for name, one in gpus().items() if not name.startswith("mac-"))
    return next((one.label for one in cards if one.bytes >= size), "none of these")


def fit(out: Output, question: Question, budget: float | None, name: str | None) -> None:
    """`--fit` and `--gpu`: the most that fits, and what to change where nothing does."""
    if budget is not None and not 0 < budget < 2**20:
        raise UserError(f"fit takes GiB of memory, more than 0, got {budget:g}.")
    device = gpu(name) if name else Gpu("fit", f"{budget:g} GiB", round((budget or 0) * GIB))
    model, method, run = question.model.shapes, question.method, question.run
    peak, most = predict(model, method, run).peak, largest(model, method, run, device.bytes)
    ways = [] if peak <= device.bytes else list(changes(model, method, run, device.bytes))
    if out.json:
        found = {**vars(most), "peak": peak, "budget": device.bytes, "fits": peak <= device.bytes}
        print_json({"model": model.name, **found, "changes": [{"change": w, "peak": p} for w, _, _, p in ways]})
        return
    rows = [(key, str(value)) for key, value in vars(most).items() if value is not None]
    if out.rows(("setting", "largest"), rows):
        return
    verdict = "fits" if peak <= device.bytes else "does not fit"
    stdout.print(Text.assemble((f"{model.name}, {_title(method)}, {run.precision}: {_unit(peak)} {verdict}", "bold")))
    room = f", {_unit(device.bytes)}" if name else ""
    stdout.print(f"on {device.label}{room}; {run.batch} × {run.sequence:,} tokens", markup=False)
    if peak <= device.bytes:
        stdout.print("\nthe most that fits, the rest as given")
        shown = [(key, f"{int(value):,}" if value.isdigit() else value) for key, value in rows]
        stdout.print(table(("setting", "largest"), shown, right=("largest",)))
        return
    stdout.print("\nchange this" if ways else "\nnothing to change is left")
    for words, _, _, size in ways:
        stdout.print(f"  {words}  → {_unit(size)}{'  fits' if size <= device.bytes else ''}", markup=False)
    needed = ways[-1][3] if ways else peak
    if needed > device.bytes:
        stdout.print(f"a larger device is needed: {_smallest(needed)}")


def _unit(size: float) -> str:
    text = _gib(size)
    return text if text.endswith("B") else f"{text} GiB"


def trace(out: Output, question: Question) -> None:
    """`--trace`: the step that this project runs, under fake tensors, beside the formula."""
    from pipeline.training.trace import traced_peak

    model = question.model
    if model.config is None:
        raise UserError(f"--trace builds the model, which needs a config.json; {model.shapes.name} has shapes alone.")
    run = replace(question.run, context=0)
    traced = traced_peak(model.config, question.method, run)
    formula = predict(model.shapes, question.method, run).peak
    difference = round(100 * (formula / traced - 1), 3)
    if out.rows(("traced", "formula", "difference_percent"), [(traced, formula, difference)]):
        return
    rows = [("traced", f"{traced:,}", _unit(traced)), ("formula", f"{formula:,}", _unit(formula))]
    stdout.print(table(("", "bytes", ""), rows, right=("bytes", "")))
    stdout.print(f"the formula differs by {difference:+.3g}%; without the CUDA context")


def explain(out: Output, question: Question) -> None:
    """`--explain`: each number's formula with the values put in."""
    from pipeline.calc.explain import explain as lines

    model, method, run = question.model.shapes, question.method, question.run
    found = list(lines(model, method, run, predict(model, method, run)))
    if not out.rows(("what", "formula"), found):
        stdout.print(table(("", f"{model.name}, {_title(method)}, {run.precision}"), found))
