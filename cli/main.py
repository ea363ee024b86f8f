"""`lora`: the commands, each in a module of its own, and the conversion of errors to messages and
exit codes.
"""

import gc
import os
import sys
from contextlib import suppress
from functools import cache
from importlib import import_module
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import Annotated, Any, NoReturn

import typer
from typer import Exit, Option

from cli.options import UNDER_DVC, Group, Lazy, group, noted
from pipeline.errors import (
    FULL,
    Interrupted,
    OutOfMemory,
    UserError,
    explain,
    first_line,
    is_out_of_memory,
    path_problem,
)
from pipeline.extensions import ExtensionError, Registry
from pipeline.files.text import printable
from pipeline.project.process import (
    exit_code,
    open_streams,
    postpone_collection,
    require_current_folder,
    world,
)

# What was imported stays to the end. Python would look through it for garbage, at exit at the
# latest, which took a tenth of `lora --help`.
gc.freeze()

STDOUT = 1

# Command → its module and its line in `lora --help`, so that the help imports no module.
COMMANDS = {
    "train": ("cli.new", "Fine-tune a base on your data, in one command."),
    "new": ("cli.new", "Make a project: params, data, dvc.yaml."),
    "params": ("cli.project", "Show every setting, its source and its meaning."),
    "advise": ("cli.advise", "Compare the settings with what experiments advise."),
    "import": ("cli.stages", "Import the base model → artifacts/base."),
    "pretrain": ("cli.stages", "Train MiniGPT from scratch → artifacts/base."),
    "expand-vocab": ("cli.stages", "Add rows for new words → artifacts/expanded."),
    "train-from-scratch": ("cli.stages", "Train a model from random weights on old and new data."),
    "merge": ("cli.stages", "Merge the adapter into its base."),
    "evaluate": ("cli.stages", "Compare all variants → artifacts/evaluation."),
    "finetune": ("cli.stages.finetune", "Fine-tune the expanded base with one method."),
    "report": ("cli.project.report", "Show the last comparison, and where the report is."),
    "spectrum": ("cli.spectrum", "Singular values of a fine-tuning; LoRA; intruders."),
    "calc": ("cli.calc", "Exact parameters, training memory, what fits your GPU."),
    "prompt": ("cli.inference.prompt", "Prompt a model: its top next tokens and a completion."),
    "chat": ("cli.inference.chat", "Talk with a model over several turns."),
    "compare": ("cli.inference.prompt", "Ask every variant of the project, side by side."),
    "serve": ("cli.inference.serve", "Serve base and adapters over OpenAI's HTTP API."),
    "adapters": ("cli.adapters", "List, compare, combine, compress, export adapters."),
    "export": ("cli.export", "Export an adapter for another program, or merged."),
    "certify": ("cli.export", "Certify an adapter in other programs."),
    "push": ("cli.export", "Push an export of an adapter to the Hugging Face hub."),
    "data": ("cli.data", "Check, show and convert data files."),
    "fleet": ("cli.fleet", "Runs on other devices and machines."),
    "runs": ("cli.runs", "List training runs; send finished ones to a tracker."),
    "cache": ("cli.project", "Show or prune the cache of finished stages."),
    "doctor": ("cli.project.doctor", "Show versions, devices, memory, missing libraries."),
}


def _names() -> list[str]:
    return [*COMMANDS, *ADDED]


def _find(name: str, app: Any) -> Any:
    """The command or group of this name in a Typer app; None if there is none."""
    for command in app.registered_commands:
        if name == (command.name or typer.main.get_command_name(command.callback.__name__)):
            return command
    # a group may have its name and its help from several places
    groups = map(typer.main.solve_typer_info_defaults, app.registered_groups)
    return next((below for below in groups if below.name == name), None)


def _lacks(name: str, app: Any) -> str:
    return "" if _find(name, app) else f"its app has no command {name}."


# by extensions: name → the Typer app that has it
ADDED = Registry[Any]("command", taken=COMMANDS.keys(), check=_lacks)


@cache
def _load(name: str) -> Any:
    """The command of this name. What it imports stays to the end too, and is never looked through
    for garbage: that took an eighth of `lora calc`.
    """
    gc.disable()
    try:
        return _command(name)
    finally:
        gc.freeze()
        gc.enable()


