"""Options that several commands share, and the project that --params names."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, BadParameter, Option, Typer
from typer.core import TyperCommand, TyperGroup

from pipeline.errors import UserError
from pipeline.files.text import printable
from pipeline.project import process

if TYPE_CHECKING:
    from pipeline.project.stage_graph import Project


def base_folder(base: Path | None) -> Path | None:
    """Callback for --base: its folder, named as `base` in params.yaml. Raises UserError."""
    if (
        base is None
        or base.is_dir()
        or (base.suffix != ".gguf" and (base.parent == Path() or base.parent.is_dir()))
    ):
        return base  # a folder; if it is missing, the command says so
    from cli.console import print_note
    from pipeline.models.import_base import import_to_cache

    return import_to_cache(base, lambda: print_note(f"importing {base}, once"))


def adapter_folder(name: str) -> Path:
    """Parser of an adapter: its folder, or the name of a run of the project here.

    Raises UserError for a run of several adapters.
    """
    from pipeline.adapters.config import CONFIG
    from pipeline.project.cache import Cache
    from pipeline.project.stage_graph import cache_folder

    path = Path(name)
    results = Cache(cache_folder(Path())).results()
    made = [link for link in results if link.parent.name == name]
    if path.exists() or not made:
        return path
    adapters = [folder for folder in made if (folder / CONFIG).is_file()]
    if len(adapters) > 1:
        raise UserError(f"{name} has several adapters. Name one: {', '.join(map(str, adapters))}.")
    return adapters[0] if adapters else made[0]


def use_device(name: str | None) -> None:
    """Callback for --device: what this process, and all that it starts, compute on."""
    if name is not None and not process.is_valid(name):
        raise BadParameter(f"{name!r} must be {process.RULE}.")
    if name is not None:
        process.ask(name)


ParamsOption = Annotated[
    Path, Option("--params", help="Params file; paths in it are relative to its folder.")
]
SetOption = Annotated[
    list[str] | None,
    Option(
        "--set", metavar="KEY=VALUE", help="Override one value for this run: finetune_lora.rank=8"
    ),
]
NameOption = Annotated[
    str | None,
    Option(
        help="Keep this run under a name, with its evaluation, whatever is trained later: `lora runs`."
    ),
]
ForceOption = Annotated[bool, Option("--force", help="Run even if the cache has the result.")]
CheckpointOption = Annotated[
    int | None,
    Option(
        "--checkpoint-every",
        min=1,
        help="Most steps that a kill costs: checkpoints to resume from are this far apart.",
    ),
]
ADAPTER = "Adapter folder, or the name of a run."
AdapterArgument = Annotated[Path, Argument(metavar="PATH", parser=adapter_folder, help=ADAPTER)]
DevicesOption = Annotated[
    int, Option("--devices", min=1, help="Number of processes that train, one per GPU.")
]
NodesOption = Annotated[
    int, Option("--nnodes", min=1, help="Number of machines; run the same command on each.")
]
EndpointOption = Annotated[
    str | None,
    Option(
        "--rdzv-endpoint",
        metavar="HOST:PORT",
        help="With --nnodes: one of the machines, and a free port.",
    ),
]
NodeRankOption = Annotated[
    int | None,
    Option(
        "--node-rank", min=0, help="With --nnodes: this machine's number, 0 at --rdzv-endpoint."
    ),
]
OnOption = Annotated[
    str | None,
    Option("--on", metavar="NAME", help="Run it in units: local, or a cluster of fleet.yaml."),
]
DetachOption = Annotated[
    bool,
    Option("--detach", help="With --on: do not wait; what is left to do follows in the queue."),
]
PartsOption = Annotated[int | None, Option(min=1, help="With --on: units of a pass.")]
ShardOption = Annotated[
    bool | None,
    Option(
        "--shard/--no-shard",
        help="Shard the base over the devices; default: if a step does not fit one.",
    ),
]
BaseOption = Annotated[
    Path | None,
    Option(
        "--base",
        callback=base_folder,
        help=(
            "Base: folder, .gguf file or hub id; default: the base named by the adapter, or "
            "artifacts/expanded."
        ),
    ),
]
BaseNameOption = Annotated[
    str | None,
    Option(
        "--base-name", help="Name of the base to write; default: the hub id it was imported from."
    ),
]
OutOption = Annotated[Path, Option("--out", help="Output folder.")]
WidthOption = Annotated[
    Literal["fp32", "bf16", "fp16"] | None,
    Option(help="dtype of the merged weights; default: the base's."),
]
PromptsOption = Annotated[
    Path | None, Option(help="Prompts to compare the merged model with base + adapter; loads both.")
]
# The callback sets the device: commands that compute have the option, and never read its value.
DeviceOption = Annotated[
    str | None,
    Option(
        "--device",
        metavar="NAME",
        callback=use_device,
        help="cpu, cuda, cuda:N, mps or auto; default: LORA_DEVICE, then `device:` of params.yaml.",
    ),
]
TrustOption = Annotated[
    bool, Option("--trust-remote-code", help="Run the code that came with the base.")
]
ColumnsOption = Annotated[
    str | None,
    Option(
        "--columns",
        metavar="KEY=COLUMN,…",
        help="Names in the file: prompt=question,completion=answer; of turns and roles too: "
        "messages=dialog,role=speaker,content=text,user=customer",
    ),
]
PlainOption = Annotated[
    bool,
    Option(
        "--no-template",
        help="Take plain prompts and completions as they are, without the base's chat template.",
    ),
]
JsonOption = Annotated[bool, Option("--json", help="Print one JSON document to stdout.")]
DEFAULT_PARAMS = Path("params.yaml")
# the longest name of a stage in dvc.yaml: lines of `dvc repro` are aligned to it
WIDEST = len("finetune_freeze")
# the note on other tools' names, once it is printed
noted = list[str]()
# DVC runs the command as one of many stages: it prints one line
UNDER_DVC = "DVC_STAGE" in os.environ


def finite(value: float | None) -> float | None:
    """Callback for float options: min and max do not reject nan, nor inf if only one is given."""
    if value is not None and not isfinite(value):
        raise BadParameter(f"{value} is not a finite number.")
    return value


def size_of(text: str) -> int:
    """Parser of options that are a size: the bytes of 5GB, 1.5 GiB or 500MB."""
    match = re.fullmatch(
        r"(\d{1,9}(?:\.\d{1,9})?) ?([kmgt])(i?)b", str(text).strip(), re.IGNORECASE | re.ASCII
    )
    if not match:
        raise BadParameter(f"{text!r} must be a size such as 500MB, 5GB or 1.5GiB.")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("kmgt".index(prefix.lower()) + 1))


def columns_of(text: str | None) -> dict[str, str]:
    """The columns of `--columns`: key of a format → name in the file."""
    from pipeline.data.columns import parse_columns

    try:
        return parse_columns(text or "")
    except UserError as error:
        raise BadParameter(str(error)) from None


class Lazy(Mapping[str, Any]):
    """A group's commands, each imported when needed: a third of the time of `lora --help`."""

    def __init__(self, names: Callable[[], Iterable[str]], load: Callable[[str], Any]) -> None:
        self._names, self._load = names, load

    def __getitem__(self, name: str) -> Any:
        if name not in self._names():
            raise KeyError(name)
        return self._load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(list(self._names()))


