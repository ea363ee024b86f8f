"""A model card: how an adapter or a merged model was trained and how it was evaluated, from its manifest."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.adapters.config import OTHER_KINDS, VIRTUAL, read_config
from pipeline.adapters.folder import Origin, origin_of, quantization_of
from pipeline.files import artifact
from pipeline.inference.catalog import measured
from pipeline.project.logs.run_log import LOSS, final_loss, read_steps

CARD = "README.md"
TAGS = "tags: [lora, lora-workbench]"  # mark a card as written by this project
TRAINED = (
    "epochs",
    "batch_size",
    "learning_rate",
    "loraplus_ratio",
    "init_lora_weights",
    "precision",
    "quantization",
    "train_embeddings",
    "retention_weight",
)


def card(
    adapter: Path,
    certificate: Mapping[str, Any] | None = None,
    base: Path | None = None,
    base_name: str | None = None,
    library: str = "peft",
) -> str:
    """A model card in the hub's Markdown; with a merge's `certificate`, for the merged model.

    `base`: default the adapter's own; `base_name`: its name on the card, default the hub id that it was imported from.
    `library`: the one that reads the adapter. Raises UserError.
    """
    origin = origin_of(adapter, base)
    manifest = artifact.verify(adapter) if (adapter / artifact.MANIFEST).exists() else {}
    metrics = measured([adapter.resolve().parent]).get(artifact.sealed_digest(manifest), {}) if manifest else {}
    front_matter = [f"library_name: {library if certificate is None else 'transformers'}", TAGS]
    name = base_name or (origin and origin.hub_id) or read_config(adapter).get("base_model_name_or_path")
    if isinstance(name, str) and name:
        path = Path(name)  # an absolute path means nothing on other machines
        front_matter.insert(0, f"base_model: {path.name if path.is_absolute() else name}")
    made_with = [f"{library} {number}" for library, number in manifest.get("versions", {}).items()]
    if manifest.get("commit"):
        made_with.append(f"code: commit `{manifest['commit']}`")
    parts = [
        "\n".join(["---", *front_matter, "---"]),
        f"# {adapter.resolve().name}{', merged' if certificate is not None else ''}",
        _section("Method", _method(adapter, manifest, origin, merged=certificate is not None)),
        _section("Adapters" if manifest.get("method") == "combine" else "Data", _data(manifest)),
        _section("Evaluation", _evaluation(adapter, metrics)),
        _section("Merge", _merge(certificate or {}, quantization_of(adapter))),
        _section("Made with", made_with),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def has_card(folder: Path) -> bool:
    """Whether `folder` holds a card written by this project."""
    path = folder / CARD
    return path.is_file() and TAGS in path.read_text(encoding="utf-8", errors="replace").splitlines()


def _section(title: str, lines: Iterable[str]) -> str:
    text = "\n".join(f"- {line}" for line in lines)
    return f"## {title}\n\n{text}" if text else ""


def quantization_note(kind: str) -> str:
    """A warning about an adapter that was trained on a quantized base."""
    return f"trained on its base quantized to {kind}; on the unquantized base it answers differently"


def _method(adapter: Path, manifest: Mapping[str, Any], origin: Origin | None, merged: bool) -> Iterator[str]:
    config, params = read_config(adapter), manifest.get("params", {})
    if manifest.get("method") == "combine":
        weights = ", ".join(f"{weight:g}" for weight in params["weights"])
        yield f"combined by {params['method']} from {len(params['weights'])} adapters with weights {weights}"
        yield f"{manifest['error']:.2%} off their exact sum"
    if kind := VIRTUAL.get(str(config.get("peft_type"))):
        yield f"{kind} tuning, {config.get('num_virtual_tokens')} virtual tokens"
    elif (other := str(config.get("peft_type"))) in OTHER_KINDS:
        yield f"{other} (PEFT's type)"
    else:
        kind = "DoRA" if config.get("use_dora") else "LoRA"
        rslora = ", rsLoRA" if config.get("use_rslora") else ""
        yield f"{kind}, rank {config.get('r')}, alpha {config.get('lora_alpha')}{rslora}"
    if "stored" in manifest:
        yield f"trained with rank {params['rank']} and saved relative to the original base, which doubles the rank"
    if targets := config.get("target_modules"):
        yield f"on {targets if isinstance(targets, str) else ', '.join(map(str, targets))}"
    if (kind := quantization_of(adapter)) != "none" and not merged:
        yield f"{quantization_note(kind)}. Load the base in {kind}, or merge the adapter into it"
    if origin and origin.added:
        yield f"on {origin.hub_id}, tokens added: {origin.added}"
    for key in TRAINED:
        if key in params and (key != "retention_weight" or _retains(params)):
            yield f"{key.replace('_', ' ')}: {params[key]}"
    counted = manifest.get("parameters", {})
    if "trainable" in counted:
        yield f"{counted['trainable']:,} of {counted['total']:,} parameters trained"


def _retains(params: Mapping[str, Any]) -> bool:
    """Whether the retention loss was used: a file may be set without a weight."""
    return bool(params.get("retention_data") and params.get("retention_weight"))


def _data(manifest: Mapping[str, Any]) -> Iterator[str]:
    combined = manifest.get("method") == "combine"  # the inputs are adapters, which may lie in artifacts/
    params = manifest.get("params", {})
    for name, digest in manifest.get("inputs", {}).items():
        retained = name == params.get("retention_data") != params.get("data")
        if (combined or not name.startswith(("artifacts/", "../artifacts/"))) and (_retains(params) or not retained):
            yield f"`{name}`{', retained' * retained}, sha256 `{digest}`"


def _evaluation(adapter: Path, metrics: Mapping[str, Any]) -> Iterator[str]:
    if (adapter / LOSS).exists():
        yield f"final training loss: {final_loss(read_steps(adapter / LOSS)):.4f} nats per token"
    if not metrics:
        yield "not evaluated: run `lora evaluate` where it was trained"
    if "new_loss" in metrics:
        yield f"loss on the new data: {metrics['new_loss']:.4f} nats per token"
    if "new_completed" in metrics:
        yield f"completed as in the data: {metrics['new_completed']} of {metrics['new_sentences']}"
    if forgetting := metrics.get("forgetting"):
        yield f"forgetting: loss on the old data {forgetting['loss_rise']:+.4f} nats per token"
        yield f"forgetting: divergence from the base {forgetting['divergence']:.4f} nats per token"
        yield f"forgetting: {forgetting['answers_kept']:.1%} of the base's first choices kept"


def _merge(certificate: Mapping[str, Any], kind: str) -> Iterator[str]:
    ratios = [ratio for ratio in certificate.get("delta_ratios", {}).values() if ratio is not None]
    if ratios:
        yield f"{len(ratios)} matrices hold their update {min(ratios):.4f} to {max(ratios):.4f} times"
    if "max_logit_difference" in certificate:
        yield (
            f"against base + adapter on {certificate['prompts_checked']} prompts: largest logit difference "
            f"{certificate['max_logit_difference']:.1e}, divergence {certificate['divergence']:.1e} nats per token"
        )
    if certificate and kind != "none":
        yield f"merged into the {kind} weights that the adapter was trained on, dequantized"
