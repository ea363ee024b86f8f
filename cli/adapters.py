"""`lora adapters`: what lies there, and whether it is what was trained."""

from math import isfinite
from os.path import commonprefix
from pathlib import Path
from typing import Annotated, Literal

import typer

from cli.export import OutOption, export
from cli.options import BaseNameOption, BaseOption, JsonOption, TrustOption, finite, group

Method = Literal["linear", "cat", "svd", "ties", "dare", "dare-ties"]
app = group()
adapters = group(help="List, verify, compare, combine, export adapters.", invoke_without_command=True)
app.add_typer(adapters, name="adapters")
adapters.command()(export)

FOLDER = Path("artifacts")
COLUMNS = ("adapter", "method", "rank", "targets", "base", "size", "loss", "forgot", "state")


@adapters.callback()
def show(
    context: typer.Context,
    folder: Annotated[Path, typer.Option(help="Folder to search for adapters.")] = FOLDER,
    as_json: JsonOption = False,
) -> None:
    """List adapters: method, rank, targets, base, size, final loss, and the old sentences' rise in loss."""
    if context.invoked_subcommand:
        return
    from dataclasses import asdict

    from cli.console import print_json, stdout, table
    from pipeline.errors import UserError
    from pipeline.files.digest_cache import DigestStore
    from pipeline.inference.catalog import Adapter
    from pipeline.inference.catalog import adapters as found_in

    if folder != FOLDER and not folder.is_dir():
        raise UserError(f"--folder must be a folder, got {folder}. Name one that has adapters in it.")
    store = DigestStore()
    found = found_in(folder, store.fingerprint, store.contents)
    store.save()
    if as_json:
        print_json([{**asdict(adapter), "path": str(adapter.path)} for adapter in found])
        return
    if not found:
        stdout.print(f"No adapters in {folder}. Make one with `lora finetune lora`, or look elsewhere with --folder.")
        return

    def cells(one: Adapter) -> tuple[str, ...]:
        half = one.trained_rank not in (None, one.rank)
        return (
            str(one.path.relative_to(folder)),
            one.method.removesuffix("_tuning"),
            "–" if one.rank is None else f"{one.rank}{f', {one.trained_rank} trained' * half}",
            " ".join(target.removesuffix("_proj").removesuffix(" tokens") for target in one.targets),
            Path(one.base or "?").name,
            f"{one.size / 1000:,.0f} kB",
            "–" if one.final_loss is None else f"{one.final_loss:.3f}",
            "–" if one.forgetting is None else f"{one.forgetting:+.3f}",
            one.problem or "whole",
        )

    stdout.print(table(COLUMNS, [cells(one) for one in found], right=("rank", "size", "loss", "forgot")))


