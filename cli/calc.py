"""`lora calc`: what a fine-tuning run trains, needs and fits on, before anything is downloaded."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any

from rich.text import Text
from typer import Context, Option

from cli.console import print_json, stdout, table
from cli.options import JsonOption, finite, group
from pipeline.calc import report
from pipeline.calc.architecture import Model
from pipeline.calc.fit import LARGEST, changes, gpus, largest, of_size
from pipeline.calc.fit import gpu as find_gpu
from pipeline.calc.memory import PARTS, inference, predict, refuse_impossible
from pipeline.calc.method import (
    Configuration,
    configure,
    find_method,
    first_adapter,
    names_of,
    projections,
    trainable,
    why_they_differ,
)
from pipeline.calc.report import PROJECTION, SHADES, capped, gib, smallest, swept
from pipeline.calc.settings import TrainingConfig, options_of
from pipeline.calc.sources.open_model import built_in, names, open_model
from pipeline.errors import UserError
from pipeline.stages.registry import COUNTED, note_targets

app = group()
NAMES = names_of(COUNTED.values())
METHOD_HELP = f"Method: {', '.join(NAMES[:-1])} or {NAMES[-1]}."
BAR = 36  # cells of the largest peak's bar
CLASSES = {  # one card of each common size in GB; Macs follow
    **{"8": "rtx4060", "12": "rtx3060", "16": "rtx4080", "24": "rtx4090", "32": "rtx5090"},
    **{"40": "a100-40", "48": "l40s", "80": "h100", "141": "h200"},
}


def with_calculator_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each of the methods and of the step, in place of its
    `**options`.

    Values are checked by the calculator, so that each mistake is one message.
    """
    own = list(signature(command).parameters.values())
    default = first_adapter(COUNTED)  # its options come first in the help
    parameters: dict[str, Parameter] = {}
    for settings in (default, *COUNTED.values(), TrainingConfig):
        for name, rule in options_of(settings).items():
            kind, value = rule.kind or type(rule.default), rule.default
            if rule.metavar:  # may be given several times
                kind, value = list[str] | None, None  # type: ignore[assignment]
            elif rule.parse:
                kind, value = str, ",".join(value)
            elif rule.automatic:
                kind, value = kind | None, None  # type: ignore[assignment]
            flags = rule.flags or (f"--{name.replace('_', '-')}",)
            annotation = Annotated[kind, Option(*flags, help=rule.help, metavar=rule.metavar)]  # type: ignore[valid-type]
            parameter = Parameter(
                name, Parameter.KEYWORD_ONLY, default=value, annotation=annotation
            )
            parameters.setdefault(name, parameter)
    at = next(
        index for index, parameter in enumerate(own) if parameter.kind is Parameter.VAR_KEYWORD
    )
    command.__signature__ = signature(  # type: ignore[attr-defined]
        command
    ).replace(parameters=[*own[:2], *parameters.values(), *own[2:at]])
    return command