@contextmanager
def _printable_errors() -> Iterator[None]:
    """Removes control characters from Click's usage errors, which quote what was typed."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message"):
            error.message = printable(error.message)  # type: ignore[attr-defined]
        raise


class Group(TyperGroup):
    """Suggests today's name for an old command or option, or for another tool's."""

    def list_commands(self, _ctx: Any) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = self.list_commands(ctx)
        if args[0] not in known:
            from pipeline.project.params.aliases import COMMANDS

            if (meant := COMMANDS.get(args[0])) in known:
                ctx.fail(f"No such command {args[0]!r}. Did you mean {meant!r}?")
        return super().resolve_command(ctx, args)

    def make_context(self, *args: Any, **more: Any) -> Any:
        with _printable_errors():
            return super().make_context(*args, **more)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _printable_errors():
                return super().invoke(ctx)
        except Exception as error:  # Typer does not export the class of an unknown option's error
            unknown: Any = error if hasattr(error, "option_name") else None
            # of a command of this very group
            if unknown and unknown.ctx and unknown.ctx.parent is ctx:
                from pipeline.project.params.aliases import OPTIONS

                meant = OPTIONS.get(unknown.option_name)
                if any(meant in option.opts for option in unknown.ctx.command.params):
                    unknown.message = f"{unknown.message}. Did you mean {meant}?"
                    unknown.possibilities = None
            raise


class SettingsCommand(TyperCommand):
    """A command whose unknown options that name a setting, ours or another tool's, are --set."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        known = {name for option in self.params for name in (*option.opts, *option.secondary_opts)}
        given = {arg.partition("=")[0] for arg in args if arg.startswith("--")}
        return super().parse_args(ctx, args if given <= known else _as_settings(args, known))


def _as_settings(args: list[str], known: Set[str]) -> list[str]:
    """Arguments with --lora_r 8 as --set lora_r=8, and --output_dir out as --out out.

    An option without a value is a switch that is on; several values are a list.
    """
    from pipeline.project.params.aliases import KEYS, OPTIONS, why_none
    from pipeline.project.params.other_names import SAME
    from pipeline.project.params.schema import hints
    from pipeline.stages.registry import METHODS

    keys = {*KEYS, *SAME, *(key for stage in METHODS.values() for key in hints(stage.settings))}
    result, waiting = list[str](), list(args)
    while waiting:
        option, equals, value = waiting.pop(0).partition("=")
        key = option.removeprefix("--").replace("-", "_")
        as_ours = f"--{KEYS.get(key, key).replace('_', '-')}"
        ours = OPTIONS.get(f"--{key.replace('_', '-')}", as_ours)
        if not option.startswith("--") or option in known:
            result.append(f"{option}{equals}{value}")
        elif ours in known or as_ours in known:
            result += [ours if ours in known else as_ours, *[value] * bool(equals)]
        elif key in keys or why_none(key):
            values = [value] * bool(equals)
            while waiting and not equals and not re.match("-[^0-9]", waiting[0]):
                values.append(waiting.pop(0))
            text = f"[{', '.join(values)}]" if len(values) > 1 else "".join(values) or "true"
            result += ["--set", f"{key}={text}"]
        else:
            result.append(f"{option}{equals}{value}")
    return result


def group(**settings: Any) -> Typer:
    """A Typer with plain help: Rich's boxes would double the time of `lora --help`."""
    return Typer(rich_markup_mode=None, **{"cls": Group, **settings})


def project_of(params: Path, overrides: list[str] | None = None) -> "Project":
    """Open the project of `--params` and validate its values; a note says which names it took."""
    from pipeline.stages.registry import open_project

    project = open_project(params, overrides or ())
    note_names(project.params.note)
    return project


def note_names(note: str) -> None:
    """Print what other tools' names became, once in a command, by the first of its processes.

    Of DVC's stages those print it whose section it concerns.
    """
    if not note or noted or os.environ.get("DVC_STAGE", "") not in note:
        return
    from cli.console import print_note
    from pipeline.training.parallel.launch import LAUNCHER

    noted.append(note)
    if process.world().is_main_process and LAUNCHER not in os.environ:
        print_note(note)
