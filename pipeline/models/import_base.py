"""Import a base as a plain checkpoint: config.json, model.safetensors, a fast tokenizer.

Any causal language model that transformers opens is imported completely or rejected. Pickles are
never read. Two imports of one base write the same bytes, whatever its path.

A GGUF file may be refused by `files/base_model.py` (no such file, no GGUF), by
`calc/sources/headers.py` (damaged, or too large), `load.py` (sizes that do not fit its tensors,
NaN), `save.py` (tensors that the model lacks or has left over), and here (a tokenizer that splits
texts in an unknown way).
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pipeline.errors import UserError, first_line, require
from pipeline.files import artifact, base_model, digest_cache
from pipeline.files.artifact import read_json, write_json
from pipeline.files.base_model import base_fingerprint
from pipeline.files.safetensors_file import as_os_error
from pipeline.models.device import move_for_inference
from pipeline.models.load import (
    DTYPES,
    refuse_implausible,
    refuse_implausible_gguf,
    refuse_integers,
    refuse_not_finite,
    refuse_quantized,
)
from pipeline.models.quantized_linear import require_bitsandbytes, rows_of_blocks
from pipeline.models.save import (
    clean,
    copy_tokenizer,
    generation_of,
    load_strict,
    quiet,
    reported,
    save_checkpoint,
)

Precision = Literal["auto", "fp32", "bf16", "fp16"]
# raised when a file gives another base than before, so that those in the user's cache are not used
GGUF_IMPORT = 2
WIDE_GGUF = ("ALL_F32", "MOSTLY_F16", "MOSTLY_BF16")  # file types whose weights are not quantized
GGUF_LICENSE = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
}
# How byte-level vocabularies split a text before they merge, by `tokenizer.ggml.pre` (llama.cpp's
# names). transformers knows others, and splits as GPT-2 does for a name that it does not know.
SPLIT_AS_GPT2 = {
    "default",
    "gpt-2",
    "phi-2",
    "mpt",
    "olmo",
    "jais",
    "trillion",
    "granite-docling",
    "exaone4",
    "gigachat",
    "a.x-4.0",
    "mellum",
    "modern-bert",
    "roberta-bpe",
    "jina-es",
    "jina-de",
    "jina-v1-en",
    "jina-v2-es",
    "jina-v2-de",
    "jina-v2-code",
}
SPLIT_AT_DIGITS = {
    "smollm",
    "starcoder",
    "refact",
    "command-r",
    "codeshell",
    "exaone",
    "minerva-7b",
    "mellum2",
}
SENTENCE = "The capital of France is Paris, and two and two are four."


def import_base(
    source: base_model.Source,
    out: Path,
    precision: Precision = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint of `source` to `out`; returns its entries of the manifest.

    `auto` keeps the precision of the weights; a GGUF file, which is quantized, becomes fp32.
    Raises UserError if anything is missing, left over, damaged, not finite or not causal.
    """
    dtype = DTYPES.get(precision)  # None for auto
    revision = None
    with quiet(), tempfile.TemporaryDirectory() as scratch:
        if source.kind == base_model.GGUF:
            model, more = _import_gguf(source, out, dtype or torch.float32, Path(scratch))
        else:
            folder = source.path
            if source.kind != base_model.FOLDER:
                folder = _download(source, trust_remote_code)
                revision = folder.name
            model, more = _import_folder(
                folder, f"base: {source.text}", out, dtype, trust_remote_code
            )
            if license := base_model.license_of(folder):
                more["license"] = license
        if (out / "tokenizer_config.json").is_file():
            clean(out / "tokenizer_config.json")
        _refuse_unusable(model, out, f"base: {source.text}", trust_remote_code)
    return {
        "source": source.kind,
        "revision": revision,
        "architecture": type(model).__name__,
        "precision": str(model.dtype).removeprefix("torch."),
        "parameters": {"total": model.num_parameters(), "trainable": 0},
        "fingerprint": base_fingerprint(out),
        **more,
    }


def import_to_cache(base: Path, on_start: Callable[[], None]) -> Path:
    """The folder in the user's cache of a GGUF file or a model of the hub.

    It is imported there first if it is not yet; `on_start` is called before that. Raises UserError.
    """
    source = base_model.resolve(str(base), Path.cwd())
    digests = digest_cache.DigestStore()
    if source.kind == base_model.HUB:
        downloaded = _download(source, False)  # named after its commit
        name = f"{source.hub_id.replace('/', '--')}@{downloaded.name}"
        source = base_model.parse_source(str(downloaded), Path.cwd())
    else:
        name = f"{digests.digest(source.path)}-{GGUF_IMPORT}"
        digests.save()
    folder = digest_cache.cache_home() / "lora-workbench" / "bases" / name
    if not folder.is_dir():
        on_start()
        with artifact.writing(folder) as out:
            import_base(source, out)
    return folder


