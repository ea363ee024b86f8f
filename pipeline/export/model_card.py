"""A model card: how an adapter or a merged model was trained and evaluated, from its manifest.

Its front matter is the metadata that the Hugging Face hub reads, and follows the hub's rules.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.adapters.config import OTHER_KINDS, VIRTUAL, read_config
from pipeline.adapters.folder import Origin, base_of, origin_of, quantization_of
from pipeline.data.answers.match import describe, share
from pipeline.data.tokenizers.chat_template import has_template
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.base_model import CARD, HUB, parse_source
from pipeline.inference.catalog import VERDICT, measured_of
from pipeline.project.logs.run_log import LOSS, final_loss, read_steps

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TAG = "lora-workbench"  # marks a card as written by this project
MERGED = ", merged"  # after the adapter's name in the title
TAGS = f"tags: [lora, {TAG}]"  # in the cards of earlier versions
UNNAMED = (
    "`adapter_config.json` names the base by a folder of the machine that it was exported on. "
    "Write the base's hub id there, or its folder here."
)
LICENSE = re.compile(r"[\w.+-]{1,100}", re.ASCII)  # the form of the hub's identifiers
BITSANDBYTES = {  # transformers' options for each of our quantizations
    "int8": "load_in_8bit=True",
    "nf4": 'load_in_4bit=True, bnb_4bit_quant_type="nf4"',
    "nf4-dq": 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True',
}
TRAINED = (
    "epochs",
    "max_steps",
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
    folder_name: str | None = None,
    library: str | None = None,
    commands: Sequence[str] = (),
) -> str:
    """A model card in the hub's Markdown; with a merge's `certificate`, for the merged model.

    `base`: default the adapter's own; `base_name`: its name on the card, default the hub id that it
    was imported from. `folder_name`: what its code opens, default the adapter. `library`: the one
    that reads it, default transformers or PEFT; `commands`: how it is used there. Raises UserError.
    """
    from huggingface_hub import ModelCardData

    origin = origin_of(adapter, base)
    merged = certificate is not None
    name = adapter.resolve().name
    manifest = artifact.verify(adapter) if (adapter / artifact.MANIFEST).exists() else {}
    metrics = measured_of(adapter)
    known = hub_name(adapter, origin, manifest, base_name)
    license: dict[str, Any] = _license(origin)
    relation = "finetune" if merged else "adapter"
    metadata = ModelCardData(
        base_model=known,
        base_model_relation=relation if known else None,
        library_name=library or ("transformers" if merged else "peft"),
        pipeline_tag="text-generation",
        tags=["lora", TAG],
        model_name=name,
        eval_results=list(_results(metrics, manifest)) or None,
        **license,
    )
    if not metadata.eval_results:
        metadata.pop("model_name")
    made_with = [f"{package} {number}" for package, number in manifest.get("versions", {}).items()]
    if manifest.get("commit"):
        made_with.append(f"code: commit `{manifest['commit']}`")
    if library:
        use = "\n".join(["## Use", "", "```sh", *commands, "```"]) if commands else ""
    else:
        use = _usage(adapter, folder_name or name, merged)
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {name}{MERGED * merged}",
        use,
        "" if known or library or merged else UNNAMED,
        _section("Method", _method(adapter, manifest, origin, merged)),
        _section("Adapters" if manifest.get("method") == "combine" else "Data", _data(manifest)),
        _section("Evaluation", _evaluation(adapter, metrics, manifest)),
        _section("Merge", _merge(certificate or {}, quantization_of(adapter))),
        _section("Made with", made_with),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_card(folder: Path, text: str) -> None:
    (folder / CARD).write_text(text, encoding="utf-8")


def has_card(folder: Path) -> bool:
    """Whether `folder` holds a card written by this project."""
    marks = {f"- {TAG}", TAGS}
    return (folder / CARD).is_file() and not marks.isdisjoint(_card_lines(folder))


def _card_lines(folder: Path) -> list[str]:
    return (folder / CARD).read_text(encoding="utf-8", errors="replace").splitlines()


def title(folder: Path) -> str:
    """The name of the adapter that was exported to a folder; empty without a card of ours."""
    if not has_card(folder):
        return ""
    lines = _card_lines(folder)
    heading = next((line for line in lines if line.startswith("# ")), "")
    return heading.removeprefix("# ").removesuffix(MERGED)


def hub_name(
    adapter: Path, origin: Origin | None, manifest: Mapping[str, Any], base_name: str | None = None
) -> str | None:
    """The hub id of the adapter's base; None if it is unknown, or a path of this machine.

    It is the given name, else where the base was imported from, else for an adapter from elsewhere
    the name in its config.
    """
    if base_name or (origin and origin.hub_id):
        name: Any = base_name or (origin and origin.hub_id)
    elif manifest:
        # of an import; else the config names a folder of the project
        source = manifest.get("source")
        name = source.get("base") if isinstance(source, dict) else None
    else:
        name = read_config(adapter).get("base_model_name_or_path")
        try:
            base_of(adapter)
            return None  # the name is that of a folder here
        except UserError:
            pass
    try:
        return name if isinstance(name, str) and parse_source(name, Path()).kind == HUB else None
    except UserError:
        return None


def _license(origin: Origin | None) -> dict[str, str]:
    """The base's license, which derived models inherit; empty if it is unknown."""
    license = dict(origin.license) if origin else {}
    if not LICENSE.fullmatch(license.get("license", "")):
        return {}
    link = license.get("license_link", "")
    if origin and origin.hub_id and link and "://" not in link:  # a file of the base's repository
        from huggingface_hub.constants import ENDPOINT

        revision = origin.revision or "main"
        license["license_link"] = f"{ENDPOINT}/{origin.hub_id}/blob/{revision}/{link}"
    keys = ("license", "license_name", "license_link")
    return {key: license[key][:300] for key in keys if license.get(key)}


