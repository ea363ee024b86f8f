"""What is refused of a base made by others: it is taken whole, or not at all."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import read_json
from pipeline.errors import UserError
from pipeline.pretrained import reported

if TYPE_CHECKING:
    from torch import Tensor

SENTENCE = "The capital of France is Paris, and two and two are four."


def refuse_quantized(folder: Path) -> None:
    config = read_json(folder / "config.json", "Copy it anew")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "some method")
        raise UserError(
            f"pretrain.base: {folder} is quantized ({method}); training changes weights. Name the 16-bit model."
        )


def refuse_unusable(model: Any, out: Path, text: str, trust_remote_code: bool) -> None:
    """What was written must read a sentence, answer with finite numbers, and never look ahead."""
    import torch
    from transformers import AutoTokenizer

    with reported(f"pretrain.base: {text}", trust_remote_code):
        tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True, trust_remote_code=trust_remote_code)
        ids = tokenizer(SENTENCE)["input_ids"][:16]
    rows = model.get_input_embeddings().weight.shape[0]
    if not ids or max(ids) >= rows or len(tokenizer) > rows:
        raise UserError(
            f"pretrain.base: {text} has a tokenizer of {len(tokenizer)} tokens and a model of {rows} rows. "
            "Copy the files of one model."
        )
    other = [*ids[:-1], (ids[-1] + 1) % rows]
    with torch.no_grad(), reported(f"pretrain.base: {text}", trust_remote_code):
        first, second = model.eval()(input_ids=torch.tensor([ids, other])).logits.float()  # (T, V) each
    _refuse_logits(first, second, text, str(model.dtype).removeprefix("torch."))


def _refuse_logits(first: "Tensor", second: "Tensor", text: str, kind: str) -> None:
    """`first` and `second`: (T, V), of two texts that differ in the last token alone."""
    if not first.isfinite().all():
        raise UserError(
            f"pretrain.base: {text} answers a sentence with numbers that are not finite, in {kind}. "
            "Copy its weights anew, or set a precision of more range."
        )
    apart = (first[:-1] - second[:-1]).abs()
    if apart.numel() and apart.max() > 0.02 * first.abs().max():  # rounding, and experts' batches, stay far below
        raise UserError(
            f"pretrain.base: {text} is not a causal language model: a later token changes what it says before it. "
            "Choose a model that generates text."
        )
