"""An adapter folder and the base it belongs to, read from their files: no model is loaded."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pipeline.adapters.config import CONFIG, WEIGHTS, read_config
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.base_model import base_fingerprint, license_of
from pipeline.files.text import abbreviate_repr
from pipeline.project.params.sections import Quantization

PICKLE = "adapter_model.bin"
DEFAULT_BASE = "artifacts/expanded"  # expand_vocab's
# of a base folder: base_fingerprint, or a caching one
Fingerprint = Callable[[Path], Mapping[str, str]]
Contents = Callable[[Path], Mapping[str, str]]  # of any folder: artifact.contents, or a caching one


def refuse_pickle(folder: Path) -> None:
    """Raises UserError for an adapter whose only weights are a pickle, as of older PEFT."""
    if (folder / PICKLE).is_file() and not (folder / WEIGHTS).exists():
        raise UserError(
            f"{folder / PICKLE} is a pickle, which can run code and is never read. Import the "
            "adapter, which reads its tensors without running any: `lora adapters import "
            f"{folder} --base BASE --out OUT`."
        )


def base_of(adapter: Path | None, here: Path = Path(), *last: Path) -> Path:
    """The model folder that an adapter names as its base; without one, the pipeline's base.

    A relative name is looked up in `here`, in the adapter's parent folders, then in `last`: each
    project has an artifacts/expanded, so that one which the adapter was trained on goes first.
    Raises UserError.
    """
    if adapter is None:
        return here / DEFAULT_BASE
    name = read_config(adapter).get("base_model_name_or_path") or DEFAULT_BASE
    found = []
    with suppress(OSError):  # too long for a name
        for folder in (here, *adapter.resolve().parents, *last):
            if isinstance(name, str) and (folder / name).is_dir():
                found.append(folder / name)
    if found:
        return next((base for base in found if _is_base(adapter, base)), found[0])
    shown = abbreviate_repr(name, 200)
    raise UserError(
        f"{adapter} names {shown} as its base, but there is no such folder. Pass the base with "
        "--base."
    )


def _is_base(adapter: Path, base: Path) -> bool:
    """Whether their manifests say that the adapter was trained on the base."""
    with suppress(UserError, KeyError):  # one has no manifest, or it is not ours
        trained_on = artifact.read_manifest(adapter)["base"]
        return bool(artifact.read_manifest(base)["fingerprint"] == trained_on)
    return False


class Origin(NamedTuple):
    """Where a base was imported from."""

    hub_id: str | None  # None: not from the hub
    revision: str | None  # its commit there
    added: int  # tokens that expand_vocab added
    license: Mapping[str, str]  # on its card
    dequantized: str  # the quantization of the weights there, which the import dequantized


def origin_of(adapter: Path, base: Path | None = None) -> Origin | None:
    """The origin of the adapter's base, or of `base`.

    None if the base is missing, was made here without an import, or was expanded from another base
    than the one in the folder beside it. A base without a manifest comes from elsewhere: only its
    license is known.
    """
    try:
        base = base or base_of(adapter)
        if not (base / artifact.MANIFEST).exists():
            return Origin(None, None, 0, license_of(base), "")
        manifest = artifact.read_manifest(base)
        added = 0
        if manifest.get("stage") == "expand_vocab":
            start, stop = manifest["new_rows"]
            imported = artifact.read_manifest(base.parent / "base")
            if manifest["inputs"]["artifacts/base"] != artifact.sealed_digest(imported):
                return None
            manifest, added = imported, stop - start
        if "source" not in manifest:
            return None
        hub_id = None
        if manifest["source"] == "hub":
            hub_id = manifest["params"]["base"].partition("@")[0]
        license = {str(key): str(value) for key, value in manifest.get("license", {}).items()}
        return Origin(
            hub_id, manifest.get("revision"), added, license, str(manifest.get("dequantized") or "")
        )
    # no manifest, or none of this project
    except (UserError, AttributeError, KeyError, TypeError, ValueError):
        return None


def common_base(adapters: Sequence[Path]) -> Path:
    """The folder that all of them name as their base. Raises UserError if they differ."""
    first, *others = adapters
    base = base_of(first)
    for other in others:
        another = base_of(other)
        if another.resolve() != base.resolve():
            raise UserError(
                f"{first} and {other} name different bases: {base} and {another}. If both are the "
                "same model, pass it with --base."
            )
    return base


def quantization_of(adapter: Path | None) -> Quantization:
    """The quantization of the base that the adapter was trained on.

    It stands in our manifest only: PEFT's config has no key for it.
    """
    if adapter is None or not (adapter / artifact.MANIFEST).exists():
        return "none"
    params = _read_part(adapter, artifact.read_manifest(adapter), "params")
    quantization: Quantization = params.get("quantization", "none")
    allowed = get_args(Quantization)
    if quantization not in allowed:
        raise UserError(
            f"{adapter / artifact.MANIFEST}: quantization must be one of {', '.join(allowed)}, got "
            f"{abbreviate_repr(quantization, 200)}. Train the adapter again."
        )
    return quantization


def _read_part(folder: Path, manifest: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The mapping at `key` of the folder's manifest, or {}. Raises UserError for another value."""
    part = manifest.get(key, {})
    if not isinstance(part, dict):
        raise UserError(
            f"{folder / artifact.MANIFEST}: {key} must be a mapping, got "
            f"{abbreviate_repr(part, 200)}. Train the adapter again."
        )
    return part


def refuse_foreign(
    base_folder: Path,
    folder: Path,
    fingerprint: Fingerprint = base_fingerprint,
    contents: Contents = artifact.contents,
) -> None:
    """Raises UserError if the adapter was edited or trained on another base, by its manifest.

    An adapter made elsewhere has no manifest: only its names and shapes can be checked, when it is
    loaded.
    """
    if not (folder / artifact.MANIFEST).exists():
        return
    manifest = artifact.read_manifest(folder)
    params, stored, trained_on = (
        _read_part(folder, manifest, key) for key in ("params", "stored", "base")
    )
    config = read_config(folder)
    trained = params | stored  # these two differ for PiSSA, whose files have twice the rank
    names = {"r": "rank", "lora_alpha": "alpha", "num_virtual_tokens": "virtual_tokens"}
    for key, name in names.items():
        if name in trained and config.get(key) != trained[name]:
            raise UserError(
                f"{folder / CONFIG}: {key} was edited: it is {config.get(key)!r}, but the adapter "
                f"was trained with {trained[name]!r}. Restore the file or train the adapter again."
            )
    artifact.verify(folder, contents)
    for part, digest in fingerprint(base_folder).items():
        if trained_on.get(part) != digest:
            raise UserError(
                f"{folder} was trained on another base: the sha256 of its {part} is "
                f"{str(trained_on.get(part))[:12]}, that of {base_folder} {digest[:12]}. "
                "Pass the base it was trained on with --base, or train it again."
            )
