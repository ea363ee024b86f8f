"""How alike two models answer: a merge beside base + adapter, a LoRA that was extracted beside its fine-tuned model."""

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
    """Whether a merged checkpoint answers prompts as base + adapter do.

    Their logits may differ by `limit`. Without prompts no model is loaded.
    """

    base: Path
    adapter: Path
    prompts: Sequence[str]
    limit: float = torch.inf
    trust_remote_code: bool = False

    def __call__(self, merged: Path) -> dict[str, Any]:
        """What the certificate is to say of it. Raises UserError."""
        if not self.prompts:
            return {}
        base, adapter, prompts = self.base, self.adapter, self.prompts
        tuned = self._load(base, adapter)
        found = difference(tuned, self._load(merged), prompts)
        self._refuse(found.max_logit_difference)
        certificate = found._asdict() | {"prompts_checked": len(prompts)}
        kind = quantization_of(adapter)
        if kind != "none":
            wide = self._load(base, adapter, quantization="none")
            certificate |= {"trained_on": kind, "merged_on_stored_weights": difference(tuned, wide, prompts)._asdict()}
            alone = difference(self._load(base), self._load(base, quantization=kind), prompts)
            certificate["quantization_alone"] = alone._asdict()
        return certificate

    def _load(self, folder: Path, adapter: Path | None = None, quantization: Quantization | None = None) -> LoadedModel:
        return load(folder, adapter, trust_remote_code=self.trust_remote_code, quantization=quantization)

    def _refuse(self, difference: float) -> None:
        if not difference <= self.limit:
            raise UserError(
                f"merge refused: the merged model's logits differ from base + adapter by {difference:.1e}, more than "
                f"merge.max_logit_difference {self.limit:.1e}. Raise it if that is acceptable."
            )


class Difference(NamedTuple):
    """Between two models' logits on prompts: the largest at any token, the mean KL(one‖other) in nats a token, and
    after how many prompts the likeliest next token is the same."""

    max_logit_difference: float
    divergence: float
    same_first_choices: int


@torch.no_grad()
def difference(one: LoadedModel, other: LoadedModel, texts: Sequence[str]) -> Difference:
    """Computed in fp32, so that what remains is the weights'."""
    ids = [one.tokenizer.encode(text)[: one.model.shape.positions] for text in texts]  # unknown words included
    farthest, divergences, same = list[Tensor](), list[Tensor](), 0
    with compute_in_fp32(one.model), compute_in_fp32(other.model):
        for first, second in zip(
            packed_hidden_states(one.model, ids), packed_hidden_states(other.model, ids), strict=True
        ):
            p = one.model.logits(first).float()
            q = other.model.logits(second).float().to(p.device)
            log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
            farthest.append((p - q).abs().max())
            divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
            same += int(p[-1].argmax() == q[-1].argmax())
    largest = float(torch.stack(farthest).max())  # Python's max overlooks what is not a number
    return Difference(largest, float(torch.cat(divergences).mean()), same)


class Quality(NamedTuple):
    """Mean cross-entropy in nats a token, and the shares of next-token first choices that are right, and the tuned
    model's."""

    loss: float
    right: float
    as_tuned: float


def refuse_other_tokens(base: Path, tuned: Path, examples: Sequence[Example]) -> None:
    """Raises UserError where the two read an example otherwise: their first choices are then not comparable."""
    tokenizers = [load_tokenizer(folder) for folder in (base, tuned)]
    for example in examples:
        read = [encode(example, tokenizer) for tokenizer in tokenizers]
        mine, theirs = (list(zip(found.ids, found.trained, strict=True)) for found in read)
        if mine != theirs:
            at = next(n for n, (one, other) in enumerate(zip_longest(mine, theirs), start=1) if one != other)
            raise UserError(
                f"{example.place}: {base} and {tuned} must read it as the same tokens, but differ in token {at} of "
                f"{len(mine)} and {len(theirs)}. Give both one tokenizer and chat template, or leave out --data."
            )


def quality(
    base: Path, tuned: Path, adapter: Path, examples: Sequence[Example], trust_remote_code: bool = False
) -> dict[str, Quality]:
    """How base, tuned model and base + adapter predict the examples; one model is in memory at a time."""
    found = {}
    for name, folders in {"base": (base, None), "tuned": (tuned, None), "base + LoRA": (base, adapter)}.items():
        scored = score(load(*folders, trust_remote_code=trust_remote_code), examples)
        found[name] = (scored.loss, scored.accuracy, scored.choices)
    wanted = found["tuned"][2]
    return {
        name: Quality(loss, right, float((choices == wanted).double().mean()))
        for name, (loss, right, choices) in found.items()
    }
