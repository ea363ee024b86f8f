"""The other answers of `lora calc`: models, the document, sweeps, what fits, traces, explanations."""

from dataclasses import replace
from typing import Any

from rich.text import Text

from cli.calc.output import Output, Question
from cli.console import print_json, stdout, table
from pipeline.calc.fit import LARGEST, changes, gpu, largest, of_size
from pipeline.calc.memory import PARTS, predict
from pipeline.calc.parameters import trainable
from pipeline.calc.report import capped, smallest, swept, title_of
from pipeline.calc.sources.open_model import built_in, names
from pipeline.errors import UserError
from pipeline.project.logs.run_log import in_units


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
    from cli.document.claims import show
    from pipeline.workbench import calculated_claims

    _, found = calculated_claims()
    columns = ("section", "quote", "document", "measured", "verdict", "why")
    shown = [(r["section"], r["quote"], *r["shown"].values(), r["verdict"], r["why"]) for r in found]
    if not out.rows(columns, shown):
        show(found)


def sweep(out: Output, question: Question, key: str, values: list[str]) -> None:
    """`--sweep`: one row a value."""
    model = question.model.shapes
    rows: list[tuple[Any, ...]] = []
    for value, method, run in swept(question.method, question.run, key, values):
        memory, trained = predict(model, method, run), trainable(model, method)
        number = int(value) if key in LARGEST else value
        percent = round(100 * trained / model.total, 4)
        rows.append((number, trained, percent, *memory.parts().values(), memory.peak))
    columns = (key, "trainable", "percent", *PARTS, "peak")
    if out.rows(columns, rows):
        return
    shown = [(str(row[0]), f"{row[1]:,}", f"{row[2]:g}", in_units(row[-1]), smallest(row[-1])) for row in rows]
    heads = (key, "trainable", "%", "peak", "smallest device")
    stdout.print(table(heads, shown, right=heads[:4]))
    stdout.print(
        f"{question.model.shapes.name}, {title_of(question.method)}; --csv has every part", style="dim", markup=False
    )


def fit(out: Output, question: Question, budget: float | None, name: str | None) -> None:
    """`--fit` and `--gpu`: the most that fits, and what to change where nothing does."""
    device = gpu(name) if name is not None else of_size(budget or 0)
    model, method, run = question.model.shapes, question.method, question.run
    peak, most = predict(model, method, run).peak, largest(model, method, run, device.bytes)
    fits = peak <= device.bytes
    ways = [] if fits else list(changes(model, method, run, device.bytes))
    if out.json:
        found = {**vars(most), "peak": peak, "budget": device.bytes, "fits": fits}
        print_json({"model": model.name, **found, "changes": [{"change": w, "peak": p} for w, _, _, p in ways]})
        return
    changes_ = [(f"change: {words}", needed) for words, _, _, needed in ways]
    if out.rows(("what", "value"), [*vars(most).items(), ("peak", peak), ("fits", fits), *changes_]):
        return
    verdict = "fits" if fits else "does not fit"
    stdout.print(
        Text.assemble((f"{model.name}, {title_of(method)}, {run.precision}: {in_units(peak)} {verdict}", "bold"))
    )
    room = f", {in_units(device.bytes)}" if name else ""
    stdout.print(f"on {device.label}{room}; {run.batch} × {run.sequence:,} tokens", markup=False)
    if fits:
        rows = [(key, capped(value, LARGEST.get(key))) for key, value in vars(most).items() if value is not None]
        stdout.print("\nthe most that fits, the rest as given")
        stdout.print(table(("setting", "largest"), rows, right=("largest",)))
        return
    stdout.print("\nchange this" if ways else "\nnothing to change is left")
    for words, _, _, size in ways:
        stdout.print(f"  {words}  → {in_units(size)}{'  fits' if size <= device.bytes else ''}", markup=False)
    needed = ways[-1][3] if ways else peak
    if needed > device.bytes:
        stdout.print(f"a larger device is needed: {smallest(needed)}")


def trace(out: Output, question: Question) -> None:
    """`--trace`: the step that this project runs, under fake tensors, beside the formula."""
    from pipeline.training.memory.trace import traced_peak

    model = question.model
    if model.config is None:
        raise UserError(f"--trace builds the model, which needs a config.json; {model.shapes.name} has shapes alone.")
    run = replace(question.run, context=0)
    traced = traced_peak(model.config, question.method, run)
    formula = predict(model.shapes, question.method, run).peak
    difference = round(100 * (formula / traced - 1), 3)
    if out.rows(("traced", "formula", "difference_percent"), [(traced, formula, difference)]):
        return
    rows = [("traced", f"{traced:,}", in_units(traced)), ("formula", f"{formula:,}", in_units(formula))]
    stdout.print(table(("", "bytes", ""), rows, right=("bytes", "")))
    stdout.print(f"the formula differs by {difference:+.3g}%; without the CUDA context")


def explain(out: Output, question: Question) -> None:
    """`--explain`: each number's formula with the values put in."""
    from pipeline.calc.explain import explain as lines

    model, method, run = question.model.shapes, question.method, question.run
    found = list(lines(model, method, run, predict(model, method, run)))
    if not out.rows(("what", "formula"), found):
        stdout.print(table(("", f"{model.name}, {title_of(method)}, {run.precision}"), found))
