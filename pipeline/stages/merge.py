"""merge: W' = W + s·BA as a plain checkpoint, with a certificate measured on the file that was written (§4.4)."""

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from pipeline.adapters.attach import adapter_layers, merged_model
from pipeline.adapters.lora import LoRALinear, delta, transposed, weight_of
from pipeline.artifact import base_fingerprint, write_json
from pipeline.data import read_prompts
from pipeline.engine import Loaded, load
from pipeline.errors import UserError
from pipeline.models.base import Base, count, save_base
from pipeline.models.causal import CausalLM, read
from pipeline.models.exact import exact
from pipeline.runner import Event, Facts, Job, Progress

CERTIFICATE = "certificate.json"
RATIO_TOLERANCE = 1e-3  # of a matrix's merged delta, beside rounding; a delta merged twice has ratio 2


def merge(job: Job) -> Generator[Event, None, Facts]:
    """base + adapter → one checkpoint. Raises UserError, and writes nothing, if it does not answer the same."""
    settings = job.project.params.merge
    base, adapter = job.artifact("expand_vocab"), job.artifact("finetune_lora")
    trust = job.project.params.pretrain.trust_remote_code
    tuned, plain = load(base, adapter, trust_remote_code=trust), load(base, trust_remote_code=trust)
    save_base(job.out, Base(merged_model(tuned.model), tuned.tokenizer))
    written = load(job.out, name="merged", trust_remote_code=trust)
    prompts = [prompt.prompt for prompt in read_prompts(job.path(settings.prompts), settings.prompts)]
    certificate = {
        "delta_ratios": delta_ratios(plain.model, tuned.model, written.model),
        "max_logit_difference": _logit_difference(tuned, written, prompts),
        "prompts_checked": len(prompts),
    }
    _refuse(certificate, tolerances(tuned.model), settings.max_logit_difference)
    write_json(job.out / CERTIFICATE, certificate)
    yield Progress(1, 1, f"largest logit difference {certificate['max_logit_difference']:.1e}")
    return {"parameters": count(written.model) | {"trainable": 0}, "fingerprint": base_fingerprint(job.out)}


@torch.no_grad()
def delta_ratios(base: CausalLM, tuned: CausalLM, merged: CausalLM) -> dict[str, float | None]:
    """⟨W' − W, s·BA⟩ / ⟨s·BA, s·BA⟩ of each target matrix: 1 if merged once, 0 if lost, 2 if merged twice.

    None where BA is zero and there is nothing to merge.
    """
    ratios: dict[str, float | None] = {}
    for name, layer in adapter_layers(tuned):
        before, after = _weight(base, name), _weight(merged, name)
        update = _stored(layer).double()
        size = float((update * update).sum())
        ratios[name] = float(((after - before) * update).sum()) / size if size else None
    return ratios


@torch.no_grad()
def tolerances(tuned: CausalLM) -> dict[str, float]:
    """How far from 1 each ratio may be: a thousandth, and what rounding W' to its precision can do to a small s·BA."""
    found: dict[str, float] = {}
    for name, layer in adapter_layers(tuned):
        weight = weight_of(layer.base)
        rounding = torch.finfo(weight.dtype).eps * float(weight.float().norm() / delta(layer).norm().clamp(min=1e-30))
        found[name] = RATIO_TOLERANCE + rounding
    return found


def _stored(layer: LoRALinear) -> Tensor:
    """s·BA in the layout of the base's weight."""
    return delta(layer).T if transposed(layer.base) else delta(layer)


def _weight(model: CausalLM, name: str) -> Tensor:
    return model.get_parameter(f"{name}.weight").double()


@torch.no_grad()
def _logit_difference(one: Loaded, other: Loaded, texts: list[str]) -> float:
    ids = [one.tokenizer.encode(text)[: one.model.shape.positions] for text in texts]  # unknown words included
    with exact(one.model), exact(other.model):
        pairs = zip(read(one.model, ids), read(other.model, ids), strict=True)
        return max(float((one.model.logits(a).float() - other.model.logits(b).float()).abs().max()) for a, b in pairs)


def _refuse(certificate: dict[str, Any], allowed: dict[str, float], limit: float) -> None:
    wrong = {
        name: ratio
        for name, ratio in certificate["delta_ratios"].items()
        if ratio is not None and abs(ratio - 1) > allowed[name]
    }
    if wrong:
        name, ratio = next(iter(wrong.items()))
        raise UserError(f"merge refused: {name} received {ratio:.4f} times its update, not once. Please report this.")
    if not certificate["max_logit_difference"] <= limit:
        raise UserError(
            f"merge refused: the merged model's logits differ from base + adapter by "
            f"{certificate['max_logit_difference']:.1e}, more than merge.max_logit_difference {limit:.1e}. "
            "Raise it in params.yaml if that is acceptable."
        )
