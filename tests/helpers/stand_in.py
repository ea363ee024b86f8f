"""A stand-in for an accelerator that holds no numbers. It shows what an accelerator would wait for.

It is `meta`, on which torch takes no kernel of a GPU; or, where LORA_STAND_IN says cuda, the device
of cuda_device.py. While `watched`, everything is recorded that a GPU's owner would not want in a
step: tensors made or computed on the host, copies to the device that the host waits for, reads of
the device, and tensors as large as a row's scores. Where a number is read, it is a stand-in: what
runs goes on as if all were well. `fake_accelerator.py` is the device that computes the CPU's
numbers.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch._dynamo  # torch loads it late, and its annotations need the Generator that is patched below
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pipeline

Model = TypeVar("Model", bound=nn.Module)
STAND_IN = torch.device(os.environ.get("LORA_STAND_IN", "meta"))
HOME = Path(pipeline.__file__).parent
# operations whose result has a size that only the numbers tell
COUNTED = {"nonzero", "masked_select", "unique_consecutive", "_unique2", "unique_dim", "bincount"}

READ = "models/device.py:read_numbers _to_copy"  # of what is logged, once all of a step is queued
# the latter moments that stay on the host
QUEUED = ("models/device.py:to_device ", "training/optimizer/__init__.py:")
# kernels are tried
ONCE = tuple(f"models/experts/grouped_product.py:{each} " for each in ("agrees", "<genexpr>"))
# Where tensors are made on the host, and why: from there they are copied without a wait.
HOSTED = {
    "training/batches.py": "a batch is made of lists, and is one table when it is copied",
    "training/batched.py": "the same of a sweep's windows",
    "training/preferences/batches.py": "the same of pairs of answers",
    "training/preferences/losses.py:measured": "what a step measured, as numbers",
    "training/preferences/data.py": "the same",
    "training/noise.py:perturb": "the size of NEFTune's noise follows from the lengths",
    "training/step.py:_times": "the shares of a sweep's learners, where they differ",
    "training/optimizer/__init__.py:": "moments that stay in the host's memory",
    "adapters/batched.py:select_live": "the numbers of a sweep's adapters that still train",
    "models/kernels/plain_attention.py:sequence_starts": "where sequences begin, once a forward",
    "models/kernels/accelerator.py:": "what Liger computes is tried once",
    "models/kernels/__init__.py:random_tensors": "what a kernel is tried on, once",
    "models/kernels/accelerator_attention.py:_seen": "the keys that queries see, once a forward",
    "models/base.py:packed_hidden_states": "texts to score, a row of them",
    "models/generate.py:": "a prompt; and the logits, for sampling is on the host",
    "inference/score.py:": "labels; and what was read of the answers",
    "evaluation/harness_model.py:_loglikelihood_tokens": "the tokens to score",
    "inference/batched_model.py:logits": "the next tokens of many sequences",
    "adapters/mixed.py:masks": "which rows are whose, when that changes",
    "models/device.py:": "what was read, or is copied",
}


@dataclass
class Seen:
    """What happened, with the function of `pipeline` in which it did: how often each."""

    # of the device: the host waits until all is computed
    reads: Counter[str] = field(default_factory=Counter)
    # that these copy to the host
    read_bytes: Counter[str] = field(default_factory=Counter)
    # copies to the device from memory that is not pinned
    blocking: Counter[str] = field(default_factory=Counter)
    # copies to the device that the host does not wait for
    queued: Counter[str] = field(default_factory=Counter)
    # tensors with a dimension that were made on the CPU
    hosted: Counter[str] = field(default_factory=Counter)
    # tensors with two dimensions of a row's tokens
    square: Counter[str] = field(default_factory=Counter)
    # sums whose order is another each time: torch's `cumsum` of floats is such on CUDA
    unordered: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        for counted in vars(self).values():
            counted.clear()


def _where(operation: str) -> str:
    """The innermost function of `pipeline` on the stack, as file:function, and what it called."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if HOME in path.parents:
            return f"{path.relative_to(HOME).as_posix()}:{frame.f_code.co_name} {operation}"
        frame = frame.f_back  # type: ignore[assignment]
    return f"elsewhere {operation}"


