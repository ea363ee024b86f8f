"""Training of Llama's blocks in bf16 on the CPU: few passes over memory between products.

Queries, keys and values share one product with the stacked A of their adapters, the gradients of
what shares an input are added inside the products, rotation, SwiGLU and the norm of a residual sum
are one pass each (native.c). A LoRA step of SmolLM2-135M, 8 sequences of 12 to 300 tokens, takes
1/1.24 of the time together with native.c's attention and cross-entropy (CPU seconds of one thread,
in turns, on a busy machine). Copies of the weights in oneDNN's own layout would make the products 3
to 5% faster for twice the memory of the base: they are not made.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.base import CausalLM, LowRankLinear
from pipeline.models.kernels import has_hooks, random_tensors
from pipeline.models.kernels.decode import AGREEMENT, has_llama_parts, window_of
from pipeline.models.kernels.native import call, supports
from pipeline.models.kernels.packed_attention import attend
from pipeline.models.kernels.rms_norm import RMSNorm
from pipeline.models.kernels.short_attention import NATIVE_LANES
from pipeline.project.probes import PLAIN, attempt

# options of the block's own forward only
ALONE = ("cache", "past_key_values", "attention_mask")


class TrainingBlock(nn.Module):
    """A block of Llama with a faster forward: on a CPU for training, elsewhere for answers too.

    It stands before the block's own class, whose forward computes the rest. After its attention the
    last block computes only the rows that carry a label: (1, n, D) for an index (n,).
    """

    is_last = False

    def forward(
        self, x: Tensor, *others: Any, labelled: Tensor | None = None, **options: Any
    ) -> Tensor:
        if others or not self._supports(x, options):
            out: Tensor = super().forward(x, *others, **options)
            return out
        attention: Any = self.self_attn
        mlp: Any = self.mlp
        first_norm: Any = self.input_layernorm
        B, T, _ = x.shape
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (
            y.view(B, T, -1, attention.head_dim) for y in self.linears(first_norm(x), projections)
        )
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k = self.rotate(q, k, *options["position_embeddings"])
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, T, K)
        given = {key: options[key] for key in ("segments", "prefix", "past") if key in options}
        # (B, T, H, K)
        attended, _ = attend(attention, q, k, v, None, scaling=attention.scaling, **given)
        attended = attended.view(B, T, -1)
        if self.is_last and labelled is not None:
            later = (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
            if all(self.takes_rows(module) for module in later):
                attended, x = (
                    rows.flatten(0, 1).index_select(0, labelled)[None] for rows in (attended, x)
                )
        (out,) = self.linears(attended, (attention.o_proj,))
        x, normed = self.norm_of_sum(x, out)
        gate, up = self.linears(normed, (mlp.gate_proj, mlp.up_proj))
        (out,) = self.linears(self.gated(gate, up), (mlp.down_proj,))
        return out.add_(x)

    # what differs on an accelerator: accelerator/block.py

    def linears(self, x: Tensor, modules: Sequence[nn.Module]) -> Sequence[Tensor]:
        """The outputs (B, T, O) of linears with the same x (B, T, I)."""
        return linears(x, modules)

    def takes_rows(self, module: nn.Module) -> bool:
        """Whether the linear can be given some of the rows only."""
        return _terms(module) is not None

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Sequence[Tensor]:
        """q and k (B, T, heads, K) turned to their positions."""
        turned: Sequence[Tensor] = _Rotary.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
        return turned

    def norm_of_sum(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """x + added, and what the feed-forward gets of it."""
        norm = self.post_attention_layernorm
        assert isinstance(norm, RMSNorm)
        return norm.of_sum(x, added)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate)·up."""
        if not supports(gate, up):
            return F.silu(gate) * up
        product: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
        return product

    def _supports(self, x: Tensor, options: dict[str, Any]) -> bool:
        if not self.training or any(options.get(key) is not None for key in ALONE):
            return False
        cos, _ = options["position_embeddings"]
        whole_heads = cos.shape[-1] == self.self_attn.head_dim  # type: ignore[union-attr]
        return supports(x) and supports(cos, lanes=NATIVE_LANES) and bool(whole_heads)


