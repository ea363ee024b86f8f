"""LoRA: frozen linears with a trainable low-rank update (Hu et al. 2021, §4.1; the document's §2.3 and §4)."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.01  # of A; B starts at zero, so that training starts from the base (the document's §4.1)
FOLD_BELOW = 2**16  # weights; see LoRALinear


def transposed(base: nn.Module) -> bool:
    """Whether the layer stores its weight as (I, O), as GPT-2's Conv1D does."""
    return type(base).__name__ == "Conv1D"


def weight_of(module: nn.Module) -> Tensor:
    """A layer's weight, as the tensor that it is."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


class LoRALinear(nn.Module):
    """A frozen linear plus a trainable update: y = Wx + b + s·BAx.

    W is (O, I), lora_A (R, I), lora_B (O, R). A small W is folded first, (W + s·BA)x, because there the
    number of operations costs more than their size; a large one never forms the (O, I) product.
    A and B may have another dtype than W: they are cast to x's, which is far smaller than x cast to theirs.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.base, self.rank, self.alpha = base, rank, alpha
        self.enabled = True  # off: the base alone
        weight = weight_of(base)
        outputs, inputs = reversed(weight.shape) if transposed(base) else weight.shape
        like = torch.empty(0, dtype=dtype or weight.dtype, device=weight.device)
        self.lora_A = nn.Parameter(like.new_empty(rank, inputs).normal_(std=INIT_STD))
        self.lora_B = nn.Parameter(like.new_zeros(outputs, rank))
        self.folds = weight.numel() < FOLD_BELOW and not transposed(base)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor
        if not self.enabled:
            out = self.base(x)
            return out
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        if self.folds:
            weight = torch.addmm(weight_of(self.base), B, A, alpha=self.scale)
            return F.linear(x, weight, self.base.bias)  # type: ignore[arg-type]
        rows = x.flatten(0, -2)  # (N, I)
        out = self.base(rows).addmm_(F.linear(rows, A), B.t(), alpha=self.scale)  # no second (N, O)
        return out.view(*x.shape[:-1], -1)


def delta(layer: LoRALinear) -> Tensor:
    """s·BA, (O, I), in fp32."""
    return layer.scale * (layer.lora_B.float() @ layer.lora_A.float())


def merged(layer: LoRALinear) -> nn.Module:
    """W + s·BA as a new plain layer of the base's kind; `layer` is untouched (the document's §4.4).

    The sum is taken in fp32 and rounded once, to the base's precision.
    """
    plain = copy.copy(layer.base)  # a new module; what it holds is replaced, not written to
    plain._parameters = dict(layer.base._parameters)
    with torch.no_grad():
        update = delta(layer).float()
        update = update.T if transposed(layer.base) else update
        weight = (weight_of(layer.base).float() + update).to(weight_of(layer.base).dtype)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    return plain