def _download(source: base_model.Source, trust_remote_code: bool) -> Path:
    """The folder of a hub model's files in the local cache; it is named after their commit."""
    from huggingface_hub import snapshot_download

    patterns = [*base_model.PLAIN, base_model.CARD, base_model.INDEX, "model*.safetensors"]
    if trust_remote_code:
        patterns.append(base_model.CODE)
    try:
        folder = Path(
            snapshot_download(source.hub_id, revision=source.revision, allow_patterns=patterns)
        )
    # errors of huggingface_hub, its HTTP client and the system have no common base class
    except Exception as error:
        raise UserError(
            f"base: {source.text} is neither a folder in the project nor in the local hub cache, "
            f"and the download failed ({first_line(error).rstrip('.')}). Download it elsewhere "
            "and name its folder."
        ) from None
    base_model.refuse_other_folders(folder)
    return folder


def _import_folder(
    folder: Path, name: str, out: Path, dtype: torch.dtype | None, trust_remote_code: bool
) -> tuple[Any, dict[str, Any]]:
    """Copy a checkpoint folder through transformers; errors call it `name`.

    Returns the model, and the manifest's entry of a quantized one.
    """
    from transformers import AutoTokenizer

    config = read_json(folder / "config.json", "Copy it again")
    more = dict[str, Any]()
    kind = _bitsandbytes_kind(config)
    if kind is None:
        refuse_quantized(config, name)
    files = base_model.weight_files(folder)
    refuse_implausible(folder, files)  # it also rejects damaged files, with a reason
    if kind is None:
        model = load_strict(folder, name, trust_remote_code, dtype=dtype or "auto")
        refuse_integers(model, files, name)
    else:
        require_bitsandbytes(f"{name} is quantized ({kind}), which")
        model = load_strict(folder, name, trust_remote_code, dtype="auto", device_map="cpu")
        with reported(name, trust_remote_code):
            model = _dequantize(model, dtype or model.dtype)
        more["dequantized"] = kind
    refuse_not_finite(model, name)
    with reported(name, trust_remote_code):
        save_checkpoint(model, out, generation_of(folder))

    if (folder / "tokenizer.json").is_file():
        copy_tokenizer(folder, out)
        return model, more
    # Without tokenizer.json transformers converts the older files.
    if not any(any(folder.glob(pattern)) for pattern in base_model.VOCABULARY):
        raise UserError(f"{name} has no tokenizer: no tokenizer.json or older file. Copy it too.")
    with reported(name, trust_remote_code, "Give the folder a tokenizer.json"):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        with as_os_error(out / "tokenizer.json"):
            tokenizer.save_pretrained(out)
    if not (out / "tokenizer.json").is_file():
        raise UserError(
            f"{name} has a tokenizer ({type(tokenizer).__name__}) that cannot be saved as "
            "tokenizer.json. Add a tokenizer.json to the folder, or choose another base."
        )
    return model, more


def _dequantize(model: Any, dtype: torch.dtype) -> Any:
    """A model of bitsandbytes in `dtype`; weights of 4 bits are read in rows of whole blocks."""
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        if state is not None:
            state.shape = rows_of_blocks(state.shape.numel(), state.blocksize)
    model = model.dequantize(dtype)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.view(module.out_features, module.in_features)
    return model


def _bitsandbytes_kind(config: Mapping[str, Any]) -> str | None:
    """The quantization of a checkpoint of bitsandbytes: nf4, fp4 or int8; None if it is none."""
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping):
        return None
    in_8_bits = settings.get("load_in_8bit") is True
    in_4_bits = settings.get("load_in_4bit") is True
    if settings.get("quant_method", "bitsandbytes") != "bitsandbytes" or in_8_bits == in_4_bits:
        return None
    return "int8" if in_8_bits else str(settings.get("bnb_4bit_quant_type", "fp4"))[:20]


