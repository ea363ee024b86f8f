"""Import a base as a plain checkpoint: config.json, one model.safetensors, a fast tokenizer's files.

Any causal language model that transformers opens is imported completely or rejected. Pickles are never read. Two
imports of one base write the same bytes, whatever its path.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import UserError
from pipeline.files import base_model
from pipeline.files.artifact import read_json, write_json
from pipeline.files.base_model import base_fingerprint
from pipeline.files.safetensors_header import as_os_error
from pipeline.models.importing.checks import (
    refuse_implausible,
    refuse_implausible_gguf,
    refuse_quantized,
    refuse_unusable,
)
from pipeline.models.importing.transformers_io import (
    clean,
    generation_of,
    load_strict,
    quiet,
    reason,
    reported,
    save_checkpoint,
)

if TYPE_CHECKING:
    from torch import dtype

Precision = Literal["auto", "fp32", "bf16", "fp16"]
TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
GGUF_NEEDS = ("gguf", "sentencepiece", "google.protobuf", "accelerate")


def import_base(
    source: base_model.Source, out: Path, precision: Precision = "auto", trust_remote_code: bool = False
) -> dict[str, Any]:
    """Write a checkpoint of `source` to `out`; returns its entries of the manifest.

    `auto` keeps the precision of the weights; a GGUF file, which is quantized, becomes fp32.
    Raises UserError if anything is missing, left over, damaged, not finite or not causal.
    """
    with quiet(), tempfile.TemporaryDirectory() as scratch:
        if source.kind == base_model.GGUF:
            revision = None
            model = _import_gguf(source, out, precision, Path(scratch))
        else:
            folder, revision = _checkpoint_folder(source, trust_remote_code)
            model = _import_folder(folder, source.text, out, precision, trust_remote_code)
        if (out / "tokenizer_config.json").is_file():
            clean(out / "tokenizer_config.json")
        refuse_unusable(model, out, source.text, trust_remote_code)
    return {
        "source": source.kind,
        "revision": revision,
        "architecture": type(model).__name__,
        "precision": str(model.dtype).removeprefix("torch."),
        "parameters": {"total": model.num_parameters(), "trainable": 0},
        "fingerprint": base_fingerprint(out),
    }


def _display_name(text: str) -> str:
    return f"base: {text}"


def _checkpoint_folder(source: base_model.Source, trust_remote_code: bool) -> tuple[Path, str | None]:
    """The folder of the checkpoint's files, and their commit on the hub."""
    if source.kind == base_model.FOLDER:
        return source.path, None
    from huggingface_hub import snapshot_download

    patterns = [
        *base_model.PLAIN,
        base_model.INDEX,
        "model*.safetensors",
        *([base_model.CODE] if trust_remote_code else []),
    ]
    try:
        folder = Path(snapshot_download(source.hub_id, revision=source.revision, allow_patterns=patterns))
    except Exception as error:  # errors of huggingface_hub, its HTTP client and the system have no common base class
        raise UserError(
            f"base: {source.text} is neither a folder in the project nor in the local hub cache, "
            f"and the download failed ({reason(error)}). Download it elsewhere and name its folder."
        ) from None
    base_model.refuse_other_folders(folder)
    return folder, folder.name


def _import_folder(folder: Path, text: str, out: Path, precision: Precision, trust_remote_code: bool) -> Any:
    refuse_quantized(folder)
    refuse_implausible(folder, base_model.weight_files(folder))  # it also rejects damaged files, with a reason
    model = load_strict(folder, _display_name(text), trust_remote_code, dtype=_torch_dtype(precision) or "auto")
    with reported(_display_name(text), trust_remote_code):
        save_checkpoint(model, out, generation_of(folder))
    _import_tokenizer(folder, text, out, trust_remote_code)
    return model


def _import_gguf(source: base_model.Source, out: Path, precision: Precision, scratch: Path) -> Any:
    missing = [name.removeprefix("google.") for name in GGUF_NEEDS if not _installed(name)]
    if missing:
        raise UserError(
            f"{_display_name(source.text)} needs {', '.join(missing)} to be read: pip install 'lora-workbench[gguf]'."
        )
    refuse_implausible_gguf(source.path)
    from transformers import AutoTokenizer, GgufConfig

    # Alone in a folder: a config.json in the file's own folder may belong to another model.
    file = "model.gguf"
    (scratch / file).symlink_to(source.path.resolve())
    name, hint = _display_name(source.text), "Name a checkpoint folder of the same model instead"
    dequantized = GgufConfig(dequantize=True)
    with _no_progress_bar():
        dtype = _torch_dtype(precision) or _torch_dtype("fp32")
        model = load_strict(scratch, name, False, hint, gguf_file=file, quantization_config=dequantized, dtype=dtype)
    with reported(name, False, hint):
        save_checkpoint(model, out, model.generation_config.to_json_string())
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=file, local_files_only=True)
        with as_os_error(out / "tokenizer.json"):
            tokenizer.save_pretrained(out)
        _drop_added_tokens(out / "tokenizer.json")
    return model


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Without the one progress bar that ignores transformers' setting."""
    from transformers import modeling_gguf_pytorch_utils as gguf

    bar, gguf.tqdm = gguf.tqdm, lambda tensors, **_: tensors
    try:
        yield
    finally:
        gguf.tqdm = bar


def _drop_added_tokens(path: Path) -> None:
    """Remove special tokens that transformers added to the file's own: the model has no rows for them."""
    saved = read_json(path, "Import it again")
    vocabulary = saved["model"]["vocab"]
    tokens = [token for token in saved["added_tokens"] if token["content"] in vocabulary]
    if len(tokens) < len(saved["added_tokens"]):
        write_json(path, {**saved, "added_tokens": tokens})


def _import_tokenizer(folder: Path, text: str, out: Path, trust_remote_code: bool) -> None:
    """Copy tokenizer.json and its companions; where there is none, transformers converts the older files."""
    if (folder / "tokenizer.json").is_file():
        for name in base_model.TOKENIZER:
            for path in folder.glob(name):
                shutil.copyfile(path, out / path.name)
        return
    if not any(path for pattern in base_model.VOCABULARY for path in folder.glob(pattern)):
        raise UserError(f"base: {text} has no tokenizer: no tokenizer.json or older file. Copy it too.")
    from transformers import AutoTokenizer

    with reported(_display_name(text), trust_remote_code, "Give the folder a tokenizer.json"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        with as_os_error(out / "tokenizer.json"):
            tokenizer.save_pretrained(out)
    if not (out / "tokenizer.json").is_file():
        raise UserError(
            f"base: {text} has a tokenizer ({type(tokenizer).__name__}) that cannot be saved as "
            "tokenizer.json. Add a tokenizer.json to the folder, or choose another base."
        )


def _torch_dtype(precision: Precision) -> "dtype | None":
    """None for auto."""
    import torch

    chosen: dtype | None = getattr(torch, TYPES[precision]) if precision in TYPES else None
    return chosen


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False
