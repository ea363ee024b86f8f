"""A model card: how an adapter or a merged model was made, what it learned and what it forgot, from its manifest."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.adapters.folder import VIRTUAL, Origin, origin_of, quantization_of, read_config
from pipeline.files import artifact
from pipeline.inference.catalog import measured
from pipeline.project.logs.run_log import LOSS, final_loss, read_steps

CARD = "README.md"
TAGS = "tags: [lora, lora-workbench]"  # by them a card is known as one of these
TRAINED = (
    "epochs",
    "batch_size",
    "learning_rate",
    "loraplus_ratio",
    "init_lora_weights",
    "precision",
    "quantization",
    "train_embeddings",
    "retain_weight",
)


def card(
    adapter: Path,
    certificate: Mapping[str, Any] | None = None,
    base: Path | None = None,
    base_name: str | None = None,
) -> str:
    """In Markdown, as the hub wants it; with a merge's `certificate`, of the merged model.

    `base` is the adapter's own where it is not given; `base_name` what it is called, if not by the hub's id that it was
    imported from. Raises UserError.
    """
    origin = origin_of(adapter, base)
    manifest = artifact.verify(adapter) if (adapter / artifact.MANIFEST).exists() else {}
    found = measured([adapter.resolve().parent]).get(artifact.sealed_digest(manifest), {}) if manifest else {}
    parts = [
        "\n".join(_front(adapter, base_name or (origin and origin.hub_id), merged=certificate is not None)),
        f"# {adapter.resolve().name}{', merged' if certificate is not None else ''}",
        _section("Method", _method(adapter, manifest, origin, merged=certificate is not None)),
        _section("Adapters" if manifest.get("method") == "combine" else "Data", _data(manifest)),
        _section("Learned and forgotten", _measured(adapter, found)),
        _section("Merge", _merge(certificate or {}, quantization_of(adapter))),
        _section("Made with", _made_with(manifest)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def has_card(folder: Path) -> bool:
    """Whether `folder` was exported from here."""
    path = folder / CARD
    return path.is_file() and TAGS in path.read_text(encoding="utf-8", errors="replace").splitlines()


def _section(title: str, lines: Iterator[str]) -> str:
    text = "\n".join(f"- {line}" for line in lines)
    return f"## {title}\n\n{text}" if text else ""


def _front(adapter: Path, base_name: str | None, merged: bool) -> Iterator[str]:
    base = base_name or read_config(adapter).get("base_model_name_or_path")
    yield "---"
    if isinstance(base, str) and base:
        path = Path(base)  # one from the root is of no use elsewhere
        yield f"base_model: {path.name if path.is_absolute() else base}"
    yield f"library_name: {'transformers' if merged else 'peft'}"
    yield TAGS
    yield "---"


def bits(kind: str) -> str:
    """What one must know of an adapter that was trained on a base in few bits."""
    return f"trained on its base in {kind}: on the base as it is stored it answers differently"


def _method(adapter: Path, manifest: Mapping[str, Any], origin: Origin | None, merged: bool) -> Iterator[str]:
    config, params = read_config(adapter), manifest.get("params", {})
    if manifest.get("method") == "combine":
        weights = ", ".join(f"{weight:g}" for weight in params["weights"])
        yield f"combined by {params['method']} from {len(params['weights'])} adapters with weights {weights}"
        yield f"{manifest['error']:.2%} off their exact sum"
    yield _adapter(config)
    if "stored" in manifest:
        yield f"trained with rank {params['rank']} and saved for the base as it was, which takes twice the rank"
    if targets := config.get("target_modules"):
        yield f"on {targets if isinstance(targets, str) else ', '.join(map(str, targets))}"
    if (kind := quantization_of(adapter)) != "none" and not merged:
        yield f"{bits(kind)}. Load the base in {kind}, or merge the adapter into it"
    if origin and origin.added:
        yield f"on {origin.hub_id}, tokens added: {origin.added}"
    for key in TRAINED:
        if key in params and (key != "retain_weight" or _retains(params)):
            yield f"{key.replace('_', ' ')}: {params[key]}"
    counted = manifest.get("parameters", {})
    if "trainable" in counted:
        yield f"{counted['trainable']:,} of {counted['total']:,} parameters trained"


def _adapter(config: Mapping[str, Any]) -> str:
    if kind := VIRTUAL.get(str(config.get("peft_type"))):
        return f"{kind} tuning, {config.get('num_virtual_tokens')} virtual tokens"
    rslora = ", rsLoRA" * bool(config.get("use_rslora"))
    kind = "DoRA" if config.get("use_dora") else "LoRA"
    return f"{kind}, rank {config.get('r')}, alpha {config.get('lora_alpha')}{rslora}"


def _retains(params: Mapping[str, Any]) -> bool:
    """Whether texts were retained: a file may be named and have no weight."""
    return bool(params.get("retain") and params.get("retain_weight"))


def _data(manifest: Mapping[str, Any]) -> Iterator[str]:
    combined = manifest.get("method") == "combine"  # of adapters, wherever they lie
    params = manifest.get("params", {})
    for name, digest in manifest.get("inputs", {}).items():
        retained = name == params.get("retain") != params.get("data")
        if (combined or not name.startswith("artifacts/")) and (_retains(params) or not retained):
            yield f"`{name}`{', retained' * retained}, sha256 `{digest}`"


def _measured(adapter: Path, found: Mapping[str, Any]) -> Iterator[str]:
    if (adapter / LOSS).exists():
        yield f"training loss at the end: {final_loss(read_steps(adapter / LOSS)):.4f} nats a token"
    if "forgetting" not in found:
        yield "not evaluated: run `lora evaluate` where it was trained"
        return
    forgetting = found["forgetting"]
    if "new_loss" in found:
        yield f"loss on what it learned: {found['new_loss']:.4f} nats a token"
        yield f"completed as in the data: {found['new_completed']} of {found['new_sentences']}"
    yield f"forgetting: loss on the old data {forgetting['loss_rise']:+.4f} nats a token"
    yield f"forgetting: divergence from the base {forgetting['divergence']:.4f} nats a token"
    yield f"forgetting: {forgetting['answers_kept']:.1%} of the base's first choices kept"


def _merge(certificate: Mapping[str, Any], kind: str) -> Iterator[str]:
    ratios = [ratio for ratio in certificate.get("delta_ratios", {}).values() if ratio is not None]
    if ratios:
        yield f"{len(ratios)} matrices hold their update {min(ratios):.4f} to {max(ratios):.4f} times"
    if "max_logit_difference" in certificate:
        yield (
            f"against base + adapter on {certificate['prompts_checked']} prompts: largest logit difference "
            f"{certificate['max_logit_difference']:.1e}, divergence {certificate['divergence']:.1e} nats a token"
        )
    if certificate and kind != "none":
        yield f"merged into the {kind} weights that the adapter was trained on, dequantized"


def _made_with(manifest: Mapping[str, Any]) -> Iterator[str]:
    for name, number in manifest.get("versions", {}).items():
        yield f"{name} {number}"
    if manifest.get("commit"):
        yield f"code: commit `{manifest['commit']}`"
