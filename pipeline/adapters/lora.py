"""An adapter's layers: LoRA, DoRA, and embedding and head of which single rows train."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.adapters.config import FOLD_BELOW
from pipeline.errors import UserError
from pipeline.models.base import LinearUpdate, LowBitLinear, LowRankLinear, RowScale, is_conv1d
from pipeline.models.device import device_for_matrix
from pipeline.project.params.sections import Init

DOCUMENT_STD = 0.01
# fp32's smallest normal number: the norm of a row of zeros, so that nothing is divided by 0
LEAST = 2.0**-126
# PEFT's keys of an adapter's tensors, after the module's name: A and B of a linear, A and B of an
# embedding, and others
LINEAR_KEYS = (".lora_A.weight", ".lora_B.weight")
EMBEDDING_KEYS = (".lora_embedding_A", ".lora_embedding_B")
MAGNITUDE = ".lora_magnitude_vector"
ROWS = ".token_adapter.trainable_tokens_delta"


def fan_in_fan_out(base: nn.Module) -> bool:
    """Whether the layer stores its weight as (I, O): Conv1D, and an embedding, by its rows."""
    return is_conv1d(base) or isinstance(base, nn.Embedding)


def weight_of(module: nn.Module) -> Tensor:
    """A layer's weight, typed as a tensor."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def weight_like(module: nn.Module) -> Tensor:
    """A tensor of a layer's weight's shape, dtype and device; a quantized one is not dequantized."""
    return module.weight_like if isinstance(module, LowBitLinear) else weight_of(module)


def weight_out_in(base: nn.Module) -> Tensor:
    """A view of a linear's weight as (O, I)."""
    return weight_of(base).T if fan_in_fan_out(base) else weight_of(base)


