"""What `base` refers to: MiniGPT, a checkpoint folder, a GGUF file, or a model of the hub.

Decided from the text and the file system alone, without network or heavy imports, because checking
whether a stage is up to date needs it too. `import_base` opens the model.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import UserError
from pipeline.files.artifact import (
    contents_digest,
    digest,
    file_digest,
    once_until_changed,
    read_json,
    read_manifest,
    refuse_untrusted,
)
from pipeline.files.home import expand
from pipeline.files.safetensors_file import TensorInfo, fingerprint, read_header

MINIGPT, FOLDER, GGUF, HUB = "minigpt", "folder", "gguf", "hub"
IMPORTED = "artifacts/base"  # in a project
# keys of a config for the width of hidden states
WIDTHS, WIDEST = ("hidden_size", "n_embd", "d_model"), 1_000_000
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "*.model", "*.tiktoken")
TOKENIZER = (
    *VOCABULARY,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
CODE = "*.py"
CARD = "README.md"
PLAIN = ("config.json", "generation_config.json", *TOKENIZER)
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)
# In a card's front matter: a value on the key's line, or the first of a list below it.
_LICENSE = re.compile(
    r"^(license(?:_name|_link)?):[ \t]*(?:\n[ \t]*-[ \t]+)?[\"']?([\w.+:/-]{1,200})[\"']?[ \t]*$",
    re.MULTILINE | re.ASCII,
)
# in the folder itself: an index from elsewhere must name no other file
_SHARD = re.compile(r"[^/\0]*\.safetensors")


@dataclass(frozen=True)
class Source:
    """A base: `text` as the user wrote it, `path` of a folder or file, `hub_id` of a hub model."""

    kind: Literal["minigpt", "folder", "gguf", "hub"]
    text: str
    path: Path = Path()
    hub_id: str = ""
    revision: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether it is a file or folder, so that DVC can track it."""
        return self.kind in (FOLDER, GGUF)


@dataclass(frozen=True)
class TensorLocation:
    """The file that holds a tensor, and its dtype, shape and byte range there."""

    file: Path
    info: TensorInfo


def parse_source(base: str, root: Path) -> Source:
    """What `base` refers to, relative to the project's folder. Raises UserError.

    Whether it can be used is not checked.
    """
    if base == MINIGPT:
        return Source("minigpt", base)
    # A file or folder goes before the hub: org/name may be both. A missing .gguf is a missing file:
    # no hub id ends so.
    path = _path(base, root)
    if path is not None and path.is_dir():
        return Source("folder", base, path)
    if path is not None and (path.is_file() or path.suffix == ".gguf"):
        return Source("gguf", base, path)
    match = _HUB_ID.fullmatch(base)
    if match:
        return Source("hub", base, hub_id=match["id"], revision=match["revision"])
    raise UserError(
        "base must be minigpt, a checkpoint folder, a .gguf file or a hub id such as org/name, "
        f"got {base!r}: {path or 'a file of that name'} does not exist. Change base."
    )


def _path(base: str, root: Path) -> Path | None:
    """The path of a file or folder of that name, existing or not; None if it cannot be a path."""
    try:
        name = expand(base)
        path = root / name
        if not root.is_dir():  # a project about to be created: .. does not resolve yet
            path = Path(os.path.normpath(root.resolve() / name))
        path.is_dir()
    except (OSError, ValueError):  # too long, a NUL
        return None
    return path


def width(base: str, root: Path) -> int | None:
    """The width of a base's hidden states, as imported or in its folder; None if neither says."""
    imported, folder = root / IMPORTED, _path(base, root)
    with suppress(UserError):
        if read_manifest(imported).get("params", {}).get("base") == shared_name(base):
            return _width(imported)
    return _width(folder) if folder else None


def _width(folder: Path) -> int | None:
    try:
        config = read_json(folder / "config.json", "")
    except UserError:
        return None
    return _first_integer(config, WIDTHS, lambda width: 0 < width <= WIDEST)


