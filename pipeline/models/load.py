"""Load a model and its tokenizer from a checkpoint folder, or build it without weights."""

from collections.abc import Mapping, Sequence
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pipeline.calc.families import architecture
from pipeline.data.tokenizers.word import Tokenizer, load_tokenizer
from pipeline.errors import UserError
from pipeline.files.artifact import MANIFEST, read_json, refuse_untrusted
from pipeline.files.base_model import WIDTHS, TensorLocation, tensor_locations, weight_files
from pipeline.files.safetensors_file import read_header, refuse_difference, shapes
from pipeline.files.text import abbreviate_repr
from pipeline.models.base import CausalLM
from pipeline.models.device import asked_device, device_for, fp64_device
from pipeline.models.minigpt import MiniGPT, MiniGPTConfig, state
from pipeline.models.save import CONFIG, HARMLESS, WEIGHTS, load_tensors, reported
from pipeline.project.params.sections import Quantization
from pipeline.project.process import resume_collection, world

INTEGERS = {"I8", "U8", "I16", "I32", "I64", "BOOL"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}  # by safetensors' names

# Sizes in a config, by the names that different families give them.
LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
BESIDE_WIDTH = (  # each is a side of a matrix whose other side is the width
    "vocab_size",
    "intermediate_size",
    "moe_intermediate_size",
    "ffn_dim",
    "n_inner",
    "head_dim",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "n_positions",
    *EXPERTS,
)
POSITIONS_TABLE = ("gpt2", "opt")  # families whose positions are a matrix too, by whichever key
AT_LEAST_ONE = ("num_hidden_layers", "n_layer", "max_position_embeddings", "n_positions")
MOST_EXPERTS = 100_000  # over all layers; published models have up to about 25,000
SLACK = 2**24  # parameters that may be missing: transformers then names the tensors


class Base(NamedTuple):
    """A model with the tokenizer it was trained with."""

    model: CausalLM
    tokenizer: Tokenizer


def load_base(
    folder: Path,
    precision: str | None = None,
    trust_remote_code: bool = False,
    quantization: Quantization = "none",
) -> Base:
    """The checkpoint in `folder`, in evaluation mode, on the CPU, in `precision` or its own.

    `quantization` is that of its blocks' linears. Also sets the number of CPU threads for a model
    of this size, so that no earlier setting changes what is computed before training.

    Raises UserError; never loads a checkpoint partially.
    """
    asked_device()  # raises for a missing device before a large base is read
    ours = _describe_minigpt(folder)
    tokenizer = load_tokenizer(folder)
    requested = DTYPES[precision] if precision else None
    # quantization starts from the weights as they are stored
    dtype = requested if quantization == "none" else None
    if ours is not None:
        resume_collection()
        minigpt = MiniGPT(ours)
        expected = {name: tuple(tensor.shape) for name, tensor in state(minigpt).items()}
        refuse_difference(expected, shapes(folder / WEIGHTS), str(folder / WEIGHTS))
        # a tied head is not stored
        minigpt.load_state_dict(load_tensors(folder / WEIGHTS), strict=not ours.tie_embeddings)
        model: CausalLM = minigpt.to(dtype or torch.float32)
    else:
        # MiniGPT does not need transformers
        from pipeline.models.transformers_model import load_pretrained

        model = load_pretrained(folder, dtype, trust_remote_code)
        if world().world_size > 1 and quantization == "none":
            model.stored = _stored(model, folder)
    refuse_integers(model, weight_files(folder), str(folder))
    device = device_for(model)
    # A base with a manifest was checked when it was imported or made. Of several processes each
    # reads only its rows.
    if not (folder / MANIFEST).exists() and world().world_size == 1:
        refuse_not_finite(model, str(folder))
        if device.type == "cpu" and ours is None:
            _refuse_unusable(model, str(folder), trust_remote_code)
    rows, tokens = model.shape.rows, len(tokenizer)
    if tokens > rows or (tokens < rows and ours is not None):
        raise UserError(
            f"{folder}: the tokenizer has {tokens} tokens, the model's embedding {rows} rows. "
            "Copy both from the same model."
        )
    if quantization != "none":
        from pipeline.models.quantized_linear import quantize  # few runs quantize their base

        quantize(model, quantization, requested, fp64_device(device))
    return Base(model.eval(), tokenizer)


def _stored(model: CausalLM, folder: Path) -> dict[Tensor, TensorLocation]:
    """Each weight that was not renamed, fused or cast, and its place in the files of `folder`."""
    locations = tensor_locations(folder)
    stored = dict[Tensor, TensorLocation]()
    for name, p in model.named_parameters():
        location = locations.get(name)
        if location is None or location.info.shape != tuple(p.shape):
            continue
        if DTYPES.get(PRECISIONS.get(location.info.dtype, "")) == p.dtype:
            stored[p] = location
    return stored


