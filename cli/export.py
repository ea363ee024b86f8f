"""`lora export`, and merging an adapter into checkpoint files."""

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from cli.options import AdapterArgument, BaseNameOption, BaseOption, TrustOption, group

if TYPE_CHECKING:
    from pipeline.project.runner import Event
    from pipeline.weights.merge import Merging, Verify

Width = Literal["fp32", "bf16", "fp16"]
OutOption = Annotated[Path, Option(help="Output folder.")]
WidthOption = Annotated[Width | None, Option(help="dtype of the merged weights; default: the base's.")]
PromptsOption = Annotated[
    Path | None, Option(help="Prompts to compare the merged model with base + adapter; loads both.")
]
app = group()


@app.command()
def export(
    path: AdapterArgument,
    out: OutOption,
    form: Annotated[Literal["peft", "vllm", "merged"], Option("--format", help="Format to write.")],
    base: BaseOption = None,
    base_name: BaseNameOption = None,
    precision: WidthOption = None,
    prompts: PromptsOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Export an adapter: for PEFT, for vLLM, or merged.

    vllm keeps to what vLLM accepts; merged writes a whole checkpoint.
    """
    from cli.console import print_line, print_note
    from pipeline.adapters.folder import base_of, quantization_of
    from pipeline.errors import UserError
    from pipeline.export.formats import for_peft, for_vllm, merged
    from pipeline.export.model_card import quantization_note

    if form != "merged" and (precision or prompts):
        raise UserError("--precision and --prompts need --format merged.")
    if form == "peft" and (base or trust_remote_code):
        raise UserError("--format peft only copies the adapter, so it takes neither --base nor --trust-remote-code.")
    if form == "merged":
        merging, verify = merging_of(path, base, precision, prompts, trust_remote_code)
        print_merged(out, merged(out, merging, verify, base_name))
        return
    if (kind := quantization_of(path)) != "none":
        note = f"{path} was {quantization_note(kind)}. Load the base in {kind}, or export it with --format merged."
        print_note(note)
    if form == "peft":
        for_peft(path, out, base_name)
        print_line(f"{out}  for PEFT")
        return
    base = base or base_of(path)
    rank = for_vllm(path, base, out, trust_remote_code, base_name)
    print_line(f"{out}  for vLLM. Serve it with:")
    modules = f"--max-lora-rank {rank} --lora-modules {out.resolve().name}={out}"
    print_line(f"vllm serve {base_name or base} --enable-lora {modules}")


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


def print_merged(out: Path, merging: "Generator[Event, None, Mapping[str, Any]]") -> None:
    """Run a merge and say what its certificate proves."""
    from cli.console import follow, print_line

    certificate = follow(merging, "merge")
    ratios = [ratio for ratio in certificate["delta_ratios"].values() if ratio is not None]
    parts = [str(out)]
    if ratios:
        parts.append(f"{len(ratios)} matrices hold their update {min(ratios):.4f} to {max(ratios):.4f} times")
    if "max_logit_difference" in certificate:
        parts.append(f"largest logit difference {certificate['max_logit_difference']:.1e}")
    print_line("  ".join(parts))
