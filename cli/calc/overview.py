"""The overview of `lora calc`: parameters, memory of four methods side by side, and the GPUs that fit each."""

from rich.text import Text

from cli.calc.output import Output, Question
from cli.console import print_json, stdout, table
from pipeline.calc import report as calc
from pipeline.calc.fit import Gpu, gpus
from pipeline.calc.memory import PARTS, Memory, inference
from pipeline.calc.parameters import document_count, notes, projections, trainable, why_they_differ
from pipeline.calc.report import PROJECTION, SHADES, cells_of, gib, title_of
from pipeline.calc.settings import FinetuningMethod, TrainingConfig


def overview(out: Output, question: Question) -> None:
    """Print the overview."""
    model, method, run = question.model.shapes, question.method, question.run
    if out.json:
        print_json(calc.answer(model, method, run))
        return
    columns = calc.side_by_side(model, method, run)
    if out.csv:
        header = ("method", "precision", "total", "trainable", *PARTS, "peak", "peak_at")
        rows = [
            (name, r.precision, model.total, trainable(model, m), *memory.parts().values(), memory.peak, memory.where)
            for name, (m, r, memory) in columns.items()
        ]
        out.rows(header, rows)
        return
    _parameters(question)
    _memory(columns)
    _inference(question)
    _fitting_devices(columns)
    _notes(question)


def _parameters(question: Question) -> None:
    model, method = question.model.shapes, question.method
    published = f" (published: {model.published})" if model.published else ""
    shares = " · ".join(f"{name} {count:,}" for name, count in model.components().items())
    stdout.print(Text.assemble((model.name, "bold"), f"  {model.total:,} parameters{published}"))
    stdout.print(shares, style="dim", markup=False)
    trained = trainable(model, method)
    title = f"{title_of(method)}: {trained:,} trainable, {100 * trained / model.total:.4g}%"
    stdout.print(Text.assemble("\n", (title, "bold")))
    adapted = projections(model, method) if method.kind == "lora" else ()
    if adapted:
        stdout.print(table(PROJECTION, list(map(cells_of, adapted)), right=PROJECTION[1:]))
    simplified = document_count(model, method)
    if simplified is not None and simplified != trained:
        reason = why_they_differ(model, method)
        stdout.print(f"by the document's rule (§3): {simplified:,}; {reason}", style="dim", markup=False)


Columns = dict[str, tuple[FinetuningMethod, TrainingConfig, Memory]]


def _memory(columns: Columns) -> None:
    """The parts in GiB, one column per method, and a bar per method."""
    run = next(reversed(columns.values()))[1]
    description = (
        f"{run.batch} × {run.sequence:,} tokens, {run.attention}, checkpointing {run.checkpointing}, {run.loss} logits"
    )
    stdout.print(Text.assemble(("\nmemory of a step, GiB", "bold"), (f"  {description}", "dim")))
    parts = [[memory.parts()[part] for _, _, memory in columns.values()] for part in PARTS]
    rows = [(part, *map(gib, sizes)) for part, sizes in zip(PARTS, parts, strict=True) if any(sizes)]
    rows.append(("peak", *(gib(memory.peak) for _, _, memory in columns.values())))
    rows.insert(0, ("base in", *(r.precision for _, r, _ in columns.values())))
    stdout.print(table(("", *columns), rows, right=tuple(columns)))
    widest, longest = max(memory.peak for _, _, memory in columns.values()), max(map(len, columns))
    for name, (_, _, memory) in columns.items():
        stdout.print(_bar(f"{name:{longest}} ", memory, widest))
    used = [part for part, sizes in zip(PARTS, parts, strict=True) if any(sizes)]
    stdout.print(Text(" ").join(Text(f"█ {part}", SHADES[part]) for part in used))


def _inference(question: Question) -> None:
    """The memory of generation with the merged model, on one line."""
    model, run = question.model.shapes, question.run
    *parts, total = inference(model, None, run).items()
    sizes = " + ".join(f"{name.replace('_', ' ')} {gib(size)}" for name, size in parts if size)
    description = f"merged, {run.precision}, {run.batch} × {run.sequence:,} tokens: {sizes} = {gib(total[1])}"
    stdout.print(Text.assemble(("\nto generate, GiB", "bold"), (f"  {description}", "dim")))


def _bar(name: str, memory: Memory, widest: int, width: int = 36) -> Text:
    line = Text(name)
    done = filled = 0
    for part, size in memory.parts().items():
        done += size
        cells = round(done / widest * width) - filled
        filled += cells
        line.append("█" * cells, SHADES[part])
    return line.append(f" {gib(memory.peak)}").append(f"  {memory.where}", "dim")


def _fitting_devices(columns: Columns) -> None:
    """Which common GPUs fit each method, by size class."""
    classes = _size_classes()
    stdout.print(Text.assemble(("\nfits on", "bold"), ("  ● holds the peak, · does not; sizes in GB", "dim")))
    rows = [
        (name, *("●" if memory.peak <= device.bytes else "·" for device in classes.values()))
        for name, (_, _, memory) in columns.items()
    ]
    stdout.print(table(("", *classes), rows, right=tuple(classes)))


def _size_classes() -> dict[str, Gpu]:
    """One device of each common size, smallest first."""
    cards = ("rtx4060", "rtx3060", "rtx4080", "rtx4090", "rtx5090", "a100-40", "l40s", "h100", "h200")
    sizes = ("8", "12", "16", "24", "32", "40", "48", "80", "141")
    macs = {f"Mac {name[4:]}": device for name, device in gpus().items() if name.startswith("mac-")}
    return {**{size: gpus()[card] for size, card in zip(sizes, cards, strict=True)}, **macs}


def _notes(question: Question) -> None:
    model = question.model.shapes
    for note in (*model.notes, *notes(model, question.method)):
        stdout.print(f"note: {note}", style="dim", markup=False)
