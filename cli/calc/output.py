"""What `lora calc` prints of each answer: a table, CSV rows, or one JSON document."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from rich.text import Text

from cli.console import print_json, print_table, stdout
from lora_workbench.calculator import Calculation
from pipeline.calc import report
from pipeline.calc.architecture import Architecture, Model
from pipeline.calc.fit import LARGEST, changes, gpus, largest, of_size
from pipeline.calc.fit import gpu as find_gpu
from pipeline.calc.memory import PARTS, Memory, inference, predict
from pipeline.calc.method import (
    Configuration,
    FinetuningMethod,
    projections,
    trainable,
    why_they_differ,
)
from pipeline.calc.report import PROJECTION, SHADES, capped, gib, smallest, swept
from pipeline.calc.settings import TrainingConfig
from pipeline.calc.sources.open_model import built_in, names
from pipeline.errors import UserError
from pipeline.files.text import in_units
from pipeline.stages.registry import note_targets

MARKS = {True: "●", False: "·"}
BAR = 36  # cells of the largest peak's bar
CLASSES = {  # one card of each common size in GB; Macs follow
    "8": "rtx4060",
    "12": "rtx3060",
    "16": "rtx4080",
    "24": "rtx4090",
    "32": "rtx5090",
    "40": "a100-40",
    "48": "l40s",
    "80": "h100",
    "141": "h200",
}


class Output(NamedTuple):
    """The output format: one JSON document, CSV rows, or a table on the terminal."""

    json: bool
    csv: bool

    def rows(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> bool:
        """Print rows as JSON or CSV. Returns False, without printing, if neither was requested."""
        if self.json:
            print_json([dict(zip(columns, row, strict=True)) for row in rows])
        elif self.csv:
            import csv

            csv.writer(sys.stdout, lineterminator="\n").writerows([columns, *rows])
        return self.json or self.csv


def _headline(title: str, description: str) -> None:
    stdout.print(Text.assemble((f"\n{title}", "bold"), (f"  {description}", "dim")))


def _print_dim(text: str) -> None:
    stdout.print(text, style="dim", markup=False)


def print_overview(out: Output, calculation: Calculation) -> None:
    """Parameters, memory of up to four methods side by side, and the GPUs that fit each."""
    model, given = calculation.model, calculation.given
    if out.json:
        print_json(calculation.answer())
        return
    columns = report.side_by_side(model.shapes, given.method, given.run, given.methods)
    if out.csv:
        header = ("method", "precision", "total", "trainable", *PARTS, "peak", "peak_at")
        rows = []
        for name, (method, run, memory) in columns.items():
            counts = (model.shapes.total, trainable(model.shapes, method))
            sizes = (*memory.parts().values(), memory.peak, memory.where)
            rows.append((name, run.precision, *counts, *sizes))
        out.rows(header, rows)
        return
    _print_parameters(model.shapes, given.method)
    _print_memory(columns)
    _print_generation(model.shapes, given.run)
    _print_devices({name: memory for name, (_, _, memory) in columns.items()})
    targets = note_targets(model.shapes, given.method)
    for note in (*model.shapes.notes, *given.method.notes(model.shapes), targets):
        if note:
            _print_dim(f"note: {note}")


def _print_parameters(shapes: Architecture, method: FinetuningMethod) -> None:
    published = f" (published: {shapes.published})" if shapes.published else ""
    stdout.print(Text.assemble((shapes.name, "bold"), f"  {shapes.total:,} parameters{published}"))
    components = [f"{name} {count:,}" for name, count in shapes.components().items()]
    _print_dim(" · ".join(components))
    trained = trainable(shapes, method)
    title = f"{method.title}: {trained:,} trainable, {100 * trained / shapes.total:.4g}%"
    stdout.print(Text.assemble("\n", (title, "bold")))
    if adapted := projections(shapes, method):
        print_table(PROJECTION, list(map(report.cells_of, adapted)), right=PROJECTION[1:])
    simplified = method.simple_count(shapes)
    if simplified is not None and simplified != trained:
        reason = why_they_differ(shapes, method)
        _print_dim(f"2·r·d per projection: {simplified:,}; {reason}")


def _print_memory(columns: Mapping[str, report.Column]) -> None:
    """A column of sizes for each method, and a bar of them that ends at the peak."""
    memories = {name: memory for name, (_, _, memory) in columns.items()}
    runs = [run for _, run, _ in columns.values()]
    last = runs[-1]
    step = f"{last.size}, {last.attention}, checkpointing {last.checkpointing}"
    _headline("memory of a step, GiB", f"{step}, {last.loss} logits")

    used, cells = [], [["base in", *(run.precision for run in runs)]]
    for part in PARTS:
        sizes = [memory.parts()[part] for memory in memories.values()]
        if any(sizes):
            used.append(part)
            cells.append([part, *map(gib, sizes)])
    cells.append(["peak", *(gib(memory.peak) for memory in memories.values())])
    print_table(("", *columns), cells, right=tuple(columns))

    widest = max(memory.peak for memory in memories.values())
    longest = max(map(len, columns))
    for name, memory in memories.items():
        line, done, filled = Text(f"{name:{longest}} "), 0, 0
        for part, size in memory.parts().items():
            done += size
            # of the sum, so that roundings do not add up
            width = round(done / widest * BAR) - filled
            filled += width
            line.append("█" * width, SHADES[part])
        stdout.print(line.append(f" {gib(memory.peak)}").append(f"  {memory.where}", "dim"))
    stdout.print(Text(" ").join(Text(f"█ {part}", SHADES[part]) for part in used))


def _print_generation(shapes: Architecture, run: TrainingConfig) -> None:
    """The memory that generating takes with the adapter merged."""
    sizes = inference(shapes, None, run)
    total = gib(sizes.pop("total"))
    parts = [f"{name.replace('_', ' ')} {gib(size)}" for name, size in sizes.items() if size]
    step = f"merged, {run.precision}, {run.batch} × {run.sequence:,} tokens"
    _headline("to generate, GiB", f"{step}: {' + '.join(parts)} = {total}")


def _print_devices(memories: Mapping[str, Memory]) -> None:
    """Which common GPUs and Macs hold the peak of each method."""
    devices = {size: gpus()[card] for size, card in CLASSES.items()}
    for name, device in gpus().items():
        if name.startswith("mac-"):
            devices[f"Mac {name[4:]}"] = device
    _headline("fits on", "● holds the peak, · does not; sizes in GB")
    marks = []
    for name, memory in memories.items():
        fits = (MARKS[memory.peak <= device.bytes] for device in devices.values())
        marks.append((name, *fits))
    print_table(("", *devices), marks, right=tuple(devices))


def print_models(out: Output) -> None:
    """`--list`."""
    columns = ("name", "parameters", "published", "family", "blocks", "width", "source")
    rows: list[tuple[Any, ...]] = []
    for name in names():
        s = built_in(name).shapes
        rows.append((name, s.total, s.published, s.family, len(s.blocks), s.hidden, s.source))
    if not out.rows(columns, rows):
        shown = [
            (name, f"{total:,}", published, family, str(blocks), f"{width:,}")
            for name, total, published, family, blocks, width, _ in rows
        ]
        print_table(columns[:6], shown, right=("parameters", "blocks", "width"))


def print_sweep(out: Output, model: Model, given: Configuration, text: str) -> None:
    """`--sweep KEY=A,B`: one row per value."""

    key, _, values = text.partition("=")
    key, choices = key.strip(), [value.strip() for value in values.split(",") if value.strip()]
    if not choices:
        raise UserError(f"sweep takes KEY=A,B,..., such as rank=1,2,4,8, got {text!r}.")
    shapes = model.shapes
    rows: list[tuple[Any, ...]] = []
    for value, method, run in swept(given.method, given.run, key, choices, given.methods):
        memory, trained = predict(shapes, method, run), trainable(shapes, method)
        number = int(value) if key in LARGEST else value
        percent = round(100 * trained / shapes.total, 4)
        rows.append((number, trained, percent, *memory.parts().values(), memory.peak))
    if out.rows((key, "trainable", "percent", *PARTS, "peak"), rows):
        return
    shown = [
        (str(value), f"{trained:,}", f"{percent:g}", in_units(peak), smallest(peak))
        for value, trained, percent, *_, peak in rows
    ]
    headers = (key, "trainable", "%", "peak", "smallest device")
    print_table(headers, shown, right=headers[:4])
    _print_dim(f"{shapes.name}, {given.method.title}; --csv has every part")


def print_time(out: Output, model: Model, given: Configuration, time: dict[str, Any]) -> None:
    """`--tokens`; with --json added to the answer without it."""
    from pipeline.calc.time import format_hours

    if out.json:
        print_json({**Calculation(model, given).answer(), "time": time})
        return
    devices = time["gpus"]
    header = ("gpu", "hours_low", "hours_high", "cost_low", "cost_high", "fits")
    rows = [(t["gpu"], *t["hours"], *(t["cost"] or (None, None)), t["fits"]) for t in devices]
    if out.rows(header, rows):
        return
    about = f"{model.shapes.name}, {given.method.title}, {given.run.precision}; ● memory suffices"
    _headline(f"{time['tokens']:,} tokens take {time['flops']:.3g} FLOPs", about)
    columns = ["gpu", "fits", "time"]
    shown = [[gpus()[t["gpu"]].label, MARKS[t["fits"]], format_hours(*t["hours"])] for t in devices]
    if time["price"] is not None:
        columns.append("cost")
        for row, device in zip(shown, devices, strict=True):
            low, high = device["cost"]
            row.append(f"${low:,.2f}–{high:,.2f}")
    print_table(columns, shown, right=columns[2:])
    for line in time["assumptions"]:
        _print_dim(line)


def print_fit(
    out: Output,
    model: Model,
    given: Configuration,
    budget: float | None,
    name: str | None,
    time: dict[str, Any] | None,
) -> None:
    """`--fit` and `--gpu`: the largest values that fit, or what to change so that it fits."""

    device = find_gpu(name) if name is not None else of_size(budget or 0)
    shapes, (methods, method, run) = model.shapes, given
    peak = predict(shapes, method, run).peak
    most = largest(shapes, method, run, device.bytes)._asdict()
    fits, fixes = peak <= device.bytes, list[tuple[str, int]]()
    if not fits:
        for words, _, _, size in changes(shapes, method, run, device.bytes, methods):
            fixes.append((words, size))
    if out.json:
        summary = {"model": shapes.name, **most, "peak": peak, "budget": device.bytes, "fits": fits}
        summary["changes"] = [{"change": words, "peak": size} for words, size in fixes]
        print_json(summary | ({"time": time} if time else {}))
        return
    change_rows = [(f"change: {words}", size) for words, size in fixes]
    if out.rows(("what", "value"), [*most.items(), ("peak", peak), ("fits", fits), *change_rows]):
        return

    verdict = "fits" if fits else "does not fit"
    configuration = f"{shapes.name}, {method.title}, {run.precision}"
    stdout.print(Text(f"{configuration}: {in_units(peak)} {verdict}", "bold"))
    room = f"{device.label}, {in_units(device.bytes)}" if name else device.label
    stdout.print(f"on {room}; {run.size}", markup=False)
    if fits:
        settings_that_fit = {key: value for key, value in most.items() if value is not None}
        rows = [(key, capped(value, LARGEST.get(key))) for key, value in settings_that_fit.items()]
        stdout.print("\nthe most that fits, the rest as given")
        print_table(("setting", "largest"), rows, right=("largest",))
    else:
        stdout.print("\nchange this" if fixes else "\nno setting makes it fit")
        for words, size in fixes:
            enough = "  fits" if size <= device.bytes else ""
            stdout.print(f"  {words}  → {in_units(size)}{enough}", markup=False)
        needed = fixes[-1][1] if fixes else peak
        if needed > device.bytes:
            stdout.print(f"a larger device is needed: {smallest(needed)}")
    if time:
        print_time(out, model, given, time)


def print_gpus(
    out: Output, model: Model, given: Configuration, text: str, sharded: bool | None
) -> None:
    """`--gpus`: each method in each layout on several GPUs, and the most that fits."""
    from pipeline.calc import parallel  # the overview starts without

    devices, shapes = parallel.parse_devices(text), model.shapes
    answer = parallel.answer(shapes, given, devices, sharded)
    if out.json:
        print_json(answer)
        return
    rows = []
    for run in answer["runs"]:
        row = {**run, **run["memory"], **run["received"]}
        del row["memory"], row["received"]
        rows.append(row)
    if out.rows([*rows[0]], [[*row.values()] for row in rows]):
        return

    gpu = devices.gpu
    link = f", {gpu.via} {gpu.link:g} GB/s each way" if gpu.link else ""
    stdout.print(Text.assemble((f"{shapes.name} on {devices.number} × {gpu.label}", "bold"), link))
    _print_dim(f"{given.run.size} per GPU (tensor: on all together); GiB per GPU\n")
    columns = ("", "layout", "weights", "peak", "fits", "least", "GB moved", "step, s", "tokens/s")
    shown = []
    for row in rows:
        sizes = (gib(row["weights"]), gib(row["peak"]), MARKS[row["fits"]])
        least = str(row["least_gpus"] or "none")
        speed = ("?", "?")
        if row["seconds"]:
            speed = (f"{row['seconds']:,.3g}", f"{row['tokens_per_second']:,.0f}")
        moved = f"{row['moved'] / 1e9:.3g}"
        shown.append((row["method"], row["layout"], *sizes, least, moved, *speed))
    print_table(columns, shown, right=columns[2:])

    about = f"{given.method.title}, {given.run.precision}; the rest as given"
    _headline("the most that fits", about)
    most = []
    for name, sizes_of in answer["largest"].items():
        most.append((name, *(capped(value, LARGEST[key]) for key, value in sizes_of.items())))
    print_table(("layout", "batch", "sequence"), most, right=("batch", "sequence"))
    for line in answer["notes"]:
        _print_dim(line)


def print_trace(out: Output, model: Model, given: Configuration) -> None:
    """`--trace`: the peak of the real step under fake tensors, beside the formula's."""
    from pipeline.training.memory.trace import traced_peak

    if model.config is None:
        raise UserError(
            f"--trace builds the model, which needs a config.json; {model.shapes.name} has shapes "
            "only."
        )
    run = replace(given.run, context=0)
    traced = traced_peak(model.config, given.method, run)
    formula = predict(model.shapes, given.method, run).peak
    difference = round(100 * (formula / traced - 1), 3)
    if out.rows(("traced", "formula", "difference_percent"), [(traced, formula, difference)]):
        return
    rows = [
        ("traced", f"{traced:,}", in_units(traced)),
        ("formula", f"{formula:,}", in_units(formula)),
    ]
    print_table(("", "bytes", ""), rows, right=("bytes", ""))
    stdout.print(f"the formula differs by {difference:+.3g}%; without the CUDA context")


def print_explain(out: Output, model: Model, given: Configuration) -> None:
    """`--explain`: the formula of each number with the values inserted."""
    shapes, (_, method, run) = model.shapes, given
    formulas = list(report.explain(shapes, method, run, predict(shapes, method, run)))
    if not out.rows(("what", "formula"), formulas):
        print_table(("", f"{shapes.name}, {method.title}, {run.precision}"), formulas)
