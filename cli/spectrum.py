"""`lora spectrum`: singular values of what fine-tuning changed, and the nearest LoRA of a rank."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from cli.options import DeviceOption, JsonOption, PlainOption, TrustOption, finite, group
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.data.examples import Example
    from pipeline.weights.extract import Spectra
    from pipeline.weights.intruders import Searched
    from pipeline.weights.spectrum import Measured

app = group()
SHOWN = 4  # names in a list
LEGEND = (
    "1 to 64: share of ‖ΔW‖² that the nearest matrix of that rank holds; stable: ‖ΔW‖²/σ₁²; 90%: "
    "rank that holds it."
)


@app.command()
def spectrum(
    base: Annotated[Path, Argument(metavar="BASE", help="Base model folder.")],
    tuned: Annotated[
        Path, Argument(metavar="TUNED", help="The fine-tuned model, or an adapter on the base.")
    ],
    rank: Annotated[int | None, Option(min=1, help="Extract a LoRA of this rank.")] = None,
    out: Annotated[Path | None, Option(help="Adapter folder to write.")] = None,
    embeddings: Annotated[
        Literal["all", "none"],
        Option(help="Changed embedding and head: save in full, or leave out."),
    ] = "all",
    data: Annotated[
        Path | None,
        Option(help="Data file to compare base, tuned and what is written on; loads all three."),
    ] = None,
    no_template: PlainOption = False,
    intruders: Annotated[
        bool,
        Option("--intruders", help="List intruder dimensions instead (Shuttleworth et al. 2024)."),
    ] = False,
    top: Annotated[
        int, Option(min=1, max=64, help="Largest singular vectors to look for intruders in.")
    ] = 10,
    epsilon: Annotated[
        float,
        Option(
            min=0,
            max=1,
            callback=finite,
            help="Intruders have a lower |cos| with each singular vector of BASE.",
        ),
    ] = 0.5,
    damp: Annotated[
        float | None,
        Option(
            min=0,
            max=1,
            callback=finite,
            help="Scale the intruders by this in the adapter --out; 0 removes them.",
        ),
    ] = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, Option("--csv", help="Print CSV to stdout.")] = False,
    _device: DeviceOption = None,
) -> None:
    """Singular values of a fine-tuning; LoRA; intruders.

    Of ΔW = TUNED − BASE, matrix by matrix, and how much of it each rank holds.
    """
    from cli.console import follow
    from pipeline.data.formats import read_examples
    from pipeline.weights.extract import spectra_of

    if as_json and as_csv:
        raise UserError("--json and --csv exclude each other.")
    if as_csv and data is not None:
        raise UserError(
            "--csv has one row per tensor and cannot include the results of --data. Use --json, "
            "or omit --csv."
        )
    if intruders or damp is not None:
        if rank is not None or as_csv:
            raise UserError(
                "--intruders and --damp exclude --rank and --csv. Run the command once for each."
            )
        if (damp is None) != (out is None):
            raise UserError(
                "--damp and --out must be used together to write a damped adapter. Add the other "
                "one."
            )
        if data is not None and out is None:
            raise UserError("--data compares the damped adapter. Add --damp and --out.")
    else:
        if (rank is None) != (out is None):
            raise UserError(
                "--rank and --out must be used together to extract a LoRA. Add the other one."
            )
        if data is not None and out is None:
            raise UserError("--data evaluates the extracted LoRA. Add --rank and --out.")

    examples = read_examples(data, str(data), templated=not no_template) if data else []
    models = Models(base, tuned, examples, trust_remote_code)
    if intruders or damp is not None:
        _find_intruders(models, top, epsilon, damp, out, as_json)
        return
    form: Form = "tables"
    if as_json or as_csv:
        form = "json" if as_json else "csv"
    if out is None or rank is None:
        PRINT[form](follow(spectra_of(base, tuned, trust_remote_code), "spectrum"))
    else:
        _extract(models, rank, embeddings == "all", out, form)


@dataclass(frozen=True)
class Models:
    """A base and what became of it, and the examples on which models are compared."""

    base: Path
    tuned: Path
    examples: "list[Example]"
    trust_remote_code: bool


def _extract(models: Models, rank: int, in_full: bool, out: Path, form: "Form") -> None:
    """Write the nearest LoRA, and print the spectra, what was written, and what it answers."""
    from cli.console import follow, noting_replaced, print_line, print_table
    from pipeline.inference.score import quality, refuse_other_tokens
    from pipeline.weights.extract import extract

    base, tuned = models.base, models.tuned
    if models.examples:
        refuse_other_tokens(base, tuned, models.examples)
    with noting_replaced(out):
        work = extract(base, tuned, out, rank, in_full, models.trust_remote_code)
        extracted = follow(work, "spectrum")
    if form != "json":  # before the models are loaded, which may fail
        PRINT[form](extracted.spectra)
    if form == "tables":
        count = f"{len(extracted.low_rank)} matrices at rank {extracted.rank}"
        print_line(f"{out}  {count}, {extracted.held:.1%} of all that changed")
        if extracted.in_full:
            print_line(f"In full: {', '.join(map(short, extracted.in_full))}.")
        if extracted.left_out:
            print_line(f"Left out: {_join_names(extracted.left_out)}.")
    answers = {}
    if models.examples:
        answers = quality(base, tuned, out, models.examples, models.trust_remote_code)
    if form == "json":
        facts: dict[str, Any] = {"folder": str(out)}
        for key in ("rank", "low_rank", "in_full", "left_out", "held"):
            facts[key] = getattr(extracted, key)
        scores = {name: score._asdict() for name, score in answers.items()}
        _print_json(extracted.spectra, extracted=facts, quality=scores)
    elif answers:
        columns = ("model", "loss", "right", "as tuned")
        rows = [
            (name, f"{score.loss:.4f}", f"{score.right:.1%}", f"{score.as_tuned:.1%}")
            for name, score in answers.items()
        ]
        print_table(columns, rows, right=columns[1:])


def _find_intruders(
    models: Models,
    top: int,
    epsilon: float,
    factor: float | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """List intruders among the `top` largest singular vectors of a matrix, compared at `epsilon`.

    With `factor` and `out`, write the adapter with them damped.
    """
    from cli.console import follow, noting_replaced, print_costs, print_json, print_line
    from pipeline.inference.score import costs
    from pipeline.weights.intruders import damp, intruders_of, refuse_undampable

    base, tuned, trust = models.base, models.tuned, models.trust_remote_code
    if out is not None:
        refuse_undampable(tuned, out)
    search = {"top": top, "epsilon": epsilon}
    searched = follow(intruders_of(base, tuned, top, epsilon, trust), "intruders")
    if not as_json:
        _print_intruders(searched, top, epsilon)
    if out is not None and factor is not None:
        with noting_replaced(out):
            damp(base, tuned, out, searched, factor, search)
    quality = {}
    if models.examples:
        compared = {"tuned": tuned, "base": None, "damped": out}
        quality = costs(base, compared, models.examples, trust)
    if as_json:
        matrices = []
        for matrix in searched:
            found = [intruder._asdict() for intruder in matrix.intruders]
            about = {"name": matrix.pair.module, "complete": matrix.complete}
            matrices.append({**about, "intruders": found})
        scores = {name: cost._asdict() for name, cost in quality.items()}
        written = None if out is None else str(out)
        print_json({**search, "matrices": matrices, "damped": written, "quality": scores})
        return
    if out is not None:
        print_line(f"{out}  intruders scaled by {factor:g}")
    print_costs(quality)


def _print_intruders(searched: "list[Searched]", top: int, epsilon: float) -> None:
    """A row for each matrix with intruders; below it their number, and what was not compared."""
    from cli.console import print_line, print_table
    from pipeline.weights.spectrum import MAX_VALUES

    matrices = [matrix for matrix in searched if matrix.intruders]
    rows = []
    for matrix in matrices:
        intruders = matrix.intruders
        positions = " ".join(str(intruder.position) for intruder in intruders)
        largest = f"{intruders[0].value:.2f}"
        similarity = f"{max(intruder.similarity for intruder in intruders):.2f}"
        name = short(matrix.pair.module)
        rows.append((name, str(len(intruders)), positions, largest, similarity))
    if rows:
        columns = ("matrix", "intruders", "at", "largest σ", "most alike")
        print_table(columns, rows, right=("intruders", "largest σ", "most alike"))
    count = sum(len(matrix.intruders) for matrix in matrices)
    print_line(
        f"{count} intruder{'s' * (count != 1)} in {len(matrices)} of {len(searched)} matrices: "
        f"among the {top} largest left singular vectors of each, those whose |cos| with "
        f"every one of the base's is below {epsilon:g}."
    )
    if wide := sum(not matrix.complete for matrix in searched):
        print_line(
            f"Of {wide} wide matri{'ces' if wide > 1 else 'x'} only the {MAX_VALUES} largest were "
            "compared, estimated: "
            "a counterpart further down is not seen, so there may be fewer intruders."
        )


def _facts(tensor: "Measured") -> dict[str, Any]:
    """What is measured of a tensor, with up to MAX_VALUES singular values."""
    from pipeline.weights.spectrum import MAX_VALUES, RANKS

    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "norm": tensor.before,
        "change": tensor.change,
        "relative": tensor.relative,
        "energy": {str(rank): tensor.energy(rank) for rank in RANKS},
        "stable_rank": tensor.stable_rank,
        "effective_rank": tensor.effective_rank,
        "rank_of_90": tensor.rank_of(0.9),
        "values": list(tensor.values[:MAX_VALUES]),
        "error": tensor.error,
    }


def _print_json(spectra: "Spectra", **more: Any) -> None:
    from cli.console import print_json

    print_json({"tensors": list(map(_facts, spectra.tensors)), "unsaid": spectra.skipped, **more})


def _print_csv(spectra: "Spectra") -> None:
    """A row for each tensor: what `_facts` has, without the singular values."""
    import csv
    import sys

    from pipeline.files.text import printable
    from pipeline.weights.spectrum import RANKS

    writer = csv.writer(sys.stdout, lineterminator="\n")
    energies = [f"energy_{rank}" for rank in RANKS]
    last = ("stable_rank", "effective_rank", "rank_of_90", "error")
    writer.writerow(["name", "shape", "norm", "change", "relative", *energies, *last])
    for tensor in map(_facts, spectra.tensors):
        numbers = (tensor[key] for key in ("norm", "change", "relative"))
        ranks = (*tensor["energy"].values(), tensor["stable_rank"], tensor["effective_rank"])
        written = ["" if value is None else f"{value:.6g}" for value in (*numbers, *ranks)]
        name = printable(tensor["name"])  # from a file: a terminal would obey its escapes
        shape = "x".join(map(str, tensor["shape"]))
        error = f"{tensor['error']:.2g}"
        writer.writerow([name, shape, *written, tensor["rank_of_90"], error])


def _print_tables(spectra: "Spectra") -> None:
    """A row for each changed matrix; then vectors, estimates, unchanged tensors."""
    from cli.console import number, print_line, print_table
    from pipeline.weights.spectrum import RANKS

    changed = [tensor for tensor in spectra.tensors if tensor.change]
    if not changed:
        print_line("No tensor differs.")
    rows = []
    for tensor in changed:
        if tensor.values:
            least = tensor.rank_of(0.9)
            energies = (number(tensor.energy(rank), ".0%") for rank in RANKS)
            enough = f">{len(tensor.values)}" if least is None else str(least)
            stable = number(tensor.stable_rank, ".1f")
            rows.append((short(tensor.name), _percent(tensor.relative), *energies, stable, enough))
    if rows:
        columns = ("matrix", "‖Δ‖/‖W‖", *map(str, RANKS), "stable", "90%")
        print_table(columns, rows, right=columns[1:])
        print_line(LEGEND)
    if vectors := [tensor for tensor in changed if not tensor.values]:
        shares = [tensor.relative for tensor in vectors if tensor.relative is not None]
        change_range = f", by {_percent(min(shares))} to {_percent(max(shares))}" if shares else ""
        print_line(
            f"{len(vectors)} other tensor{'s' * (len(vectors) > 1)}, norms and biases for the most "
            f"part, changed too{change_range}: no low rank carries them."
        )
    if wide := [tensor for tensor in changed if not tensor.complete]:
        matrices = f"{len(wide)} wide matri{'ces' if len(wide) > 1 else 'x'}"
        error = max(tensor.error for tensor in wide)
        print_line(
            f"Of {matrices} the {len(wide[0].values)} largest values come from a random subspace, "
            f"each within {error:.1%} of the first from a true one; no share is too high."
        )
    same = [tensor.name for tensor in spectra.tensors if not tensor.change]
    if same and changed:
        print_line(f"Unchanged: {_join_names(same)}.")
    for reason in spectra.skipped:
        print_line(f"Not included: {reason}.")


Form = Literal["tables", "csv", "json"]
PRINT: Mapping[Form, Callable[["Spectra"], None]] = {
    "tables": _print_tables,
    "csv": _print_csv,
    "json": _print_json,
}


def short(name: str) -> str:
    """A tensor's name from its block number on, or its last parts: 0.self_attn.q_proj, lm_head."""
    module = name.removesuffix(".weight")
    numbered = re.search(r"(?:^|\.)(\d+\..*)", module)
    if numbered:
        return numbered[1]
    parts = 1 if module != name else 2  # "bias" alone does not say of what
    return ".".join(module.split(".")[-parts:])


def _percent(share: float | None) -> str:
    """12.3%, or 4e-05 if it is below 0.05%."""
    if share is None:
        return "–"
    return f"{share:.1%}" if share >= 0.0005 else f"{share:.0e}"


def _join_names(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(map(short, names[:SHOWN])) + (f" and {more} more" if more > 0 else "")