def _is_there(one: Any) -> bool:
    return isinstance(one, Tensor) and one.device.type == STAND_IN.type


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what the operations do, and gives stand-ins for what is read."""

    def __init__(self, seen: Seen, tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen, self.tokens = seen, tokens

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.removeprefix("aten::")
        seen, given = (
            self.seen,
            [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)],
        )
        of_meta = any(map(_is_there, given))
        if name == "_local_scalar_dense" and of_meta:
            seen.reads[_where(name)] += 1
            return args[0].dtype == torch.bool or 1 if not args[0].dtype.is_floating_point else 1.0
        if name in ("_to_copy", "copy_", "_copy_from"):
            source, target = (
                (args[1], args[0])
                if name == "copy_"
                else (args[0], kwargs.get("device") or args[0])
            )
            to = target.device if isinstance(target, Tensor) else torch.device(target)
            if _is_there(source) and to.type == "cpu":
                seen.reads[_where(name)] += 1
                seen.read_bytes[_where(name)] += source.nbytes
                if name == "copy_":
                    return target.zero_()
                zeros = torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
                return zeros if (counted := getattr(source, "counted", None)) is None else counted
            if (
                not _is_there(source)
                and to.type == STAND_IN.type
                and source.dim()
                and source.numel()
            ):
                queued = kwargs.get("non_blocking", False) or (
                    name == "copy_" and len(args) > 2 and args[2]
                )
                (seen.queued if queued else seen.blocking)[_where(name)] += 1
        if name in COUNTED and of_meta:
            seen.reads[_where(name)] += 1
            if name == "nonzero":
                return torch.empty(
                    args[0].numel(), args[0].dim(), dtype=torch.int64, device=STAND_IN
                )
            if name == "bincount":
                counts = torch.zeros(args[-1], dtype=torch.int64)
                counts[0] = args[0].numel()
                counted = torch.empty_like(counts, device=STAND_IN)
                counted.counted = counts  # type: ignore[attr-defined]  # what is read of it adds up
                return counted
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and of_meta:
            masks = [
                one for one in args[1] if one is not None and one.dtype in (torch.bool, torch.uint8)
            ]
            if masks and any(map(_is_there, masks)):
                seen.reads[_where(f"{name} by a mask")] += 1
                if name != "index":
                    return args[0]
                whole = [one for one in args[1] if one is not None]
                return args[0].flatten(0, whole[0].dim() - 1)  # as if it were true everywhere
            if any(one is not None and one.dim() and not _is_there(one) for one in args[1]):
                seen.blocking[_where(f"{name} by indices of the host")] += 1
        if name == "cumsum" and of_meta and args[0].is_floating_point():
            seen.unordered[_where(name)] += 1
        out = func(*args, **kwargs)
        for one in tree_leaves(out):
            if isinstance(one, Tensor) and not _is_there(one) and one.dim() and one.numel():
                seen.hosted[_where(name)] += 1
            if _is_there(one) and sum(size >= self.tokens for size in one.shape) > 1:
                seen.square[_where(f"{name} {tuple(one.shape)}")] += 1
        return out


class _Calls(TorchFunctionMode):
    """What dispatch does not see of a meta tensor: those made of numbers, and which kernel a GPU
    takes.
    """

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = (
            func in (torch.tensor, torch.as_tensor)
            and torch.device(kwargs.get("device") or "cpu") == STAND_IN
        )
        made |= func is Tensor.new_tensor and _is_there(args[0]) and kwargs.get("device") is None
        if made and args[-1] != []:  # transformers' caches begin with that
            self.seen.blocking[_where(func.__name__)] += 1
        if func in (Tensor.__getitem__, Tensor.__setitem__) and _is_there(args[0]):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(one, list) for one in index):
                self.seen.blocking[_where(f"{func.__name__} by a list")] += 1
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return _as_on_a_gpu(func, *args, **kwargs)
        repeats = (
            func in (Tensor.repeat_interleave, torch.repeat_interleave)
            and kwargs.get("output_size") is None
        )
        if repeats and any(map(_is_there, args[1:2] or args[:1])):
            self.seen.reads[_where("repeat_interleave")] += 1
        return func(*args, **kwargs)


def _as_on_a_gpu(
    func: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The fused kernel where a GPU has one. On meta torch would take the one that writes all
    scores.
    """
    options: dict[str, Any] = {"dropout_p": 0.0, "is_causal": is_causal, "scale": scale}
    if attn_mask is not None or dropout_p:
        out: Tensor = func(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    elif q.dtype.itemsize == 2:
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, **options)[0]
    elif not enable_gqa:
        out = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, torch.is_grad_enabled(), **options
        )[0]
    else:
        out = func(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=True)
    return out


def to_stand_in(model: Model) -> Model:
    """The model there. A moved parameter stays the same one, as on a GPU."""
    moved = dict[Tensor, Tensor]()
    for module in model.modules():
        for place in (module._parameters, module._buffers):
            for tensor in place.values():
                if tensor is not None and tensor not in moved:
                    there = tensor.detach().to(STAND_IN)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    moved[tensor] = (
                        nn.Parameter(there, tensor.requires_grad) if is_parameter else there
                    )
    for tensor, there in moved.items():
        for attribute in ("__class__", "__dict__"):
            own, other = getattr(tensor, attribute), getattr(there, attribute)
            setattr(tensor, attribute, other)
            setattr(there, attribute, own)
        torch._C._swap_tensor_impl(tensor, there)
    return model


@contextmanager
def watched(tokens: int = 10**9) -> Iterator[Seen]:
    """Inside the block what happens is recorded. `tokens`: of the longest packed row."""
    seen = Seen()
    with pytest.MonkeyPatch.context() as patched:
        # no generator is of that device: one of the CPU's is seeded, and what it would draw is not
        patched.setattr(torch, "Generator", _generator)
        with _Calls(seen), _Operations(seen, tokens):
            yield seen


_Generator = torch.Generator


def _generator(device: torch.device | str = "cpu") -> torch.Generator:
    return _Generator("cpu" if torch.device(device) == STAND_IN else device)


def refuse(seen: Seen, reads: Mapping[str, int]) -> None:
    """Fails on whatever a GPU would wait for or should not hold; it may be read as often as `reads`
    says, and where.
    """
    for counted in (seen.reads, seen.blocking, seen.queued, seen.hosted):
        for where in [where for where in counted if where.startswith(ONCE)]:
            del counted[where]
    assert dict(seen.reads) == dict(reads), f"reads of the device: {dict(seen.reads)}"
    assert not seen.blocking, f"copies that the host waits for: {seen.blocking}"
    assert not seen.unordered, f"sums in no fixed order: {seen.unordered}"
    assert not seen.square, f"two dimensions of a row's tokens: {seen.square}"
    assert all(where.startswith(QUEUED) for where in seen.queued), seen.queued
    hosted = [where for where in seen.hosted if not where.startswith((*HOSTED,))]
    assert not hosted, f"made on the host: {hosted}"