def stored_precision(folder: Path) -> str | None:
    """The precision of the checkpoint's weights: fp32, bf16 or fp16; None if there are several."""
    dtypes = {info.dtype for info in read_header(folder / WEIGHTS).values()}
    return PRECISIONS.get(dtypes.pop()) if len(dtypes) == 1 else None


def save_base(folder: Path, base: Base) -> None:
    """config.json, model.safetensors and the tokenizer's files."""
    model, tokenizer = base
    model.save(folder)
    tokenizer.save(folder, model.shape.positions)


def skeleton(folder: Path, trust_remote_code: bool = False) -> CausalLM:
    """The model of the checkpoint in `folder` on the meta device: names, shapes and ties alone.

    Raises UserError.
    """
    with torch.device("meta"), _SkipInit():
        return untrained(folder, trust_remote_code)


class _SkipInit(TorchFunctionMode):
    """Skips `torch.nn.init`, which would import torch's compiler on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **kwargs)


def untrained(folder: Path, trust_remote_code: bool = False) -> CausalLM:
    """The model of the checkpoint in `folder` in fp32, newly initialized. Raises UserError.

    Its family's initialization draws from torch's default generator.
    """
    ours = _describe_minigpt(folder)
    if ours is not None:
        return MiniGPT(ours).eval()
    # MiniGPT does not need transformers
    from pipeline.models.transformers_model import without_weights

    return without_weights(folder, trust_remote_code)


def _describe_minigpt(folder: Path) -> MiniGPTConfig | None:
    """The shape of the MiniGPT in `folder`; None if it is another model.

    Raises UserError for what must not be built: quantized weights, or far more than there are.
    """
    config = read_config(folder)
    refuse_quantized(config, str(folder))
    refuse_implausible(folder, weight_files(folder))
    if not MiniGPTConfig.describes(config):
        return None
    return MiniGPTConfig.from_opt(config, str(folder / CONFIG))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder. Raises UserError if there is none."""
    refuse_untrusted(folder)
    hint = "Name a model's folder, or run the stage that makes it"
    if (folder / "adapter_config.json").exists():
        hint = "It is an adapter: pass it with --adapter"
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder} is not a model folder: it has no {CONFIG}. {hint}.")
    return read_json(folder / CONFIG, hint)


def count(model: torch.nn.Module) -> dict[str, int]:
    """Total and trainable parameters; fixed sinusoids are not parameters."""
    parameters = list(model.parameters())
    return {
        "total": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
    }


def refuse_quantized(config: Mapping[str, Any], name: str) -> None:
    """Raises UserError if the weights of a checkpoint with this config.json are quantized."""
    settings = config.get("quantization_config") or config.get("compression_config")
    if not settings:
        return
    method, hint = "unknown method", "Use the 16-bit model"
    if isinstance(settings, Mapping):
        method = settings.get("quant_method", method)
    if method == "bitsandbytes":
        hint = (
            "Import it, which dequantizes it: `lora new` or `lora import` with it as the base; or "
            "use the 16-bit model"
        )
    raise UserError(
        f"{name} is quantized ({abbreviate_repr(method)}); unquantized weights are needed. {hint}."
    )


def refuse_integers(model: torch.nn.Module, files: Sequence[Path], name: str) -> None:
    """Raises UserError if a weight of `model` is stored as integers, of some quantization."""
    buffers = [f".{buffer}" for buffer, _ in model.named_buffers()]  # such as position_ids
    for path in files:
        for tensor, info in read_header(path).items():
            if info.dtype not in INTEGERS or HARMLESS.search(tensor):
                continue
            full = f".{tensor}"  # with or without the prefix of the model's body
            if not any(full.endswith(buffer) or buffer.endswith(full) for buffer in buffers):
                raise UserError(
                    f"{name}: {tensor} holds integers ({info.dtype}), but config.json names no "
                    "quantization. Use the 16-bit model, or copy its config.json again."
                )


def refuse_not_finite(model: torch.nn.Module, name: str) -> None:
    """Raises UserError if a weight, or another stored tensor, holds NaN or infinity.

    Logits show it only for the tokens that it concerns. The least and the largest number tell:
    reading a GB of weights once, without a copy, takes half a second.
    """
    stored = model.state_dict()  # without masks, whose -inf a model makes by itself
    buffers = ((tensor, buffer) for tensor, buffer in model.named_buffers() if tensor in stored)
    for tensor, weight in chain(model.named_parameters(), buffers):
        if not weight.is_floating_point() or not weight.numel():
            continue
        if not torch.stack(torch.aminmax(weight)).isfinite().all():
            dtype = str(weight.dtype).removeprefix("torch.")
            raise UserError(
                f"{name}: {tensor} is not finite in {dtype}. Copy its weights again, or set a "
                "precision with a larger range."
            )


