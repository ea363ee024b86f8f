"""`lora adapters`: list, verify, compare, combine, compress, import and export adapters."""

from collections.abc import Sequence
from math import isfinite
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Context, Option

from cli.export import HELP, export
from cli.options import (
    DEFAULT_PARAMS,
    AdapterArgument,
    BaseNameOption,
    BaseOption,
    DeviceOption,
    JsonOption,
    OutOption,
    PlainOption,
    TrustOption,
    finite,
    group,
    project_of,
)
from pipeline.weights import foreign

if TYPE_CHECKING:
    from pipeline.weights.compare import Interference

Method = Literal["linear", "cat", "svd", "ties", "dare", "dare-ties", "knots"]
app = group()
adapters = group(
    help="List, compare, combine, compress, export adapters.", invoke_without_command=True
)
app.add_typer(adapters, name="adapters")
adapters.command(hidden=True, help=HELP)(export)  # its former place

FOLDER = Path("artifacts")
COLUMNS = (
    "adapter",
    "method",
    "rank",
    "targets",
    "base",
    "size",
    "loss",
    "forgot",
    "gate",
    "state",
)
# left out, in this order, of a narrow table
OPTIONAL = ("targets", "base", "size", "rank", "loss", "forgot")


@adapters.callback()
def show(
    context: Context,
    folder: Annotated[Path, Option(help="Folder to search for adapters.")] = FOLDER,
    as_json: JsonOption = False,
) -> None:
    """List adapters: method, rank, targets, base, size, final loss, and the old sentences' rise in
    loss.

    A narrow terminal shows fewer columns; --json has all.
    """
    if context.invoked_subcommand:
        return
    from dataclasses import asdict

    from cli.console import number, print_json, print_line, print_table
    from pipeline.errors import UserError
    from pipeline.files.digest_cache import DigestStore
    from pipeline.project.cache import NAMED, Cache
    from pipeline.project.stage_graph import cache_folder
    from pipeline.views.models import adapters as list_adapters

    if folder != FOLDER and not folder.is_dir():
        raise UserError(
            f"--folder must be an existing folder, got {folder}. Choose one that contains adapters."
        )
    store = DigestStore()
    runs = Cache(cache_folder(Path()))
    named = runs.results() if folder == FOLDER else []
    found = list_adapters(folder, store.fingerprint, store.contents, named)
    store.save()
    marks = _marks([adapter.path.resolve() for adapter in found])
    if as_json:
        rows_of = ((adapter, marks.get(adapter.path.resolve(), ())) for adapter in found)
        print_json(
            [
                {**asdict(adapter), "path": str(adapter.path), "apart": apart}
                for adapter, apart in rows_of
            ]
        )
        return
    if not found:
        print_line(
            f"No adapters in {folder}. Make one with `lora finetune lora`, or look elsewhere with "
            "--folder."
        )
        return
    rows, paths = [], {adapter.path for adapter in found}
    for adapter in found:
        is_here = adapter.path.is_relative_to(folder)
        name = str(adapter.path.relative_to(folder if is_here else runs.root / NAMED))
        if adapter.path.parent in paths:  # a checkpoint, listed below its adapter
            name = f"  {adapter.path.name}"
        rank = number(adapter.rank)
        if adapter.rank is not None and adapter.trained_rank not in (None, adapter.rank):
            rank += f", {adapter.trained_rank} trained"
        mark = marks.get(adapter.path.resolve(), ())
        row = (
            name,
            adapter.method.removesuffix("_tuning"),
            rank,
            " ".join(
                target.removesuffix("_proj").removesuffix(" tokens") for target in adapter.targets
            ),
            Path(adapter.base or "?").name,
            f"{adapter.size / 1000:,.0f} kB",
            number(adapter.final_loss, ".3f"),
            number(adapter.forgetting, "+.3f"),
            adapter.gate or "",
            "; ".join(filter(None, [adapter.problem or "verified", adapter.weights_of, *mark])),
        )
        rows.append(row)
    shown = [
        n
        for n, name in enumerate(COLUMNS)
        if name != "gate" or any(adapter.gate for adapter in found)
    ]
    cells = [[row[n] for n in shown] for row in rows]
    print_table(
        [COLUMNS[n] for n in shown],
        cells,
        right=("rank", "size", "loss", "forgot"),
        optional=OPTIONAL,
    )
    if any("→" in reason for reasons in marks.values() for reason in reasons):
        print_line(
            f"\nrank 8 → 4: it was trained with 8, {DEFAULT_PARAMS} says 4. The next run of its "
            "stage replaces it."
        )


def _marks(folders: Sequence[Path]) -> dict[Path, tuple[str, ...]]:
    """Folders whose settings differ from params.yaml, and how; none outside a project."""
    from pipeline.errors import UserError
    from pipeline.views.stages import apart

    try:
        project = project_of(DEFAULT_PARAMS)
    except UserError:
        return {}
    marks = {project.artifact(name).resolve(): reasons for name, reasons in apart(project).items()}
    return {folder: marks[folder] for folder in folders if folder in marks}


