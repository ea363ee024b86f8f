"""What fine-tuning changed, as spectra, and as the LoRA that comes nearest to it (the document's §2.2).

A checkpoint is read some rows of a tensor at a time; of a LoRA that is extracted its own factors are in memory, and
embedding and head where they come in full.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pipeline.adapters.attach import adaptable
from pipeline.adapters.folder import CONFIG, refuse_foreign
from pipeline.adapters.low_rank import LowRank
from pipeline.adapters.peft.updates import load_update
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.base_model import weight_files
from pipeline.files.safetensors_header import fingerprint
from pipeline.files.shards import Place
from pipeline.models.base import CausalLM, is_conv1d
from pipeline.models.load import skeleton
from pipeline.project.runner import Event, Progress
from pipeline.weights.as_low_rank import write_updates
from pipeline.weights.diff import Delta, Differences, diff_checkpoints, of_adapter, place_of, stored
from pipeline.weights.import_adapter import copy_tokenizer, manifest_of, refuse_other
from pipeline.weights.merge_plan import stored_name
from pipeline.weights.spectrum import MOST, Measured, measure, measure_update
from pipeline.weights.streaming import read_blocks
from pipeline.weights.svd import Singular, factors


@dataclass(frozen=True)
class Spectra:
    """Of every tensor what was changed; `unsaid`: of what nothing can be said, and why."""

    tensors: list[Measured]
    unsaid: list[str] = field(default_factory=list)


def spectra_of(base: Path, tuned: Path, trust_remote_code: bool = False) -> Generator[Event, None, Spectra]:
    """Of two checkpoints of one shape, or of an adapter's updates beside the weights of its base. Raises UserError."""
    _refuse_adapter(base)
    if (tuned / CONFIG).is_file():
        return (yield from _of_adapter(base, tuned, trust_remote_code))
    differences = diff_checkpoints(base, tuned, trust_remote_code)
    found = []
    for number, delta in enumerate(differences.deltas, start=1):
        found.append(measure(delta)[0])
        yield Progress(number, len(differences.deltas), delta.name)
    return Spectra(found, differences.unsaid)


def _refuse_adapter(base: Path) -> None:
    if (base / CONFIG).is_file():
        raise UserError(f"{base} is an adapter. Name the model first, then what was made of it.")


def _of_adapter(base: Path, tuned: Path, trust_remote_code: bool) -> Generator[Event, None, Spectra]:
    old = stored(base)
    change = load_update(tuned)
    refuse_foreign(base, tuned)
    others = of_adapter(base, change, trust_remote_code)
    found, total = [], len(change.low_rank) + len(others)
    for name, update in change.low_rank.items():
        place = place_of(f"{name}.weight", old, base, trust_remote_code)
        if sorted(place.info.shape) != sorted((update.b.shape[0], update.a.shape[1])):
            raise UserError(
                f"{name} is {list(place.info.shape)} in {base}, the adapter's update is {update.b.shape[0]} × "
                f"{update.a.shape[1]}. Name the model that it was trained on."
            )
        found.append(measure_update(f"{name}.weight", update, partial(read_blocks, place)))
        yield Progress(len(found), total, name)
    for delta in others:
        found.append(measure(delta)[0])
        yield Progress(len(found), total, delta.name)
    lengths = ["what DoRA does to the lengths of outputs, these being its s·BA alone"] if change.spec.dora else []
    return Spectra(found, lengths)


@dataclass(frozen=True)
class Extracted:
    """The spectra, and of what changed: matrices that became low-rank, tensors that come in full, and what is left out.

    `held`: the share of all that changed, ‖·‖² over all tensors, that the adapter holds.
    """

    spectra: Spectra
    rank: int
    low_rank: list[str]
    whole: list[str]
    left_out: list[str]
    held: float


def extract(
    base: Path, tuned: Path, out: Path, rank: int, ends: bool = True, trust_remote_code: bool = False
) -> Generator[Event, None, Extracted]:
    """Write to `out` the LoRA that is nearest to the change of each linear of the blocks; returns what it holds.

    `ends`: embedding and head come in full where they changed. Raises UserError.
    """
    _refuse_adapter(base)
    if (tuned / CONFIG).is_file():
        raise UserError(f"{tuned} is an adapter already. Leave out --rank and --out, or name a whole model.")
    differences = diff_checkpoints(base, tuned, trust_remote_code)
    refuse_other(out, "extract", [base, tuned])
    model = skeleton(base, trust_remote_code)
    parts = _Parts(model, differences, rank, ends)
    for number, delta in enumerate(differences.deltas, start=1):
        parts.add(delta)
        yield Progress(number, len(differences.deltas), delta.name)
    found = parts.found()
    _refuse_nothing(found, base, tuned)
    _write(out, parts, base, tuned, ends)
    return found


