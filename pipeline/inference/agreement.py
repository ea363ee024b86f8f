"""Compares two models' predictions: merged model and base + adapter, fine-tuned model and extracted LoRA."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.adapters.folder import quantization_of
from pipeline.data.examples import Example
from pipeline.data.masking import encode
from pipeline.data.tokenizers.word import load_tokenizer
from pipeline.errors import UserError
from pipeline.inference.engine import LoadedModel, load
from pipeline.inference.score import score
from pipeline.models.base import packed_hidden_states
from pipeline.models.kernels.fp32_compute import compute_in_fp32
from pipeline.project.params.sections import Quantization


@dataclass(frozen=True)
class SameLogits:
    """Checks that a merged checkpoint gives the same logits as base + adapter, up to `limit`.

    Without prompts no model is loaded.
    """

    base: Path
    adapter: Path
    prompts: Sequence[str]
    limit: float = torch.inf
    trust_remote_code: bool = False

    def __call__(self, merged: Path) -> dict[str, Any]:
        """Entries for the certificate. Raises UserError if the logits differ by more than `limit`."""
        if not self.prompts:
            return {}
        base, adapter, prompts = self.base, self.adapter, self.prompts
        tuned = self._load(base, adapter)
        result = difference(tuned, self._load(merged), prompts)
        self._refuse_above_limit(result.max_logit_difference)
        certificate = result._asdict() | {"prompts_checked": len(prompts)}
        quantization = quantization_of(adapter)
        if quantization != "none":
            # How much of the difference is due to quantization: with the adapter, and without it.
            unquantized = difference(tuned, self._load(base, adapter, quantization="none"), prompts)
            certificate |= {"trained_on": quantization, "merged_on_stored_weights": unquantized._asdict()}
            base_alone = difference(self._load(base), self._load(base, quantization=quantization), prompts)
            certificate["quantization_alone"] = base_alone._asdict()
        return certificate

    def _load(self, folder: Path, adapter: Path | None = None, quantization: Quantization | None = None) -> LoadedModel:
        return load(folder, adapter, trust_remote_code=self.trust_remote_code, quantization=quantization)

    def _refuse_above_limit(self, difference: float) -> None:
        if not difference <= self.limit:
            raise UserError(
                f"merge refused: the merged model's logits differ from base + adapter by {difference:.1e}, more than "
                f"merge.max_logit_difference {self.limit:.1e}. Raise it if that is acceptable."
            )


class Difference(NamedTuple):
    """Between two models' logits on prompts: the largest absolute difference, the mean KL(one‖other) in nats per token,
    and the number of prompts with the same top-1 next token."""

    max_logit_difference: float
    divergence: float
    same_first_choices: int


@torch.no_grad()
def difference(one: LoadedModel, other: LoadedModel, texts: Sequence[str]) -> Difference:
    """Difference of two models on `texts`, computed in fp32 so that rounding does not count."""
    ids = [one.tokenizer.encode(text)[: one.model.shape.positions] for text in texts]  # may include unknown words
    largest, divergences, same = list[Tensor](), list[Tensor](), 0
    with compute_in_fp32(one.model), compute_in_fp32(other.model):
        for hidden, other_hidden in zip(
            packed_hidden_states(one.model, ids), packed_hidden_states(other.model, ids), strict=True
        ):
            p = one.model.logits(hidden).float()  # (T, V)
            q = other.model.logits(other_hidden).float().to(p.device)
            log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
            largest.append((p - q).abs().max())
            divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
            same += int(p[-1].argmax() == q[-1].argmax())
    # torch's max, since Python's ignores NaN
    return Difference(float(torch.stack(largest).max()), float(torch.cat(divergences).mean()), same)


class Quality(NamedTuple):
    """Mean cross-entropy in nats per token, and the shares of top-1 predictions that equal the label and that equal the
    fine-tuned model's."""

    loss: float
    right: float
    as_tuned: float


def refuse_other_tokens(base: Path, tuned: Path, examples: Sequence[Example]) -> None:
    """Raises UserError if the two tokenize an example differently, so that their predictions are not comparable."""
    tokenizers = [load_tokenizer(folder) for folder in (base, tuned)]
    for example in examples:
        encodings = [encode(example, tokenizer) for tokenizer in tokenizers]
        of_base, of_tuned = (list(zip(encoded.ids, encoded.trained, strict=True)) for encoded in encodings)
        if of_base != of_tuned:
            number = next(n for n, (one, other) in enumerate(zip_longest(of_base, of_tuned), start=1) if one != other)
            raise UserError(
                f"{example.location}: {base} and {tuned} must tokenize it identically, but differ in token {number} of "
                f"{len(of_base)} and {len(of_tuned)}. Give both the same tokenizer and chat template, or omit --data."
            )


def quality(
    base: Path, tuned: Path, adapter: Path, examples: Sequence[Example], trust_remote_code: bool = False
) -> dict[str, Quality]:
    """Quality of base, fine-tuned model and base + adapter on the examples; one model is in memory at a time."""
    scores = {}
    for name, folders in {"base": (base, None), "tuned": (tuned, None), "base + LoRA": (base, adapter)}.items():
        scored = score(load(*folders, trust_remote_code=trust_remote_code), examples)
        scores[name] = (scored.loss, scored.accuracy, scored.choices)
    tuned_choices = scores["tuned"][2]
    return {
        name: Quality(loss, right, float((choices == tuned_choices).double().mean()))
        for name, (loss, right, choices) in scores.items()
    }
