"""DoRA: direction and length of each output's weights train apart (Liu et al. 2024; the document's §10.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.adapters.lora import LoRALinear, weight_of, weight_out_in
from pipeline.models.quantization.quantized_linear import QuantizedLinear
from pipeline.project.params.sections import Init

LEAST = 2.0**-126  # fp32's smallest normal number: the length of a row of zeros, which has no direction


class DoRALinear(LoRALinear):
    """y = m/‖W + s·BA‖ · (W + s·BA)x + b, with a length m (O,) and a norm for each row of W, an output's weights.

    The norm follows A and B, and gets no gradient (§4.3 of the paper). Of a large W it is found without the (O, I)
    product: ‖W + s·BA‖² = ‖W‖² + 2s·⟨WAᵀ, B⟩ + s²·⟨B·AAᵀ, B⟩, row by row. m and the norm are fp32: in 16 bits m could
    not begin as the norm, and y would not begin as Wx + b.
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
            start = row_norms(self._sum(A, B)) if self.folds else self._lengths(A, B)
        self.magnitude = nn.Parameter(start)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor
        if not self.enabled:
            out = self.base(x)
            return out
        A, B = (factor.to(x.dtype) for factor in self.pair())
        out = self._folded(x, A, B) if self.folds else self._apart(x, A, B)
        return out if self.strength == 1 else torch.lerp(self.base(x), out, self.strength)

    def _folded(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        weight = self._sum(A, B)
        ratio = self.magnitude / row_norms(weight.detach())  # (O,)
        return F.linear(x, (weight * ratio[:, None]).to(x.dtype), self.base.bias)  # type: ignore[arg-type]

    def _sum(self, A: Tensor, B: Tensor) -> Tensor:
        return torch.addmm(weight_of(self.base), B, A, alpha=self.scale)

    def _apart(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # (N, I)
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        out = self.base(rows).addmm_(F.linear(rows, A), B.t(), alpha=self.scale)  # with b, which has no length
        ratio = self.magnitude / self._lengths(A, B)
        out = out * ratio if bias is None else torch.addcmul(bias * (1 - ratio), out, ratio)
        return out.to(x.dtype).view(*x.shape[:-1], -1)

    @torch.no_grad()
    def _lengths(self, A: Tensor, B: Tensor) -> Tensor:
        """‖W + s·BA‖, (O,)."""
        base = self.base
        weight = base.weight_in(A.dtype) if isinstance(base, QuantizedLinear) else weight_out_in(base).to(A.dtype)
        wide = self.squares.dtype
        across = ((weight @ A.T).to(wide) * B).sum(1)
        A, B = A.to(wide), B.to(wide)
        own = ((B @ (A @ A.T)) * B).sum(1)
        return (self.squares + 2 * self.scale * across + self.scale**2 * own).clamp_(min=0).sqrt_().clamp_(min=LEAST)


def row_norms(weight: Tensor) -> Tensor:
    """‖row‖ of a weight (O, I), (O,), in fp32 or wider, LEAST at least."""
    found: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))
    return found.clamp_(min=LEAST)