@torch.no_grad()
def fuse_llama_blocks(model: CausalLM) -> int:
    """Replaces in place the forward of each block that then computes the same.

    Returns the number of these blocks. Names, parameters and state_dict stay.
    """
    probe = torch.linspace(-4, 4, 33)
    blocks = list[nn.Module]()
    for block in model.blocks:
        if isinstance(block, TrainingBlock) or not has_llama_parts(block):
            continue
        if window_of(block.self_attn) is None:  # its attention would not hide keys
            # compared without its block, which may read it near 0 only: there GELU is much the same
            act: Any = block.get_submodule("mlp").act_fn
            if torch.allclose(act(probe), F.silu(probe)):
                blocks.append(block)
    norms = [block.get_submodule("post_attention_layernorm") for block in blocks]
    if not blocks or not all(isinstance(norm, RMSNorm) and supports(norm.weight) for norm in norms):
        return 0
    options = dict[nn.Module, dict[str, Any]]()  # of a block's forward, for two packed sequences
    hooks = [
        block.register_forward_pre_hook(
            lambda block, _, given: options.update({block: given}), with_kwargs=True
        )
        for block in blocks
    ]
    was_training = model.training
    model.train()  # a block's faster forward is for training only
    try:
        ids = torch.arange(7)[None] % model.shape.rows
        segments = [4, 3] if model.supports_packing else None
        model.run_body(ids, torch.tensor([[0, 1, 2, 3, 0, 1, 2]]), segments)
        for hook in hooks:
            hook.remove()
        replaced = [block for block in blocks if _replace(block, options[block])]
        for block in replaced:
            block.is_last = block is model.blocks[-1]  # type: ignore[assignment]
        return len(replaced)
    finally:
        model.train(was_training)


def _replace(block: nn.Module, options: dict[str, Any]) -> bool:
    """Give the block its faster forward if both do the same to a random input; whether they do."""
    width = len(block.post_attention_layernorm.weight)  # type: ignore[union-attr, arg-type]
    # small: its size does not change what the block adds, but how far bf16 rounds the sum of both
    (x,) = random_tensors((1, 7, width))
    x = x.mul_(2**-8).to(torch.bfloat16)
    expected = block(x, **options).float() - x.float()
    kind = type(block)
    block.__class__ = _with_training_forward(kind)  # type: ignore[arg-type]  # mypy: a class has no hash
    added = attempt(
        f"the fused {kind.__name__}", PLAIN, lambda: block(x, **options).float() - x.float()
    )
    if added is not None and bool((added - expected).norm() <= AGREEMENT * expected.norm()):
        return True
    block.__class__ = kind
    return False


@cache  # a class per kind of block
def _with_training_forward(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (TrainingBlock, kind), {})


def linears(x: Tensor, modules: Sequence[nn.Module]) -> Sequence[Tensor]:
    """The outputs of linears with the same x (B, T, I), with or without LoRA.

    If all are frozen, one autograd function computes them.
    """
    terms = []
    for module in modules:
        term = _terms(module)
        if term is None:
            return [linear(x) for linear in modules]
        terms.append(term)
    bases, As, Bs, scales = zip(*terms, strict=True)
    parameters = (*(base.weight for base in bases), *(base.bias for base in bases), *As, *Bs)
    outs: Sequence[Tensor] = _Linears.apply(x, scales, *parameters)  # type: ignore[no-untyped-call]
    return outs


def _terms(module: nn.Module) -> tuple[nn.Linear, Tensor | None, Tensor | None, float] | None:
    """A frozen linear, A, B and s; None if the module computes anything else."""
    term: tuple[nn.Linear, Tensor | None, Tensor | None, float] | None = None
    if isinstance(module, LowRankLinear):
        update = module.linear_update()
        if update is not None and update.A.dim() == 2 and type(update.base) is nn.Linear:
            term = update.base, update.A, update.B, update.scale  # of one adapter
    elif type(module) is nn.Linear:
        term = module, None, None, 1.0
    if term is None or has_hooks(module) or has_hooks(term[0]):
        return None
    is_frozen = not any(p.requires_grad for p in term[0].parameters())
    return term if is_frozen and supports(term[0].weight, lanes=1) else None


