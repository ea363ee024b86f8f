"""`lora export`, `lora push`: an adapter in a registered format, in a folder or on the hub.

`lora certify`: whether it does the same in other programs.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, BadParameter, Option

from cli.options import (
    AdapterArgument,
    BaseNameOption,
    BaseOption,
    DeviceOption,
    JsonOption,
    OutOption,
    PromptsOption,
    TrustOption,
    WidthOption,
    group,
)
from pipeline.errors import UserError
from pipeline.export.formats import FORMATS, Export

HELP = "Export an adapter for another program, or merged."
app = group()


def known(name: str) -> str:
    """Callback for --format: a Literal type cannot list what a registry finds."""
    if name not in FORMATS:
        raise BadParameter(f"{name!r} is not one of {', '.join(FORMATS)}.")
    return name


FormatOption = Annotated[
    str,
    Option("--format", metavar=f"<{'|'.join(FORMATS)}>", callback=known, help="Format to write."),
]

QuantizeOption = Annotated[
    str | None, Option(metavar="KIND,…", help="Kinds of GGUF files: f16,q8_0,q4_k_m; default: f16.")
]


@app.command(
    help="\n".join(
        (HELP, "\n\b", *(f"{name:14}{format_.about}" for name, format_ in FORMATS.items()))
    )
)
def export(
    path: AdapterArgument,
    out: OutOption,
    form: FormatOption,
    base: BaseOption = None,
    base_name: BaseNameOption = None,
    precision: WidthOption = None,
    prompts: PromptsOption = None,
    trust_remote_code: TrustOption = False,
    quantize: QuantizeOption = None,
    _device: DeviceOption = None,
) -> None:
    from cli.console import following, print_line
    from lora_workbench import api

    with following("export") as show:
        lines = api.export(
            path,
            out,
            form,
            base=base,
            base_name=base_name,
            precision=precision,
            prompts=prompts,
            quantize=quantize,
            trust_remote_code=trust_remote_code,
            on_event=show,
        )
    for line in lines:
        print_line(line)


@app.command()
def push(
    path: AdapterArgument,
    repository: Annotated[str, Argument(metavar="ORG/NAME", help="Repository on the hub.")],
    form: FormatOption = "peft",
    base: BaseOption = None,
    base_name: BaseNameOption = None,
    precision: WidthOption = None,
    prompts: PromptsOption = None,
    private: Annotated[bool, Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, Option(metavar="BRANCH", help="Branch to commit to; default: main.")
    ] = None,
    license: Annotated[
        str | None, Option(help="License on the card; default: the base's, if it is known.")
    ] = None,
    dataset: Annotated[
        list[str] | None, Option(help="Data set on the hub that was trained on. Repeatable.")
    ] = None,
    language: Annotated[
        list[str] | None, Option(help="Language of the model, such as en. Repeatable.")
    ] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Write the files to --out and send nothing.")
    ] = False,
    out: Annotated[
        Path | None, Option(help="Folder for the files; default: a temporary one.")
    ] = None,
    trust_remote_code: TrustOption = False,
    quantize: QuantizeOption = None,
    _device: DeviceOption = None,
) -> None:
    """Push an export of an adapter to the Hugging Face hub.

    In one commit, with a model card. A push again updates. Log in with `hf auth login`, or set
    HF_TOKEN.
    """
    from cli.console import follow, print_line, print_table
    from pipeline.export.hub import Publication, check, files_of, prepare, upload

    if dry_run and out is None:
        raise UserError("--dry-run needs --out DIR, the folder to write.")
    publication = Publication(repository, private, revision, license, dataset or (), language or ())
    exported = Export(path, base, base_name, precision, prompts, trust_remote_code, quantize)
    check(publication, form, exported, dry_run)
    with tempfile.TemporaryDirectory() as scratch:
        folder = out or Path(scratch, repository.rpartition("/")[2])
        if not dry_run:  # a short relative name could stand anywhere in `lines`
            folder = folder.absolute()
        lines = follow(prepare(form, exported, publication, folder), "export")
        done = f"A push sends these files to {repository} in one commit; nothing was sent."
        if not dry_run:
            done = follow(upload(folder, publication), "push")
            lines = [line.replace(str(folder), repository) for line in lines]
        files = [(name, f"{size:,}") for name, size in files_of(folder).items()]
        print_table(("file", "bytes"), files, right=("bytes",))
        print_line(done)
    for line in lines:
        print_line(line)


@app.command()
def certify(
    path: Annotated[
        Path, Argument(metavar="DIR", help="Adapter of PEFT or mlx-lm, checkpoint or GGUF file.")
    ],
    base: BaseOption = None,
    adapter: Annotated[
        Path | None, Option(help="Adapter of PEFT that DIR was made from, to compare with.")
    ] = None,
    engines: Annotated[
        str | None,
        Option(
            "--in",
            metavar="ENGINE,…",
            help="Programs: peft==0.18,transformers,trl,vllm,llama.cpp:q4_k_m,mlx; default: DIR's "
            "own.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        Option(help="File to write; default: certificate.json in DIR, or in runs/certificates."),
    ] = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
    _device: DeviceOption = None,
) -> None:
    """Certify an adapter or a model in other programs. Exit code 1 where one fails.

    Each opens it on its base, in an environment of its own, and is compared with the library of its
    format: did every group of tensors take effect, are the answers the same, is a conversation read
    alike.
    """
    from cli.console import follow, print_json, print_line
    from pipeline.adapters.folder import base_of
    from pipeline.certify import record
    from pipeline.certify.certify import FAILED, Processes
    from pipeline.certify.certify import certify as certify_in
    from pipeline.certify.engines import parse
    from pipeline.certify.kinds import Checked, kind_of

    kind = kind_of(path)
    if base is None:
        named = adapter or (path if kind == "adapter" else None)
        if named is None:
            raise UserError(f"{path} names no base. Name what it was made from with --base.")
        base = base_of(named)
    checked = Checked(path, base, trust_remote_code, adapter)
    wanted = parse(engines or checked.kind.library)
    with Processes() as processes:
        certificate = follow(certify_in(checked, wanted, processes), "certify")
    if as_json:
        print_json(certificate)
    else:
        _show(certificate)
    file = record.write(checked, certificate, out)
    reference = certificate["reference"] or "nothing"
    if certificate["verdict"] == FAILED:
        raise UserError(f"{path} failed, against {reference}. The reasons are in {file}.")
    if not as_json:
        print_line(f"{path}: {certificate['verdict']}, against {reference}. {file}")


def _show(certificate: dict[str, Any]) -> None:
    """A row for each engine; below it why one failed."""
    from cli.console import number, print_line, print_table

    rows = []
    for entry in certificate["engines"]:
        effect = "–"
        if "groups" in entry:
            effect = f"{entry['groups_that_act']} of {entry['groups']}"
        greedy = {True: "the same", False: "differs", None: "–"}[entry.get("same_greedy_text")]
        divergence = entry.get("divergence")
        shown = None if divergence is None else max(divergence, 0)
        share, of_kl = number(entry.get("share"), ".0%"), number(shown, ".0e")
        rows.append((entry["engine"], entry["verdict"], share, effect, of_kl, greedy))
    columns = ("engine", "verdict", "effect", "groups", "KL", "greedy text")
    print_table(columns, rows, right=("effect", "groups", "KL"))
    for problem in certificate["problems"]:
        print_line(f"Its files: {problem.rstrip('.')}.")
    for note in certificate["notes"]:
        print_line(f"Not checked by our own reader: {note.rstrip('.')}.")
    for entry in certificate["engines"]:
        for line in (*entry["problems"], *_rounded(entry)):
            print_line(f"{entry['engine']}: {line.rstrip('.')}.")


def _rounded(entry: dict[str, Any]) -> Iterator[str]:
    """What rounding costs in an engine, and would cost a merge."""
    merged = entry.get("if_merged")
    if not merged:
        return
    yield f"rounding alone costs the base a KL of {max(entry['base_divergence'], 0):.1e} per token"
    changed, step = merged.get("codes_changed"), merged.get("share_of_step")
    if changed is not None and step is not None:
        yield (
            f"merged, {changed:.0%} of the codes would not be the base's: the update is {step:.2f} "
            "times the error of rounding"
        )
