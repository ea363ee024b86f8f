"""`lora spectrum`: the singular values of what fine-tuning changed, and the nearest LoRA of a given rank."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli.options import JsonOption, TrustOption, group

if TYPE_CHECKING:
    from pipeline.inference.score import Quality
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
    from pipeline.data.read import read_examples
    from pipeline.errors import UserError
    from pipeline.inference.score import quality, refuse_other_tokens
    from pipeline.weights.extract import extract, spectra_of

    if as_json and as_csv:
        raise UserError("--json and --csv exclude each other.")
    if as_csv and data is not None:
        raise UserError(
            "--csv has one row per tensor and cannot include the results of --data. Use --json, or omit --csv."
        )
    if (rank is None) != (out is None):
        raise UserError("--rank and --out must be used together to extract a LoRA. Add the other one.")
    if out is None or rank is None:
        if data is not None:
            raise UserError("--data evaluates the extracted LoRA. Add --rank and --out.")
        _print_spectra(follow(spectra_of(base, tuned, trust_remote_code), "spectrum"), as_json, as_csv)
        return
    examples = read_examples(data, str(data)) if data else []
    if examples:
        refuse_other_tokens(base, tuned, examples)
    extracted = follow(extract(base, tuned, out, rank, embeddings == "all", trust_remote_code), "spectrum")
    if not as_json:  # shown before the models are loaded, which may fail
        _print_spectra(extracted.spectra, as_json, as_csv)
    if not (as_json or as_csv):
        _print_extracted(extracted, out)
    answers = quality(base, tuned, out, examples, trust_remote_code) if examples else {}
    if as_json:
        quality_by_name = {name: scores._asdict() for name, scores in answers.items()}
        _print_spectra(
            extracted.spectra, as_json, as_csv, extracted=_extraction_json(extracted, out), quality=quality_by_name
        )
    else:
        _print_quality(answers)


def _print_spectra(spectra: "Spectra", as_json: bool, as_csv: bool, **more: Any) -> None:
    if as_json:
        from cli.console import print_json

        print_json({"tensors": [_tensor_json(tensor) for tensor in spectra.tensors], "unsaid": spectra.skipped, **more})
    elif as_csv:
        _write_csv(spectra)
    else:
        _print_table(spectra)


def _tensor_json(tensor: "Measured") -> dict[str, Any]:
    """A tensor as JSON, with up to MAX_VALUES singular values."""
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


def _write_csv(spectra: "Spectra") -> None:
    import csv
    import sys

    from pipeline.weights.spectrum import RANKS

    writer = csv.writer(sys.stdout, lineterminator="\n")
    energies = [f"energy_{rank}" for rank in RANKS]
    last = ("stable_rank", "effective_rank", "rank_of_90", "error")
    writer.writerow(["name", "shape", "norm", "change", "relative", *energies, *last])
    for tensor in spectra.tensors:
        share = [tensor.energy(rank) for rank in RANKS]
        numbers = [tensor.before, tensor.change, tensor.relative, *share, tensor.stable_rank, tensor.effective_rank]
        written = ["" if number is None else f"{number:.6g}" for number in numbers]
        shape = "x".join(map(str, tensor.shape))
        writer.writerow([tensor.name, shape, *written, tensor.rank_of(0.9), f"{tensor.error:.2g}"])


def _print_table(spectra: "Spectra") -> None:
    from cli.console import stdout, table
    from pipeline.weights.spectrum import RANKS

    changed = [tensor for tensor in spectra.tensors if tensor.change]
    matrices = [tensor for tensor in changed if tensor.values]
    if not changed:
        stdout.print("No tensor differs.")
    if matrices:
        columns = ("matrix", "‖Δ‖/‖W‖", *map(str, RANKS), "stable", "90%")
        stdout.print(table(columns, [_cells(tensor) for tensor in matrices], right=columns[1:]))
        stdout.print(_LEGEND, soft_wrap=True)
    for line in _notes(spectra, changed):
        stdout.print(line, markup=False, soft_wrap=True)


_LEGEND = (
    "1 to 64: share of ‖ΔW‖² that the nearest matrix of that rank holds; stable: ‖ΔW‖²/σ₁²; 90%: rank that holds it."
)


def _cells(tensor: "Measured") -> tuple[str, ...]:
    from pipeline.weights.spectrum import RANKS

    stable, least = tensor.stable_rank, tensor.rank_of(0.9)
    return (
        short(tensor.name),
        _percent(tensor.relative),
        *("–" if (share := tensor.energy(rank)) is None else f"{share:.0%}" for rank in RANKS),
        "–" if stable is None else f"{stable:.1f}",
        f">{len(tensor.values)}" if least is None else str(least),
    )


def _notes(spectra: "Spectra", changed: list["Measured"]) -> list[str]:
    """Lines below the table: vectors, estimated matrices, unchanged and skipped tensors."""
    lines = []
    vectors = [tensor for tensor in changed if not tensor.values]
    if vectors:
        shares = [tensor.relative for tensor in vectors if tensor.relative is not None]
        change_range = f", by {_percent(min(shares))} to {_percent(max(shares))}" if shares else ""
        tensors = f"{len(vectors)} other tensor{'s' * (len(vectors) > 1)}, norms and biases for the most part,"
        lines.append(f"{tensors} changed too{change_range}: no low rank carries them.")
    wide = [tensor for tensor in changed if not tensor.complete]
    if wide:
        matrices = f"{len(wide)} wide matri{'ces' if len(wide) > 1 else 'x'}"
        error = max(tensor.error for tensor in wide)
        lines.append(
            f"Of {matrices} the {len(wide[0].values)} largest values come from a random subspace, each within "
            f"{error:.1%} of the first from a true one; no share is too high."
        )
    same = [tensor.name for tensor in spectra.tensors if not tensor.change]
    if same and changed:
        lines.append(f"Unchanged: {_join_names(same)}.")
    return [*lines, *(f"Not included: {reason}." for reason in spectra.skipped)]


def short(name: str) -> str:
    """A tensor's name from its block number on, or its last parts: 0.self_attn.q_proj, lm_head, final_norm.bias."""
    module = name.removesuffix(".weight")
    numbered = re.search(r"(?:^|\.)(\d+\..*)", module)
    return numbered[1] if numbered else ".".join(module.split(".")[-1 - (module == name) :])


