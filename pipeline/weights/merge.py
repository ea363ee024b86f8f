"""base + adapter → a checkpoint of its own, and the proof that it answers as they do (the document's §4.4)."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.project.runner import Event, Note, Progress
from pipeline.weights.merge_plan import plan_merge
from pipeline.weights.streaming import Merge, UpdateRatio, one_thread, ratios

CERTIFICATE = "certificate.json"
MOSTLY = 0.9  # of an update: below it, not all that was learned is there
STORED = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}  # as safetensors calls them
RATIO_TOLERANCE = 1e-3  # of a matrix's merged delta, beside rounding; a delta merged twice has ratio 2


@dataclass(frozen=True)
class Merging:
    """What is merged into what, in `precision` (fp32, bf16 or fp16), or in the base's own."""

    base: Path
    adapter: Path
    precision: str | None = None
    trust_remote_code: bool = False


Verify = Callable[[Path], dict[str, Any]]  # a merged checkpoint → what its certificate is to say; raises UserError
Finish = Callable[[Path, dict[str, Any]], None]  # adds to the checkpoint, given its certificate


def merge_to(
    out: Path, merging: Merging, verify: Verify | None = None, finish: Finish | None = None
) -> Generator[Event, None, dict[str, Any]]:
    """`merge_into` a folder that exists whole or not at all.

    Raises UserError for a folder that holds something else.
    """
    earlier = (out / CERTIFICATE).exists() and not (out / artifact.MANIFEST).exists()  # a stage's result has one
    artifact.refuse_other(out, earlier, (merging.base, merging.adapter))
    with artifact.writing(out) as folder:
        certificate = yield from merge_into(folder, merging, verify)
        if finish:
            finish(folder, certificate)
    return certificate


def merge_into(out: Path, merging: Merging, verify: Verify | None = None) -> Generator[Event, None, dict[str, Any]]:
    """Fill `out` with the merged checkpoint and its certificate, which is returned.

    Weights pass through memory some rows at a time. Raises UserError if a matrix did not receive its update once, or
    if `verify` does.
    """
    dtype = STORED[merging.precision] if merging.precision else None
    with one_thread():
        merge = plan_merge(merging.base, merging.adapter, merging.trust_remote_code, dtype)
    yield from _written(merge, out)
    measured = ratios(merge, out)
    _refuse_ratios(measured)
    yield from _note_lost(measured)
    certificate: dict[str, Any] = {"delta_ratios": {name: ratio.value for name, ratio in measured.items()}}
    if verify:
        certificate |= verify(out)
    artifact.write_json(out / CERTIFICATE, certificate)
    return certificate


def _written(merge: Merge, out: Path) -> Generator[Event, None, None]:
    for number, name in enumerate(merge.write(out), start=1):
        yield Progress(number, len(merge.files), name)


def _refuse_ratios(measured: dict[str, UpdateRatio]) -> None:
    for name, (ratio, rounding) in measured.items():
        if ratio is not None and not abs(ratio - 1) <= RATIO_TOLERANCE + rounding:
            raise UserError(
                f"merge refused: {name} received {ratio:.4f} times its update, not once. Please report this."
            )


def _note_lost(measured: dict[str, UpdateRatio]) -> Iterator[Event]:
    """An update smaller than half the step between two 16-bit numbers is rounded away."""
    kept = [ratio.value for ratio in measured.values() if ratio.value is not None]
    if kept and min(kept) < MOSTLY:
        yield Note(
            f"merge: of an update as small as this one, rounding leaves {min(kept):.0%} to {max(kept):.0%} in the "
            "merged weights. Write them in fp32 (--precision fp32), or serve the adapter beside its base."
        )
