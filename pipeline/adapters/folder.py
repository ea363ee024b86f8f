"""An adapter and the base that it is bound to, from their files alone: nothing is loaded."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.base_model import base_fingerprint
from pipeline.project.params.sections import Quantization
from pipeline.project.stage_graph import STAGES

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MODEL = "config.json"  # what a whole model has in its place
VIRTUAL = {"PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}  # PEFT's types that change no weight
DEFAULT_BASE = STAGES["expand_vocab"].path
Fingerprint = Callable[[Path], Mapping[str, str]]  # of a base folder: base_fingerprint, or one that remembers
Contents = Callable[[Path], Mapping[str, str]]  # of any folder: artifact.contents, or one that remembers


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises UserError if there is none, saying what the folder is where that can be seen."""
    artifact.refuse_untrusted(folder)
    if not (folder / CONFIG).exists():
        if (folder / MODEL).is_file():
            raise UserError(
                f"{folder} is a whole model, not an adapter: it goes on no base, and there is nothing to merge. "
                f"Use it as it is: `lora prompt --base {folder}`."
            )
        if inside := sorted(path.parent for path in folder.glob(f"*/{CONFIG}")):
            raise UserError(f"{folder} holds adapters and is none itself. Name one of them, such as {inside[0]}.")
    return artifact.read_json(folder / CONFIG, f"An adapter folder holds {CONFIG} and {WEIGHTS}")


def refuse_pickle(folder: Path) -> None:
    """Raises UserError for an adapter whose weights are a pickle alone, as PEFT wrote them before safetensors."""
    if (folder / PICKLE).is_file() and not (folder / WEIGHTS).exists():
        raise UserError(
            f"{folder / PICKLE} is a pickle, which can run code and is never read. Convert it once: "
            'python -c "import torch, safetensors.torch as s; '
            f"s.save_file({{k: v.contiguous().clone() for k, v in torch.load('{folder / PICKLE}', map_location='cpu', "
            f"weights_only=True).items()}}, '{folder / WEIGHTS}', {{'format': 'pt'}})\""
        )


def refuse_virtual(folder: Path) -> None:
    """Raises UserError where what is asked of the adapter needs changes of weights, and it has none."""
    config = read_config(folder)
    kind = VIRTUAL.get(str(config.get("peft_type")))
    if kind:
        raise UserError(
            f"{folder} is a {kind} of {config.get('num_virtual_tokens')} virtual tokens: it changes no weight, so that "
            "there is nothing to merge, combine or compare, and vLLM serves none. Use it on its base: "
            "`lora prompt --adapter`, or PEFT."
        )


def base_of(adapter: Path | None, here: Path = Path()) -> Path:
    """The model folder that an adapter names as its base; without an adapter, the pipeline's expanded base.

    A relative name is looked for in `here`, then in the folders that the adapter lies in. Raises UserError.
    """
    if adapter is None:
        return here / DEFAULT_BASE
    named = read_config(adapter).get("base_model_name_or_path") or DEFAULT_BASE
    for folder in (here, *adapter.resolve().parents):
        if isinstance(named, str) and (folder / named).is_dir():
            return folder / named
    raise UserError(f"{adapter} names {named!r} as its base, and there is no such folder. Name the base with --base.")


class Origin(NamedTuple):
    """The model of the hub that a base was imported from: its id and commit, and how many tokens were added since."""

    hub_id: str
    revision: str | None
    added: int


def origin_of(adapter: Path, base: Path | None = None) -> Origin | None:
    """Where the adapter's base comes from, which may be given; None for one that is not of the hub, is not here, or was
    made by expand_vocab from another than lies beside it."""
    try:
        base = base or base_of(adapter)
        manifest, added = artifact.read_manifest(base), 0
        if manifest.get("stage") == "expand_vocab":
            start, stop = manifest["new_rows"]
            imported = artifact.read_manifest(base.parent / STAGES["pretrain"].output)
            if manifest["inputs"][STAGES["pretrain"].path] != artifact.sealed_digest(imported):
                return None
            manifest, added = imported, stop - start
        if manifest.get("source") != "hub":
            return None
        return Origin(manifest["params"]["base"].partition("@")[0], manifest.get("revision"), added)
    except (UserError, AttributeError, KeyError, TypeError, ValueError):  # no manifest, or none of this project
        return None


def common_base(adapters: Sequence[Path]) -> Path:
    """The folder that all of them name as their base. Raises UserError if they name several."""
    first, *others = adapters
    base = base_of(first)
    for other in others:
        if base_of(other).resolve() != base.resolve():
            raise UserError(
                f"{first} and {other} name different bases: {base} and {base_of(other)}. If both stand for the same, "
                "name it with --base."
            )
    return base


def quantization_of(adapter: Path | None) -> Quantization:
    """In how few bits the adapter's base was kept while it trained. Only a manifest knows: PEFT's config is silent."""
    if adapter is None or not (adapter / artifact.MANIFEST).exists():
        return "none"
    said: Quantization = artifact.read_manifest(adapter).get("params", {}).get("quantization", "none")
    if said not in get_args(Quantization):
        raise UserError(f"{adapter / artifact.MANIFEST}: quantization is {said!r}. Train the adapter again.")
    return said


def refuse_foreign(
    base_folder: Path,
    folder: Path,
    fingerprint: Fingerprint = base_fingerprint,
    contents: Contents = artifact.contents,
) -> None:
    """Raises UserError if the adapter's manifest does not bind these files to this base.

    An adapter made elsewhere has no manifest: its names and shapes are all that can be checked.
    """
    if not (folder / artifact.MANIFEST).exists():
        return
    manifest = artifact.read_manifest(folder)
    _refuse_edited(manifest, read_config(folder), folder / CONFIG)
    artifact.verify(folder, contents)
    trained_on, found = manifest.get("base", {}), fingerprint(base_folder)
    for part, digest in found.items():
        if trained_on.get(part) != digest:
            raise UserError(
                f"{folder} was trained on another base: its {part} {'have' if part == 'tensors' else 'has'} sha256 "
                f"{str(trained_on.get(part))[:12]}, those of {base_folder} {digest[:12]}. "
                "Name the base it was trained on with --base, or train it again."
            )


def _refuse_edited(manifest: dict[str, Any], config: dict[str, Any], place: Path) -> None:
    trained = manifest.get("params", {}) | manifest.get("stored", {})  # PiSSA's is stored with twice its rank
    for key, name in (("r", "rank"), ("lora_alpha", "alpha"), ("num_virtual_tokens", "virtual_tokens")):
        if name in trained and config.get(key) != trained[name]:
            raise UserError(
                f"{place}: {key} was edited: it says {config.get(key)!r}, the adapter was trained with "
                f"{trained[name]!r}. Restore the file or train the adapter again."
            )
