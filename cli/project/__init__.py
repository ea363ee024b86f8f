"""`lora params` and `lora cache`: a project's settings, and its finished stages."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context, Option

from cli.options import (
    DEFAULT_PARAMS,
    JsonOption,
    ParamsOption,
    SetOption,
    finite,
    group,
    project_of,
    size_of,
)
from pipeline.errors import UserError
from pipeline.files.text import in_units

if TYPE_CHECKING:
    from pipeline.project.cache import Cache

app = group()

cache = group(help="Show or prune the cache of finished stages.", invoke_without_command=True)
app.add_typer(cache, name="cache")
settings = group(help="Show every setting, its source and its meaning.", no_args_is_help=True)
app.add_typer(settings, name="params")

MUCH = 500_000_000  # bytes of a cache that are worth a hint
SOURCE = 42  # the column of a value's source, where the value leaves room


@settings.command("show")
def show_params(
    section: Annotated[str | None, Argument(metavar="SECTION", help="Only this section.")] = None,
    path: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print all settings as a params file, with their sources.

    Sources, of which a later one wins: a stage's defaults, the training block, its section, --set.
    """
    from cli.console import print_json, print_line
    from pipeline.project.params.edit import dump_inline
    from pipeline.project.params.load import TOP_LEVEL, key_path
    from pipeline.project.params.schema import hints

    params = project_of(path, overrides).params
    names = [
        name
        for name in params.kinds
        if name in params.sections and (name != "import" or params.origin.imports)
    ]
    if section is not None and section not in names:
        raise UserError(f"{section} is not a section of this project. It has {', '.join(names)}.")
    names = names if section is None else [section]
    above: dict[str, Any] = {}
    if section is None:
        above = {
            "base": params.origin.base,
            "report_to": params.report_to,
            "device": params.running.device,
        }
    rows = {key: (value, params.source(TOP_LEVEL[key], key)) for key, value in above.items()}
    for name in names:
        for key in hints(params.kinds[name]):
            value = getattr(params.section(name), key)
            rows[key_path(name, key)] = (value, params.source(name, key))
    if as_json:
        print_json(
            [
                {"key": key, "value": value, "source": source}
                for key, (value, source) in rows.items()
            ]
        )
        return
    for name in ("", *names):  # "" has what stands above the sections
        if name:
            print_line(f"{name}:")
        for path_of_key, (value, source) in rows.items():
            of_section, _, key = path_of_key.rpartition(".")
            if of_section == name:
                setting = f"{'  ' * bool(name)}{key}: {dump_inline(value)}"
                print_line(f"{setting:<{SOURCE}}  # {source}")


@settings.command()
def explain(
    key: Annotated[
        str, Argument(metavar="KEY", help="A key, such as finetune_lora.rank, or a section.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Say what a key means, which values it may have, and its default."""
    from cli.console import print_json, stdout
    from pipeline.project.params.aliases import KEYS, suggest
    from pipeline.project.params.edit import dump_inline
    from pipeline.project.params.load import RUNNING, TOP_LEVEL, TRAINING, key_path
    from pipeline.project.params.schema import Pretrained, Section, hints, meaning, rule
    from pipeline.project.params.sections import Running, Training
    from pipeline.stages.registry import GRAPH

    kinds: dict[str, type[Section]] = {TRAINING: Training, **GRAPH.sections, RUNNING: Running}
    path = f"{TOP_LEVEL[key]}.{key}" if key in TOP_LEVEL else key
    section, _, name = path.partition(".")
    if section not in kinds:
        ours = KEYS.get(key, key)
        owners = (f"{owner}.{ours}" for owner, kind in kinds.items() if ours in hints(kind))
        meant = suggest(section, kinds, KEYS) or next(owners, None)
        known = f"Did you mean {meant}?" if meant else f"Known: {', '.join(kinds)}."
        raise UserError(f"There is no section {section}. {known}")
    kind = kinds[section]
    if name and name not in hints(kind):
        meant = suggest(name, list(hints(kind)), KEYS, section)
        known = f"Did you mean {section}.{meant}?" if meant else f"Known: {', '.join(hints(kind))}."
        raise UserError(f"There is no key {key}. {known}")
    facts: list[dict[str, Any]] = [
        {
            "key": key_path(section, field),
            "meaning": meaning(kind, field),
            "rule": rule(kind, field),
            "default": dump_inline(getattr(kind(), field)),
            "pretrained": dump_inline(getattr(kind.defaults(Pretrained()), field)),
        }
        for field in ([name] if name else hints(kind))
    ]
    if as_json:
        print_json(facts)
        return
    if not name:
        stdout.print(f"{section}: {' '.join((kind.__doc__ or '').split())}\n", markup=False)
    for fact in facts:
        stdout.print(fact["key"], style="bold", markup=False)
        default = f"default {fact['default']}"
        if fact["pretrained"] != fact["default"]:
            default += f", for a pretrained base {fact['pretrained']}"
        stdout.print(f"  {fact['meaning']}\n  {fact['rule']}; {default}", markup=False)


@cache.callback()
def show_cache(
    context: Context, params: ParamsOption = DEFAULT_PARAMS, as_json: JsonOption = False
) -> None:
    """Show what is kept: stage, key, size, last use."""
    if context.invoked_subcommand:
        return
    from cli.console import print_json, print_line, print_table

    entries = _cache_of(params).entries()
    if as_json:
        print_json(
            [
                {
                    "stage": e.stage,
                    "key": e.key,
                    "bytes": e.size,
                    "shared": e.shared,
                    "used": e.used,
                }
                for e in entries
            ]
        )
        return
    rows = [
        (
            e.stage,
            e.key[:12],
            in_units(e.size),
            datetime.fromtimestamp(e.used).strftime("%Y-%m-%d %H:%M"),
        )
        for e in entries
    ]
    print_table(("stage", "key", "size", "last used"), rows, right=("size",))
    size, shared = sum(e.size for e in entries), sum(e.shared for e in entries)
    links = f", of which artifacts share {in_units(shared)} by hard links" * bool(shared)
    print_line(f"{len(entries)} kept, {in_units(size)}{links}")
    if size > MUCH:
        print_line("`lora cache prune --max-size 1GB` keeps what was used last.")


@cache.command()
def prune(
    params: ParamsOption = DEFAULT_PARAMS,
    keep: Annotated[
        int, Option(min=0, help="Number of entries to keep per stage, most recently used first.")
    ] = 0,
    older_than: Annotated[
        float,
        Option(
            min=0,
            callback=finite,
            metavar="DAYS",
            help="Only entries unused for at least DAYS days.",
        ),
    ] = 0.0,
    max_size: Annotated[
        int | None,
        Option(
            parser=size_of, metavar="SIZE", help="Keep what was used last, up to SIZE: 5GB, 500MB."
        ),
    ] = None,
) -> None:
    """Remove cached results; artifacts stay."""
    from cli.console import print_line

    removed = _cache_of(params).prune(keep, older_than, max_size or 0)
    print_line(f"{len(removed)} removed, {in_units(sum(e.size for e in removed))}")


def _cache_of(params: Path) -> "Cache":
    """The project's cache; without a params.yaml the one in this folder. Raises UserError."""
    from pipeline.project.cache import Cache
    from pipeline.project.stage_graph import cache_folder

    if params.is_file():
        return Cache(project_of(params).cache)
    if params != DEFAULT_PARAMS:
        raise UserError(f"{params} does not exist. Name the project's params file with --params.")
    return Cache(cache_folder(params.resolve().parent))