@app.command()
@with_calculator_options
def calc(
    *,
    model: Annotated[
        str, Option(help="Built-in name, folder, config.json, .safetensors, .gguf or hub id.")
    ] = "qwen3-8b",
    method: Annotated[str, Option(help=METHOD_HELP)] = "lora",
    fit: Annotated[
        float | None,
        Option(metavar="GIB", help="Show what fits into this memory, and what to change."),
    ] = None,
    gpu: Annotated[
        str | None, Option(help="The same for a GPU: rtx4090, a100-80, h100 ...")
    ] = None,
    gpus_: Annotated[
        str | None,
        Option(
            "--gpus",
            metavar="NxGPU",
            help="Memory, traffic and speed on several: 8xH100, 2xA100-40GB, 4x24GB.",
        ),
    ] = None,
    shard: Annotated[
        bool | None, Option(help="With --gpus: only the layout of `lora finetune lora --shard`.")
    ] = None,
    tokens: Annotated[
        str | None,
        Option(
            metavar="N", help="Show hours for so many tokens, all epochs together: 5M, 200k, 1.2B."
        ),
    ] = None,
    price: Annotated[
        float | None, Option(callback=finite, help="Dollars per GPU-hour, with --tokens.")
    ] = None,
    sweep: Annotated[
        str | None, Option(metavar="KEY=A,B", help="Table over rank, sequence, precision ...")
    ] = None,
    trace: Annotated[
        bool, Option("--trace", help="Run the real step under fake tensors and compare the peaks.")
    ] = False,
    list_: Annotated[bool, Option("--list", help="List the built-in models.")] = False,
    explain: Annotated[
        bool, Option("--explain", help="Show each number's formula with its values.")
    ] = False,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, Option("--csv", help="Print CSV to stdout.")] = False,
    params: Annotated[
        Path | None,
        Option(
            "--params", help="Count what a project trains: base and settings; options here win."
        ),
    ] = None,
    command: Context,
    **options: Any,
) -> None:
    """Exact parameters, training memory, what fits your GPU.

    Computed from shapes alone: nothing is downloaded, no GPU is needed.
    """
    out = _Output(as_json, as_csv)
    questions = {
        "--list": list_,
        "--sweep": sweep is not None,
        "--fit": fit is not None,
        "--gpu": gpu is not None,
        "--gpus": gpus_ is not None,
        "--trace": trace,
        "--explain": explain,
    }
    asked = [name for name, is_given in questions.items() if is_given]
    if tokens is not None and gpu is None:
        asked.append("--tokens")
    if price is not None and tokens is None:
        raise UserError(
            "--price needs --tokens: a cost is hours times a price. Add --tokens, such as 5M."
        )
    if shard is not None and gpus_ is None:
        raise UserError(
            "--shard needs --gpus, such as 8xH100: a base is sharded over several. Add it."
        )
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} exclude each other. Use one of them.")
    if list_:
        return _print_models(out)
    for name, rule in options_of(TrainingConfig).items():
        if options[name] is not None and rule.unit != 1:
            options[name] *= rule.unit
    if params is not None:
        model, method, options = _of_project(command, params, model, method, options)
    loaded = open_model(model)
    given = configure(loaded.shapes, COUNTED, method, **options)
    refuse_impossible(loaded.shapes, given.method, given.run)
    if sweep is not None:
        return _print_sweep(out, loaded, given, sweep)
    time = None if tokens is None else _time(loaded, given, gpu, tokens, price)
    if time and (gpu is None or out.csv):
        return _print_time(out, loaded, given, time)
    if fit is not None or gpu is not None:
        return _print_fit(out, loaded, given, fit, gpu, time)
    if gpus_ is not None:
        return _print_gpus(out, loaded, given, gpus_, shard)
    if trace:
        return _print_trace(out, loaded, given)
    return (_print_explain if explain else _print_overview)(out, loaded, given)


def _of_project(
    command: Context, params: Path, model: str, method: str, options: dict[str, Any]
) -> tuple[str, str, dict[str, Any]]:
    """Model, method and options of a project, in place of those that are not given on the command
    line.
    """
    from pipeline.stages.registry import (
        METHODS,
        counted_stage,
        model_source,
        open_project,
        options_of_stage,
    )

    def is_given(name: str) -> bool:
        source = command.get_parameter_source(name)
        return source is not None and source.name == "COMMANDLINE"

    project = open_project(params)
    found, implied = find_method(COUNTED, method)
    stage = METHODS[found.name] if is_given("method") else counted_stage(project)
    own = {**options_of_stage(project, stage), **(implied if is_given("method") else {})}
    given = {name: value for name, value in options.items() if is_given(name)}
    return (
        model if is_given("model") else model_source(project),
        method if is_given("method") else stage.method,
        {**options, **own, **given},
    )


@dataclass(frozen=True)
class _Output:
    """The output format: one JSON document, CSV rows, or a table on the terminal."""

    json: bool
    csv: bool

    def __post_init__(self) -> None:
        if self.json and self.csv:
            raise UserError("--json and --csv exclude each other.")

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


def _answer(model: Model, given: Configuration) -> dict[str, Any]:
    """What `--json` says of a model, with a note on what training would adapt."""
    found = report.answer(model.shapes, given.method, given.run)
    return {
        **found,
        "notes": [*found["notes"], *filter(None, [note_targets(model.shapes, given.method)])],
    }