def _first_integer(
    config: Mapping[str, Any], keys: Sequence[str], is_valid: Callable[[int], bool]
) -> int | None:
    """The first valid number under one of `keys` in a config, or in that of its text model."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in keys:
            value = part.get(key)
            if type(value) is int and is_valid(value):
                return value
    return None


def shared_name(name: str) -> str:
    """The name of a base or data file in a manifest: of an absolute path only the last part."""
    path = Path(name)
    if path.is_absolute() or name.startswith("~"):
        return path.name or name
    return name


def license_of(folder: Path) -> dict[str, str]:
    """What the model card in a folder has of `license`, `license_name` and `license_link`."""
    if not (folder / CARD).is_file():
        return {}
    with (folder / CARD).open(encoding="utf-8", errors="replace") as file:
        begin, _, text = file.read(100_000).partition("---\n")
    front_matter, end, _ = text.partition("\n---")
    return dict(_LICENSE.findall(front_matter)) if end and not begin.strip() else {}


def path_to_watch(base: str, root: Path) -> Path | None:
    """The file or folder of a local base, existing or not; None if the base cannot be one."""
    return None if base == MINIGPT else _path(base, root)


def files_to_watch(base: str, root: Path) -> list[Path]:
    """The files of a local base to watch for changes, existing or not."""
    path = path_to_watch(base, root)
    if path is None:
        return []
    try:
        files = list(path.iterdir()) if path.is_dir() else [path]
    except OSError:
        return []
    return sorted(file for file in files if not file.is_dir())


def resolve(base: str, root: Path) -> Source:
    """`parse_source`, with a first look whether it can be imported. Raises UserError."""
    source = parse_source(base, root)
    if source.kind == FOLDER:
        refuse_other_folders(source.path)
        weight_files(source.path)
    if source.kind == GGUF:
        try:
            with source.path.open("rb") as file:
                magic = file.read(4)
        except OSError as error:
            raise UserError(
                f"base: {source.path}: {error.strerror}. Put the file there, or change base."
            ) from None
        if magic != b"GGUF":
            hint = (
                "A checkpoint is named by its folder"
                if source.path.suffix != ".gguf"
                else "Download it again"
            )
            raise UserError(
                f"base: {source.path} is not a GGUF file: it begins with {magic!r}. {hint}."
            )
    return source


def identity(source: Source, digest: Callable[[Path], str] = digest) -> dict[str, str]:
    """A base's part of the cache key: shared name → sha256; of the hub, id and revision.

    {} for MiniGPT, whose training settings are the key. Of a folder only the files that an import
    reads count. Raises UserError.
    """
    if source.kind == MINIGPT:
        return {}
    if source.kind == HUB:
        return {source.text: f"hub:{source.hub_id}@{source.revision or 'main'}"}
    if source.kind == GGUF:
        return {shared_name(source.text): digest(source.path)}
    files = {path.name: digest(path) for path in relevant_files(source.path)}
    return {shared_name(source.text): contents_digest(files)}


def relevant_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that an import reads. Raises UserError."""
    plain = {path for pattern in (*PLAIN, CODE) for path in folder.glob(pattern) if path.is_file()}
    index = [folder / INDEX] if (folder / INDEX).is_file() else []
    return sorted({*plain, *index, *weight_files(folder)})


def weight_files(folder: Path) -> list[Path]:
    """The weights of a checkpoint folder: one file, or shards in an index. Raises UserError."""
    refuse_untrusted(folder)
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX, "Copy it again").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{folder / INDEX} lists no weights. Copy it again.")
        for name in weight_map.values():
            if not isinstance(name, str) or not _SHARD.fullmatch(name):
                raise UserError(
                    f"{folder / INDEX}: a shard must be the name of a .safetensors file in this "
                    f"folder, got {str(name)[:80]!r}. Copy the model again."
                )
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder}: {name} is missing, but {INDEX} lists it. Copy it there."
                )
        return sorted({folder / name for name in weight_map.values()})
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    pickled = sorted(
        path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)
    )
    if pickled:
        convert = (
            "from transformers import AutoModelForCausalLM as M; "
            f"M.from_pretrained('{folder}').save_pretrained('{folder}')"
        )
        raise UserError(
            f"{folder} has its weights in {pickled[0]}, a pickle, which can run code; only "
            f'safetensors are read. If you trust it, convert it once: python -c "{convert}"'
        )
    raise UserError(f"{folder} has no {WEIGHTS} and no {INDEX}. Copy the model's weights there.")


def tensor_locations(folder: Path) -> dict[str, TensorLocation]:
    """Every tensor of the checkpoint in `folder`, by name. Raises UserError."""
    locations: dict[str, TensorLocation] = {}
    for file in weight_files(folder):
        for name, info in read_header(file).items():
            if name in locations:
                raise UserError(
                    f"{folder}: {name} is in {locations[name].file.name} and in {file.name}. Copy "
                    "it again."
                )
            locations[name] = TensorLocation(file, info)
    return locations


def base_fingerprint(folder: Path) -> dict[str, str]:
    """What binds an adapter to its base: sha256 of the checkpoint's tensors and of its tokenizer.

    Independent of how the tensors are split into files. Raises UserError.
    """
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise UserError(f"{tokenizer} does not exist. Copy the tokenizer into the model folder.")
    tensors = _fingerprint(*weight_files(folder))
    return {"tensors": tensors, "tokenizer": file_digest(tokenizer)}


@once_until_changed
def _fingerprint(*files: Path) -> str:
    return fingerprint(files)


def refuse_other_folders(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        raise UserError(f"base: {folder} is an adapter. Name the model that it was trained on.")
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        hint = (
            f"Name the file in it: {ggufs[0].name}"
            if ggufs
            else "Name a folder that transformers can open"
        )
        raise UserError(f"base: {folder} is not a checkpoint: it has no config.json. {hint}.")


def max_positions(base: Path) -> int | None:
    """The maximum number of tokens of the model; None if its config has none."""
    config = read_json(base / "config.json", "A model folder needs its config")
    return _first_integer(config, ("max_position_embeddings", "n_positions"), lambda _: True)
