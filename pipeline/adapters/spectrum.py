"""The singular values of an adapter's updates: how much of each rank it uses (the document's §2.3)."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline import artifact
from pipeline.adapters.attach import PREFIX
from pipeline.adapters.peft_format import read_spec, read_tensors
from pipeline.binding import WEIGHTS
from pipeline.errors import UserError

A, B = ".lora_A.weight", ".lora_B.weight"


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
    if (folder / artifact.MANIFEST).exists():
        artifact.verify(folder)
    spec = read_spec(folder)
    tensors = read_tensors(folder)
    found = []
    for key in sorted((key for key in tensors if key.endswith(A)), key=_in_order):
        a, b = tensors[key], tensors.get(key.removesuffix(A) + B)
        if b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise UserError(f"{folder / WEIGHTS}: {key} has no lora_B of its rank. Make the adapter again.")
        values = singular_values(a, b) * (spec.alpha / spec.rank)
        name = key.removeprefix(PREFIX).removesuffix(A)
        found.append(Spectrum(name, a.shape[0], tuple(values.tolist())))
    return found


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Those of BA, largest first, A (R, I) and B (O, R), without the (O, I) product.

    With B = QS and Aᵀ = PT, BA = Q(STᵀ)Pᵀ has the singular values of the small STᵀ.
    """
    s = torch.linalg.qr(b.double()).R  # (min(O, R), R)
    t = torch.linalg.qr(a.double().T).R  # (min(I, R), R)
    values: Tensor = torch.linalg.svdvals(s @ t.T)
    return values


def _in_order(name: str) -> str:
    """Layer 10 after layer 9."""
    return ".".join(part.zfill(6) for part in name.split("."))
