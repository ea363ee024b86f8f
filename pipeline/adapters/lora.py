"""LoRA: frozen linears with a trainable low-rank update (Hu et al. 2021, §4.1; the document's §2.3 and §4)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.adapters.init import DOCUMENT_STD, initialize, principal
from pipeline.models.base import LowBitLinear, is_conv1d
from pipeline.project.params.sections import Init

FOLD_BELOW = 2**16  # weights; see LoRALinear
# PEFT's keys of an adapter's tensors, after the module's name; A's and B's are in the layers below.
MAGNITUDE = ".lora_magnitude_vector"
ROWS = ".token_adapter.trainable_tokens_delta"


def fan_in_fan_out(base: nn.Module) -> bool:
    """Whether the layer stores its weight as (I, O): Conv1D, and an embedding, whose inputs are its rows."""
    return is_conv1d(base) or isinstance(base, nn.Embedding)


def weight_of(module: nn.Module) -> Tensor:
    """A layer's weight, typed as a tensor."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def weight_out_in(base: nn.Module) -> Tensor:
    """A view of a linear's weight as (O, I)."""
    return weight_of(base).T if fan_in_fan_out(base) else weight_of(base)


def weight_in(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """W for a product in `dtype`: a quantized weight is dequantized in it, any other is returned as it is."""
    return base.weight_in(dtype) if isinstance(base, LowBitLinear) else weight_of(base)


class AdapterLayer(nn.Module):
    """A frozen layer of the base and what an adapter adds to it."""

    base: nn.Module
    enabled: bool  # False: the base only

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by PEFT's key after the module's name."""
        raise NotImplementedError


class LoRALinear(AdapterLayer):
    """A frozen linear plus a trainable update: y = Wx + b + s·BAx.

    W is (O, I), lora_A (R, I), lora_B (O, R). A small W is folded first, (W + s·BA)x, because the number of calls
    then costs more than their size; for a large one the (O, I) product is never formed.
    With PiSSA y = Wx + b + s·(BA − B₀A₀)x: the paper subtracts s·B₀A₀ from W, here W stays unchanged.
    A and B may have another dtype than W: they are cast to x's dtype, which is cheaper than casting x to theirs.
    """

    initial_A: Tensor
    neg_initial_B: Tensor

    def __init__(
        self, base: nn.Module, rank: int, scale: float, dtype: torch.dtype | None = None, init: Init = "document"
    ) -> None:
        """Raises UserError if `init` does not fit the rank."""
        super().__init__()
        self.base, self.scale = base, scale
        self.enabled = True
        weight = weight_of(base)
        outputs, inputs = reversed(weight.shape) if fan_in_fan_out(base) else weight.shape
        like = torch.empty(0, dtype=dtype or weight.dtype, device=weight.device)
        A, B = like.new_empty(rank, inputs), like.new_empty(outputs, rank)
        initialize(A, B, init)
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
        self.folds = isinstance(base, nn.Linear | LowBitLinear) and weight.numel() < FOLD_BELOW
        self.subtracts_initial = init == "pissa"  # B₀A₀ is not 0, and is subtracted in the forward
        if self.subtracts_initial:
            self._set_initial(*principal(weight_out_in(base), rank, scale))

    @torch.no_grad()
    def _set_initial(self, A: Tensor, B: Tensor) -> None:
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)
        self.register_buffer("initial_A", self.lora_A.detach().clone(), persistent=False)
        self.register_buffer("neg_initial_B", -self.lora_B.detach(), persistent=False)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {".lora_A.weight": self.lora_A, ".lora_B.weight": self.lora_B}

    def pair(self) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (O, R) of the update s·BA; with PiSSA of BA − B₀A₀, as one product of rank 2R."""
        if not self.subtracts_initial:
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


class LoRAEmbedding(AdapterLayer):
    """A frozen embedding W (V, D) plus a trainable update: W + s·(BA)ᵀ, lora_A (R, V) and lora_B (D, R)."""

    def __init__(self, base: nn.Module, rank: int, scale: float, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.base, self.scale, self.enabled = base, scale, True
        weight = weight_of(base)
        rows, width = weight.shape
        like = torch.empty(0, dtype=dtype or weight.dtype, device=weight.device)
        self.lora_A = nn.Parameter(like.new_zeros(rank, rows))
        self.lora_B = nn.Parameter(like.new_empty(width, rank).normal_(std=DOCUMENT_STD))

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {".lora_embedding_A": self.lora_A, ".lora_embedding_B": self.lora_B}

    def forward(self, tokens: Tensor) -> Tensor:
        old: Tensor = self.base(tokens)
        if not self.enabled:
            return old
        update = F.embedding(tokens, self.lora_A.T) @ self.lora_B.T * self.scale
        return old + scaled_as(self.base, update).to(old.dtype)


def scaled_as(embedding: nn.Module, rows: Tensor) -> Tensor:
    """`rows` (..., D) with the embedding's own scale: Gemma's multiplies the rows it looks up."""
    scale = getattr(embedding, "embed_scale", None)
    return rows if scale is None else rows * scale.to(rows.dtype)


def factors(layer: LoRALinear | LoRAEmbedding) -> tuple[Tensor, Tensor]:
    """Two factors, (n, R) and (R, m), whose scaled product is added to the base's weight in its stored layout."""
    pair = layer.pair() if isinstance(layer, LoRALinear) else (layer.lora_A, layer.lora_B)
    a, b = (factor.detach() for factor in pair)
    return (a.T, b.T) if fan_in_fan_out(layer.base) else (b, a)
