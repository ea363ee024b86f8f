"""The other outputs of `lora calc`: models, the document's claims, sweeps, what fits, traces, formulas."""

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
    shapes = [(name, built_in(name).shapes) for name in names()]
    columns = ("name", "parameters", "published", "family", "blocks", "width", "source")
    rows = [(n, s.total, s.published, s.family, len(s.blocks), s.hidden, s.source) for n, s in shapes]
    if not out.rows(columns, rows):
        shown = [(n, f"{t:,}", p, f, str(b), f"{w:,}") for n, t, p, f, b, w, _ in rows]
        stdout.print(table(columns[:6], shown, right=("parameters", "blocks", "width")))


def document(out: Output) -> None:
    """`--document`."""
    from cli.document.claims import show
    from pipeline.workbench import calculated_claims

    _, claims = calculated_claims()
    columns = ("section", "quote", "document", "measured", "verdict", "why")
    shown = [(r["section"], r["quote"], *r["shown"].values(), r["verdict"], r["why"]) for r in claims]
    if not out.rows(columns, shown):
        show(claims)


def sweep(out: Output, question: Question, key: str, values: list[str]) -> None:
    """`--sweep`: one row per value."""
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
    headers = (key, "trainable", "%", "peak", "smallest device")
    stdout.print(table(headers, shown, right=headers[:4]))
    stdout.print(
        f"{question.model.shapes.name}, {title_of(question.method)}; --csv has every part", style="dim", markup=False
    )


def fit(out: Output, question: Question, budget: float | None, name: str | None) -> None:
    """`--fit` and `--gpu`: the largest values that fit, and what to change if the configuration does not."""
    device = gpu(name) if name is not None else of_size(budget or 0)
    model, method, run = question.model.shapes, question.method, question.run
    peak, largest_fit = predict(model, method, run).peak, largest(model, method, run, device.bytes)
    fits = peak <= device.bytes
    fixes = [] if fits else list(changes(model, method, run, device.bytes))
    if out.json:
        summary = {**vars(largest_fit), "peak": peak, "budget": device.bytes, "fits": fits}
        print_json({"model": model.name, **summary, "changes": [{"change": w, "peak": p} for w, _, _, p in fixes]})
        return
    change_rows = [(f"change: {words}", needed) for words, _, _, needed in fixes]
    if out.rows(("what", "value"), [*vars(largest_fit).items(), ("peak", peak), ("fits", fits), *change_rows]):
        return
    verdict = "fits" if fits else "does not fit"
    stdout.print(
        Text.assemble((f"{model.name}, {title_of(method)}, {run.precision}: {in_units(peak)} {verdict}", "bold"))
    )
    memory_text = f", {in_units(device.bytes)}" if name else ""
    stdout.print(f"on {device.label}{memory_text}; {run.batch} × {run.sequence:,} tokens", markup=False)
    if fits:
        rows = [(key, capped(value, LARGEST.get(key))) for key, value in vars(largest_fit).items() if value is not None]
        stdout.print("\nthe most that fits, the rest as given")
        stdout.print(table(("setting", "largest"), rows, right=("largest",)))
        return
    stdout.print("\nchange this" if fixes else "\nno setting makes it fit")
    for words, _, _, size in fixes:
        stdout.print(f"  {words}  → {in_units(size)}{'  fits' if size <= device.bytes else ''}", markup=False)
    needed = fixes[-1][3] if fixes else peak
    if needed > device.bytes:
        stdout.print(f"a larger device is needed: {smallest(needed)}")


def trace(out: Output, question: Question) -> None:
    """`--trace`: the peak of the real training step under fake tensors, beside that of the formula."""
    from pipeline.training.memory_trace import traced_peak

    model = question.model
    if model.config is None:
        raise UserError(f"--trace builds the model, which needs a config.json; {model.shapes.name} has shapes only.")
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
    """`--explain`: the formula of each number with the values inserted."""
    from pipeline.calc.explain import explain as explanations

    model, method, run = question.model.shapes, question.method, question.run
    formulas = list(explanations(model, method, run, predict(model, method, run)))
    if not out.rows(("what", "formula"), formulas):
        stdout.print(table(("", f"{model.name}, {title_of(method)}, {run.precision}"), formulas))
