"""Merge base + adapter into one checkpoint, with a certificate of the result (the document's §4.4)."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.project.runner import Event, Note, Progress
from pipeline.weights.merge_plan import plan_merge
from pipeline.weights.streaming import Merge, UpdateRatio, single_torch_thread, update_ratios

CERTIFICATE = "certificate.json"
NOTE_BELOW = 0.9  # share of an update that must survive rounding; below it a note is shown
STORED = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}  # safetensors' names
RATIO_TOLERANCE = 1e-3  # on top of rounding; an update merged twice has ratio 2


@dataclass(frozen=True)
class Merging:
    """The base and adapter to merge; `precision`: fp32, bf16 or fp16, None: the base's dtype."""

    base: Path
    adapter: Path
    precision: str | None = None
    trust_remote_code: bool = False


Verify = Callable[[Path], dict[str, Any]]  # merged checkpoint → entries for its certificate; raises UserError
Finish = Callable[[Path, dict[str, Any]], None]  # adds files to the checkpoint, given its certificate


def merge_to(
    out: Path, merging: Merging, verify: Verify | None = None, finish: Finish | None = None
) -> Generator[Event, None, dict[str, Any]]:
    """`merge_into` a folder that is written atomically.

    Raises UserError if `out` holds anything but an earlier merge.
    """
    # a stage's result has a manifest too, and is not replaced
    replaceable = (out / CERTIFICATE).exists() and not (out / artifact.MANIFEST).exists()
    artifact.refuse_other(out, replaceable, (merging.base, merging.adapter))
    with artifact.writing(out) as folder:
        certificate = yield from merge_into(folder, merging, verify)
        if finish:
            finish(folder, certificate)
    return certificate


def merge_into(out: Path, merging: Merging, verify: Verify | None = None) -> Generator[Event, None, dict[str, Any]]:
    """Write the merged checkpoint and its certificate to `out`; returns the certificate.

    Weights pass through memory a block of rows at a time. Raises UserError if a matrix did not receive its update
    exactly once, or if `verify` does.
    """
    dtype = STORED[merging.precision] if merging.precision else None
    with single_torch_thread():
        merge = plan_merge(merging.base, merging.adapter, merging.trust_remote_code, dtype)
    yield from _write_files(merge, out)
    measured = update_ratios(merge, out)
    _refuse_ratios(measured)
    yield from _note_lost(measured)
    certificate: dict[str, Any] = {"delta_ratios": {name: ratio.value for name, ratio in measured.items()}}
    if verify:
        certificate |= verify(out)
    artifact.write_json(out / CERTIFICATE, certificate)
    return certificate


def _write_files(merge: Merge, out: Path) -> Generator[Event, None, None]:
    for number, name in enumerate(merge.write(out), start=1):
        yield Progress(number, len(merge.files), name)


def _refuse_ratios(measured: dict[str, UpdateRatio]) -> None:
    for name, (ratio, rounding) in measured.items():
        if ratio is not None and not abs(ratio - 1) <= RATIO_TOLERANCE + rounding:
            raise UserError(
                f"merge rejected: {name} received {ratio:.4f} times its update, not once. Please report this."
            )


def _note_lost(measured: dict[str, UpdateRatio]) -> Iterator[Event]:
    """Note how much of the updates is lost: less than half the distance of two 16-bit numbers rounds to nothing."""
    retained = [ratio.value for ratio in measured.values() if ratio.value is not None]
    if retained and min(retained) < NOTE_BELOW:
        yield Note(
            f"merge: the update is so small that rounding leaves {min(retained):.0%} to {max(retained):.0%} of it in "
            "the merged weights. Write them in fp32 (--precision fp32), or serve the adapter without merging."
        )