class _Linears(torch.autograd.Function):
    """Wᵢx + bᵢ + sᵢ·BᵢAᵢx of n linears with the same x (B, T, I); A and B may be missing."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: Sequence[float], *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        n = len(scales)
        weights, biases, As, Bs = (parameters[start : start + n] for start in range(0, 4 * n, n))
        rows = x.flatten(0, -2)  # (N, I)
        outs = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]  # type: ignore[arg-type]
        adapted = [i for i in range(n) if As[i] is not None]
        ctx.scales, ctx.adapted, ctx.shape = scales, adapted, x.shape
        saved = list[Tensor]()
        if adapted:
            A = torch.cat([As[i].to(x.dtype) for i in adapted])  # type: ignore[union-attr]  # (ΣR, I)
            low = F.linear(rows, A)  # (N, ΣR)
            ctx.ranks = [len(As[i]) for i in adapted]  # type: ignore[arg-type]
            ctx.dtypes = [(As[i].dtype, Bs[i].dtype) for i in adapted]  # type: ignore[union-attr]
            narrow = [Bs[i].to(x.dtype) for i in adapted]  # type: ignore[union-attr]
            for i, B, part in zip(adapted, narrow, low.split(ctx.ranks, 1), strict=True):  # type: ignore[no-untyped-call]
                outs[i].view(len(rows), -1).addmm_(part, B.t(), alpha=scales[i])
            saved = [rows, low, A, *narrow]
        ctx.save_for_backward(*weights, *saved)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """dx = Σ gᵢWᵢ + sᵢ·gᵢBᵢAᵢ; dAᵢ = (sᵢ·gᵢBᵢ)ᵀx; dBᵢ = sᵢ·gᵢᵀ(Aᵢx)."""
        n = len(ctx.scales)
        saved = ctx.saved_tensors  # once: a checkpointed block gives them once
        weights = saved[:n]
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in outputs]
        d_x, d_A, d_B = None, [None] * n, [None] * n
        if ctx.needs_input_grad[0]:
            d_x = grads[0] @ weights[0]
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                d_x.addmm_(grad, weight)
        if ctx.adapted:
            rows, low, A, *Bs = saved[n:]
            pairs = zip(ctx.adapted, Bs, strict=True)
            d_low = torch.cat([(grads[i] @ B).mul_(ctx.scales[i]) for i, B in pairs], 1)
            if d_x is not None:
                d_x.addmm_(d_low, A)
            stacked = (d_low.t() @ rows).split(ctx.ranks)
            parts = low.split(ctx.ranks, 1)
            of_each = zip(ctx.adapted, stacked, parts, ctx.dtypes, strict=True)
            for i, grad_A, part, (A_dtype, B_dtype) in of_each:
                d_A[i] = grad_A.to(A_dtype)
                d_B[i] = (part.t() @ grads[i]).t().mul(ctx.scales[i]).to(B_dtype)
        if d_x is not None:
            d_x = d_x.view(ctx.shape)
        return d_x, None, *[None] * (2 * n), *d_A, *d_B


class _SwiGLU(torch.autograd.Function):
    """silu(gate)·up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        call("swiglu_forward", gate, up, out, gate.numel())
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, ...]:
        gate, up = ctx.saved_tensors
        grads = torch.empty_like(gate), torch.empty_like(up)
        call("swiglu_backward", outputs[0].contiguous(), gate, up, *grads, gate.numel())
        return grads


class _Rotary(torch.autograd.Function):
    """q and k (B, T, heads, K) turned to their positions, whose cos and sin are (1 or B, T, K)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        cos, sin = (table.expand(len(q), -1, -1).contiguous() for table in (cos, sin))
        ctx.save_for_backward(cos, sin)
        return tuple(_rotate(x, cos, sin, 1) for x in (q, k))

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *(_rotate(grad, cos, sin, -1) for grad in outputs), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    x = x.contiguous()
    B, T, heads, K = x.shape
    out = torch.empty_like(x)
    call("rotate", x, cos, sin, out, B * T, heads, K, sign)
    return out