@adapters.command()
def verify(
    path: AdapterArgument,
    base: BaseOption = None,
    trust_remote_code: TrustOption = False,
    _device: DeviceOption = None,
) -> None:
    """Check that an adapter fits its base and is undamaged.

    Loads it as `lora prompt` would.
    """
    from cli.console import print_line
    from pipeline.adapters.folder import base_of
    from pipeline.files.artifact import MANIFEST, read_manifest
    from pipeline.inference.engine import load

    base = base or base_of(path)
    load(base, path, trust_remote_code=trust_remote_code)
    if (path / MANIFEST).exists():
        imported = read_manifest(path).get("method") == "import"
        how = "imported with; what it was trained on is not known" if imported else "trained with"
        proof = f"files, names, shapes and base are those it was {how}"
    else:
        proof = f"names and shapes fit; it has no {MANIFEST}, so that its base cannot be checked"
    print_line(f"{path} on {base}: {proof}.")


@adapters.command()
def diff(
    one: Annotated[Path, Argument(metavar="ONE", help="Adapter folder.")],
    other: Annotated[
        Path, Argument(metavar="OTHER", help="Adapter folder of the same base model.")
    ],
    as_json: JsonOption = False,
    _device: DeviceOption = None,
) -> None:
    """Compare two adapters: settings, update sizes, subspaces."""
    from cli.console import number, print_json, print_line, print_table
    from pipeline.adapters.low_rank import load_update
    from pipeline.weights.compare import modules, refuse_other_model, settings_that_differ, values

    first, second = load_update(one), load_update(other)
    refuse_other_model(first, second)
    settings = settings_that_differ(first, second)
    rows = list(modules(first.low_rank, second.low_rank))
    trained = list(values(first, second))
    if as_json:
        by_module, by_value = [row._asdict() for row in rows], [row._asdict() for row in trained]
        print_json({"settings": settings, "modules": by_module, "values": by_value})
        return
    for key, (here, there) in settings.items():
        print_line(f"{key}: {here} | {there}")
    shared = _shared_prefix([row.module for row in rows])
    columns = (shared or "module", "‖one‖", "‖other‖", "‖one−other‖", "cosine", "outputs", "inputs")
    cells = [
        (
            row.module.removeprefix(shared),
            *(number(size, ".3f") for size in row[1:4]),
            *(number(share, ".2f") for share in row[4:]),
        )
        for row in rows
    ]
    print_table(columns, cells, right=columns[1:])
    for name, difference in trained:
        distance = (
            "not the same of it in both" if difference is None else f"‖one−other‖ {difference:.3f}"
        )
        print_line(f"{name}, its values: {distance}")
    if first.spec.dora or second.spec.dora:
        print_line("For DoRA, only s·BA is compared, without the magnitudes.")
    print_line(
        "outputs, inputs: share of directions in common, from 0 to 1 (Hu et al. 2021, §7.2)."
    )


def _shared_prefix(names: list[str]) -> str:
    """What the names have in common, up to a dot, which then heads their column."""
    shared = commonprefix(names) if len(names) > 1 else ""  # noqa: RUF071 (not paths)
    return shared[: shared.rfind(".") + 1]


@adapters.command()
def combine(
    paths: Annotated[
        list[Path],
        Argument(metavar="PATH...", help="Two or more adapter folders with the same base."),
    ],
    out: OutOption,
    weights: Annotated[
        str | None, Option(help="Comma-separated weights, one per adapter; default: 1 each.")
    ] = None,
    method: Annotated[Method, Option(help="cat is exact; all others report their error.")] = "cat",
    rank: Annotated[int, Option(min=1, help="Rank of the result (svd, ties, dare).")] = 8,
    density: Annotated[
        float,
        Option(
            min=0.01, max=1, callback=finite, help="Fraction of values to keep (ties, dare, knots)."
        ),
    ] = 0.5,
    seed: Annotated[int, Option(min=0, help="Random seed (dare).")] = 0,
    base: BaseOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
    _device: DeviceOption = None,
) -> None:
    """Combine adapters into one by a weighted sum.

    Exact (cat), at a smaller rank, or aligned first (knots). Prints how much they interfere before
    it writes.
    """
    from cli.console import noting_replaced, print_json, print_line
    from pipeline.adapters.folder import common_base
    from pipeline.errors import UserError
    from pipeline.weights.combine import CombineOptions
    from pipeline.weights.import_adapter import combine_adapters

    count = len(paths)
    if count < 2:
        raise UserError(f"combine needs at least two adapters, got {count}. Add another.")
    try:
        numbers = (
            [1.0] * count if weights is None else [float(number) for number in weights.split(",")]
        )
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(map(isfinite, numbers)) or not any(numbers):
        raise UserError(
            f"--weights must be {count} comma-separated numbers, one per adapter and not all 0, "
            f"got {weights!r}."
        )
    options = CombineOptions(method, rank, density, seed)
    shown: list[Interference] = []
    show = shown.extend if as_json else _print_interference
    with noting_replaced(out):
        error = combine_adapters(
            paths, numbers, options, base or common_base(paths), out, trust_remote_code, show
        )
    if as_json:
        pairs = [
            {**pair._asdict(), "modules": [row._asdict() for row in pair.modules]} for pair in shown
        ]
        print_json({"folder": str(out), "method": method, "error": error, "interference": pairs})
        return
    print_line(f"{out}  {method} of {count} adapters, {error:.2%} off their exact sum")


