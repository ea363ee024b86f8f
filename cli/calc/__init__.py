"""`lora calc`: what a fine-tuning run trains, needs and fits on, before anything is downloaded."""

from collections.abc import Callable
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

from typer import Context, Option

from cli.calc.output import (
    CLASSES,
    Output,
    print_explain,
    print_fit,
    print_gpus,
    print_models,
    print_overview,
    print_sweep,
    print_time,
    print_trace,
)
from cli.options import JsonOption, finite, group
from lora_workbench import calculator
from pipeline.calc import settings
from pipeline.calc.architecture import Model
from pipeline.calc.fit import gpu as find_gpu
from pipeline.calc.fit import gpus
from pipeline.calc.method import Configuration, find_method, first_adapter, names_of
from pipeline.calc.settings import TrainingConfig
from pipeline.errors import UserError
from pipeline.stages.registry import COUNTED

app = group()
NAMES = names_of(COUNTED.values())
METHOD_HELP = f"Method: {', '.join(NAMES[:-1])} or {NAMES[-1]}."


def _option_parameter(name: str, rule: settings.Option) -> Parameter:
    """The parameter, with its Typer option, for an option of a method or of the step.

    It takes any value of its type: the calculator checks it, so that each mistake is one message.
    """
    kind: Any = rule.kind or type(rule.default)
    default = rule.default
    if rule.metavar:  # may be given several times
        kind, default = list[str] | None, None
    elif rule.parse:
        kind, default = str, ",".join(default)
    elif rule.automatic:
        kind, default = kind | None, None
    flags = rule.flags or (f"--{name.replace('_', '-')}",)
    typed = Annotated[kind, Option(*flags, help=rule.help, metavar=rule.metavar)]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=typed)


def _with_method_options(command: Callable[..., None]) -> Signature:
    """The command's signature, with all options of the methods and of the step for `**options`.

    They follow the model and the method; those of the adapter come first.
    """
    model, method, *others, _options = signature(command).parameters.values()
    rules: dict[str, settings.Option] = {}
    for source in (first_adapter(COUNTED), *COUNTED.values(), TrainingConfig):
        for name, rule in settings.options_of(source).items():
            rules.setdefault(name, rule)
    added = [_option_parameter(name, rule) for name, rule in rules.items()]
    return Signature([model, method, *added, *others])


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
    if as_json and as_csv:
        raise UserError("--json and --csv exclude each other.")
    out = Output(as_json, as_csv)
    if price is not None and tokens is None:
        raise UserError(
            "--price needs --tokens: a cost is hours times a price. Add --tokens, such as 5M."
        )
    if shard is not None and gpus_ is None:
        raise UserError(
            "--shard needs --gpus, such as 8xH100: a base is sharded over several. Add it."
        )
    questions = {
        "--list": list_,
        "--sweep": sweep is not None,
        "--fit": fit is not None,
        "--gpu": gpu is not None,
        "--gpus": gpus_ is not None,
        "--trace": trace,
        "--explain": explain,
        "--tokens": tokens is not None and gpu is None,
    }
    asked = [name for name, is_given in questions.items() if is_given]
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} exclude each other. Use one of them.")

    if list_:
        return print_models(out)
    for name, rule in settings.options_of(TrainingConfig).items():
        if rule.unit != 1 and options[name] is not None:
            options[name] *= rule.unit
    if params is not None:
        model, method, options = _of_project(command, params, model, method, options)
    calculation = calculator.calc(model, method, **options)
    loaded, given = calculation.model, calculation.given
    if sweep is not None:
        return print_sweep(out, loaded, given, sweep)
    time = None if tokens is None else _time(loaded, given, gpu, tokens, price)
    if time and (gpu is None or out.csv):
        return print_time(out, loaded, given, time)
    if fit is not None or gpu is not None:
        return print_fit(out, loaded, given, fit, gpu, time)
    if gpus_ is not None:
        return print_gpus(out, loaded, given, gpus_, shard)
    if trace:
        return print_trace(out, loaded, given)
    if explain:
        return print_explain(out, loaded, given)
    return print_overview(out, calculation)


calc.__signature__ = _with_method_options(calc)  # type: ignore[attr-defined]
app.command()(calc)


def _of_project(
    command: Context, params: Path, model: str, method: str, options: dict[str, Any]
) -> tuple[str, str, dict[str, Any]]:
    """A project's model, method and options, where the command line does not give them."""
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
    of_stage = {**options_of_stage(project, stage), **(implied if is_given("method") else {})}
    given = {name: value for name, value in options.items() if is_given(name)}
    return (
        model if is_given("model") else model_source(project),
        method if is_given("method") else stage.method,
        {**options, **of_stage, **given},
    )


def _time(
    model: Model, given: Configuration, gpu: str | None, tokens: str, price: float | None
) -> dict[str, Any]:
    """Hours and cost on this GPU, or on one of each size."""
    from pipeline.calc.time import estimate, parse_tokens  # the overview starts without

    devices = [gpus()[card] for card in CLASSES.values()] if gpu is None else [find_gpu(gpu)]
    return estimate(model.shapes, given.method, given.run, parse_tokens(tokens), devices, price)
