"""ΔW = s·BA in factored form: norms, singular values and singular vectors without the product."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """s·BA with A (R, I) and B (O, R); an embedding's inputs are its rows."""

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


def squared_norm(b: Tensor, a: Tensor, scale: float) -> float:
    """‖s·BA‖² for B (O, R) and A (R, I), without the (O, I) product: trace of BᵀB·AAᵀ."""
    b, a = b.double(), a.double()
    return scale**2 * float(((b.T @ b) * (a @ a.T)).sum())


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Singular values of BA, largest first, for A (R, I) and B (O, R), without the (O, I) product.

    With the QR decompositions B = QS and Aᵀ = PT, BA = Q(STᵀ)Pᵀ has the singular values of the small STᵀ.
    """
    s = torch.linalg.qr(b.double()).R  # (min(O, R), R)
    t = torch.linalg.qr(a.double().T).R  # (min(I, R), R)
    values: Tensor = torch.linalg.svdvals(s @ t.T)
    return values


def directions(update: LowRank) -> tuple[Tensor, Tensor]:
    """Left (O, k) and right (I, k) singular vectors of s·BA, largest singular value first; k = min(O, I, R)."""
    q, s = torch.linalg.qr(update.b.double())
    p, t = torch.linalg.qr(update.a.double().T)
    left, _, right = torch.linalg.svd(s @ t.T)
    count = min(update.rank, *left.shape, *right.shape)
    return (q @ left)[:, :count], (p @ right.T)[:, :count]
