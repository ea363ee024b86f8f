"""LoRA: frozen linears with a trainable low-rank update (Hu et al. 2021, §4.1; the document's §2.3 and §4)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.adapters.init import DOCUMENT_STD, initialize, principal
from pipeline.models.linears import is_conv1d
from pipeline.models.quantization.quantized_linear import QuantizedLinear
from pipeline.project.params.sections import Init

FOLD_BELOW = 2**16  # weights; see LoRALinear


def fan_in_fan_out(base: nn.Module) -> bool:
    """Whether the layer stores its weight as (I, O): Conv1D, and an embedding, whose inputs are its rows."""
    return is_conv1d(base) or isinstance(base, nn.Embedding)


def weight_of(module: nn.Module) -> Tensor:
    """A layer's weight, as the tensor that it is."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def weight_out_in(base: nn.Module) -> Tensor:
    """A linear's weight as (O, I), a view of it."""
    return weight_of(base).T if fan_in_fan_out(base) else weight_of(base)


def weight_in(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """W for a product in `dtype`: made in it where it is kept in few bits, else as it is."""
    return base.weight_in(dtype) if isinstance(base, QuantizedLinear) else weight_of(base)


class LoRALinear(nn.Module):
    """A frozen linear plus a trainable update: y = Wx + b + s·BAx.

    W is (O, I), lora_A (R, I), lora_B (O, R). A small W is folded first, (W + s·BA)x, because there the
    number of operations costs more than their size; a large one never forms the (O, I) product.
    With PiSSA y = Wx + b + s·(BA − B₀A₀)x: the paper takes s·B₀A₀ out of W, here W stays as it is.
    A and B may have another dtype than W: they are cast to x's, which is far smaller than x cast to theirs.
    """

    initial_A: Tensor
    neg_initial_B: Tensor

    def __init__(
        self, base: nn.Module, rank: int, scale: float, dtype: torch.dtype | None = None, init: Init = "document"
    ) -> None:
        """Raises UserError where `init` does not fit the rank."""
        super().__init__()
        self.base, self.scale = base, scale
        self.enabled = True  # off: the base alone
        weight = weight_of(base)
        outputs, inputs = reversed(weight.shape) if fan_in_fan_out(base) else weight.shape
        like = torch.empty(0, dtype=dtype or weight.dtype, device=weight.device)
        A, B = like.new_empty(rank, inputs), like.new_empty(outputs, rank)
        initialize(A, B, init)
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
        self.folds = isinstance(base, nn.Linear | QuantizedLinear) and weight.numel() < FOLD_BELOW
        self.moved = init == "pissa"  # A and B begin elsewhere than at BA = 0: where, is taken away again
        if self.moved:
            self._begin_at(*principal(weight_out_in(base), rank, scale))

    @torch.no_grad()
    def _begin_at(self, A: Tensor, B: Tensor) -> None:
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)
        self.register_buffer("initial_A", self.lora_A.detach().clone(), persistent=False)
        self.register_buffer("neg_initial_B", -self.lora_B.detach(), persistent=False)

    def pair(self) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (O, R) of the update s·BA; with PiSSA BA − B₀A₀, in one product of rank 2R."""
        if not self.moved:
            return self.lora_A, self.lora_B
        return torch.cat((self.lora_A, self.initial_A)), torch.cat((self.lora_B, self.neg_initial_B), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor
        if not self.enabled:
            out = self.base(x)
            return out
        A, B = self.pair()
        A, B = A.to(x.dtype), B.to(x.dtype)
        if self.folds:
            weight = torch.addmm(weight_in(self.base, x.dtype), B, A, alpha=self.scale)
            return F.linear(x, weight, self.base.bias)  # type: ignore[arg-type]
        rows = x.flatten(0, -2)  # (N, I)
        out = self.base(rows).addmm_(F.linear(rows, A), B.t(), alpha=self.scale)  # no second (N, O)
        return out.view(*x.shape[:-1], -1)


class LoRAEmbedding(nn.Module):
    """A frozen embedding W (V, D) plus a trainable update: W + s·(BA)ᵀ, lora_A (R, V) and lora_B (D, R)."""

    def __init__(self, base: nn.Module, rank: int, scale: float, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.base, self.scale, self.enabled = base, scale, True
        weight = weight_of(base)
        rows, width = weight.shape
        like = torch.empty(0, dtype=dtype or weight.dtype, device=weight.device)
        self.lora_A = nn.Parameter(like.new_zeros(rank, rows))
        self.lora_B = nn.Parameter(like.new_empty(width, rank).normal_(std=DOCUMENT_STD))

    def forward(self, tokens: Tensor) -> Tensor:
        old: Tensor = self.base(tokens)
        if not self.enabled:
            return old
        update = F.embedding(tokens, self.lora_A.T) @ self.lora_B.T * self.scale
        return old + scaled_as(self.base, update).to(old.dtype)


def scaled_as(embedding: nn.Module, rows: Tensor) -> Tensor:
    """`rows` as the embedding gives them out: Gemma's multiplies what it looks up."""
    scale = getattr(embedding, "embed_scale", None)
    return rows if scale is None else rows * scale.to(rows.dtype)


def factors(layer: LoRALinear | LoRAEmbedding) -> tuple[Tensor, Tensor]:
    """Two whose product, scaled, is added to the base's weight as it is stored: (n, R) and (R, m)."""
    pair = layer.pair() if isinstance(layer, LoRALinear) else (layer.lora_A, layer.lora_B)
    a, b = (factor.detach() for factor in pair)
    return (a.T, b.T) if fan_in_fan_out(layer.base) else (b, a)