def _print_overview(out: _Output, model: Model, given: Configuration) -> None:
    """Parameters, memory of four methods side by side, and the GPUs that fit each."""
    shapes, (methods, method, run) = model.shapes, given
    if out.json:
        return print_json(_answer(model, given))
    columns = report.side_by_side(shapes, method, run, methods)
    memories = {name: memory for name, (_, _, memory) in columns.items()}
    if out.csv:
        header = ("method", "precision", "total", "trainable", *PARTS, "peak", "peak_at")
        rows = [
            (
                name,
                r.precision,
                shapes.total,
                trainable(shapes, m),
                *size.parts().values(),
                size.peak,
                size.where,
            )
            for name, (m, r, size) in columns.items()
        ]
        out.rows(header, rows)
        return None

    published = f" (published: {shapes.published})" if shapes.published else ""
    stdout.print(Text.assemble((shapes.name, "bold"), f"  {shapes.total:,} parameters{published}"))
    components = [f"{name} {count:,}" for name, count in shapes.components().items()]
    stdout.print(" · ".join(components), style="dim", markup=False)
    trained = trainable(shapes, method)
    title = f"{method.title}: {trained:,} trainable, {100 * trained / shapes.total:.4g}%"
    stdout.print(Text.assemble("\n", (title, "bold")))
    if adapted := projections(shapes, method):
        stdout.print(table(PROJECTION, list(map(report.cells_of, adapted)), right=PROJECTION[1:]))
    simplified = method.simple_count(shapes)
    if simplified is not None and simplified != trained:
        reason = why_they_differ(shapes, method)
        stdout.print(
            f"2·r·d per projection: {simplified:,}; {reason}",
            style="dim",
            markup=False,
        )

    run = next(reversed(columns.values()))[1]
    step = f"{run.size}, {run.attention}, checkpointing {run.checkpointing}"
    _headline("memory of a step, GiB", f"{step}, {run.loss} logits")
    used = [part for part in PARTS if any(memory.parts()[part] for memory in memories.values())]
    cells = [("base in", *(r.precision for _, r, _ in columns.values()))]
    cells += [(part, *(gib(memory.parts()[part]) for memory in memories.values())) for part in used]
    cells.append(("peak", *(gib(memory.peak) for memory in memories.values())))
    stdout.print(table(("", *columns), cells, right=tuple(columns)))
    widest, longest = max(memory.peak for memory in memories.values()), max(map(len, columns))
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

    run = given.run
    *parts, total = inference(shapes, None, run).items()
    generating = " + ".join(f"{name.replace('_', ' ')} {gib(size)}" for name, size in parts if size)
    step = f"merged, {run.precision}, {run.batch} × {run.sequence:,} tokens"
    _headline("to generate, GiB", f"{step}: {generating} = {gib(total[1])}")

    devices = {size: gpus()[card] for size, card in CLASSES.items()}
    devices |= {
        f"Mac {name[4:]}": device for name, device in gpus().items() if name.startswith("mac-")
    }
    _headline("fits on", "● holds the peak, · does not; sizes in GB")
    marks = [
        (name, *("●" if memory.peak <= device.bytes else "·" for device in devices.values()))
        for name, memory in memories.items()
    ]
    stdout.print(table(("", *devices), marks, right=tuple(devices)))
    for note in (
        *shapes.notes,
        *method.notes(shapes),
        *filter(None, [note_targets(shapes, method)]),
    ):
        stdout.print(f"note: {note}", style="dim", markup=False)
    return None


def _print_models(out: _Output) -> None:
    """`--list`."""
    shapes = [(name, built_in(name).shapes) for name in names()]
    columns = ("name", "parameters", "published", "family", "blocks", "width", "source")
    rows = [
        (n, s.total, s.published, s.family, len(s.blocks), s.hidden, s.source) for n, s in shapes
    ]
    if not out.rows(columns, rows):
        shown = [(n, f"{t:,}", p, f, str(b), f"{w:,}") for n, t, p, f, b, w, _ in rows]
        stdout.print(table(columns[:6], shown, right=("parameters", "blocks", "width")))