def _percent(share: float | None) -> str:
    """12.3%, or 4e-05 if it is below 0.05%."""
    if share is None:
        return "–"
    return f"{share:.1%}" if share >= 0.0005 else f"{share:.0e}"


def _extraction_json(extracted: "Extracted", out: Path) -> dict[str, Any]:
    return {
        "folder": str(out),
        "rank": extracted.rank,
        "low_rank": extracted.low_rank,
        "in_full": extracted.in_full,
        "left_out": extracted.left_out,
        "held": extracted.held,
    }


def _print_extracted(extracted: "Extracted", out: Path) -> None:
    from cli.console import stdout

    share = f"{len(extracted.low_rank)} matrices at rank {extracted.rank}, {extracted.held:.1%} of all that changed"
    lines = [f"{out}  {share}"]
    if extracted.in_full:
        lines.append(f"In full: {', '.join(map(short, extracted.in_full))}.")
    if extracted.left_out:
        lines.append(f"Left out: {_join_names(extracted.left_out)}.")
    for line in lines:
        stdout.print(line, markup=False, soft_wrap=True)


def _join_names(names: list[str], limit: int = 4) -> str:
    more = len(names) - limit
    return ", ".join(map(short, names[:limit])) + (f" and {more} more" if more > 0 else "")


def _print_quality(answers: dict[str, "Quality"]) -> None:
    from cli.console import stdout, table

    if answers:
        columns = ("model", "loss", "right", "as tuned")
        rows = [
            (name, f"{scores.loss:.4f}", f"{scores.right:.1%}", f"{scores.as_tuned:.1%}")
            for name, scores in answers.items()
        ]
        stdout.print(table(columns, rows, right=columns[1:]))