def _import_gguf(
    source: base_model.Source, out: Path, dtype: torch.dtype, scratch: Path
) -> tuple[Any, dict[str, Any]]:
    """Dequantize a GGUF file into a checkpoint.

    Returns the model, and the entries of the manifest that only GGUF files have.
    """
    name, hint = f"base: {source.text}", "Name a checkpoint folder of the same model instead"
    require("base: MODEL.gguf", name)
    metadata = refuse_implausible_gguf(source.path)
    from gguf import LlamaFileType
    from transformers import AutoTokenizer, GgufConfig, modeling_gguf_pytorch_utils

    # Alone in a folder: a config.json in the file's own folder may belong to another model.
    file = "model.gguf"
    (scratch / file).symlink_to(source.path.resolve())
    how = {"gguf_file": file, "quantization_config": GgufConfig(dequantize=True), "dtype": dtype}
    # the one progress bar that ignores transformers' setting
    bar = modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = lambda tensors, **_: tensors
    try:
        model = load_strict(scratch, name, False, hint, **how)
    finally:
        modeling_gguf_pytorch_utils.tqdm = bar
    refuse_not_finite(model, name)
    with reported(name, False, hint):
        save_checkpoint(model, out, model.generation_config.to_json_string())
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=file, local_files_only=True)
        path = out / "tokenizer.json"
        with as_os_error(path):
            tokenizer.save_pretrained(out)
        saved = read_json(path, "Import it again")
        # transformers adds special tokens to the file's own, for which the model has no rows
        added, vocabulary = saved["added_tokens"], saved["model"]["vocab"]
        saved["added_tokens"] = [token for token in added if token["content"] in vocabulary]
        if metadata.get("tokenizer.ggml.model") == "gpt2":
            _correct_split(saved, metadata.get("tokenizer.ggml.pre", "default"), name)
        write_json(path, saved)
    # What a file says of itself is any value of any length.
    license = {
        key: str(metadata[field])[:300] for key, field in GGUF_LICENSE.items() if field in metadata
    }
    facts: dict[str, Any] = {"license": license} if license else {}
    stored = metadata.get("general.file_type")
    kind = next((kind.name for kind in LlamaFileType if kind == stored), None)
    if kind and kind not in WIDE_GGUF:
        facts["dequantized"] = kind.removeprefix("MOSTLY_")
    return model, facts


def _correct_split(tokenizer: dict[str, Any], split: object, name: str) -> None:
    """Give a byte-level tokenizer.json the pre-tokenizer that the file names.

    Raises UserError if it is not known.
    """
    from transformers.integrations.gguf import gguf_tokenizer_mapping

    if split in SPLIT_AT_DIGITS:
        at_digits = {"type": "Digits", "individual_digits": True}
        tokenizer["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [at_digits, tokenizer["pre_tokenizer"]],
        }
        return
    known = SPLIT_AS_GPT2.union(gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS)
    if split not in known:
        raise UserError(
            f"{name} splits texts by {split!r} (tokenizer.ggml.pre), which is not known here: its "
            "tokens would be others. Name a checkpoint folder of the same model instead."
        )


def _refuse_unusable(model: Any, out: Path, name: str, trust_remote_code: bool) -> None:
    """Raises UserError unless the model tokenizes, gives finite logits and is causal."""
    from transformers import AutoTokenizer

    with reported(name, trust_remote_code):
        tokenizer = AutoTokenizer.from_pretrained(
            out, local_files_only=True, trust_remote_code=trust_remote_code
        )
        ids = tokenizer(SENTENCE)["input_ids"][:16]
    rows = model.get_input_embeddings().weight.shape[0]
    if not ids or max(ids) >= rows or len(tokenizer) > rows:
        raise UserError(
            f"{name} has a tokenizer of {len(tokenizer)} tokens and an embedding of {rows} rows. "
            "Copy both from the same model."
        )
    other = [*ids[:-1], (ids[-1] + 1) % rows]  # differs in the last token only
    with torch.no_grad(), reported(name, trust_remote_code):
        model = move_for_inference(model.eval())
        both = torch.tensor([ids, other], device=model.device)
        first, second = model(input_ids=both).logits.float()  # (T, V) each
    if not first.isfinite().all():
        dtype = str(model.dtype).removeprefix("torch.")
        raise UserError(
            f"{name} gives logits that are not finite in {dtype}. Copy its weights again, or set a "
            "precision with a larger range."
        )
    difference = (first[:-1] - second[:-1]).abs()  # (T - 1, V)
    # rounding, and how experts batch tokens, stay far below 2 %
    if difference.numel() and difference.max() > 0.02 * first.abs().max():
        raise UserError(
            f"{name} is not a causal language model: a later token changes the logits before it. "
            "Choose a model that generates text."
        )
