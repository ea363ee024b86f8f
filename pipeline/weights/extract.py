"""Spectra of what fine-tuning changed, and extraction of the nearest LoRA.

Checkpoints are read a block of rows at a time. An extracted LoRA is held in memory: its factors,
and embedding and head if they are saved in full.
"""

from collections.abc import Generator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

from torch import Tensor

from pipeline.adapters.config import CONFIG
from pipeline.adapters.folder import refuse_foreign
from pipeline.adapters.low_rank import LowRank, load_update
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.base_model import weight_files
from pipeline.files.safetensors_file import fingerprint
from pipeline.models.base import CausalLM, is_conv1d
from pipeline.models.load import skeleton
from pipeline.models.save import copy_tokenizer
from pipeline.project.runner import Event, Progress
from pipeline.weights.blocks import read_blocks, read_matrix, stored_name, tied_names
from pipeline.weights.combine import write_updates
from pipeline.weights.diff import (
    Delta,
    Differences,
    block_linears,
    diff_adapter,
    diff_checkpoints,
    refuse_adapter,
    require_location,
    stored_tensors,
)
from pipeline.weights.import_adapter import refuse_other, seal_adapter
from pipeline.weights.spectrum import MAX_VALUES, Measured, factors, measure, measure_update


@dataclass(frozen=True)
class Spectra:
    """The spectrum of every tensor's change; `skipped`: tensors without one, and why."""

    tensors: list[Measured]
    skipped: list[str] = field(default_factory=list)


def spectra_of(
    base: Path, tuned: Path, trust_remote_code: bool = False
) -> Generator[Event, None, Spectra]:
    """The spectra of the difference of two checkpoints, or of an adapter's updates.

    Raises UserError.
    """
    refuse_adapter(base)
    if (tuned / CONFIG).is_file():
        return (yield from _adapter_spectra(base, tuned, trust_remote_code))
    differences = diff_checkpoints(base, tuned, trust_remote_code)
    spectra = []
    for number, delta in enumerate(differences.deltas, start=1):
        spectra.append(measure(delta)[0])
        yield Progress(number, len(differences.deltas), delta.name)
    return Spectra(spectra, differences.skipped)


def _adapter_spectra(
    base: Path, tuned: Path, trust_remote_code: bool
) -> Generator[Event, None, Spectra]:
    base_tensors = stored_tensors(base)
    change = load_update(tuned)
    refuse_foreign(base, tuned)
    others = diff_adapter(base, change, trust_remote_code)
    spectra, total = [], len(change.low_rank) + len(others)
    for name, update in change.low_rank.items():
        location = require_location(f"{name}.weight", base_tensors, base, trust_remote_code)
        if sorted(location.info.shape) != sorted((update.b.shape[0], update.a.shape[1])):
            raise UserError(
                f"{name} has shape {list(location.info.shape)} in {base}, but the adapter's "
                "update is "
                f"{update.b.shape[0]} × {update.a.shape[1]}. Name the model that it was trained on."
            )
        spectra.append(measure_update(f"{name}.weight", update, partial(read_blocks, location)))
        yield Progress(len(spectra), total, name)
    for delta in others:
        spectra.append(measure(delta)[0])
        yield Progress(len(spectra), total, delta.name)
    skipped = ["the magnitudes of DoRA, as the spectra are of s·BA alone"] * change.spec.dora
    return Spectra(spectra, skipped)