def _print_interference(pairs: "list[Interference]") -> None:
    """A row for each pair of adapters, and the modules where they agree and disagree most."""
    from cli.console import number, print_line, print_table

    columns = ("adapters", "cosine", "lowest", "highest", "outputs", "inputs")
    rows = []
    for pair in pairs:
        cosines = [row.cosine for row in pair.modules if row.cosine is not None]
        shares = (
            pair.cosine,
            min(cosines, default=None),
            max(cosines, default=None),
            pair.outputs,
            pair.inputs,
        )
        rows.append((f"{pair.first}, {pair.second}", *(number(share, ".2f") for share in shares)))
    print_table(columns, rows, right=columns[1:])
    print_line(
        "cosine of their updates, of all modules together, and of the modules with the lowest and "
        "highest: 0 if they are independent, −1 if they are opposed."
    )
    print_line(
        "outputs, inputs: share of directions in common, mean over modules (`lora adapters diff` "
        "lists them)."
    )


@adapters.command()
def compress(
    path: AdapterArgument,
    out: OutOption,
    rank: Annotated[int | None, Option(min=1, help="Highest rank of each module.")] = None,
    energy: Annotated[
        float | None,
        Option(
            min=0.01, max=1, callback=finite, help="Share of ‖ΔW‖² that each module keeps, as 0.99."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        Option(help="Data file to compare base, adapter and compressed adapter on; loads them."),
    ] = None,
    no_template: PlainOption = False,
    base: BaseOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
    _device: DeviceOption = None,
) -> None:
    """Lower an adapter's rank, with what that costs.

    Train big, compress after: the nearest update of each module.
    """
    from dataclasses import asdict

    from cli.console import (
        noting_replaced,
        number,
        print_costs,
        print_json,
        print_line,
        print_table,
    )
    from pipeline.adapters.config import WEIGHTS
    from pipeline.adapters.folder import base_of
    from pipeline.data.formats import read_examples
    from pipeline.errors import UserError
    from pipeline.inference.score import costs
    from pipeline.weights.compress import Limit, compress_adapter, total_error

    if (rank is None) == (energy is None):
        raise UserError("compress needs either --rank or --energy. Add one, such as --energy 0.99.")
    base = base or base_of(path)
    examples = read_examples(data, str(data), templated=not no_template) if data else []
    with noting_replaced(out):
        rows = compress_adapter(path, base, out, Limit(rank, energy), trust_remote_code)
    error = total_error(rows)
    if not as_json:  # shown before the models are loaded, which may fail
        shared = _shared_prefix([row.module for row in rows])
        columns = (shared or "module", "‖ΔW‖", "rank", "now", "error")
        names = [row.module.removeprefix(shared) for row in rows]
        cells = [
            (name, number(row.size, ".3f"), str(row.before), str(row.after), f"{row.error:.2%}")
            for name, row in zip(names, rows, strict=True)
        ]
        print_table(columns, cells, right=columns[1:])
        before, after = ((folder / WEIGHTS).stat().st_size / 1000 for folder in (path, out))
        print_line(f"{out}  {before:,.0f} → {after:,.0f} kB, {error:.2%} off, all modules together")
    models = {"adapter": path, "base": None, "compressed": out}
    quality = costs(base, models, examples, trust_remote_code) if examples else {}
    if as_json:
        modules = [{**asdict(row), "error": row.error} for row in rows]
        scores = {name: cost._asdict() for name, cost in quality.items()}
        print_json({"folder": str(out), "error": error, "modules": modules, "quality": scores})
    else:
        print_costs(quality)


IMPORT = "Import an adapter that was trained elsewhere."
BOUND = "It must fit its base, and is bound to it from then on. No code in its files runs."
READS = "\n".join(f"{source.name:10}{source.about}" for source in foreign.FORMATS.values())


@adapters.command("import", help=f"{IMPORT}\n\n{BOUND}\n\n\b\n{READS}")
def import_(
    path: Annotated[Path, Argument(metavar="PATH", help="Adapter folder of one of these tools.")],
    out: OutOption,
    base: BaseOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    from cli.console import noting_replaced, print_line, print_note
    from pipeline.weights.import_adapter import import_adapter

    base = base or foreign.base_of(path)
    with noting_replaced(out):
        imported = import_adapter(path, base, out, trust_remote_code)
    for note in imported.notes:
        print_note(note)
    proof = "by names and shapes; no more is known"
    if imported.verified:
        proof = "which has the weights of the model that it names"
    print_line(f"{out}  fits {base}, {proof}")


@adapters.command()
def card(
    path: AdapterArgument,
    base_name: BaseNameOption = None,
) -> None:
    """Print an adapter's model card.

    Method, data and its digest, what was learned, what was forgotten.
    """
    from pipeline.export.model_card import card as text
    from pipeline.files.text import printable

    typer.echo(printable(text(path, base_name=base_name)), nl=False)
