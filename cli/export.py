"""`lora export`: an adapter in each of the registered formats."""

from typing import Annotated

from typer import BadParameter, Option

from cli.options import (
    AdapterArgument,
    BaseNameOption,
    BaseOption,
    OutOption,
    PromptsOption,
    TrustOption,
    WidthOption,
    group,
)
from pipeline.export.formats import FORMATS, Export, write

HELP = "Export an adapter for another program, or merged."
app = group()


def known(name: str) -> str:
    """Callback for --format: a Literal type cannot list what a registry finds."""
    if name not in FORMATS:
        raise BadParameter(f"{name!r} is not one of {', '.join(FORMATS)}.")
    return name


FormatOption = Annotated[
    str, Option("--format", metavar=f"<{'|'.join(FORMATS)}>", callback=known, help="Format to write.")
]

QuantizeOption = Annotated[
    str | None, Option(metavar="KIND,…", help="Kinds of GGUF files: f16,q8_0,q4_k_m; default: f16.")
]


@app.command(help="\n".join((HELP, "\n\b", *(f"{name:14}{each.about}" for name, each in FORMATS.items()))))
def export(
    path: AdapterArgument,
    out: OutOption,
    form: FormatOption,
    base: BaseOption = None,
    base_name: BaseNameOption = None,
    precision: WidthOption = None,
    prompts: PromptsOption = None,
    trust_remote_code: TrustOption = False,
    quantize: QuantizeOption = None,
) -> None:
    from cli.console import follow, print_line

    exported = Export(path, base, base_name, precision, prompts, trust_remote_code, quantize)
    for line in follow(write(form, exported, out), "export"):
        print_line(line)
