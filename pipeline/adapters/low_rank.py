"""What an adapter changes in a model's weights, ΔW = s·BA, read from its files without a model."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.adapters.attach import read_tensors
from pipeline.adapters.config import (
    EMBEDDING,
    PREFIX,
    WEIGHTS,
    AdapterConfig,
    AdapterSpec,
    refuse_experts,
)
from pipeline.adapters.lora import EMBEDDING_KEYS, LINEAR_KEYS, MAGNITUDE, ROWS
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.patterns import one_budget
from pipeline.models.device import device_for_matrix

_KEYS = (LINEAR_KEYS, EMBEDDING_KEYS)


@dataclass(frozen=True)
class LowRank:
    """A low-rank update s·BA of one weight, or of stacked experts.

    An embedding's inputs are its rows.
    """

    a: Tensor  # (R, I), of experts (E, R, I)
    b: Tensor  # (O, R), of experts (E, O, R)
    scale: float
    embedding: bool = False
    magnitude: Tensor | None = None  # DoRA's, (O,)

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    def delta(self) -> Tensor:
        """(O, I), in fp32."""
        return self.scale * (self.b.float() @ self.a.float())

    def squared_norm(self) -> float:
        """‖s·BA‖²."""
        return squared_norm(self.b, self.a, self.scale)


def squared_norm(b: Tensor, a: Tensor, scale: float) -> float:
    """‖s·BA‖² for B (O, R) and A (R, I), without the (O, I) product: trace of BᵀB·AAᵀ."""
    b, a = b.double(), a.double()
    # (R, R) each, symmetric: the trace is the sum of products
    return scale**2 * float(((b.mT @ b) * (a @ a.mT)).sum())


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Singular values of BA, largest first, for A (R, I) and B (O, R), without the (O, I) product.

    With the QR decompositions B = QS and Aᵀ = PT, BA = Q(STᵀ)Pᵀ has the singular values of the
    small STᵀ.
    """
    device = device_for_matrix(a.numel() + b.numel())
    s = torch.linalg.qr(b.to(device, torch.float64)).R  # (min(O, R), R)
    t = torch.linalg.qr(a.to(device, torch.float64).T).R  # (min(I, R), R)
    values: Tensor = torch.linalg.svdvals(s @ t.T).cpu()
    return values


def svd(update: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """U (O, k), σ (k,) and Vᵀ (k, I) of s·BA, in fp64, largest σ first; k = min(O, I, R).

    The singular vectors are those of the small STᵀ of `singular_values`, times Q and P.
    """
    device = device_for_matrix(update.a.numel() + update.b.numel())
    # (O, min(O, R)), (min(O, R), R)
    q, s = torch.linalg.qr(update.scale * update.b.to(device, torch.float64))
    p, t = torch.linalg.qr(update.a.to(device, torch.float64).T)  # (I, min(I, R)), (min(I, R), R)
    left, values, right = torch.linalg.svd(s @ t.T, full_matrices=False)
    return (q @ left).cpu(), values.cpu(), (right @ p.T).cpu()


def truncated(
    left: Tensor, values: Tensor, right: Tensor, rank: int, embedding: bool = False
) -> LowRank:
    """The first `rank` of the triples U (O, k), σ (k,), Vᵀ (k, I) as an update in fp32."""
    root = values[:rank].sqrt()  # √S in both factors, so that their norms are similar
    return LowRank(
        (root[:, None] * right[:rank]).float(), (left[:, :rank] * root).float(), 1.0, embedding
    )


def inner_product(first: LowRank, second: LowRank) -> float:
    """⟨s₁B₁A₁, s₂B₂A₂⟩, the sum of the products of their entries, without the (O, I) products."""
    b = first.b.double().mT @ second.b.double()  # (R₁, R₂)
    a = first.a.double() @ second.a.double().mT  # (R₁, R₂)
    return first.scale * second.scale * float((b * a).sum())


def tensors_of(module: str, update: LowRank) -> dict[str, Tensor]:
    """A module's factors and DoRA's magnitude by PEFT's keys; the config has the scale."""
    a_key, b_key = _KEYS[update.embedding]
    tensors = {f"{PREFIX}{module}{a_key}": update.a, f"{PREFIX}{module}{b_key}": update.b}
    if update.magnitude is not None:
        tensors[f"{PREFIX}{module}{MAGNITUDE}"] = update.magnitude
    return tensors


@dataclass(frozen=True)
class LowRankUpdate:
    """All that an adapter changes, by full module name, in the model's order."""

    spec: AdapterSpec
    low_rank: Mapping[str, LowRank]
    rows: Mapping[str, tuple[tuple[int, ...], Tensor]]  # numbers of n rows, and their values (n, D)
    whole: Mapping[str, Tensor]  # parameters that were trained in full, and DoRA's magnitudes
    base: str | None = None  # the sha256 of the base's tensors, if a manifest names it


@one_budget()
def load_update(folder: Path) -> LowRankUpdate:
    """The adapter in `folder`.

    Raises UserError if it was edited, is damaged, is not supported, or changes no weights.
    """
    config = AdapterConfig.read(folder)
    config.refuse_other_kinds()
    manifest = artifact.verify(folder) if (folder / artifact.MANIFEST).exists() else {}
    path = folder / WEIGHTS
    again = "Train or import the adapter again."
    stored = read_tensors(folder)
    tensors = {key.removeprefix(PREFIX): stored[key] for key in sorted(stored, key=layer_sort_key)}
    row_modules = [key.removesuffix(ROWS) for key in tensors if key.endswith(ROWS)]
    # a list in trainable_token_indices means the embedding, which only the tensors' keys name
    spec = config.spec(row_modules[0].rpartition(".")[2] if row_modules else EMBEDDING)
    refuse_experts(folder, spec)

    low_rank = {}
    for embedding, (a_key, b_key) in enumerate(_KEYS):
        for key in [key for key in tensors if key.endswith(a_key)]:
            name = key.removesuffix(a_key)
            a, b = tensors.pop(key), tensors.pop(name + b_key, None)
            rank = spec.rank_of(name)
            if b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
                raise UserError(f"{path}: {name} has no A and B of the same rank. {again}")
            if a.shape[0] != rank:
                raise UserError(
                    f"{path}: {name} has rank {a.shape[0]}, but its config says {rank}. {again}"
                )
            low_rank[name] = LowRank(a, b, spec.scale_of(name), bool(embedding))

    rows = {}
    for name in row_modules:
        ids = next((ids for suffix, ids in spec.rows.items() if name.endswith(suffix)), None)
        if ids is None:
            raise UserError(f"{path}: {name} has rows that its config does not name. {again}")
        values = tensors.pop(name + ROWS)
        if values.ndim != 2 or len(values) != len(ids):
            raise UserError(
                f"{path}: {name} must have {len(ids)} rows, as its config says, got shape "
                f"{list(values.shape)}. {again}"
            )
        rows[name] = (ids, values)
    return LowRankUpdate(spec, low_rank, rows, tensors, manifest.get("base", {}).get("tensors"))


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
    rows = []
    for name, update in load_update(folder).low_rank.items():
        values = singular_values(update.a, update.b) * update.scale
        rows.append(Spectrum(name, update.rank, tuple(values.tolist())))
    return rows
