"""DoRA: direction and magnitude of each output's weights train separately (Liu et al. 2024; the document's §10.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.adapters.lora import MAGNITUDE, LoRALinear, weight_of, weight_out_in
from pipeline.models.base import LowBitLinear
from pipeline.project.params.sections import Init

LEAST = 2.0**-126  # fp32's smallest normal number: the norm of a row of zeros, so that nothing is divided by 0


class DoRALinear(LoRALinear):
    """y = m/‖W + s·BA‖ · (W + s·BA)x + b, with a magnitude m (O,) and the norm of each row of W + s·BA.

    The norm follows A and B and has no gradient (§4.3 of the paper). For a large W it is computed without the (O, I)
    product: ‖W + s·BA‖² = ‖W‖² + 2s·⟨WAᵀ, B⟩ + s²·⟨B·AAᵀ, B⟩, row by row. m and the norm are fp32: in 16 bits m would
    be rounded, and y would not start at Wx + b.
    """

    squares: Tensor

    def __init__(
        self, base: nn.Module, rank: int, scale: float, dtype: torch.dtype | None = None, init: Init = "document"
    ) -> None:
        super().__init__(base, rank, scale, dtype, init)
        self.strength = 1.0  # W + strength · (W' − W): the update is not linear in its scale
        self.register_buffer("squares", row_norms(weight_out_in(base)).square(), persistent=False)  # ‖W‖², (O,)
        with torch.no_grad():
            A, B = (factor.to(weight_of(base).dtype) for factor in self.pair())
            norms = row_norms(self._updated_weight(A, B)) if self.folds else self._norms(A, B)
        self.magnitude = nn.Parameter(norms)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {**super().adapter_parameters(), MAGNITUDE: self.magnitude}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor
        if not self.enabled:
            out = self.base(x)
            return out
        A, B = (factor.to(x.dtype) for factor in self.pair())
        out = self._forward_folded(x, A, B) if self.folds else self._forward_factored(x, A, B)
        return out if self.strength == 1 else torch.lerp(self.base(x), out, self.strength)

    def _forward_folded(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        weight = self._updated_weight(A, B)
        ratio = self.magnitude / row_norms(weight.detach())  # (O,)
        return F.linear(x, (weight * ratio[:, None]).to(x.dtype), self.base.bias)  # type: ignore[arg-type]

    def _updated_weight(self, A: Tensor, B: Tensor) -> Tensor:
        """W + s·BA, (O, I)."""
        return torch.addmm(weight_of(self.base), B, A, alpha=self.scale)

    def _forward_factored(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # (N, I)
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        out = self.base(rows).addmm_(F.linear(rows, A), B.t(), alpha=self.scale)  # (N, O), b included
        ratio = self.magnitude / self._norms(A, B)
        out = out * ratio if bias is None else torch.addcmul(bias * (1 - ratio), out, ratio)  # b is not scaled
        return out.to(x.dtype).view(*x.shape[:-1], -1)

    @torch.no_grad()
    def _norms(self, A: Tensor, B: Tensor) -> Tensor:
        """‖W + s·BA‖, (O,)."""
        base = self.base
        weight = base.weight_in(A.dtype) if isinstance(base, LowBitLinear) else weight_out_in(base).to(A.dtype)
        wide = self.squares.dtype
        cross = ((weight @ A.T).to(wide) * B).sum(1)  # ⟨WAᵀ, B⟩, (O,)
        A, B = A.to(wide), B.to(wide)
        square = ((B @ (A @ A.T)) * B).sum(1)  # ⟨B·AAᵀ, B⟩, (O,)
        return (self.squares + 2 * self.scale * cross + self.scale**2 * square).clamp_(min=0).sqrt_().clamp_(min=LEAST)


def row_norms(weight: Tensor) -> Tensor:
    """‖row‖ of a weight (O, I), (O,), in fp32 or wider, at least LEAST."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))
    return norms.clamp_(min=LEAST)