class Extraction:
    """The change of each tensor: as a low-rank update, saved in full, or left out."""

    def __init__(
        self, model: CausalLM, differences: Differences, rank: int, with_embeddings: bool
    ) -> None:
        self._model, self._limit, self._tuned = model, rank, differences.tuned
        linears = block_linears(model)
        self._linears = {stored_name(f"{name}.weight", self._tuned): name for name in linears}
        # stored name → full names of the embedding and head parameters it holds; both names for a
        # tied pair
        self._full_names: dict[str, list[str]] = {}
        for end in (model.embedding_name, model.head_name) if with_embeddings else ():
            for parameter, _ in model.get_submodule(end).named_parameters():
                if key := stored_name(f"{end}.{parameter}", self._tuned, tied_names(model)):
                    self._full_names.setdefault(key, []).append(f"{end}.{parameter}")
        self.spectra = Spectra([], differences.skipped)  # of all tensors
        self.updates: dict[str, LowRank] = {}
        self.in_full, self.left_out = list[str](), list[str]()
        self._held = 0.0

    @property
    def low_rank(self) -> list[str]:
        return list(self.updates)

    @property
    def rank(self) -> int:
        """The highest of all updates."""
        return max((update.rank for update in self.updates.values()), default=0)

    @property
    def held(self) -> float:
        """The share of Σ‖ΔW‖² over all tensors that the adapter captures."""
        total = sum(tensor.change**2 for tensor in self.spectra.tensors)
        return self._held / total if total else 0.0

    def add(self, delta: Delta) -> None:
        measured, singular = measure(delta, max(MAX_VALUES, self._limit))
        self.spectra.tensors.append(measured)
        if not measured.change:
            return
        module = self._linears.get(delta.name)
        if module is not None and singular is not None:
            # (n, R), (R, m)
            b, a = factors(delta.change, delta.shape[0], singular, min(self._limit, *delta.shape))
            if is_conv1d(self._model.get_submodule(module)):  # its stored weight is (I, O)
                a, b = b.T.contiguous(), a.T.contiguous()
            self.updates[module] = update = LowRank(a, b, 1.0)
            # of the factors as they are stored, in fp32, not of the singular values that they come
            # from
            self._held += update.squared_norm()
        elif delta.name in self._full_names:
            self.in_full.append(delta.name)
            self._held += measured.change**2
        else:
            self.left_out.append(delta.name)

    def saved(self) -> dict[str, Tensor]:
        """Parameters to save in full, by name: all of a module, unchanged ones too."""
        changed = chain.from_iterable(self._full_names[key] for key in self.in_full)
        modules = {name.rpartition(".")[0] for name in changed}
        saved = {}
        for key, names in self._full_names.items():
            location = self._tuned[key]
            for name in names:
                if name.rpartition(".")[0] in modules:
                    saved[name] = read_matrix(read_blocks(location)).view(location.info.shape)
        return saved


def extract(
    base: Path,
    tuned: Path,
    out: Path,
    rank: int,
    with_embeddings: bool = True,
    trust_remote_code: bool = False,
) -> Generator[Event, None, Extraction]:
    """Write to `out` the LoRA that best approximates the change of the blocks' linears.

    `with_embeddings`: save embedding and head in full if they changed. Raises UserError.
    """
    refuse_adapter(base)
    if (tuned / CONFIG).is_file():
        raise UserError(
            f"{tuned} is an adapter already. Omit --rank and --out, or name a full model."
        )
    differences = diff_checkpoints(base, tuned, trust_remote_code)
    refuse_other(out, "extract", [base, tuned])
    model = skeleton(base, trust_remote_code)
    extraction = Extraction(model, differences, rank, with_embeddings)
    for number, delta in enumerate(differences.deltas, start=1):
        extraction.add(delta)
        yield Progress(number, len(differences.deltas), delta.name)
    if not any(tensor.change for tensor in extraction.spectra.tensors):
        raise UserError(
            f"{tuned} and {base} have equal weights: there is nothing to extract. Name a "
            "fine-tuned model."
        )
    if not extraction.updates:
        raise UserError(
            f"{tuned} and {base} differ in "
            f"{', '.join([*extraction.in_full, *extraction.left_out][:3])}, but in no "
            "linear layer of a block, so there is no LoRA to extract."
        )
    with artifact.writing(out) as folder:
        updates = {
            name: extraction.updates[name]
            for name, _ in model.named_modules()
            if name in extraction.updates
        }
        spec = write_updates(folder, updates, model, str(base), extraction.saved())
        copy_tokenizer(base, folder)
        params = {
            "rank": spec.rank,
            "alpha": spec.alpha,
            "embeddings": "all" if with_embeddings else "none",
        }
        inputs = {tuned.resolve().name: fingerprint(weight_files(tuned))}
        seal_adapter(folder, "extract", __name__, base, params, inputs)
    return extraction