@torch.no_grad()
def _refuse_unusable(model: CausalLM, name: str, trust_remote_code: bool) -> None:
    """Raises UserError unless `model` computes two tokens, together and one at a time.

    Some false settings of config.json, such as a window that is a text, show only when the model
    computes.
    """
    model.eval()
    with reported(name, trust_remote_code):
        ids = torch.arange(min(2, model.shape.rows, model.shape.positions))[None]
        model(ids)
        cache = model.new_cache()
        for token in torch.split(ids, 1, dim=1):
            model(token, cache=cache)


def refuse_implausible(folder: Path, files: Sequence[Path]) -> None:
    """Raises UserError if config.json describes a model far larger than the weights in `files`.

    Runs before transformers builds anything: a million layers take minutes, a huge vocabulary all
    the memory.
    """
    source = folder / CONFIG
    config = read_json(source, "Copy it again")
    infos = [*chain.from_iterable(read_header(path).values() for path in files)]
    stored = sum(prod(info.shape) for info in infos)
    # a stored number packs several parameters: at least 2 bits each
    if config.get("quantization_config"):
        stored = 4 * sum(info.size for info in infos)
    most = 2 * stored + SLACK
    parts: list[Mapping[str, Any]] = [config]
    for part in parts:
        for key, value in part.items():
            if isinstance(value, dict) and key.endswith("_config"):
                parts.append(value)  # a nested config, such as text_config, checked in its turn
        _refuse_sizes(part, len(infos), most, source)
    try:
        total = architecture(config, str(source)).total
    # of an architecture that the calculator does not support, or values that transformers rejects
    except (
        UserError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ):
        return
    if total > most:
        raise _implausible(
            source, f"it describes {total:,} parameters, the weights have {stored:,}"
        )


def refuse_implausible_gguf(path: Path) -> dict[str, Any]:
    """`refuse_implausible` for the GGUF file `path`; returns its metadata.

    A parameter takes at least one bit. `block_count` must be the number of blocks: transformers
    leaves out those above it, and builds 32 if it is missing.
    """
    from pipeline.calc.sources import headers  # loading a model checks its folder only

    metadata, tensors = headers.read_gguf(path)
    kind = metadata.get("general.architecture")
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    key = f"{kind}.block_count"
    value = metadata.get(key)
    if type(value) is not int or value != len(blocks) or not blocks:
        raise UserError(
            f"{path}: {key} must be the number of its blocks, at least 1: its tensors have "
            f"{len(blocks)}, got {abbreviate_repr(value)}. Download it again."
        )
    config = headers.gguf_config(metadata, tensors)
    rows = metadata.get(f"{kind}.vocab_size", config.get("vocab_size"))  # what transformers builds
    most = 8 * path.stat().st_size + SLACK
    _refuse_sizes({**config, "vocab_size": rows}, len(tensors), most, path)
    return metadata


def _refuse_sizes(config: Mapping[str, Any], tensors: int, most: int, source: Path) -> None:
    """Raises UserError for no layers, more layers than tensors, or more than `most` numbers.

    The numbers are those of one matrix; of all layers' experts there are at most MOST_EXPERTS.
    """

    def integers(keys: Sequence[str]) -> dict[str, int]:
        return {key: config[key] for key in keys if type(config.get(key)) is int}

    for key, count in integers(LAYERS).items():
        if count > tensors:
            raise _implausible(source, f"{key} is {count:,}, the weights have {tensors:,} tensors")
        for name, experts in integers(EXPERTS).items():
            if count * experts > MOST_EXPERTS:
                raise _implausible(
                    source, f"{key} × {name} is {count:,} × {experts:,}, more than {MOST_EXPERTS:,}"
                )
    for key, count in integers(AT_LEAST_ONE).items():
        if count < 1:
            raise UserError(
                f"{source}: {key} must be at least 1, got {count}. Copy the model again."
            )
    table = ("max_position_embeddings",) if config.get("model_type") in POSITIONS_TABLE else ()
    for key, width in integers(WIDTHS).items():
        for name, count in integers((*BESIDE_WIDTH, *table)).items():
            if width * count > most:
                # the product may have more digits than Python writes
                raise _implausible(
                    source, f"{key} × {name} is {width:,} × {count:,}, more than its weights hold"
                )


def _implausible(source: Path, reason: str) -> UserError:
    return UserError(
        f"{source} does not match its weights: {reason}. Copy both from the same model."
    )
