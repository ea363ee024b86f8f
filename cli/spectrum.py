"""`lora spectrum`: what fine-tuning changed, how few directions hold it, and the LoRA that is nearest to it."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli.options import JsonOption, TrustOption, group

if TYPE_CHECKING:
    from pipeline.inference.agreement import Quality
    from pipeline.weights.extract import Extracted, Spectra
    from pipeline.weights.spectrum import Measured

app = group()


@app.command()
def spectrum(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Base model folder.")],
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="The fine-tuned model, or an adapter on the base.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Extract a LoRA of this rank.")] = None,
    out: Annotated[Path | None, typer.Option(help="Adapter folder to write.")] = None,
    embeddings: Annotated[
        Literal["all", "none"], typer.Option(help="Changed embedding and head: save in full, or leave out.")
    ] = "all",
    data: Annotated[
        Path | None, typer.Option(help="Data file to compare base, tuned and base + LoRA on; loads all three.")
    ] = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV to stdout.")] = False,
) -> None:
    """Singular values of a fine-tuning; extract its LoRA.

    Of ΔW = TUNED − BASE, matrix by matrix, and how much of it each rank holds.
    """
    from cli.progress import follow
    from pipeline.data.examples import read_examples
    from pipeline.errors import UserError
    from pipeline.inference.agreement import quality, refuse_other_tokens
    from pipeline.weights.extract import extract, spectra_of

    if as_json and as_csv:
        raise UserError("--json and --csv exclude each other.")
    if as_csv and data is not None:
        raise UserError(
            "--csv has one row a tensor, and none for what --data measures: take --json, or leave out --csv."
        )
    if (rank is None) != (out is None):
        raise UserError("A LoRA is extracted with --rank and --out together: name the other one too.")
    if out is None or rank is None:
        if data is not None:
            raise UserError("--data compares the extracted LoRA: name --rank and --out too.")
        _show(follow(spectra_of(base, tuned, trust_remote_code), "spectrum"), as_json, as_csv)
        return
    examples = read_examples(data, str(data)) if data else []
    if examples:
        refuse_other_tokens(base, tuned, examples)
    found = follow(extract(base, tuned, out, rank, embeddings == "all", trust_remote_code), "spectrum")
    if not as_json:  # before the models are loaded, which may fail
        _show(found.spectra, as_json, as_csv)
    if not (as_json or as_csv):
        _say_extracted(found, out)
    answers = quality(base, tuned, out, examples, trust_remote_code) if examples else {}
    if as_json:
        said = {name: one._asdict() for name, one in answers.items()}
        _show(found.spectra, as_json, as_csv, extracted=_facts(found, out), quality=said)
    else:
        _say_quality(answers)


def _show(spectra: "Spectra", as_json: bool, as_csv: bool, **more: Any) -> None:
    if as_json:
        from cli.console import print_json

        print_json({"tensors": [_document(one) for one in spectra.tensors], "unsaid": spectra.skipped, **more})
    elif as_csv:
        _csv(spectra)
    else:
        _table(spectra)


def _document(one: "Measured") -> dict[str, Any]:
    """One tensor, with up to 64 singular values."""
    from pipeline.weights.spectrum import MAX_VALUES, RANKS

    return {
        "name": one.name,
        "shape": list(one.shape),
        "norm": one.before,
        "change": one.change,
        "relative": one.relative,
        "energy": {str(rank): one.energy(rank) for rank in RANKS},
        "stable_rank": one.stable_rank,
        "effective_rank": one.effective_rank,
        "rank_of_90": one.rank_of(0.9),
        "values": list(one.values[:MAX_VALUES]),
        "error": one.error,
    }


def _csv(spectra: "Spectra") -> None:
    import csv
    import sys

    from pipeline.weights.spectrum import RANKS

    writer = csv.writer(sys.stdout, lineterminator="\n")
    energies = [f"energy_{rank}" for rank in RANKS]
    last = ("stable_rank", "effective_rank", "rank_of_90", "error")
    writer.writerow(["name", "shape", "norm", "change", "relative", *energies, *last])
    for one in spectra.tensors:
        held = [one.energy(rank) for rank in RANKS]
        numbers = [one.before, one.change, one.relative, *held, one.stable_rank, one.effective_rank]
        written = ["" if number is None else f"{number:.6g}" for number in numbers]
        shape = "x".join(map(str, one.shape))
        writer.writerow([one.name, shape, *written, one.rank_of(0.9), f"{one.error:.2g}"])


def _table(spectra: "Spectra") -> None:
    from cli.console import stdout, table
    from pipeline.weights.spectrum import RANKS

    changed = [one for one in spectra.tensors if one.change]
    matrices = [one for one in changed if one.values]
    if not changed:
        stdout.print("No tensor differs.")
    if matrices:
        columns = ("matrix", "‖Δ‖/‖W‖", *map(str, RANKS), "stable", "90%")
        stdout.print(table(columns, [_cells(one) for one in matrices], right=columns[1:]))
        stdout.print(_LEGEND, soft_wrap=True)
    for line in _besides(spectra, changed):
        stdout.print(line, markup=False, soft_wrap=True)


_LEGEND = (
    "1 to 64: share of ‖ΔW‖² that the nearest matrix of that rank holds; stable: ‖ΔW‖²/σ₁²; 90%: rank that holds it."
)


def _cells(one: "Measured") -> tuple[str, ...]:
    from pipeline.weights.spectrum import RANKS

    stable, least = one.stable_rank, one.rank_of(0.9)
    return (
        short(one.name),
        _percent(one.relative),
        *("–" if (held := one.energy(rank)) is None else f"{held:.0%}" for rank in RANKS),
        "–" if stable is None else f"{stable:.1f}",
        f">{len(one.values)}" if least is None else str(least),
    )


def _besides(spectra: "Spectra", changed: list["Measured"]) -> list[str]:
    """What the table has not: vectors, what is estimated, and what nothing is said of."""
    lines = []
    vectors = [one for one in changed if not one.values]
    if vectors:
        shares = [one.relative for one in vectors if one.relative is not None]
        how_far = f", by {_percent(min(shares))} to {_percent(max(shares))}" if shares else ""
        tensors = f"{len(vectors)} other tensor{'s' * (len(vectors) > 1)}, norms and biases for the most part,"
        lines.append(f"{tensors} changed too{how_far}: no low rank carries them.")
    wide = [one for one in changed if not one.complete]
    if wide:
        which = f"{len(wide)} wide matri{'ces' if len(wide) > 1 else 'x'} the {len(wide[0].values)} largest values"
        lines.append(
            f"Of {which} come from a random subspace, each at most {max(one.error for one in wide):.1%} of the first "
            "from a true one; no share is too high."
        )
    same = [one.name for one in spectra.tensors if not one.change]
    if same and changed:
        lines.append(f"Unchanged: {_listed(same)}.")
    return [*lines, *(f"Nothing is said of {what}." for what in spectra.skipped)]


def short(name: str) -> str:
    """A tensor's name from its block's number on, or its last parts: 0.self_attn.q_proj, lm_head, final_norm.bias."""
    module = name.removesuffix(".weight")
    numbered = re.search(r"(?:^|\.)(\d+\..*)", module)
    return numbered[1] if numbered else ".".join(module.split(".")[-1 - (module == name) :])


def _percent(share: float | None) -> str:
    """Three digits, or as many as there is room for."""
    if share is None:
        return "–"
    return f"{share:.1%}" if share >= 0.0005 else f"{share:.0e}"


def _facts(found: "Extracted", out: Path) -> dict[str, Any]:
    return {
        "folder": str(out),
        "rank": found.rank,
        "low_rank": found.low_rank,
        "in_full": found.in_full,
        "left_out": found.left_out,
        "held": found.held,
    }


def _say_extracted(found: "Extracted", out: Path) -> None:
    from cli.console import stdout

    held = f"{len(found.low_rank)} matrices at rank {found.rank}, {found.held:.1%} of all that changed"
    lines = [f"{out}  {held}"]
    if found.in_full:
        lines.append(f"In full: {', '.join(map(short, found.in_full))}.")
    if found.left_out:
        lines.append(f"Left out: {_listed(found.left_out)}.")
    for line in lines:
        stdout.print(line, markup=False, soft_wrap=True)


def _listed(names: list[str], most: int = 4) -> str:
    more = len(names) - most
    return ", ".join(map(short, names[:most])) + (f" and {more} more" if more > 0 else "")


def _say_quality(answers: dict[str, "Quality"]) -> None:
    from cli.console import stdout, table

    if answers:
        columns = ("model", "loss", "right", "as tuned")
        rows = [(name, f"{one.loss:.4f}", f"{one.right:.1%}", f"{one.as_tuned:.1%}") for name, one in answers.items()]
        stdout.print(table(columns, rows, right=columns[1:]))
