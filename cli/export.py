"""`lora export`, and merging an adapter into checkpoint files."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli.options import BaseNameOption, BaseOption, TrustOption, group

if TYPE_CHECKING:
    from pipeline.weights.merge import Merging, Verify

Width = Literal["fp32", "bf16", "fp16"]
OutOption = Annotated[Path, typer.Option(help="Output folder.")]
WidthOption = Annotated[Width | None, typer.Option(help="dtype of the merged weights; default: the base's.")]
PromptsOption = Annotated[
    Path | None, typer.Option(help="Prompts to compare the merged model with base + adapter; loads both.")
]
app = group()


@app.command()
def export(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Adapter folder.")],
    out: OutOption,
    form: Annotated[Literal["peft", "vllm", "merged"], typer.Option("--format", help="Format to write.")],
    base: BaseOption = None,
    base_name: BaseNameOption = None,
    precision: WidthOption = None,
    prompts: PromptsOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Export an adapter: for PEFT, for vLLM, or merged.

    vllm keeps to what vLLM accepts; merged writes a whole checkpoint.
    """
    from cli.console import stdout
    from pipeline.adapters.folder import base_of
    from pipeline.errors import UserError
    from pipeline.export.formats import for_peft, for_vllm

    if form != "merged" and (precision or prompts):
        raise UserError("--precision and --prompts need --format merged.")
    if form == "peft" and (base or trust_remote_code):
        raise UserError("--format peft only copies the adapter, so it takes neither --base nor --trust-remote-code.")
    if form == "merged":
        _export_merged(out, *merging_of(path, base, precision, prompts, trust_remote_code), base_name)
    elif form == "vllm":
        _note_quantization(path)
        base = base or base_of(path)
        rank = for_vllm(path, base, out, trust_remote_code, base_name)
        stdout.print(f"{out}  for vLLM. Serve it with:", markup=False, soft_wrap=True)
        modules = f"--max-lora-rank {rank} --lora-modules {out.resolve().name}={out}"
        stdout.print(f"vllm serve {base_name or base} --enable-lora {modules}", markup=False, soft_wrap=True)
    else:
        _note_quantization(path)
        for_peft(path, out, base_name)
        stdout.print(f"{out}  for PEFT", markup=False, soft_wrap=True)


def _note_quantization(adapter: Path) -> None:
    from cli.console import stderr
    from pipeline.adapters.folder import quantization_of
    from pipeline.export.model_card import quantization_note

    kind = quantization_of(adapter)
    if kind != "none":
        note = f"{adapter} was {quantization_note(kind)}. Load the base in {kind}, or export it with --format merged."
        stderr.print(note, markup=False, soft_wrap=True)


def merging_of(
    adapter: Path, base: Path | None, precision: str | None, prompts: Path | None, trust: bool
) -> tuple["Merging", "Verify | None"]:
    """The merge, and the check of its logits if there are prompts."""
    from pipeline.adapters.folder import base_of
    from pipeline.data.prompts import read_prompts
    from pipeline.weights.merge import Merging

    merging = Merging(base or base_of(adapter), adapter, precision, trust)
    if prompts is None:
        return merging, None
    from pipeline.inference.score import SameLogits

    texts = [prompt.prompt for prompt in read_prompts(prompts, str(prompts))]
    return merging, SameLogits(merging.base, adapter, texts, trust_remote_code=trust)


def _export_merged(out: Path, merging: "Merging", verify: "Verify | None", base_name: str | None) -> None:
    from cli.progress import follow
    from pipeline.export.formats import merged

    print_merged(out, follow(merged(out, merging, verify, base_name), "merge"))


def merge_files(out: Path, merging: "Merging", verify: "Verify | None") -> None:
    """Write the merged checkpoint without a model card."""
    from cli.progress import follow
    from pipeline.weights.merge import merge_to

    print_merged(out, follow(merge_to(out, merging, verify), "merge"))


def print_merged(out: Path, certificate: dict[str, Any]) -> None:
    from cli.console import stdout

    ratios = [ratio for ratio in certificate["delta_ratios"].values() if ratio is not None]
    parts = [str(out)]
    if ratios:
        parts.append(f"{len(ratios)} matrices hold their update {min(ratios):.4f} to {max(ratios):.4f} times")
    if "max_logit_difference" in certificate:
        parts.append(f"largest logit difference {certificate['max_logit_difference']:.1e}")
    stdout.print("  ".join(parts), markup=False, soft_wrap=True)