def _command(name: str) -> Any:
    # a command that loads an adapter must know every method's kind
    import pipeline.stages.registry  # noqa: F401

    whole = group()
    whole.add_typer(import_module(COMMANDS[name][0]).app if name in COMMANDS else ADDED[name])
    whole.callback()(lambda: None)  # without it, Typer makes no group of a single command
    return typer.main.get_group(whole).commands[name]


class _Commands(Group):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: Any = Lazy(_names, _load)

    def format_commands(self, _ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _line(name)) for name in _names()])


def _line(name: str) -> str:
    """A command's line in `lora --help`."""
    if name in COMMANDS:
        return COMMANDS[name][1]
    try:
        about = _find(name, ADDED[name])
    except ExtensionError:
        return "Cannot be imported: `lora doctor` says why."
    text = about.help or (about.callback.__doc__ if about.callback else "") or ""
    return text.strip().partition("\n")[0]


app = group(
    help=(
        "Adapt language models with LoRA: train, merge, evaluate, prompt. Settings are in "
        "params.yaml."
    ),
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    cls=_Commands,
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"lora {version('lora-workbench')}")
        raise Exit


@app.callback()
def root(
    _version_wanted: Annotated[
        bool,
        Option("--version", callback=_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    noted.clear()


def main() -> None:
    """Run a command. Exit codes: 0 success, 1 UserError, 2 wrong usage, 128 + n interrupted by
    signal n; in a unit of a fleet also AGAIN and NO_MEMORY.
    """
    postpone_collection()
    open_streams()
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # ? for what is no text
    sys.stdout, sys.stderr = map(_unbroken, (sys.stdout, sys.stderr))
    # before torch is loaded. Batches differ in length: CUDA's allocator otherwise keeps gaps that
    # no tensor fits into
    if sys.platform == "linux" and not os.environ.keys() & {
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
    }:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    try:
        require_current_folder()
        rank = world()
    except UserError as error:
        _exit(str(error), 1)
    if rank.world_size > 1 or UNDER_DVC:
        from pipeline.training.parallel.launch import end_with_launcher

        end_with_launcher()
    try:
        try:
            app(prog_name="lora")
        except SystemExit:  # so every command ends that has printed its result
            sys.stdout.flush()  # the disk that it goes to may be full
            raise
    except (UserError, Interrupted) as error:
        # if this rank failed, torchrun would stop the one that reports before it does
        if not rank.reports_errors:
            raise SystemExit(0) from None
        if isinstance(error, Interrupted):
            _exit(
                f"{error}.{' Run the same command to resume.' * error.resumes}",
                128 + error.signal_number,
            )
        _exit(str(error), exit_code(error))
    except (MemoryError, RuntimeError) as error:
        if problem := path_problem(error):
            _exit(str(problem), 1)
        if not is_out_of_memory(error):
            raise
        _exit(
            f"out of memory ({first_line(error)}). Use a smaller model, shorter texts or smaller "
            "params (rank, batch_size, tokens_per_batch): `lora calc` shows what they need. Set "
            "--device cpu to run on the CPU.",
            exit_code(OutOfMemory),
        )
    except OSError as error:
        _exit(f"{explain(error)} Existing results are unchanged.", 1)


class _Unbroken(FileIO):
    """Standard output or error that may be closed by its reader, such as `head`: what follows is
    lost, and no error.

    The command goes on: `lora train | head` trains, and whether a reader was quicker changes no
    exit code. A full disk is an error of standard output, once; of standard error it is ignored.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            if error.errno in FULL and self.fileno() == STDOUT:
                raise
            return len(data)


def _unbroken(stream: Any) -> Any:
    """The same stream, which outlives its reader and prints ? for characters that the terminal
    cannot encode.
    """
    if not isinstance(stream, TextIOWrapper):
        return stream
    stream.reconfigure(errors="replace")
    if not isinstance(getattr(stream.buffer, "raw", stream.buffer), FileIO):  # in tests
        return stream
    stream.flush()
    return TextIOWrapper(
        BufferedWriter(_Unbroken(stream.fileno(), "wb", closefd=False)),
        encoding=stream.encoding,
        errors="replace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _exit(message: str, code: int) -> NoReturn:
    message = printable(message)
    with suppress(OSError):  # a flush that fails must not hide the message
        sys.stdout.flush()
    sys.stderr.write(f"{message}\n" if code > 128 else f"error: {message}\n")
    raise SystemExit(code)


if __name__ == "__main__":  # for the processes of --devices
    main()
