"""base + adapter → a checkpoint of its own, and the proof that it answers as they do (the document's §4.4)."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline import artifact
from pipeline.adapters.plan import planned
from pipeline.adapters.stream import Merge, Ratio, one_thread, ratios
from pipeline.binding import quantization_of
from pipeline.engine import Loaded, load
from pipeline.errors import UserError
from pipeline.models.causal import read
from pipeline.models.exact import exact
from pipeline.params import Kept
from pipeline.runner import Event, Note, Progress

CERTIFICATE = "certificate.json"
MOSTLY = 0.9  # of an update: below it, not all that was learned is there
STORED = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}  # as safetensors calls them
RATIO_TOLERANCE = 1e-3  # of a matrix's merged delta, beside rounding; a delta merged twice has ratio 2


@dataclass(frozen=True)
class Merging:
    """What is merged into what, and how it is proven.

    The result is written in `precision` (fp32, bf16 or fp16), or in the base's own. On `prompts`, if there are any,
    its logits may differ from those of base + adapter by `limit`: for that alone are models loaded.
    """

    base: Path
    adapter: Path
    precision: str | None = None
    prompts: Sequence[str] = ()
    limit: float = torch.inf
    trust_remote_code: bool = False

    def load(self, folder: Path, adapter: Path | None = None, quantization: Kept | None = None) -> Loaded:
        return load(folder, adapter, trust_remote_code=self.trust_remote_code, quantization=quantization)


def merge_to(
    out: Path, merging: Merging, finish: Callable[[Path, dict[str, Any]], None] = lambda _folder, _certificate: None
) -> Generator[Event, None, dict[str, Any]]:
    """`merge_into` a folder that exists whole or not at all; `finish` adds to it, given the certificate.

    Raises UserError for a folder that holds something else.
    """
    earlier = (out / CERTIFICATE).exists() and not (out / artifact.MANIFEST).exists()  # a stage's result has one
    artifact.refuse_other(out, earlier, (merging.base, merging.adapter))
    with artifact.writing(out) as folder:
        certificate = yield from merge_into(folder, merging)
        finish(folder, certificate)
    return certificate


def merge_into(out: Path, merging: Merging) -> Generator[Event, None, dict[str, Any]]:
    """Fill `out` with the merged checkpoint and its certificate, which is returned.

    Weights pass through memory some rows at a time. Raises UserError if a matrix did not receive its update once, or
    logits differ by more than they may.
    """
    dtype = STORED[merging.precision] if merging.precision else None
    with one_thread():
        merge = planned(merging.base, merging.adapter, merging.trust_remote_code, dtype)
    yield from _written(merge, out)
    measured = ratios(merge, out)
    _refuse_ratios(measured)
    yield from _note_lost(measured)
    certificate: dict[str, Any] = {"delta_ratios": {name: ratio.value for name, ratio in measured.items()}}
    if merging.prompts:
        certificate |= _compared(out, merging)
    artifact.write_json(out / CERTIFICATE, certificate)
    return certificate


def _written(merge: Merge, out: Path) -> Generator[Event, None, None]:
    for number, name in enumerate(merge.write(out), start=1):
        yield Progress(number, len(merge.files), name)


def _refuse_ratios(measured: dict[str, Ratio]) -> None:
    for name, (ratio, rounding) in measured.items():
        if ratio is not None and not abs(ratio - 1) <= RATIO_TOLERANCE + rounding:
            raise UserError(
                f"merge refused: {name} received {ratio:.4f} times its update, not once. Please report this."
            )


def _compared(out: Path, merging: Merging) -> dict[str, Any]:
    """How far the merged model's answers are from base + adapter's. Raises UserError."""
    base, adapter, prompts = merging.base, merging.adapter, merging.prompts
    tuned = merging.load(base, adapter)
    found = difference(tuned, merging.load(out), prompts)
    _refuse_difference(found.max_logit_difference, merging.limit)
    certificate = found._asdict() | {"prompts_checked": len(prompts)}
    kind = quantization_of(adapter)
    if kind != "none":
        wide = merging.load(base, adapter, quantization="none")
        certificate |= {"trained_on": kind, "merged_on_stored_weights": difference(tuned, wide, prompts)._asdict()}
        alone = difference(merging.load(base), merging.load(base, quantization=kind), prompts)
        certificate["quantization_alone"] = alone._asdict()
    return certificate


class Difference(NamedTuple):
    """Between two models' logits on prompts: the largest at any token, the mean KL(one‖other) in nats a token, and
    after how many prompts the likeliest next token is the same."""

    max_logit_difference: float
    divergence: float
    same_first_choices: int


def _note_lost(measured: dict[str, Ratio]) -> Iterator[Event]:
    """An update smaller than half the step between two 16-bit numbers is rounded away."""
    kept = [ratio.value for ratio in measured.values() if ratio.value is not None]
    if kept and min(kept) < MOSTLY:
        yield Note(
            f"merge: of an update as small as this one, rounding leaves {min(kept):.0%} to {max(kept):.0%} in the "
            "merged weights. Write them in fp32 (--precision fp32), or serve the adapter beside its base."
        )


@torch.no_grad()
def difference(one: Loaded, other: Loaded, texts: Sequence[str]) -> Difference:
    """Computed in fp32, so that what remains is the weights'."""
    ids = [one.tokenizer.encode(text)[: one.model.shape.positions] for text in texts]  # unknown words included
    farthest, divergences, same = list[Tensor](), list[Tensor](), 0
    with exact(one.model), exact(other.model):
        for first, second in zip(read(one.model, ids), read(other.model, ids), strict=True):
            p = one.model.logits(first).float()
            q = other.model.logits(second).float().to(p.device)
            log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
            farthest.append((p - q).abs().max())
            divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
            same += int(p[-1].argmax() == q[-1].argmax())
    largest = float(torch.stack(farthest).max())  # Python's max overlooks what is not a number
    return Difference(largest, float(torch.cat(divergences).mean()), same)


def _refuse_difference(difference: float, limit: float) -> None:
    if not difference <= limit:
        raise UserError(
            f"merge refused: the merged model's logits differ from base + adapter by {difference:.1e}, more than "
            f"merge.max_logit_difference {limit:.1e}. Raise it if that is acceptable."
        )
