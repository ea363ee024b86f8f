"""LoRA: frozen linears with a trainable low-rank update (Hu et al. 2021, §4.1; the document's §2.3 and §4)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.01  # of A; B starts at zero, so that training starts from the base (the document's §4.1)
FOLD_BELOW = 2**16  # weights; see LoRALinear


class LoRALinear(nn.Module):
    """A frozen linear plus a trainable update: y = Wx + b + s·BAx.

    W is (O, I), lora_A (R, I), lora_B (O, R). A small W is folded first, (W + s·BA)x, because there the
    number of operations costs more than their size; a large one never forms the (O, I) product.
    A and B may have another dtype than W: they are cast to x's, which is far smaller than x cast to theirs.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.base, self.rank, self.alpha = base, rank, alpha
        like = torch.empty(0, dtype=dtype or base.weight.dtype, device=base.weight.device)
        self.lora_A = nn.Parameter(like.new_empty(rank, base.in_features).normal_(std=INIT_STD))
        self.lora_B = nn.Parameter(like.new_zeros(base.out_features, rank))
        self.folds = base.weight.numel() < FOLD_BELOW

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        if self.folds:
            return F.linear(x, torch.addmm(self.base.weight, B, A, alpha=self.scale), self.base.bias)
        out: Tensor = self.base(x) + F.linear(F.linear(x, A) * self.scale, B)
        return out


def delta(layer: LoRALinear) -> Tensor:
    """s·BA, (O, I)."""
    return layer.scale * (layer.lora_B @ layer.lora_A)


def merged(layer: LoRALinear) -> nn.Linear:
    """W + s·BA as a new plain linear; `layer` is untouched (the document's §4.4)."""
    base = layer.base
    plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device=base.weight.device)
    with torch.no_grad():
        plain.weight.copy_(base.weight + delta(layer))
        if base.bias is not None:
            plain.bias.copy_(base.bias)
    return plain