def _refuse_nothing(found: Extracted, base: Path, tuned: Path) -> None:
    if not any(one.change for one in found.spectra.tensors):
        raise UserError(f"{tuned} and {base} have equal weights: there is nothing to extract.")
    if not found.low_rank:
        raise UserError(
            f"{tuned} and {base} differ in {', '.join([*found.whole, *found.left_out][:3])}, and in no linear of a "
            "block: LoRA has nothing to hold."
        )


class _Parts:
    """What becomes of each tensor's change."""

    def __init__(self, model: CausalLM, differences: Differences, rank: int, ends: bool) -> None:
        self.model, self.rank = model, rank
        self._places, self._unsaid = differences.tuned, differences.unsaid
        ours = [name for name, module in model.named_modules() if adaptable(module) and name != model.head_name]
        self._linears = {stored_name(f"{name}.weight", self._places): name for name in ours}
        self._ends = _parameters_of_ends(model, self._places) if ends else {}
        self._measured: list[Measured] = []
        self._held = 0.0
        self._whole, self._left_out = list[str](), list[str]()
        self.updates: dict[str, LowRank] = {}

    def add(self, delta: Delta) -> None:
        measured, found = measure(delta, max(MOST, self.rank))
        self._measured.append(measured)
        if not measured.change:
            return
        module = self._linears.get(delta.name)
        if module is not None and found is not None:
            self.updates[module] = update = self._nearest(delta, found, module)
            self._held += update.squared_norm()
        elif delta.name in self._ends:
            self._whole.append(delta.name)
            self._held += measured.change**2
        else:
            self._left_out.append(delta.name)

    def _nearest(self, delta: Delta, found: Singular, module: str) -> LowRank:
        left, right = factors(delta.change, delta.shape[0], found, min(self.rank, *delta.shape))
        turned = is_conv1d(self.model.get_submodule(module))
        return LowRank(left.T.contiguous(), right.T.contiguous(), 1.0) if turned else LowRank(right, left, 1.0)

    def saved(self) -> dict[str, Tensor]:
        """What comes in full, by parameter: a module whole, also those of its tensors that did not change."""
        modules = {name.rpartition(".")[0] for key in self._whole for name in self._ends[key]}
        names = [(key, name) for key, names in self._ends.items() for name in names]
        return {name: _read(self._places[key]) for key, name in names if name.rpartition(".")[0] in modules}

    def found(self) -> Extracted:
        """Once all are added."""
        total = sum(one.change**2 for one in self._measured)
        rank = max((update.rank for update in self.updates.values()), default=0)
        held = self._held / total if total else 0.0
        spectra = Spectra(self._measured, self._unsaid)
        return Extracted(spectra, rank, list(self.updates), self._whole, self._left_out, held)


def _parameters_of_ends(model: CausalLM, places: Mapping[str, Place]) -> dict[str, list[str]]:
    """Stored name → full names of the parameters of embedding and head that it holds: of a tied pair, both."""
    found: dict[str, list[str]] = {}
    ends = (model.embedding_name, model.head_name)
    for module in ends:
        for own, _ in model.get_submodule(module).named_parameters():
            twins = [f"{end}.weight" for end in ends] if model.shape.tied and own == "weight" else []
            keys = (stored_name(name, places) for name in (f"{module}.{own}", *twins))
            key = next((key for key in keys if key is not None), None)
            if key is not None:
                found.setdefault(key, []).append(f"{module}.{own}")
    return found


def _read(place: Place) -> Tensor:
    return torch.cat([block for _, block in read_blocks(place)]).view(place.info.shape)


def _write(out: Path, parts: _Parts, base: Path, tuned: Path, ends: bool) -> None:
    with artifact.writing(out) as folder:
        updates = {name: parts.updates[name] for name, _ in parts.model.named_modules() if name in parts.updates}
        spec = write_updates(folder, updates, parts.model, str(base), parts.saved())
        copy_tokenizer(base, folder)
        params = {"rank": spec.rank, "alpha": spec.alpha, "embeddings": "all" if ends else "none"}
        inputs = {tuned.resolve().name: fingerprint(weight_files(tuned))}
        manifest = manifest_of("extract", "pipeline.weights.extract", base, params)
        artifact.seal(folder, manifest | {"inputs": inputs, "seed": None})
