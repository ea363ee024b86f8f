"""`lora`: the Typer app, and the conversion of errors to messages and exit codes."""

import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from cli import adapters, data, export, prompt, spectrum, stages
from cli.calc import command
from cli.document import claims, figures, study
from cli.options import group
from cli.project import cache, doctor, new, report
from pipeline.errors import Interrupted, UserError, explain, first_line, is_out_of_memory
from pipeline.files.text import printable
from pipeline.project.process_rank import world

app = group(
    help="Adapt language models with LoRA: train, merge, evaluate, prompt. Settings are in params.yaml.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for part in (
    *(new, stages, report, study, figures, claims, spectrum),
    *(command, prompt, adapters, export, data, cache, doctor),
):
    app.add_typer(part.app)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"lora {version('lora-workbench')}")
        raise typer.Exit


@app.callback()
def root(
    _version_wanted: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run a command. Exit codes: 0 success, 1 UserError, 2 wrong usage, 128 + n interrupted by signal n."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # print ? for characters that the terminal cannot encode
    if world().world_size > 1:
        from pipeline.training.launch import end_with_launcher

        end_with_launcher()
    try:
        app()
    except UserError as error:
        if (
            not world().is_main_process
        ):  # rank 0 reports it; if this rank failed, torchrun would stop rank 0 before it does
            raise SystemExit(0) from None
        _exit(str(error), 1)
    except Interrupted as stop:
        _exit(f"{stop}. Run the same command to resume.", 128 + stop.signal_number)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _exit(
            f"out of memory ({first_line(error)}). Use a smaller model, shorter texts or smaller params (rank, "
            "batch_size): `lora calc` shows what they need. Set CUDA_VISIBLE_DEVICES= to run on the CPU.",
            1,
        )
    except OSError as error:
        _exit(f"{explain(error)} Existing results are unchanged.", 1)


def _exit(message: str, code: int) -> None:
    message = printable(message)
    sys.stderr.write(f"error: {message}\n" if code == 1 else f"{message}\n")
    raise SystemExit(code)


if __name__ == "__main__":  # for torchrun: torchrun --nproc-per-node 2 -m cli.main finetune lora
    main()
