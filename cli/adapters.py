"""`lora adapters`: list, verify, compare, combine, import and export adapters."""

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
    from pipeline.inference.catalog import adapters as list_adapters

    if folder != FOLDER and not folder.is_dir():
        raise UserError(f"--folder must be an existing folder, got {folder}. Choose one that contains adapters.")
    store = DigestStore()
    found = list_adapters(folder, store.fingerprint, store.contents)
    store.save()
    if as_json:
        print_json([{**asdict(adapter), "path": str(adapter.path)} for adapter in found])
        return
    if not found:
        stdout.print(f"No adapters in {folder}. Make one with `lora finetune lora`, or look elsewhere with --folder.")
        return

    def cells(adapter: Adapter) -> tuple[str, ...]:
        is_partial = adapter.trained_rank not in (None, adapter.rank)
        return (
            str(adapter.path.relative_to(folder)),
            adapter.method.removesuffix("_tuning"),
            "–" if adapter.rank is None else f"{adapter.rank}{f', {adapter.trained_rank} trained' * is_partial}",
            " ".join(target.removesuffix("_proj").removesuffix(" tokens") for target in adapter.targets),
            Path(adapter.base or "?").name,
            f"{adapter.size / 1000:,.0f} kB",
            "–" if adapter.final_loss is None else f"{adapter.final_loss:.3f}",
            "–" if adapter.forgetting is None else f"{adapter.forgetting:+.3f}",
            adapter.problem or "verified",
        )

    stdout.print(table(COLUMNS, [cells(adapter) for adapter in found], right=("rank", "size", "loss", "forgot")))


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
    from pipeline.adapters.low_rank import load_update
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
    shared = _common_prefix([row.module for row in rows])
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
        distance = "not the same of it in both" if difference is None else f"‖one−other‖ {difference:.3f}"
        stdout.print(f"{name}, its values: {distance}", markup=False, soft_wrap=True)
    if first.spec.dora or second.spec.dora:
        stdout.print("For DoRA, only s·BA is compared, without the magnitudes.", soft_wrap=True)
    stdout.print("outputs, inputs: share of directions in common, from 0 to 1 (Hu et al. 2021, §7.2).", soft_wrap=True)


def _common_prefix(names: list[str]) -> str:
    """The common prefix of several names, up to a dot."""
    prefix = commonprefix(names) if len(names) > 1 else ""  # noqa: RUF071 (not paths)
    return prefix[: prefix.rfind(".") + 1]


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

    numbers = _parse_weights(weights, len(paths))
    options = CombineOptions(method, rank, density, seed)
    error = combine_adapters(paths, numbers, options, base or common_base(paths), out, trust_remote_code)
    summary = f"{out}  {method} of {len(paths)} adapters, {error:.2%} off their exact sum"
    stdout.print(summary, markup=False, soft_wrap=True)


def _parse_weights(text: str | None, count: int) -> list[float]:
    from pipeline.errors import UserError

    if count < 2:
        raise UserError(f"combine needs at least two adapters, got {count}. Add another.")
    try:
        numbers = [1.0] * count if text is None else [float(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(map(isfinite, numbers)) or not any(numbers):
        raise UserError(
            f"--weights must be {count} comma-separated numbers, one per adapter and not all 0, got {text!r}."
        )
    return numbers


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
    is_verified = import_adapter(path, base, out, trust_remote_code)
    proof = (
        "which has the weights of the model that it names" if is_verified else "by names and shapes; no more is known"
    )
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