def _print_sweep(out: _Output, model: Model, given: Configuration, text: str) -> None:
    """`--sweep KEY=A,B`: one row per value."""
    from pipeline.files.text import in_units  # the overview starts without

    key, _, values = text.partition("=")
    key, choices = key.strip(), [value.strip() for value in values.split(",") if value.strip()]
    if not choices:
        raise UserError(f"sweep takes KEY=A,B,..., such as rank=1,2,4,8, got {text!r}.")
    shapes, rows = model.shapes, list[tuple[Any, ...]]()
    for value, method, run in swept(given.method, given.run, key, choices, given.methods):
        memory, trained = predict(shapes, method, run), trainable(shapes, method)
        number = int(value) if key in LARGEST else value
        percent = round(100 * trained / shapes.total, 4)
        rows.append((number, trained, percent, *memory.parts().values(), memory.peak))
    if out.rows((key, "trainable", "percent", *PARTS, "peak"), rows):
        return
    shown = [
        (str(row[0]), f"{row[1]:,}", f"{row[2]:g}", in_units(row[-1]), smallest(row[-1]))
        for row in rows
    ]
    headers = (key, "trainable", "%", "peak", "smallest device")
    stdout.print(table(headers, shown, right=headers[:4]))
    stdout.print(
        f"{shapes.name}, {given.method.title}; --csv has every part", style="dim", markup=False
    )


def _time(
    model: Model, given: Configuration, gpu: str | None, tokens: str, price: float | None
) -> dict[str, Any]:
    """Hours and cost on this GPU, or on one of each size."""
    from pipeline.calc.time import estimate, parse_tokens  # the overview starts without

    devices = [gpus()[card] for card in CLASSES.values()] if gpu is None else [find_gpu(gpu)]
    return estimate(model.shapes, given.method, given.run, parse_tokens(tokens), devices, price)


def _print_time(out: _Output, model: Model, given: Configuration, time: dict[str, Any]) -> None:
    """`--tokens`; with --json added to the answer without it."""
    from pipeline.calc.time import format_hours

    shapes, method, run = model.shapes, given.method, given.run
    if out.json:
        return print_json({**_answer(model, given), "time": time})
    none = (None, None)
    header = ("gpu", "hours_low", "hours_high", "cost_low", "cost_high", "fits")
    if out.rows(
        header, [(t["gpu"], *t["hours"], *(t["cost"] or none), t["fits"]) for t in time["gpus"]]
    ):
        return None
    title = f"{time['tokens']:,} tokens take {time['flops']:.3g} FLOPs"
    _headline(title, f"{shapes.name}, {method.title}, {run.precision}; ● memory suffices")
    rows = [
        (
            gpus()[t["gpu"]].label,
            "●" if t["fits"] else "·",
            format_hours(*t["hours"]),
            *([f"${t['cost'][0]:,.2f}–{t['cost'][1]:,.2f}"] if t["cost"] else []),
        )
        for t in time["gpus"]
    ]
    columns = ("gpu", "fits", "time", "cost")[: len(rows[0])]
    stdout.print(table(columns, rows, right=columns[2:]))
    for line in time["assumptions"]:
        stdout.print(line, style="dim", markup=False)
    return None


def _print_fit(
    out: _Output,
    model: Model,
    given: Configuration,
    budget: float | None,
    name: str | None,
    time: dict[str, Any] | None,
) -> None:
    """`--fit` and `--gpu`: the largest values that fit, and what to change if the configuration
    does not.
    """
    from pipeline.files.text import in_units

    device = find_gpu(name) if name is not None else of_size(budget or 0)
    shapes, (methods, method, run) = model.shapes, given
    peak, most = (
        predict(shapes, method, run).peak,
        largest(shapes, method, run, device.bytes)._asdict(),
    )
    fits = peak <= device.bytes
    fixes = (
        []
        if fits
        else [(w, size) for w, _, _, size in changes(shapes, method, run, device.bytes, methods)]
    )
    if out.json:
        summary = {"model": shapes.name, **most, "peak": peak, "budget": device.bytes, "fits": fits}
        summary |= {"changes": [{"change": words, "peak": size} for words, size in fixes]}
        return print_json(summary | ({"time": time} if time else {}))
    change_rows = [(f"change: {words}", size) for words, size in fixes]
    if out.rows(("what", "value"), [*most.items(), ("peak", peak), ("fits", fits), *change_rows]):
        return None
    verdict = "fits" if fits else "does not fit"
    stdout.print(
        Text(f"{shapes.name}, {method.title}, {run.precision}: {in_units(peak)} {verdict}", "bold")
    )
    room = f"{device.label}, {in_units(device.bytes)}" if name else device.label
    stdout.print(f"on {room}; {run.size}", markup=False)
    if fits:
        rows = [
            (key, capped(value, LARGEST.get(key)))
            for key, value in most.items()
            if value is not None
        ]
        stdout.print("\nthe most that fits, the rest as given")
        stdout.print(table(("setting", "largest"), rows, right=("largest",)))
    else:
        stdout.print("\nchange this" if fixes else "\nno setting makes it fit")
        for words, size in fixes:
            stdout.print(
                f"  {words}  → {in_units(size)}{'  fits' if size <= device.bytes else ''}",
                markup=False,
            )
        needed = fixes[-1][1] if fixes else peak
        if needed > device.bytes:
            stdout.print(f"a larger device is needed: {smallest(needed)}")
    if time:
        _print_time(out, model, given, time)
    return None