@adapters.command()
def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Adapter folder.")],
    base: BaseOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Check that an adapter fits its base and is undamaged.

    Loads it as `lora prompt` would.
    """
    from cli.console import stdout
    from pipeline.adapters.folder import base_of
    from pipeline.files.artifact import MANIFEST
    from pipeline.inference.engine import load

    base = base or base_of(path)
    load(base, path, trust_remote_code=trust_remote_code)
    bound = (path / MANIFEST).exists()
    proof = (
        "files, names, shapes and base are those it was trained with"
        if bound
        else (f"names and shapes fit; it has no {MANIFEST}, so that its base cannot be checked")
    )
    stdout.print(f"{path} on {base}: {proof}.", soft_wrap=True)


@adapters.command()
def diff(
    one: Annotated[Path, typer.Argument(metavar="ONE", help="Adapter folder.")],
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="Adapter folder of the same base model.")],
    as_json: JsonOption = False,
) -> None:
    """Compare two adapters: settings, update sizes, subspaces."""
    from cli.console import print_json, stdout, table
    from pipeline.adapters.peft.updates import load_update
    from pipeline.weights.compare import modules, refuse_other_model, settings_that_differ, values

    first, second = load_update(one), load_update(other)
    refuse_other_model(first, second)
    settings, rows = settings_that_differ(first, second), list(modules(first.low_rank, second.low_rank))
    trained = list(values(first, second))
    if as_json:
        by_module, by_value = [row._asdict() for row in rows], [row._asdict() for row in trained]
        print_json({"settings": settings, "modules": by_module, "values": by_value})
        return
    for key, (here, there) in settings.items():
        stdout.print(f"{key}: {here} | {there}", markup=False, soft_wrap=True)
    shared = _shared([row.module for row in rows])
    columns = (shared or "module", "‖one‖", "‖other‖", "‖one−other‖", "outputs", "inputs")
    cells = [
        (
            row.module.removeprefix(shared),
            *(f"{size:.3f}" for size in row[1:4]),
            *("–" if x is None else f"{x:.2f}" for x in row[4:]),
        )
        for row in rows
    ]
    stdout.print(table(columns, cells, right=columns[1:]))
    for name, difference in trained:
        how_far = "not the same of it in both" if difference is None else f"‖one−other‖ {difference:.3f}"
        stdout.print(f"{name}, its values: {how_far}", markup=False, soft_wrap=True)
    if first.spec.dora or second.spec.dora:
        stdout.print("Of DoRA this is s·BA alone; the lengths that it gives each output are not in it.", soft_wrap=True)
    stdout.print("outputs, inputs: share of directions in common, from 0 to 1 (Hu et al. 2021, §7.2).", soft_wrap=True)


def _shared(names: list[str]) -> str:
    """What several names begin with, to a dot."""
    alike = commonprefix(names) if len(names) > 1 else ""  # noqa: RUF071 (these are no paths)
    return alike[: alike.rfind(".") + 1]


@adapters.command()
def combine(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Two or more adapter folders with the same base.")
    ],
    out: OutOption,
    weights: Annotated[
        str | None, typer.Option(help="Comma-separated weights, one per adapter; default: 1 each.")
    ] = None,
    method: Annotated[Method, typer.Option(help="cat is exact; svd, ties and dare report their error.")] = "cat",
    rank: Annotated[int, typer.Option(min=1, help="Rank of the result (svd, ties, dare).")] = 8,
    density: Annotated[
        float, typer.Option(min=0.01, max=1, callback=finite, help="Fraction of values to keep (ties, dare).")
    ] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="Random seed (dare).")] = 0,
    base: BaseOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Combine adapters into one by a weighted sum.

    Exact (cat), or at a smaller rank.
    """
    from cli.console import stdout
    from pipeline.adapters.folder import common_base
    from pipeline.weights.combine import CombineOptions
    from pipeline.weights.import_adapter import combine_adapters

    numbers = _weights(weights, len(paths))
    how = CombineOptions(method, rank, density, seed)
    error = combine_adapters(paths, numbers, how, base or common_base(paths), out, trust_remote_code)
    said = f"{out}  {method} of {len(paths)} adapters, {error:.2%} off their exact sum"
    stdout.print(said, markup=False, soft_wrap=True)


def _weights(text: str | None, count: int) -> list[float]:
    from pipeline.errors import UserError

    if count < 2:
        raise UserError("combine takes two adapters or more. Name another.")
    try:
        found = [1.0] * count if text is None else [float(number) for number in text.split(",")]
    except ValueError:
        found = []
    if len(found) != count or not all(map(isfinite, found)) or not any(found):
        raise UserError(f"--weights must be {count} numbers with commas between them, one an adapter, got {text!r}.")
    return found


@adapters.command("import")
def import_(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Adapter folder in PEFT's format.")],
    out: OutOption,
    base: BaseOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Import an adapter that was trained elsewhere.

    It must fit its base, and is bound to it from then on.
    """
    from cli.console import stdout
    from pipeline.adapters.folder import base_of
    from pipeline.weights.import_adapter import import_adapter

    base = base or base_of(path)
    known = import_adapter(path, base, out, trust_remote_code)
    proof = "which has the weights of the model that it names" if known else "by names and shapes; no more is known"
    stdout.print(f"{out}  fits {base}, {proof}", markup=False, soft_wrap=True)


@adapters.command()
def card(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Adapter folder.")],
    base_name: BaseNameOption = None,
) -> None:
    """Print an adapter's model card.

    Method, data and its digest, what was learned, what was forgotten.
    """
    from pipeline.export.model_card import card as text
    from pipeline.files.text import printable

    typer.echo(printable(text(path, base_name=base_name)), nl=False)
