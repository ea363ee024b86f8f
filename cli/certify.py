"""`lora certify`: whether an adapter does the same in other programs."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Exit, Option

from cli.options import BaseOption, JsonOption, TrustOption, group

app = group()
DEFAULT = "peft"


@app.command()
def certify(
    folder: Annotated[Path, Argument(metavar="DIR", help="Adapter of any tool, in PEFT's format.")],
    base: BaseOption = None,
    engines: Annotated[
        str,
        Option(
            "--in",
            metavar="ENGINE,…",
            help="Programs, with a version if it matters: peft==0.18,transformers,trl.",
        ),
    ] = DEFAULT,
    out: Annotated[
        Path | None,
        Option(help="File to write; default: certificate.json in DIR, runs/certificates/ of ours."),
    ] = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Certify an adapter in other programs. Exit code 1 where one fails.

    Each opens it on its base, in an environment of its own, and is compared with PEFT: did every
    group of tensors take effect, are the answers the same, is a conversation read alike.
    """
    from cli.console import follow, print_json
    from pipeline.adapters.folder import base_of
    from pipeline.certify import record
    from pipeline.certify.certify import FAILED, Checked, Processes
    from pipeline.certify.certify import certify as certify_in
    from pipeline.certify.engines import parse

    wanted = parse(engines)
    checked = Checked(folder, base or base_of(folder), trust_remote_code)
    with Processes() as processes:
        certificate = follow(certify_in(checked, wanted, processes), "certify")
    path = out or record.place_of(folder)
    record.write(path, folder, certificate)
    if as_json:
        print_json(certificate)
    else:
        _show(folder, path, certificate)
    if certificate["verdict"] == FAILED:
        raise Exit(1)


def _show(folder: Path, path: Path, certificate: dict[str, Any]) -> None:
    """A row for each engine; below it why one failed."""
    from cli.console import number, print_line, print_table

    rows = []
    for entry in certificate["engines"]:
        groups = entry.get("groups", {})
        moving = sum(group["moved"] > 0 for group in groups.values())
        effect = f"{moving} of {len(groups)}" if groups else "–"
        greedy = {True: "the same", False: "differs", None: "–"}[entry.get("same_greedy_text")]
        divergence = entry.get("divergence")
        shown = None if divergence is None else max(divergence, 0)
        rows.append((entry["engine"], entry["verdict"], effect, number(shown, ".0e"), greedy))
    columns = ("engine", "verdict", "groups that act", "KL", "greedy text")
    print_table(columns, rows, right=("groups that act", "KL"))
    for problem in certificate["problems"]:
        print_line(f"The adapter: {problem}.".replace("..", "."))
    for entry in certificate["engines"]:
        for problem in entry["problems"]:
            print_line(f"{entry['engine']}: {problem}.".replace("..", "."))
    reference = certificate["reference"] or "nothing"
    print_line(f"{folder}: {certificate['verdict']}, against {reference}. {path}")
