"""Triton kernels in Triton's interpreter, on CPU tensors: our own, and each that
`accelerator.liger` returns, forward and backward, against plain torch. `python -m tests.helpers.interpreted_liger`
prints the relative errors as JSON; it is a process of its own because Triton reads TRITON_INTERPRET
when a kernel is declared.

Shown: the kernels' arithmetic, masks and strides, the arguments that we pass, dtypes and shapes of
what comes back, and that the probes of `fuse` take each of them.

Not shown: that they compile for a card, races between programs (here one runs after the other),
what a card's own tanh and rsqrt round (NumPy's stand in for them), speed and memory.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CPU = torch.device("cpu")
DTYPES = torch.float32, torch.float16, torch.bfloat16


def interpret() -> Any:
    """What `accelerator.liger` returns for CUDA, its kernels interpreted."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def convert_floats(argument: Any) -> Any:
        """A kernel's float argument is a tensor on a card, and a plain number in the
        interpreter.
        """
        if not isinstance(argument, float):
            return convert(argument)
        return tl.tensor(
            interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32
        )

    def by_numpy(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Functions of a card's library have no body."""
        return lambda x: tl.tensor(
            interpreter.TensorHandle(function(x.handle.data), x.handle.dtype), x.type
        )

    interpreter._implicit_cvt = convert_floats
    libdevice.tanh, libdevice.rsqrt = by_numpy(np.tanh), by_numpy(lambda x: 1 / np.sqrt(x))

    from pipeline.models.kernels import accelerator

    return accelerator.liger.__wrapped__(torch.device("cuda"))


def compare(found: Callable[..., Any], plain: Callable[..., Any], inputs: list[Tensor]) -> float:
    """The largest relative error of outputs and gradients, `plain` in fp32 of the same numbers."""
    results = []
    for function, own in ((found, inputs), (plain, [x.float() for x in inputs])):
        leaves = [x.detach().clone().requires_grad_() for x in own]
        made = function(*(x.clone() for x in leaves))  # some work in place
        outputs = made if isinstance(made, tuple) else (made,)
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, grads)])
        if function is found:
            assert all(x.dtype == inputs[0].dtype or not x.dim() for x in results[0])
    return largest_error(*results)


@torch.no_grad()
def largest_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


def parts(liger: Any, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    for offset in (0.0, 1.0):  # Llama's and Gemma's

        def norm(x: Tensor, weight: Tensor, offset: float = offset) -> Tensor:
            made = liger.norm(torch.nn.Parameter(torch.empty(0)), 1e-6, offset)
            del made.weight  # a parameter would be a leaf of its own
            made.weight = weight
            out: Tensor = made(x)
            return out

        def plain_norm(x: Tensor, weight: Tensor, offset: float = offset) -> Tensor:
            return F.rms_norm(x, x.shape[-1:], None, 1e-6) * (offset + weight)

        yield f"norm {offset}", compare(norm, plain_norm, [random(2, 5, 48), random(48)])

    from pipeline.models.kernels.accelerator.loss import _HeadAndLoss

    weight, labels = random(97, 48), torch.arange(20) * 4
    for cap in (None, 30.0):

        def loss(rows: Tensor, cap: float | None = cap) -> Tensor:
            out: Tensor = _HeadAndLoss.apply(rows, weight, labels, cap)  # type: ignore[no-untyped-call]
            return out

        def plain_loss(rows: Tensor, cap: float | None = cap) -> Tensor:
            logits = rows @ weight.float().T
            logits = logits if cap is None else torch.tanh(logits / cap) * cap
            return F.cross_entropy(logits, labels)

        yield f"loss, cap {cap}", compare(loss, plain_loss, [random(20, 48)])

    # others calculate in it, which the interpreter does on its bits as integers
    if dtype == torch.bfloat16:
        return
    activations = F.silu, lambda x: F.gelu(x, approximate="tanh")
    for name, product, act in zip(("silu", "gelu"), liger.products, activations, strict=True):
        plain = lambda gate, up, act=act: act(gate) * up  # noqa: E731
        yield (
            name,
            compare(
                lambda a, b, p=product: p(a, b, None), plain, [random(2, 5, 48), random(2, 5, 48)]
            ),
        )

    half = random(1, 5, 8).repeat(1, 1, 2)  # (B, T, K)
    for groups in (4, 2):
        # as projections give them
        q, k = random(1, 5, 4, 16).transpose(1, 2), random(1, 5, groups, 16).transpose(1, 2)
        yield (
            f"rotation of {groups} groups",
            compare(
                lambda q, k: liger.rotate(q, k, half.cos(), half.sin()),
                lambda q, k: apply_rotary_pos_emb(q, k, half.cos().float(), half.sin().float()),
                [q, k],
            ),
        )


def foreign_labels() -> Iterator[tuple[str, float]]:
    """How many losses of labels that have no logit are numbers."""
    from pipeline.models.kernels.accelerator.loss import row_losses

    losses = torch.empty(3)
    row_losses(torch.randn(3, 40), torch.tensor([40, 3, -100]), losses, None, False)
    assert losses[1].isfinite()
    yield "foreign labels", float(losses[[0, 2]].isfinite().sum())


def weights() -> Iterator[tuple[str, float]]:
    """NF4 weights, with codes of scales and without, in fp32: 0 where each has the same bits."""
    from pipeline.models.kernels.accelerator.weights import dequantize_nf4
    from pipeline.models.quantized_linear import Quantization, dequantize_weight, quantize_weight

    weight = torch.randn(72, 128, generator=torch.Generator().manual_seed(0))
    kinds: tuple[Quantization, ...] = ("nf4", "nf4-dq")
    for kind in kinds:
        stored = quantize_weight(weight, kind)
        expected = dequantize_weight(stored, kind, (72, 128), torch.float32)
        actual = dequantize_nf4(stored, (72, 128), torch.float32)
        yield f"weights {kind}", float((actual - expected).abs().max())


def models(liger: Any) -> Iterator[tuple[str, float]]:
    """Families whose parts `fuse` takes: the error of the logits and the embedding's gradient, and
    nothing of ours.
    """
    from pipeline.models.kernels import accelerator
    from tests.helpers.real import toy

    accelerator.liger = lambda _: liger  # type: ignore[assignment]
    ids = torch.arange(4, 20)[None]
    for name, product in (("llama", 0), ("qwen3", 0), ("gemma2", 1)):
        plain, fused = toy(name), toy(name)
        names = accelerator.fuse(fused, CPU)
        modules = [fused.get_submodule(name) for name in names]
        assert all(
            type(x) is liger.norm or x.product is liger.products[product] for x in modules
        ), names
        fused.requires_grad_(False).embeddings.requires_grad_(True)
        results = []
        for model in (fused, plain):
            out = model(ids)
            results.append(
                [
                    out,
                    *torch.autograd.grad(out.sin().sum(), model.embeddings.get_parameter("weight")),
                ]
            )
        yield f"model {name}", largest_error(*results)


if __name__ == "__main__":
    found = interpret()
    errors = [
        (f"{name} in {dtype}", error) for dtype in DTYPES for name, error in parts(found, dtype)
    ]
    json.dump(dict([*errors, *foreign_labels(), *weights(), *models(found)]), sys.stdout)
