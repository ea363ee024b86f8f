"""What an adapter changes in a model's weights, read from its files: no model is needed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from pipeline.adapters.attach import PREFIX
from pipeline.adapters.config import WEIGHTS, AdapterSpec
from pipeline.adapters.folder import refuse_virtual
from pipeline.adapters.lora import ROWS
from pipeline.adapters.low_rank import LowRank, singular_values
from pipeline.adapters.peft.config import EMBEDDING, read_spec
from pipeline.adapters.peft.tensors import read_tensors
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.patterns import one_budget

_A, _B = ".lora_A.weight", ".lora_B.weight"
_EMBEDDING_A, _EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"


def tensors_of(module: str, update: LowRank) -> dict[str, Tensor]:
    """A module's two factors by PEFT's keys; the scale follows from the config."""
    a_key, b_key = (_EMBEDDING_A, _EMBEDDING_B) if update.embedding else (_A, _B)
    return {f"{PREFIX}{module}{a_key}": update.a, f"{PREFIX}{module}{b_key}": update.b}


@dataclass(frozen=True)
class LowRankUpdate:
    """All that an adapter changes, by full module name, in the model's order; `whole` are full parameters by name.

    `base`: the sha256 of its base's tensors, if a manifest names it.
    """

    spec: AdapterSpec
    low_rank: Mapping[str, LowRank]
    rows: Mapping[str, tuple[tuple[int, ...], Tensor]]
    whole: Mapping[str, Tensor]
    base: str | None = None


@one_budget()
def load_update(folder: Path) -> LowRankUpdate:
    """Raises UserError for an adapter that was edited, is damaged, is not supported, or changes no weights."""
    refuse_virtual(folder)
    manifest = artifact.verify(folder) if (folder / artifact.MANIFEST).exists() else {}
    path = str(folder / WEIGHTS)
    tensors = {
        key.removeprefix(PREFIX): value
        for key, value in sorted(read_tensors(folder).items(), key=lambda item: layer_sort_key(item[0]))
    }
    row_modules = [key.removesuffix(ROWS) for key in tensors if key.endswith(ROWS)]
    # trainable_token_indices as a list is the embedding's, whose name only the tensors' keys give
    spec = read_spec(folder, row_modules[0].rsplit(".", 1)[-1] if row_modules else EMBEDDING)
    low_rank = {}
    for a_key, b_key in ((_A, _B), (_EMBEDDING_A, _EMBEDDING_B)):
        for key in [key for key in tensors if key.endswith(a_key)]:
            name = key.removesuffix(a_key)
            a, b = tensors.pop(key), tensors.pop(name + b_key, None)
            low_rank[name] = _low_rank(a, b, name, spec, path, embedding=a_key != _A)
    rows = {name: (_row_ids(name, spec, path), tensors.pop(name + ROWS)) for name in row_modules}
    return LowRankUpdate(spec, low_rank, rows, tensors, manifest.get("base", {}).get("tensors"))


def _low_rank(a: Tensor, b: Tensor | None, name: str, spec: AdapterSpec, path: str, embedding: bool) -> LowRank:
    if b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise UserError(f"{path}: {name} has no A and B of the same rank. Train or import the adapter again.")
    if a.shape[0] != spec.rank_of(name):
        raise UserError(
            f"{path}: {name} has rank {a.shape[0]}, but its config says {spec.rank_of(name)}. "
            "Train or import the adapter again."
        )
    return LowRank(a, b, spec.scale_of(name), embedding)


def _row_ids(name: str, spec: AdapterSpec, path: str) -> tuple[int, ...]:
    for suffix, ids in spec.rows.items():
        if name.endswith(suffix):
            return ids
    raise UserError(f"{path}: {name} has rows that its config does not name. Train or import the adapter again.")


def layer_sort_key(name: str) -> str:
    """Sorts layer 10 after layer 9."""
    return re.sub(r"\d+", lambda match: match[0].zfill(6), name)


class Spectrum(NamedTuple):
    """Singular values of one module's s·BA, largest first: min(O, I, R) of them."""

    name: str
    rank: int
    values: tuple[float, ...]

    @property
    def share_of_first(self) -> float:
        """The largest one's share of ‖s·BA‖²; 0 if the update is zero."""
        squares = [value**2 for value in self.values]
        return squares[0] / sum(squares) if any(squares) else 0.0


def spectra(folder: Path) -> list[Spectrum]:
    """One spectrum per module, in the model's order. Raises UserError as `load_update`."""
    return [
        Spectrum(name, update.rank, tuple((singular_values(update.a, update.b) * update.scale).tolist()))
        for name, update in load_update(folder).low_rank.items()
    ]
