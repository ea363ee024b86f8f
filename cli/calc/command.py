"""`lora calc`: what a fine-tuning run trains, needs and fits on, before anything is downloaded."""

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Annotated, Any

from typer import Option

from cli.options import JsonOption, group
from pipeline.calc.method import configure, first_adapter, names_of
from pipeline.calc.settings import TrainingConfig, options_of
from pipeline.errors import UserError
from pipeline.stages.registry import COUNTED

app = group()
NAMES = names_of(COUNTED.values())
METHOD_HELP = f"Method: {', '.join(NAMES[:-1])} or {NAMES[-1]}."


def with_calculator_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each of the methods and of the step, in place of its `**options`.

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
            parameter = Parameter(name, Parameter.KEYWORD_ONLY, default=value, annotation=annotation)
            parameters.setdefault(name, parameter)
    at = next(index for index, parameter in enumerate(own) if parameter.kind is Parameter.VAR_KEYWORD)
    command.__signature__ = signature(command).replace(parameters=[*own[:2], *parameters.values(), *own[2:at]])  # type: ignore[attr-defined]
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
        float | None, Option(metavar="GIB", help="Show what fits into this memory, and what to change.")
    ] = None,
    gpu: Annotated[str | None, Option(help="The same for a GPU: rtx4090, a100-80, h100 ...")] = None,
    sweep: Annotated[str | None, Option(metavar="KEY=A,B", help="Table over rank, sequence, precision ...")] = None,
    trace: Annotated[
        bool, Option("--trace", help="Run the real step under fake tensors and compare the peaks.")
    ] = False,
    document: Annotated[bool, Option("--document", help="Show the document's numbers beside the exact ones.")] = False,
    list_: Annotated[bool, Option("--list", help="List the built-in models.")] = False,
    explain: Annotated[bool, Option("--explain", help="Show each number's formula with its values.")] = False,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, Option("--csv", help="Print CSV to stdout.")] = False,
    **options: Any,
) -> None:
    """Exact parameters, training memory, what fits your GPU.

    Computed from shapes alone: nothing is downloaded, no GPU is needed.
    """
    from cli.calc import render
    from pipeline.calc.memory import refuse_impossible
    from pipeline.calc.sources.open_model import open_model

    out = render.Output(as_json, as_csv)
    questions = {
        "--list": list_,
        "--document": document,
        "--sweep": sweep is not None,
        "--fit": fit is not None,
        "--gpu": gpu is not None,
        "--trace": trace,
        "--explain": explain,
    }
    asked = [name for name, is_given in questions.items() if is_given]
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} exclude each other. Use one of them.")
    if list_:
        return render.models(out)
    if document:
        return render.document(out)
    for name, rule in options_of(TrainingConfig).items():
        if options[name] is not None and rule.unit != 1:
            options[name] *= rule.unit
    loaded = open_model(model)
    given = configure(loaded.shapes, COUNTED, method, **options)
    refuse_impossible(loaded.shapes, given.method, given.run)
    if sweep is not None:
        return render.sweep(out, loaded, given, sweep)
    if fit is not None or gpu is not None:
        return render.fit(out, loaded, given, fit, gpu)
    if trace:
        return render.trace(out, loaded, given)
    return (render.explain if explain else render.overview)(out, loaded, given)
