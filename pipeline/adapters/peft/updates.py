"""What an adapter changes in a model's weights, from its files alone: no model is needed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from pipeline.adapters.attach import PREFIX, ROWS
from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.folder import WEIGHTS, refuse_virtual
from pipeline.adapters.low_rank import LowRank, singular_values
from pipeline.adapters.peft.config import EMBEDDING, read_spec
from pipeline.adapters.peft.tensors import read_tensors
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.patterns import one_budget

_A, _B = ".lora_A.weight", ".lora_B.weight"
_EMBEDDING_A, _EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"


def tensors_of(module: str, update: LowRank) -> dict[str, Tensor]:
    """A module's two factors by PEFT's key; the scale is the config's to say."""
    first, second = (_EMBEDDING_A, _EMBEDDING_B) if update.embedding else (_A, _B)
    return {f"{PREFIX}{module}{first}": update.a, f"{PREFIX}{module}{second}": update.b}


@dataclass(frozen=True)
class LowRankUpdate:
    """All of an adapter, by a module's full name, in the model's order; `whole` by a parameter's.

    `base`: the sha256 of its base's tensors, where a manifest names it.
    """

    spec: AdapterSpec
    low_rank: Mapping[str, LowRank]
    rows: Mapping[str, tuple[tuple[int, ...], Tensor]]
    whole: Mapping[str, Tensor]
    base: str | None = None


@one_budget()
def load_update(folder: Path) -> LowRankUpdate:
    """Raises UserError for an adapter that was changed since it was made, is damaged, is not understood, or changes no
    weight."""
    refuse_virtual(folder)
    manifest = artifact.verify(folder) if (folder / artifact.MANIFEST).exists() else {}
    place = str(folder / WEIGHTS)
    found = {
        key.removeprefix(PREFIX): value
        for key, value in sorted(read_tensors(folder).items(), key=lambda item: layer_sort_key(item[0]))
    }
    by_rows = [key.removesuffix(ROWS) for key in found if key.endswith(ROWS)]
    # a list of rows without a name is the embedding's, which the file alone calls by its name
    spec = read_spec(folder, by_rows[0].rsplit(".", 1)[-1] if by_rows else EMBEDDING)
    low_rank = {}
    for first, second in ((_A, _B), (_EMBEDDING_A, _EMBEDDING_B)):
        for key in [key for key in found if key.endswith(first)]:
            name = key.removesuffix(first)
            low_rank[name] = _pair(found.pop(key), found.pop(name + second, None), name, spec, place, first != _A)
    rows = {name: (_ids(name, spec, place), found.pop(name + ROWS)) for name in by_rows}
    return LowRankUpdate(spec, low_rank, rows, found, manifest.get("base", {}).get("tensors"))


def _pair(a: Tensor, b: Tensor | None, name: str, spec: AdapterSpec, place: str, embedding: bool) -> LowRank:
    if b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise UserError(f"{place}: {name} has no A and B of one rank. Make the adapter again.")
    if a.shape[0] != spec.rank_of(name):
        raise UserError(f"{place}: {name} has rank {a.shape[0]}, its config says {spec.rank_of(name)}.")
    return LowRank(a, b, spec.scale_of(name), embedding)


def _ids(name: str, spec: AdapterSpec, place: str) -> tuple[int, ...]:
    for end, ids in spec.rows.items():
        if name.endswith(end):
            return ids
    raise UserError(f"{place}: {name} has rows that its config does not name. Make the adapter again.")


def layer_sort_key(name: str) -> str:
    """What to sort names by: layer 10 after layer 9."""
    return re.sub(r"\d+", lambda match: match[0].zfill(6), name)


class Spectrum(NamedTuple):
    """Singular values of one module's s·BA, largest first: as many as its rank, or as its smaller side."""

    name: str
    rank: int
    values: tuple[float, ...]

    @property
    def share_of_first(self) -> float:
        """How much of ‖s·BA‖² the largest one has; 0 where the update is zero."""
        squares = [value**2 for value in self.values]
        return squares[0] / sum(squares) if any(squares) else 0.0


def spectra(folder: Path) -> list[Spectrum]:
    """One spectrum a module, in the model's order. Raises UserError for a changed or damaged adapter."""
    return [
        Spectrum(name, update.rank, tuple((singular_values(update.a, update.b) * update.scale).tolist()))
        for name, update in load_update(folder).low_rank.items()
    ]
