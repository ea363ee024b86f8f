"""What an adapter changes in a model's weights, from its files alone: no model is needed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.adapters.attach import PREFIX, ROWS
from pipeline.adapters.peft_config import EMBEDDING, read_spec
from pipeline.adapters.spec import AdapterSpec
from pipeline.adapters.tensor_files import read_tensors
from pipeline.binding import WEIGHTS, refuse_virtual
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.patterns import one_budget

_A, _B = ".lora_A.weight", ".lora_B.weight"
COPY = ".base_layer.weight"  # of the base's own weight, as PEFT writes it beside an embedding's LoRA
_EMBEDDING_A, _EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"


@dataclass(frozen=True)
class LowRank:
    """s·BA with A (R, I) and B (O, R); the inputs of an embedding are its rows."""

    a: Tensor
    b: Tensor
    scale: float
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def delta(self) -> Tensor:
        """(O, I), in fp32."""
        return self.scale * (self.b.float() @ self.a.float())

    def squared_norm(self) -> float:
        """‖s·BA‖²."""
        return squared_norm(self.b, self.a, self.scale)

    def tensors(self, module: str) -> dict[str, Tensor]:
        """By PEFT's key; the scale is the config's to say."""
        first, second = (_EMBEDDING_A, _EMBEDDING_B) if self.embedding else (_A, _B)
        return {f"{PREFIX}{module}{first}": self.a, f"{PREFIX}{module}{second}": self.b}


@dataclass(frozen=True)
class Change:
    """All of an adapter, by a module's full name, in the model's order; `whole` by a parameter's.

    `base`: the sha256 of its base's tensors, where a manifest names it.
    """

    spec: AdapterSpec
    low_rank: Mapping[str, LowRank]
    rows: Mapping[str, tuple[tuple[int, ...], Tensor]]
    whole: Mapping[str, Tensor]
    base: str | None = None


@one_budget()
def read_change(folder: Path) -> Change:
    """Raises UserError for an adapter that was changed since it was made, is damaged, is not understood, or changes no
    weight."""
    refuse_virtual(folder)
    manifest = artifact.verify(folder) if (folder / artifact.MANIFEST).exists() else {}
    place = str(folder / WEIGHTS)
    found = {
        key.removeprefix(PREFIX): value
        for key, value in sorted(read_tensors(folder).items(), key=lambda item: in_order(item[0]))
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
    return Change(spec, low_rank, rows, found, manifest.get("base", {}).get("tensors"))


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


def in_order(name: str) -> str:
    """What to sort names by: layer 10 after layer 9."""
    return re.sub(r"\d+", lambda match: match[0].zfill(6), name)


def squared_norm(b: Tensor, a: Tensor, scale: float) -> float:
    """‖s·BA‖² for B (O, R) and A (R, I), without the (O, I) product: trace of BᵀB·AAᵀ."""
    b, a = b.double(), a.double()
    return scale**2 * float(((b.T @ b) * (a @ a.T)).sum())


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
        for name, update in read_change(folder).low_rank.items()
    ]


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Those of BA, largest first, A (R, I) and B (O, R), without the (O, I) product.

    With B = QS and Aᵀ = PT, BA = Q(STᵀ)Pᵀ has the singular values of the small STᵀ.
    """
    s = torch.linalg.qr(b.double()).R  # (min(O, R), R)
    t = torch.linalg.qr(a.double().T).R  # (min(I, R), R)
    values: Tensor = torch.linalg.svdvals(s @ t.T)
    return values


def directions(update: LowRank) -> tuple[Tensor, Tensor]:
    """Left (O, k) and right (I, k) singular vectors of s·BA, the strongest first, k its rank or its smaller side."""
    q, s = torch.linalg.qr(update.b.double())
    p, t = torch.linalg.qr(update.a.double().T)
    left, _, right = torch.linalg.svd(s @ t.T)
    count = min(update.rank, *left.shape, *right.shape)
    return (q @ left)[:, :count], (p @ right.T)[:, :count]