def _print_gpus(
    out: _Output, model: Model, given: Configuration, text: str, sharded: bool | None
) -> None:
    """`--gpus`: each method in each layout on several GPUs, and the most that fits of the one that
    was asked for.
    """
    from pipeline.calc import parallel  # the overview starts without

    devices, shapes = parallel.parse_devices(text), model.shapes
    answer = parallel.answer(shapes, given, devices, sharded)
    if out.json:
        return print_json(answer)
    rows = [
        {**row, **row.pop("memory"), **row.pop("received")} for row in map(dict, answer["runs"])
    ]
    rows = [
        {key: value for key, value in row.items() if not isinstance(value, dict)} for row in rows
    ]
    if out.rows([*rows[0]], [[*row.values()] for row in rows]):
        return None
    gpu = devices.gpu
    link = f", {gpu.via} {gpu.link:g} GB/s each way" if gpu.link else ""
    stdout.print(Text.assemble((f"{shapes.name} on {devices.number} × {gpu.label}", "bold"), link))
    stdout.print(
        f"{given.run.size} per GPU (tensor: on all together); GiB per GPU\n",
        style="dim",
        markup=False,
    )
    columns = ("", "layout", "weights", "peak", "fits", "least", "GB moved", "step, s", "tokens/s")
    shown = [
        (
            row["method"],
            row["layout"],
            *(gib(row[key]) for key in ("weights", "peak")),
            "●" if row["fits"] else "·",
            str(row["least_gpus"] or "none"),
            f"{row['moved'] / 1e9:.3g}",
            f"{row['seconds']:,.3g}" if row["seconds"] else "?",
            f"{row['tokens_per_second']:,.0f}" if row["seconds"] else "?",
        )
        for row in rows
    ]
    stdout.print(table(columns, shown, right=columns[2:]))
    _headline(
        "the most that fits", f"{given.method.title}, {given.run.precision}; the rest as given"
    )
    most = [
        (name, *(capped(value, LARGEST[key]) for key, value in sizes.items()))
        for name, sizes in answer["largest"].items()
    ]
    stdout.print(table(("layout", "batch", "sequence"), most, right=("batch", "sequence")))
    for line in answer["notes"]:
        stdout.print(line, style="dim", markup=False)
    return None


def _print_trace(out: _Output, model: Model, given: Configuration) -> None:
    """`--trace`: the peak of the real training step under fake tensors, beside that of the
    formula.
    """
    from pipeline.files.text import in_units
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
    stdout.print(table(("", "bytes", ""), rows, right=("bytes", "")))
    stdout.print(f"the formula differs by {difference:+.3g}%; without the CUDA context")


def _print_explain(out: _Output, model: Model, given: Configuration) -> None:
    """`--explain`: the formula of each number with the values inserted."""
    shapes, (_, method, run) = model.shapes, given
    formulas = list(report.explain(shapes, method, run, predict(shapes, method, run)))
    if not out.rows(("what", "formula"), formulas):
        stdout.print(table(("", f"{shapes.name}, {method.title}, {run.precision}"), formulas))
