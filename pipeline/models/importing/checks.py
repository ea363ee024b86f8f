"""Checks of an imported base: it is imported completely or not at all."""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.calc.families import architecture
from pipeline.errors import UserError
from pipeline.files.artifact import read_json
from pipeline.files.safetensors_header import read_header

if TYPE_CHECKING:
    from torch import Tensor

SENTENCE = "The capital of France is Paris, and two and two are four."

# Sizes in a config, by the names that different families give them.
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
WIDTHS = ("hidden_size", "n_embd", "d_model")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
BESIDE_WIDTH = (  # each is a side of a matrix whose other side is the width
    *("vocab_size", "intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner", "head_dim"),
    *("num_attention_heads", "n_head", "num_key_value_heads", *EXPERTS),
)
MOST_EXPERTS = 100_000  # over all layers; published models have up to about 25,000
SLACK = 2**24  # parameters that may be missing: transformers then names the tensors


def refuse_implausible(folder: Path, files: Sequence[Path]) -> None:
    """Raises UserError if config.json describes a model far larger than the weights in `files`.

    Runs before transformers builds anything: a million layers take minutes, a huge vocabulary all the memory.
    """
    config, source = read_json(folder / "config.json", "Copy it again"), folder / "config.json"
    infos = [info for path in files for info in read_header(path).values()]
    stored = sum(prod(info.shape) for info in infos)
    if config.get("quantization_config"):  # a stored number packs several parameters: at least 2 bits each
        stored = 4 * sum(info.size for info in infos)
    for part in _parts(config):
        _refuse_sizes(part, len(infos), 2 * stored + SLACK, source)
    try:
        total = architecture(config, str(source)).total
    except (UserError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return  # an architecture that the calculator does not support, or values that transformers will reject
    if total > 2 * stored + SLACK:
        raise _implausible(source, f"it describes {total:,} parameters, the weights have {stored:,}")


def refuse_implausible_gguf(path: Path) -> None:
    """The same for a GGUF file's metadata. A parameter takes at least one bit."""
    from pipeline.calc import headers  # loading a model checks its folder only

    metadata, shapes = headers.read_gguf(path)
    _refuse_sizes(headers.gguf_config(metadata, shapes), len(shapes), 8 * path.stat().st_size + SLACK, path)


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The config and the sub-configs nested in it, such as text_config."""
    stack = [config]
    while stack:
        yield (part := stack.pop())
        stack += [value for key, value in part.items() if isinstance(value, dict) and key.endswith("_config")]


def _refuse_sizes(config: Mapping[str, Any], tensors: int, most: int, source: Path) -> None:
    def integers(keys: Sequence[str]) -> dict[str, int]:
        return {key: config[key] for key in keys if type(config.get(key)) is int}

    for key, count in integers(LAYERS).items():
        if count > tensors:
            raise _implausible(source, f"{key} is {count:,}, the weights have {tensors:,} tensors")
        for name, experts in integers(EXPERTS).items():
            if count * experts > MOST_EXPERTS:
                raise _implausible(source, f"{key} × {name} is {count * experts:,}, more than {MOST_EXPERTS:,}")
    for key, width in integers(WIDTHS).items():
        for name, count in integers(BESIDE_WIDTH).items():
            if width * count > most:
                raise _implausible(source, f"{key} × {name} is {width * count:,}, more than its weights hold")


def _implausible(source: Path, reason: str) -> UserError:
    return UserError(f"{source} does not match its weights: {reason}. Copy both from the same model.")


def refuse_quantized(folder: Path) -> None:
    config = read_json(folder / "config.json", "Copy it again")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown method")
        raise UserError(
            f"base: {folder} is quantized ({method}); training needs unquantized weights. Use the 16-bit model."
        )


def refuse_unusable(model: Any, out: Path, text: str, trust_remote_code: bool) -> None:
    """Raises UserError unless the imported model tokenizes a sentence, gives finite logits and is causal."""
    import torch
    from transformers import AutoTokenizer

    from pipeline.models.importing.transformers_io import reported

    with reported(f"base: {text}", trust_remote_code):
        tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True, trust_remote_code=trust_remote_code)
        ids = tokenizer(SENTENCE)["input_ids"][:16]
    rows = model.get_input_embeddings().weight.shape[0]
    if not ids or max(ids) >= rows or len(tokenizer) > rows:
        raise UserError(
            f"base: {text} has a tokenizer of {len(tokenizer)} tokens and an embedding of {rows} rows. "
            "Copy both from the same model."
        )
    other = [*ids[:-1], (ids[-1] + 1) % rows]
    with torch.no_grad(), reported(f"base: {text}", trust_remote_code):
        first, second = model.eval()(input_ids=torch.tensor([ids, other])).logits.float()  # (T, V) each
    _refuse_logits(first, second, text, str(model.dtype).removeprefix("torch."))


def _refuse_logits(first: "Tensor", second: "Tensor", text: str, kind: str) -> None:
    """`first` and `second`: (T, V), of two texts that differ only in the last token."""
    if not first.isfinite().all():
        raise UserError(
            f"base: {text} gives logits that are not finite in {kind}. "
            "Copy its weights again, or set a precision with a larger range."
        )
    difference = (first[:-1] - second[:-1]).abs()
    # rounding, and how experts batch tokens, stay far below 2 %
    if difference.numel() and difference.max() > 0.02 * first.abs().max():
        raise UserError(
            f"base: {text} is not a causal language model: a later token changes the logits before it. "
            "Choose a model that generates text."
        )
