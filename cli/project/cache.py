"""`lora cache`: show and prune the cache of finished stages."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import DEFAULT_PARAMS, JsonOption, ParamsOption, finite, group

if TYPE_CHECKING:
    from pipeline.project.cache import Cache

app = group()
cache = group(help="Show or prune the cache of finished stages.", invoke_without_command=True)
app.add_typer(cache, name="cache")


@cache.callback()
def show(context: typer.Context, params: ParamsOption = DEFAULT_PARAMS, as_json: JsonOption = False) -> None:
    """Show what is kept: stage, key, size, last use."""
    if context.invoked_subcommand:
        return
    from cli.console import print_json, stdout, table

    entries = _cache_of(params).entries()
    if as_json:
        print_json([{"stage": e.stage, "key": e.key, "bytes": e.size, "used": e.used} for e in entries])
        return
    rows = [
        (e.stage, e.key[:12], f"{e.size / 1000:,.0f} kB", datetime.fromtimestamp(e.used).strftime("%Y-%m-%d %H:%M"))
        for e in entries
    ]
    stdout.print(table(("stage", "key", "size", "last used"), rows, right=("size",)))
    stdout.print(f"{len(entries)} kept, {sum(e.size for e in entries) / 1000:,.0f} kB")


@cache.command()
def prune(
    params: ParamsOption = DEFAULT_PARAMS,
    keep: Annotated[
        int, typer.Option(min=0, help="Number of entries to keep per stage, most recently used first.")
    ] = 0,
    older_than: Annotated[
        float,
        typer.Option(min=0, callback=finite, metavar="DAYS", help="Only entries unused for at least DAYS days."),
    ] = 0.0,
) -> None:
    """Remove cached results; artifacts stay."""
    from cli.console import stdout

    removed = _cache_of(params).prune(keep, older_than)
    stdout.print(f"{len(removed)} removed, {sum(e.size for e in removed) / 1000:,.0f} kB")


def _cache_of(params: Path) -> "Cache":
    from pipeline.errors import UserError
    from pipeline.project.cache import Cache
    from pipeline.project.stage_graph import cache_folder
    from pipeline.workbench import open_project

    if params != DEFAULT_PARAMS and not params.is_file():
        raise UserError(f"{params} does not exist. Name the project's params file with --params.")
    return Cache(open_project(params).cache if params.is_file() else cache_folder(params.resolve().parent))
