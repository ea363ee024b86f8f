"""The singular values of an adapter's updates: how much of each rank it uses (the document's §2.3)."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.adapters.change import read_change


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