def _results(metrics: Mapping[str, Any], manifest: Mapping[str, Any]) -> "Iterator[EvalResult]":
    """What was learned and what was forgotten, as the hub's model-index."""
    from huggingface_hub import EvalResult

    forgetting, params = metrics.get("forgetting", {}), manifest.get("params", {})
    new, old = "new data", "old data"
    completed = None
    if "new_completed" in metrics:
        completed = metrics["new_completed"] / max(1, metrics["new_sentences"])
    elif params.get("eval_share") or params.get("eval_data"):
        # without new_data in the project, what training held out was evaluated
        new = "new data, held out"
    for dataset, kind, value, name in (
        (new, "loss", metrics.get("new_loss"), "Loss, nats per token"),
        (new, "exact_match", share(metrics.get("answers", {})), "Answers as expected"),
        (new, "accuracy", completed, "Completed as in the data"),
        (old, "loss", metrics.get("old_loss"), "Loss, nats per token"),
        (
            old,
            "loss_rise",
            forgetting.get("loss_rise"),
            "Forgetting: rise of the loss, nats per token",
        ),
        (
            old,
            "kl_divergence",
            forgetting.get("divergence"),
            "Forgetting: divergence from the base, nats per token",
        ),
        (
            old,
            "accuracy",
            forgetting.get("answers_kept"),
            "Forgetting: the base's first choices kept",
        ),
    ):
        if value is not None and isfinite(value):
            yield EvalResult(
                task_type="text-generation",
                dataset_type=dataset.partition(",")[0].replace(" ", "-"),
                dataset_name=dataset,
                metric_type=kind,
                metric_name=name,
                metric_value=round(value, 4),
            )


def _usage(adapter: Path, name: str, merged: bool) -> str:
    """Python that loads the model `name` and lets it answer."""
    kind = quantization_of(adapter)
    quantized = kind != "none" and not merged
    # Python reads JSON's escapes of letters beyond U+FFFF as two letters
    quoted = json.dumps(name, ensure_ascii=False)
    source = quoted + ", quantization_config=quantized" * quantized
    auto = "AutoModelForCausalLM" if merged else "AutoPeftModelForCausalLM"
    lines = [
        f"from transformers import {'AutoModelForCausalLM, ' * merged}AutoTokenizer"
        + ", BitsAndBytesConfig" * quantized,
        f"quantized = BitsAndBytesConfig({BITSANDBYTES.get(kind)})" * quantized,
        f"model = {auto}.from_pretrained({source})",
        f"tokenizer = AutoTokenizer.from_pretrained({quoted})",
    ]
    if not merged:
        lines.insert(0, f"from peft import {auto}")
    if has_template(adapter):
        chat = '[{"role": "user", "content": "Hello"}]'
        how = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        lines.append(f"inputs = tokenizer.apply_chat_template({chat}, {how})")
    else:
        lines.append(
            'inputs = tokenizer("Hello", return_tensors="pt", return_token_type_ids=False)'
        )
    lines += [
        "output = model.generate(**inputs, max_new_tokens=64)",
        "print(tokenizer.decode(output[0]))",
    ]
    return "\n".join(["## Use", "", "```python", *filter(None, lines), "```"])


def _section(title: str, lines: Iterable[str]) -> str:
    text = "\n".join(f"- {line}" for line in lines)
    return f"## {title}\n\n{text}" if text else ""


def quantization_note(kind: str, base: str = "its base") -> str:
    """A warning about an adapter that was trained on a quantized base."""
    return f"trained on {base} quantized to {kind}; on the unquantized base it answers differently"