def weight_in(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """A linear's weight (O, I) for a product in `dtype`; a quantized one is dequantized in it."""
    return base.weight_in(dtype) if isinstance(base, LowBitLinear) else weight_out_in(base)


class AdapterLayer(nn.Module):
    """A frozen layer of the base and what an adapter adds to it.

    Disabling an adapter, the retention loss and saving know no more of a layer than this.
    """

    enabled = True  # False: the base only

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.adapted(x) if self.enabled else self.base(x)
        return out

    def adapted(self, x: Tensor) -> Tensor:
        """What the layer computes with the adapter."""
        raise NotImplementedError

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by PEFT's key after the module's name."""
        raise NotImplementedError


class LoRALinear(AdapterLayer, LowRankLinear):
    """A frozen linear plus a trainable update: y = Wx + b + s·BAx.

    W is (O, I), lora_A (R, I), lora_B (O, R). The update of a small W is folded in, (W + s·BA)x;
    for a large one the (O, I) product is never formed. With PiSSA y = Wx + b + s·(BA − B₀A₀)x: the
    paper subtracts s·B₀A₀ from W, here W stays unchanged. Dropout, while it trains, is on the input
    of A, as in PEFT: y = Wx + b + s·BA·dropout(x); the update is then folded with PiSSA only. A
    and B may have another dtype than W: they are cast to x's dtype, which is cheaper than casting x
    to theirs.
    """

    initial_A: Tensor
    neg_initial_B: Tensor
    # while it trains: which elements of an input dropout keeps
    keep: Callable[[Tensor], Tensor | None] | None = None

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        scale: float,
        dtype: torch.dtype | None = None,
        init: Init = "document",
        dropout: float = 0.0,
    ) -> None:
        """Raises UserError if `init` does not fit the rank."""
        super().__init__(base)
        self.scale, self.dropout = scale, dropout
        weight = weight_like(base)
        outputs, inputs = reversed(weight.shape) if fan_in_fan_out(base) else weight.shape
        A, B = (weight.new_empty(size, dtype=dtype) for size in ((rank, inputs), (outputs, rank)))
        initialize(A, B, init)
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
        self.folds = isinstance(base, nn.Linear | LowBitLinear) and weight.numel() < FOLD_BELOW
        self.subtracts_initial = init == "pissa"  # B₀A₀ is not 0, and is subtracted in the forward
        self.adds_to_base = not self.subtracts_initial  # nothing of Wx is changed or subtracted
        if self.subtracts_initial:
            A_0, B_0 = principal(weight_out_in(base), rank, scale)
            A.copy_(A_0)
            B.copy_(B_0)
            self.register_buffer("initial_A", A.clone(), persistent=False)
            self.register_buffer("neg_initial_B", -B, persistent=False)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return dict(zip(LINEAR_KEYS, (self.lora_A, self.lora_B), strict=True))

    def pair(self) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (O, R) of the update s·BA; of PiSSA's BA − B₀A₀, with rank 2R."""
        if not self.subtracts_initial:
            return self.lora_A, self.lora_B
        A = torch.cat((self.lora_A, self.initial_A))  # (2R, I)
        B = torch.cat((self.lora_B, self.neg_initial_B), dim=1)  # (O, 2R)
        return A, B

    def linear_update(self) -> LinearUpdate | None:
        if not self.enabled or self.keep is not None or self.subtracts_initial:
            return None
        # not as attributes, of which a module's take half a microsecond each
        parameters: Any = self._parameters
        base = self._modules["base"]
        if type(base) is not nn.Linear and not isinstance(base, LowBitLinear):
            return None
        return LinearUpdate(base, parameters["lora_A"], parameters["lora_B"], self.scale)

    def dropped(self, x: Tensor) -> Tensor:
        """dropout(x): x itself unless it trains with dropout."""
        mask = self.keep(x) if self.keep is not None else None
        return x if mask is None else torch.where(mask, x, 0).mul_(1 / (1 - self.dropout))

    def frozen(self, x: Tensor) -> Tensor:
        """What does not train, without the bias: Wx; with PiSSA Wx − s·B₀A₀x."""
        out = F.linear(x, weight_in(self.base, x.dtype))
        if self.subtracts_initial:
            low = F.linear(x, self.initial_A.to(x.dtype))
            out = out + F.linear(low, self.neg_initial_B.to(x.dtype)) * self.scale
        return out

    def adapted(self, x: Tensor) -> Tensor:
        dropped = self.dropped(x)
        if dropped is x:
            return self.updated(x)
        if self.adds_to_base:
            return self._add_update(x, dropped)
        # the update of `dropped`, and what does not train of x: `updated` is linear in its input
        return self.updated(dropped) + self.frozen(x - dropped)

    def updated(self, x: Tensor) -> Tensor:
        """(W + s·BA)x + b, without dropout."""
        if not self.folds:
            return self._add_update(x, x)
        A, B = self.pair()
        frozen = weight_in(self.base, x.dtype)
        weight = torch.addmm(frozen, B.to(x.dtype), A.to(x.dtype), alpha=self.scale)  # (O, I)
        return F.linear(x, weight, self.base.bias)  # type: ignore[arg-type]

    def _add_update(self, x: Tensor, dropped: Tensor) -> Tensor:
        A, B = (factor.to(x.dtype) for factor in self.pair())  # (R, I), (O, R)
        out: Tensor = self.base(x.flatten(0, -2))  # (N, O)
        low = F.linear(dropped.flatten(0, -2), A)  # (N, R)
        out.addmm_(low, B.t(), alpha=self.scale)  # in place: no second (N, O)
        return out.view(*x.shape[:-1], -1)


class LoRAEmbedding(AdapterLayer):
    """A frozen embedding W (V, D) plus a trainable update: W + s·(BA)ᵀ.

    lora_A is (R, V), lora_B (D, R).
    """

    def __init__(
        self, base: nn.Module, rank: int, scale: float, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(base)
        self.scale = scale
        weight = weight_of(base)
        rows, width = weight.shape
        # of an embedding PEFT starts A with zeros, not B
        self.lora_A = nn.Parameter(weight.new_zeros((rank, rows), dtype=dtype))
        B = weight.new_empty((width, rank), dtype=dtype)
        self.lora_B = nn.Parameter(B.normal_(std=DOCUMENT_STD))

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return dict(zip(EMBEDDING_KEYS, (self.lora_A, self.lora_B), strict=True))

    def adapted(self, tokens: Tensor) -> Tensor:
        old: Tensor = self.base(tokens)
        # (B, T, R) → (B, T, D)
        update = F.embedding(tokens, self.lora_A.T) @ self.lora_B.T * self.scale
        return old + scaled_as(self.base, update).to(old.dtype)


class DoRALinear(LoRALinear):
    """y = m/‖W + s·BA‖ · (W + s·BA)x + b, with a magnitude m (O,) and the norm of each row.

    The norm follows A and B and has no gradient (DoRA, Liu et al. 2024, section 4.3). For a large W
    it is computed without the (O, I) product: ‖W + s·BA‖² = ‖W‖² + 2s·⟨WAᵀ, B⟩ + s²·⟨B·AAᵀ, B⟩, row
    by row. m and the norm are fp32: in 16 bits m would be rounded, and y would not start at Wx + b.
    """

    squares: Tensor

    def __init__(self, base: nn.Module, *settings: Any, **options: Any) -> None:
        """As LoRALinear."""
        super().__init__(base, *settings, **options)
        self.adds_to_base = False  # rows of W are rescaled
        self.strength = 1.0  # W + strength · (W' − W): the update is not linear in its scale
        # the optimizer's copy of A, its number of updates, and what `_norms_of_step` returned then
        self._step: tuple[Any, ...] = (None, 0)
        # ‖W‖², (O,)
        self.register_buffer("squares", row_norms(weight_out_in(base)).square(), persistent=False)
        with torch.no_grad():
            A, B = (factor.to(weight_of(base).dtype) for factor in self.pair())
            norms = row_norms(self._updated_weight(A, B)) if self.folds else self._norms(A, B)
        self.magnitude = nn.Parameter(norms)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {**super().adapter_parameters(), MAGNITUDE: self.magnitude}

    def updated(self, x: Tensor) -> Tensor:
        A, B = (factor.to(x.dtype) for factor in self.pair())
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        if self.folds:
            weight = self._updated_weight(A, B)  # (O, I)
            ratio = self.magnitude / row_norms(weight.detach())  # (O,)
            out = F.linear(x, (weight * ratio[:, None]).to(x.dtype), bias)
        else:
            rows = x.flatten(0, -2)  # (N, I)
            # (N, O), b included
            out = self.base(rows).addmm_(F.linear(rows, A), B.t(), alpha=self.scale)
            ratio = self.magnitude / self._norms(A, B)
            # b is not scaled
            out = out * ratio if bias is None else torch.addcmul(bias * (1 - ratio), out, ratio)
            out = out.to(x.dtype).view(*x.shape[:-1], -1)
        return out if self.strength == 1 else torch.lerp(self.base(x), out, self.strength)

    def linear_update(self) -> None:
        """None: magnitude and norm make it more than W and two factors."""

    def row_scale(self) -> tuple[LinearUpdate, RowScale] | None:
        update = super().linear_update()
        if update is None or self.folds or self.strength != 1:
            return None
        return update, RowScale(self.magnitude, *self._norms_of_step())

    @torch.no_grad()
    def _norms_of_step(self) -> tuple[Tensor, Tensor]:
        """‖W + s·BA‖ and m/‖W + s·BA‖, (O,) each.

        Computed once for all batches between two updates, if the optimizer keeps copies of A and B.
        """
        A, B = (getattr(factor, "in_16_bits", factor) for factor in (self.lora_A, self.lora_B))
        copied, version, *found = self._step
        if copied is not A or version != A._version:
            norms = self._norms(A, B)
            found = [norms, self.magnitude / norms]
            # without a copy nothing tells of updates
            self._step = (None if A is self.lora_A else A, A._version, *found)
        return found[0], found[1]

    def _updated_weight(self, A: Tensor, B: Tensor) -> Tensor:
        """W + s·BA, (O, I)."""
        return torch.addmm(weight_of(self.base), B, A, alpha=self.scale)

    @torch.no_grad()
    def _norms(self, A: Tensor, B: Tensor) -> Tensor:
        """‖W + s·BA‖, (O,)."""
        weight = weight_in(self.base, A.dtype).to(A.dtype)  # (O, I)
        wide = self.squares.dtype
        cross = ((weight @ A.T).to(wide) * B).sum(1)  # ⟨WAᵀ, B⟩, (O,)
        A, B = A.to(wide), B.to(wide)
        square = ((B @ (A @ A.T)) * B).sum(1)  # ⟨B·AAᵀ, B⟩, (O,)
        total = self.squares + 2 * self.scale * cross + self.scale**2 * square
        # rounding may leave a small negative square
        return total.clamp_(min=0).sqrt_().clamp_(min=LEAST)


class TokenRows(AdapterLayer):
    """An embedding or head of which single `rows` (n, D) train; its table is frozen."""

    def __init__(self, base: nn.Module, rows: nn.Parameter) -> None:
        super().__init__(base)
        self.rows = rows

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {ROWS: self.rows}


class EmbeddingRows(TokenRows):
    """An embedding whose rows `ids` (n,) are replaced by `rows`."""

    slot: Tensor

    def __init__(self, base: nn.Module, ids: Tensor, rows: nn.Parameter) -> None:
        super().__init__(base, rows)
        # (V,): index into `rows`, or -1
        slot = torch.full((len(weight_of(base)),), -1, device=ids.device)
        slot[ids] = torch.arange(len(ids), device=ids.device)
        self.register_buffer("slot", slot, persistent=False)

    def adapted(self, tokens: Tensor) -> Tensor:
        old: Tensor = self.base(tokens)  # (B, T, D)
        slot = self.slot[tokens]  # (B, T)
        new = F.embedding(slot.clamp(min=0), self.rows)  # (B, T, D); not used for other tokens
        new = scaled_as(self.base, new).to(old.dtype)
        return torch.where((slot >= 0)[..., None], new, old)


class HeadRows(TokenRows):
    """A head whose rows `ids` (n,) are replaced by `rows`."""

    ids: Tensor

    def __init__(self, base: nn.Module, ids: Tensor, rows: nn.Parameter) -> None:
        super().__init__(base, rows)
        self.register_buffer("ids", ids, persistent=False)

    def adapted(self, x: Tensor) -> Tensor:
        logits: Tensor = self.base(x)  # (B, T, V)
        bias = self.base.bias
        own_bias = None if bias is None else bias[self.ids]  # type: ignore[index]
        new = F.linear(x, self.rows.to(x.dtype), own_bias)  # (B, T, n)
        return logits.index_copy(-1, self.ids, new)


def initialize(A: Tensor, B: Tensor, init: Init) -> None:
    """Fill A (R, I) and B (O, R) in place so that BA = 0: training starts from the base.

    `init` has PEFT's names. pissa gets zeros here; `principal` then needs the weight. Raises
    UserError for orthogonal with an odd rank.
    """
    if A.is_meta:  # meta tensors hold no numbers
        return
    rank = A.shape[0]
    if init == "orthogonal":
        # A = PᵀX/10 and B = YQ/10 for the even rows P and the odd rows Q of one orthogonal matrix
        # (R, R), X (R/2, I) and Y (O, R/2) normal: neither is zero, and still BA = Y(QPᵀ)X/100 = 0
        # up to rounding.
        if rank % 2:
            raise UserError(
                f"finetune_lora.init_lora_weights orthogonal needs an even rank, got {rank}. "
                "Increase finetune_lora.rank, or its rank_pattern, by one."
            )
        orthogonal = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64)).Q
        X, Y = torch.randn(rank // 2, A.shape[1]), torch.randn(B.shape[0], rank // 2)
        A.copy_(orthogonal[0::2].T @ X.double() / 10)
        B.copy_(Y.double() @ orthogonal[1::2] / 10)
        return
    B.zero_()
    if init == "kaiming":  # uniform in ±1/√I (He et al. 2015 with a = √5): PEFT's default
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    elif init == "pissa":
        A.zero_()
    else:
        A.normal_(std=1 / rank if init == "gaussian" else DOCUMENT_STD)


def principal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) with s·BA = the best approximation of `weight` of rank R.

    The square root of each singular value goes to A and to B (PiSSA, Meng et al. 2024, section 3).

    Raises UserError if the weight has fewer than R singular values.
    """
    most = min(weight.shape)
    if rank > most:
        raise UserError(
            f"finetune_lora.init_lora_weights pissa takes {rank} singular values of a weight that "
            f"has {most}. Set finetune_lora.rank to {most} at most."
        )
    device = weight.device if weight.is_meta else device_for_matrix(weight.numel())
    wide = weight.detach().to(device, torch.float64)
    left, values, right = torch.linalg.svd(wide, full_matrices=False)
    root = (values[:rank] / scale).sqrt()  # (R,), on each side: √(σ/s)·√(σ/s)·s = σ
    return root[:, None] * right[:rank], left[:, :rank] * root


def row_norms(weight: Tensor) -> Tensor:
    """‖row‖, (O,), of a weight (O, I), in fp32 or wider, at least LEAST."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=wide)
    return norms.clamp_(min=LEAST)


def scaled_as(embedding: nn.Module, rows: Tensor) -> Tensor:
    """`rows` (..., D) with the embedding's own scale: Gemma's multiplies the rows it looks up."""
    scale = getattr(embedding, "embed_scale", None)
    return rows if scale is None else rows * scale.to(rows.dtype)


def factors(layer: LoRALinear | LoRAEmbedding) -> tuple[Tensor, Tensor]:
    """Two factors, (n, R) and (R, m), whose scaled product is added to the stored weight."""
    pair = layer.pair() if isinstance(layer, LoRALinear) else (layer.lora_A, layer.lora_B)
    a, b = (factor.detach() for factor in pair)
    return (a.T, b.T) if fan_in_fan_out(layer.base) else (b, a)
