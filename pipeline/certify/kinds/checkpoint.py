"""A whole checkpoint, such as a merged model."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.adapters.config import Unsupported
from pipeline.certify.groups import Stored, listed, stored_in
from pipeline.certify.kinds import Checked, Found, Kind
from pipeline.errors import UserError
from pipeline.files.base_model import TensorLocation, tensor_locations, weight_files
from pipeline.models.load import skeleton
from pipeline.weights.blocks import read_blocks, tied_names
from pipeline.weights.merge_check import update_ratios, written_matrices
from pipeline.weights.merge_plan import MergePlan, plan_merge

CONFIG = "config.json"
# Of an update, in a matrix: what may be lost by rounding, and what would be a wrong scale.
SHARE = 0.2
# what may differ between a base's config and its merge's
NAMES = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
OTHER = (*NAMES, "use_cache", "tie_word_embeddings", "quantization_config")


def _recognizes(path: Path) -> bool:
    return (path / CONFIG).is_file() and any(path.glob("*.safetensors"))


def _tensors(checked: Checked) -> Mapping[str, Stored]:
    """Those that are not the base's."""
    found: dict[str, Stored] = {}
    for file in weight_files(checked.folder):
        found |= stored_in(file)
    ours, theirs = tensor_locations(checked.folder), tensor_locations(checked.base)
    return {
        name: tensor
        for name, tensor in found.items()
        if name not in theirs or not _are_equal(ours[name], theirs[name])
    }


def _are_equal(ours: TensorLocation, theirs: TensorLocation) -> bool:
    """Whether a tensor has another's numbers, as its own dtype has them."""
    if ours.info.shape != theirs.info.shape:
        return False
    pairs = zip(read_blocks(ours), read_blocks(theirs), strict=True)
    return all(torch.equal(mine, other.to(mine.dtype)) for (_, mine), (_, other) in pairs)


def _inspect(checked: Checked) -> Found:
    """Settings and tensors beside the base's, and updates beside those of the adapter."""
    found = Found([*_settings(checked), *_head(checked)], [])
    if not checked.tensors:
        found.problems.append("every tensor is the base's: nothing was merged")
    if checked.source:
        try:
            plan = plan_merge(checked.base, checked.source, checked.trust_remote_code)
        except Unsupported as error:
            found.notes.append(str(error))
        except UserError as error:
            found.problems.append(f"{checked.source}: {error}")
        else:
            found.problems.extend(_updates(checked, plan))
    return found


def _settings(checked: Checked) -> Iterator[str]:
    """Settings of the model's computation that are not the base's."""
    ours, theirs = (
        skeleton(folder, checked.trust_remote_code).describe()
        for folder in (checked.folder, checked.base)
    )
    for key in sorted({*ours, *theirs} - {*OTHER}):
        mine, other = ours.get(key), theirs.get(key)
        if mine != other:
            yield f"config.json has {key} {_short(mine)}, the base {_short(other)}"


def _short(value: Any) -> str:
    return json.dumps(value, default=str)[:80]


def _head(checked: Checked) -> Iterator[str]:
    """A head in the file that programs do not read, as the config ties it to the embedding."""
    tied = tied_names(skeleton(checked.folder, checked.trust_remote_code))
    locations = tensor_locations(checked.folder)
    stored = [locations[name] for name in tied if name in locations]
    if len(stored) > 1 and not _are_equal(*stored[:2]):
        yield "its head is tied to its embedding by config.json, and the file has another one"


def _updates(checked: Checked, plan: MergePlan) -> Iterator[str]:
    """Matrices that did not get their update once, and tensors that should be the base's."""
    stored = tensor_locations(checked.folder)
    missing = sorted(plan.edits.keys() - stored.keys())
    if missing:
        yield f"{len(missing)} matrices of the adapter are not in it: {listed(missing)}"
    edits = {
        name: edit
        for name, edit in plan.edits.items()
        if name in stored and stored[name].info.shape == plan.source(name).info.shape
    }
    written = written_matrices(checked.folder)
    wrong = dict[str, float]()
    for name, ratio in update_ratios(replace(plan, edits=edits), written).items():
        if ratio.value is not None and not abs(ratio.value - 1) <= SHARE:
            wrong[name] = ratio.value
    if wrong:
        shares = f"{min(wrong.values()):.2f} to {max(wrong.values()):.2f}"
        yield f"{len(wrong)} matrices have {shares} times their update, not once: {listed(wrong)}"
    others = sorted(checked.tensors.keys() - {*plan.edits, *plan.copies, *plan.quantizers})
    if others:
        yield f"{len(others)} tensors are not the base's, and no adapter's: {listed(others)}"


def _rounding(folder: Path) -> str | None:
    """bf16 or f16 where its numbers are."""
    kinds = {location.info.dtype for location in tensor_locations(folder).values()}
    halves = {"BF16": "bf16", "F16": "f16"}
    return next((halves[kind] for kind in sorted(kinds) if kind in halves), None)


KIND = Kind(
    4,
    "a checkpoint (config.json with safetensors)",
    "transformers",
    _recognizes,
    files=lambda folder: [folder / CONFIG, *weight_files(folder)],
    tensors=_tensors,
    inspect=_inspect,
    rounding=_rounding,
    is_adapter=lambda _: False,
)