def _method(
    adapter: Path, manifest: Mapping[str, Any], origin: Origin | None, merged: bool
) -> Iterator[str]:
    config, params = read_config(adapter), manifest.get("params", {})
    if manifest.get("method") == "combine":
        weights = ", ".join(f"{weight:g}" for weight in params["weights"])
        yield (
            f"combined by {params['method']} from {len(params['weights'])} adapters with weights "
            f"{weights}"
        )
        yield f"{manifest['error']:.2%} off their exact sum"
    if kind := VIRTUAL.get(str(config.get("peft_type"))):
        yield f"{kind} tuning, {config.get('num_virtual_tokens')} virtual tokens"
    elif (other := str(config.get("peft_type"))) in OTHER_KINDS:
        yield f"{other} (PEFT's type)"
    else:
        kind = "DoRA" if config.get("use_dora") else "LoRA"
        rslora = ", rsLoRA" if config.get("use_rslora") else ""
        yield f"{kind}, rank {config.get('r')}, alpha {config.get('lora_alpha')}{rslora}"
    if "stored" in manifest.get("parameters", {}):
        yield (
            f"trained with rank {params['rank']} and saved relative to the original base, which "
            "doubles the rank"
        )
    for key in ("target_modules", "target_parameters"):
        if targets := config.get(key):
            yield f"on {targets if isinstance(targets, str) else ', '.join(map(str, targets))}"
    if (kind := quantization_of(adapter)) != "none" and not merged:
        yield f"{quantization_note(kind)}. Load the base in {kind}, or merge the adapter into it"
    if origin and origin.dequantized:
        yield f"the weights of the base were dequantized from {origin.dequantized}"
    if origin and origin.added and origin.hub_id:
        yield f"on {origin.hub_id}, tokens added: {origin.added}"
    if params.get("init_from"):
        yield f"trained on from {params['init_from']}"
    for key in TRAINED:
        unused = (key == "retention_weight" and not _retains(params)) or (
            key == "max_steps" and not params.get(key)
        )
        if key in params and not unused:
            yield f"{key.replace('_', ' ')}: {params[key]}"
    counted = manifest.get("parameters", {})
    if "trainable" in counted:
        yield f"{counted['trainable']:,} of {counted['total']:,} parameters trained"


def _retains(params: Mapping[str, Any]) -> bool:
    """Whether the retention loss was used: a file may be set without a weight."""
    return bool(params.get("retention_data") and params.get("retention_weight"))


def _data(manifest: Mapping[str, Any]) -> Iterator[str]:
    # the inputs of a combination are adapters, which may be in artifacts/
    combined = manifest.get("method") == "combine"
    params = manifest.get("params", {})
    for name, digest in manifest.get("inputs", {}).items():
        is_data = combined or not name.startswith(("artifacts/", "../artifacts/"))
        retained = name == params.get("retention_data") and name != params.get("data")
        if is_data and (_retains(params) or not retained):
            yield f"`{name}`{', retained' * retained}, sha256 `{digest}`"


def _evaluation(
    adapter: Path, metrics: Mapping[str, Any], manifest: Mapping[str, Any]
) -> Iterator[str]:
    if (adapter / LOSS).exists():
        yield f"final training loss: {final_loss(read_steps(adapter / LOSS)):.4f} nats per token"
    if preferences := manifest.get("preferences"):
        before, after = (preferences[when]["accuracy"] for when in ("before", "after"))
        yield (
            f"held-out pairs whose chosen answer is likelier per token: {after:.1%}, {before:.1%} "
            "before training"
        )
    if not metrics:
        yield "not evaluated: run `lora evaluate` where it was trained"
    if "new_loss" in metrics:
        yield f"loss on the new data: {metrics['new_loss']:.4f} nats per token"
    if answers := describe(metrics.get("answers", {})):
        yield f"answers to prompts of the new data: {answers}"
    if "new_completed" in metrics:
        yield f"completed as in the data: {metrics['new_completed']} of {metrics['new_sentences']}"
    for name, scores in metrics.get("tasks", {}).items():
        between = f"95% interval {scores['low']:.3f} to {scores['high']:.3f}"
        yield f"task {name}: score {scores['score']:.3f} over {scores['n']:,} examples, {between}"
    if forgetting := metrics.get("forgetting"):
        yield f"forgetting: loss on the old data {forgetting['loss_rise']:+.4f} nats per token"
        yield f"forgetting: divergence from the base {forgetting['divergence']:.4f} nats per token"
        yield f"forgetting: {forgetting['answers_kept']:.1%} of the base's first choices kept"
    if verdict := metrics.get(VERDICT):
        reasons = f" ({'; '.join(verdict.reasons)})" if verdict.broken else ""
        yield f"gate, the limits that were set for it: {verdict.badge}{reasons}"


def _merge(certificate: Mapping[str, Any], kind: str) -> Iterator[str]:
    if not certificate:
        return
    from pipeline.weights.merge_check import describe as describe_merge  # imports torch

    yield from describe_merge({"delta_ratios": certificate.get("delta_ratios", {})})
    if "max_logit_difference" in certificate:
        yield (
            f"against base + adapter on {certificate['prompts_checked']} prompts: largest logit "
            f"difference {certificate['max_logit_difference']:.1e}, divergence "
            f"{certificate['divergence']:.1e} nats per token"
        )
    if kind != "none":
        yield f"merged into the {kind} weights that the adapter was trained on, dequantized"
