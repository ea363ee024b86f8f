"""`lora adapters`: what lies there, and whether it is what was trained."""

from pathlib import Path
from typing import Annotated

import typer

from cli.options import BaseOption, JsonOption, TrustOption, group

app = group()
adapters = group(help="List adapters, or verify one.", invoke_without_command=True)
app.add_typer(adapters, name="adapters")

COLUMNS = ("adapter", "method", "rank", "targets", "base", "size", "loss", "forgot", "state")


@adapters.callback()
def show(
    context: typer.Context,
    folder: Annotated[Path, typer.Option(help="Where to look.")] = Path("artifacts"),
    as_json: JsonOption = False,
) -> None:
    """List adapters: method, rank, targets, base, size, final loss, and the old sentences' rise in loss."""
    if context.invoked_subcommand:
        return
    from dataclasses import asdict

    from cli.console import print_json, stdout, table
    from pipeline.inventory import Adapter
    from pipeline.inventory import adapters as found_in

    found = found_in(folder)
    if as_json:
        print_json([{**asdict(adapter), "path": str(adapter.path)} for adapter in found])
        return
    if not found:
        stdout.print(f"No adapters in {folder}. Make one with `lora finetune lora`, or look elsewhere with --folder.")
        return

    def cells(one: Adapter) -> tuple[str, ...]:
        return (
            str(one.path.relative_to(folder)),
            one.method,
            str(one.rank),
            " ".join(target.removesuffix("_proj") for target in one.targets),
            Path(one.base or "?").name,
            f"{one.size / 1000:,.0f} kB",
            "–" if one.final_loss is None else f"{one.final_loss:.3f}",
            "–" if one.forgetting is None else f"{one.forgetting:+.3f}",
            one.problem or "whole",
        )

    stdout.print(table(COLUMNS, [cells(one) for one in found], right=("rank", "size", "loss", "forgot")))


@adapters.command()
def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="An adapter folder.")],
    base: BaseOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Load an adapter on its base as `lora prompt` would, and say whether anything is wrong."""
    from cli.console import stdout
    from pipeline.artifact import MANIFEST
    from pipeline.binding import base_of
    from pipeline.engine import load

    base = base or base_of(path)
    load(base, path, trust_remote_code=trust_remote_code)
    bound = (path / MANIFEST).exists()
    proof = (
        "files, names, shapes and base are those it was trained with"
        if bound
        else (f"names and shapes fit; it has no {MANIFEST}, so that its base cannot be checked")
    )
    stdout.print(f"{path} on {base}: {proof}.", soft_wrap=True)
