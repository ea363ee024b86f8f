"""What is refused of a base made by others: it is taken whole, or not at all."""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.calc.families.registry import architecture
from pipeline.calc.sources import gguf
from pipeline.errors import UserError
from pipeline.files.artifact import read_json
from pipeline.files.safetensors_header import read_header
from pipeline.models.importing.transformers_io import reported

if TYPE_CHECKING:
    from torch import Tensor

SENTENCE = "The capital of France is Paris, and two and two are four."


# What configs call their sizes.
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
WIDTHS = ("hidden_size", "n_embd", "d_model")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
BESIDE_WIDTH = (  # each is a side of a matrix whose other side is the width
    *("vocab_size", "intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner", "head_dim"),
    *("num_attention_heads", "n_head", "num_key_value_heads", *EXPERTS),
)
MOST_EXPERTS = 100_000  # in all layers together; published models have up to some 25,000
SLACK = 2**24  # parameters that may be missing: the library then names the tensors


def refuse_implausible(folder: Path, files: Sequence[Path]) -> None:
    """Raises UserError if config.json describes a model far larger than the weights in `files`.

    It is read before the library builds anything: a million layers take minutes, a huge vocabulary all the memory.
    """
    config, source = read_json(folder / "config.json", "Copy it anew"), folder / "config.json"
    infos = [info for path in files for info in read_header(path).values()]
    stored = sum(prod(info.shape) for info in infos)
    if config.get("quantization_config"):  # several parameters share a stored number: at least 2 bits each
        stored = 4 * sum(info.size for info in infos)
    for part in _parts(config):
        _refuse_sizes(part, len(infos), 2 * stored + SLACK, source)
    try:
        total = architecture(config, str(source)).total
    except (UserError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return  # an architecture that the calculator does not know, or values that the library will refuse
    if total > 2 * stored + SLACK:
        raise _implausible(source, f"it describes {total:,} parameters, the weights have {stored:,}")


def refuse_implausible_gguf(path: Path) -> None:
    """The same of a GGUF file's metadata. A parameter takes at least a bit."""
    metadata, shapes = gguf.read_header(path)
    _refuse_sizes(gguf.sizes(metadata, shapes), len(shapes), 8 * path.stat().st_size + SLACK, path)


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The config and those of the models within it."""
    waiting = [config]
    while waiting:
        yield (part := waiting.pop())
        waiting += [value for key, value in part.items() if isinstance(value, dict) and key.endswith("_config")]


def _refuse_sizes(config: Mapping[str, Any], tensors: int, most: int, source: Path) -> None:
    def given(keys: Sequence[str]) -> dict[str, int]:
        return {key: config[key] for key in keys if type(config.get(key)) is int}

    for key, count in given(LAYERS).items():
        if count > tensors:
            raise _implausible(source, f"{key} is {count:,}, the weights have {tensors:,} tensors")
        for name, experts in given(EXPERTS).items():
            if count * experts > MOST_EXPERTS:
                raise _implausible(source, f"{key} × {name} is {count * experts:,}, more than {MOST_EXPERTS:,}")
    for key, width in given(WIDTHS).items():
        for name, count in given(BESIDE_WIDTH).items():
            if width * count > most:
                raise _implausible(source, f"{key} × {name} is {width * count:,}, more than its weights hold")


def _implausible(source: Path, reason: str) -> UserError:
    return UserError(f"{source} describes another model than its weights: {reason}. Copy the files of one model.")


def refuse_quantized(folder: Path) -> None:
    config = read_json(folder / "config.json", "Copy it anew")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "some method")
        raise UserError(f"base: {folder} is quantized ({method}); training changes weights. Name the 16-bit model.")


def refuse_unusable(model: Any, out: Path, text: str, trust_remote_code: bool) -> None:
    """What was written must read a sentence, answer with finite numbers, and never look ahead."""
    import torch
    from transformers import AutoTokenizer

    with reported(f"base: {text}", trust_remote_code):
        tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True, trust_remote_code=trust_remote_code)
        ids = tokenizer(SENTENCE)["input_ids"][:16]
    rows = model.get_input_embeddings().weight.shape[0]
    if not ids or max(ids) >= rows or len(tokenizer) > rows:
        raise UserError(
            f"base: {text} has a tokenizer of {len(tokenizer)} tokens and a model of {rows} rows. "
            "Copy the files of one model."
        )
    other = [*ids[:-1], (ids[-1] + 1) % rows]
    with torch.no_grad(), reported(f"base: {text}", trust_remote_code):
        first, second = model.eval()(input_ids=torch.tensor([ids, other])).logits.float()  # (T, V) each
    _refuse_logits(first, second, text, str(model.dtype).removeprefix("torch."))


def _refuse_logits(first: "Tensor", second: "Tensor", text: str, kind: str) -> None:
    """`first` and `second`: (T, V), of two texts that differ in the last token alone."""
    if not first.isfinite().all():
        raise UserError(
            f"base: {text} answers a sentence with numbers that are not finite, in {kind}. "
            "Copy its weights anew, or set a precision of more range."
        )
    apart = (first[:-1] - second[:-1]).abs()
    if apart.numel() and apart.max() > 0.02 * first.abs().max():  # rounding, and experts' batches, stay far below
        raise UserError(
            f"base: {text} is not a causal language model: a later token changes what it says before it. "
            "Choose a model that generates text."
        )
