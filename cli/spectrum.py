"""`lora spectrum`: the singular values of what fine-tuning changed, and the nearest LoRA of a given
rank.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from cli.options import DeviceOption, JsonOption, PlainOption, TrustOption, finite, group

if TYPE_CHECKING:
    from pipeline.weights.extract import Spectra
    from pipeline.weights.intruders import Searched
    from pipeline.weights.spectrum import Measured

app = group()
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
    from cli.console import follow, noting_replaced, print_line, print_table
    from pipeline.data.formats import read_examples
    from pipeline.errors import UserError
    from pipeline.inference.score import quality, refuse_other_tokens
    from pipeline.weights.extract import extract, spectra_of

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
        _intruders(
            base,
            tuned,
            (top, epsilon),
            damp,
            out,
            data,
            not no_template,
            trust_remote_code,
            as_json,
        )
        return
    if (rank is None) != (out is None):
        raise UserError(
            "--rank and --out must be used together to extract a LoRA. Add the other one."
        )
    show = _print_json if as_json else _print_csv if as_csv else _print_tables
    if out is None or rank is None:
        if data is not None:
            raise UserError("--data evaluates the extracted LoRA. Add --rank and --out.")
        show(follow(spectra_of(base, tuned, trust_remote_code), "spectrum"))
        return
    examples = read_examples(data, str(data), templated=not no_template) if data else []
    if examples:
        refuse_other_tokens(base, tuned, examples)
    with noting_replaced(out):
        extracted = follow(
            extract(base, tuned, out, rank, embeddings == "all", trust_remote_code), "spectrum"
        )
    if not as_json:  # shown before the models are loaded, which may fail
        show(extracted.spectra)
    if not (as_json or as_csv):
        share = (
            f"{len(extracted.low_rank)} matrices at rank {extracted.rank}, {extracted.held:.1%} "
            "of all that changed"
        )
        print_line(f"{out}  {share}")
        if extracted.in_full:
            print_line(f"In full: {', '.join(map(short, extracted.in_full))}.")
        if extracted.left_out:
            print_line(f"Left out: {_join_names(extracted.left_out)}.")
    answers = quality(base, tuned, out, examples, trust_remote_code) if examples else {}
    if as_json:
        kept = {
            key: getattr(extracted, key)
            for key in ("rank", "low_rank", "in_full", "left_out", "held")
        }
        scores = {name: each._asdict() for name, each in answers.items()}
        _print_json(extracted.spectra, extracted={"folder": str(out), **kept}, quality=scores)
    elif answers:
        columns = ("model", "loss", "right", "as tuned")
        rows = [
            (name, f"{q.loss:.4f}", f"{q.right:.1%}", f"{q.as_tuned:.1%}")
            for name, q in answers.items()
        ]
        print_table(columns, rows, right=columns[1:])


def _intruders(
    base: Path,
    tuned: Path,
    search: tuple[int, float],
    factor: float | None,
    out: Path | None,
    data: Path | None,
    templated: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """`search`: how many singular vectors of each matrix, and ε."""
    from cli.console import follow, noting_replaced, print_costs, print_json, print_line
    from pipeline.data.formats import read_examples
    from pipeline.errors import UserError
    from pipeline.inference.score import costs
    from pipeline.weights.intruders import damp, intruders_of, refuse_undampable

    if (factor is None) != (out is None):
        raise UserError(
            "--damp and --out must be used together to write a damped adapter. Add the other one."
        )
    if data is not None and out is None:
        raise UserError("--data compares the damped adapter. Add --damp and --out.")
    if out is not None:
        refuse_undampable(tuned, out)
    examples = read_examples(data, str(data), templated=templated) if data else []
    searched = follow(intruders_of(base, tuned, *search, trust_remote_code), "intruders")
    if not as_json:
        _print_intruders(searched, *search)
    if out is not None and factor is not None:
        with noting_replaced(out):
            damp(
                base,
                tuned,
                out,
                searched,
                factor,
                dict(zip(("top", "epsilon"), search, strict=True)),
            )
    models = {"tuned": tuned, "base": None, "damped": out}
    quality = costs(base, models, examples, trust_remote_code) if examples else {}
    if as_json:
        matrices = [
            {
                "name": one.pair.module,
                "complete": one.complete,
                "intruders": [intruder._asdict() for intruder in one.intruders],
            }
            for one in searched
        ]
        scores = {name: cost._asdict() for name, cost in quality.items()}
        head = dict(zip(("top", "epsilon"), search, strict=True))
        print_json({**head, "matrices": matrices, "damped": out and str(out), "quality": scores})
    else:
        if out is not None:
            print_line(f"{out}  intruders scaled by {factor:g}")
        print_costs(quality)


def _print_intruders(searched: "list[Searched]", top: int, epsilon: float) -> None:
    """A row for each matrix with intruders; below it their number, and what was not compared."""
    from cli.console import print_line, print_table
    from pipeline.weights.spectrum import MAX_VALUES

    found = [one for one in searched if one.intruders]
    rows = []
    for one in found:
        at = " ".join(str(intruder.position) for intruder in one.intruders)
        first, similar = (
            one.intruders[0].value,
            max(intruder.similarity for intruder in one.intruders),
        )
        rows.append(
            (short(one.pair.module), str(len(one.intruders)), at, f"{first:.2f}", f"{similar:.2f}")
        )
    if rows:
        columns = ("matrix", "intruders", "at", "largest σ", "most alike")
        print_table(columns, rows, right=("intruders", "largest σ", "most alike"))
    count = sum(len(one.intruders) for one in found)
    print_line(
        f"{count} intruder{'s' * (count != 1)} in {len(found)} of {len(searched)} matrices: among "
        f"the {top} largest "
        "left singular vectors of each, those whose |cos| with every one of the base's is below "
        f"{epsilon:g}."
    )
    if wide := sum(not one.complete for one in searched):
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
    """The same, a row per tensor, without the singular values."""
    import csv
    import sys

    from pipeline.weights.spectrum import RANKS

    writer = csv.writer(sys.stdout, lineterminator="\n")
    energies = [f"energy_{rank}" for rank in RANKS]
    last = ("stable_rank", "effective_rank", "rank_of_90", "error")
    writer.writerow(["name", "shape", "norm", "change", "relative", *energies, *last])
    for tensor in map(_facts, spectra.tensors):
        numbers = (tensor[key] for key in ("norm", "change", "relative"))
        ranks = (*tensor["energy"].values(), tensor["stable_rank"], tensor["effective_rank"])
        written = ["" if value is None else f"{value:.6g}" for value in (*numbers, *ranks)]
        shape = "x".join(map(str, tensor["shape"]))
        writer.writerow(
            [tensor["name"], shape, *written, tensor["rank_of_90"], f"{tensor['error']:.2g}"]
        )


def _print_tables(spectra: "Spectra") -> None:
    """A row for each matrix that changed; below it vectors, estimated matrices, unchanged and
    skipped tensors.
    """
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
        tensors = (
            f"{len(vectors)} other tensor{'s' * (len(vectors) > 1)}, norms and biases for the "
            "most part,"
        )
        print_line(f"{tensors} changed too{change_range}: no low rank carries them.")
    if wide := [tensor for tensor in changed if not tensor.complete]:
        matrices = f"{len(wide)} wide matri{'ces' if len(wide) > 1 else 'x'}"
        error = max(tensor.error for tensor in wide)
        print_line(
            f"Of {matrices} the {len(wide[0].values)} largest values come from a random subspace, "
            "each within "
            f"{error:.1%} of the first from a true one; no share is too high."
        )
    same = [tensor.name for tensor in spectra.tensors if not tensor.change]
    if same and changed:
        print_line(f"Unchanged: {_join_names(same)}.")
    for reason in spectra.skipped:
        print_line(f"Not included: {reason}.")


def short(name: str) -> str:
    """A tensor's name from its block number on, or its last parts: 0.self_attn.q_proj, lm_head,
    final_norm.bias.
    """
    module = name.removesuffix(".weight")
    numbered = re.search(r"(?:^|\.)(\d+\..*)", module)
    return numbered[1] if numbered else ".".join(module.split(".")[-1 - (module == name) :])


def _percent(share: float | None) -> str:
    """12.3%, or 4e-05 if it is below 0.05%."""
    if share is None:
        return "–"
    return f"{share:.1%}" if share >= 0.0005 else f"{share:.0e}"


def _join_names(names: list[str], limit: int = 4) -> str:
    more = len(names) - limit
    return ", ".join(map(short, names[:limit])) + (f" and {more} more" if more > 0 else "")
