"""Fast generation of one token at a time on the CPU: prepacked weights, and fewer calls per block.

A CPU multiplies a single row by weights in torch's layout at less than half of its memory's bandwidth.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import TypeGuard
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.base import CausalLM
from pipeline.models.kernels.llama_decode import OneTokenBlock, has_llama_parts

AGREEMENT = 0.05  # of the hidden states' norm: bf16 sums in another order round differently


class PackedLinear:
    """y = Wx + b of one linear, or of several with the same x, concatenated. W is a copy in oneDNN's own layout."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.versions = _weight_versions(linears)
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        self.bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


_packed: WeakKeyDictionary[nn.Module, PackedLinear] = WeakKeyDictionary()  # by the first of the linears
_agrees: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # results of _check_agreement


@contextmanager
def fast_decoding(model: nn.Module) -> Iterator[int]:
    """Inside the block `model` is faster where one token follows a cache; yields the number of replaced forwards.

    Only bf16 on the CPU, and only inference. The packed weights are kept for the next time, as long as the model lives.
    """
    forwards: dict[nn.Module, Callable[..., Tensor]] = {}
    if _is_available():
        blocks = _fast_blocks(model)
        inside = {linear for fast in blocks.values() for linear in fast.packed}
        forwards.update({block: MethodType(fast, block) for block, fast in blocks.items()})
        forwards.update({m: _packed_linear([m]) for m in model.modules() if _can_pack(m) and m not in inside})
    with _replaced_forwards(forwards):
        yield len(forwards)


def _fast_blocks(model: nn.Module) -> dict[nn.Module, OneTokenBlock]:
    """The Llama-shaped blocks with their fast forwards, if the model then gives the same hidden states."""
    if not isinstance(model, CausalLM) or not _is_bf16_on_cpu(next(model.blocks.parameters())):
        return {}
    if not _agrees.get(model, True):
        return {}
    fast = {block: OneTokenBlock(block, _pack_together) for block in model.blocks if has_llama_parts(block)}
    if fast and model not in _agrees:
        _agrees[model] = _check_agreement(model, fast)
    return fast if _agrees.get(model) else {}


@torch.no_grad()
def _check_agreement(model: CausalLM, fast: Mapping[nn.Module, OneTokenBlock]) -> bool:
    def probe() -> Tensor:
        cache = model.new_cache()
        model.hidden_states(torch.arange(4)[None], cache=cache)
        return model.hidden_states(torch.tensor([[4]]), cache=cache).float()

    expected = probe()
    try:
        with _replaced_forwards({block: MethodType(forward, block) for block, forward in fast.items()}):
            actual = probe()
    except Exception:  # whatever a block raises that combines its parts differently
        return False
    return bool((actual - expected).norm() <= AGREEMENT * expected.norm())


@contextmanager
def _replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """Other forwards inside the block, except for modules whose forward another generation has already replaced."""
    changed = [module for module in forwards if "forward" not in module.__dict__]
    for module in changed:
        module.forward = forwards[module]
    try:
        yield
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)


def _pack_together(modules: Sequence[nn.Module]) -> PackedLinear | None:
    """One packed linear of all of them, or None if one of them cannot be packed."""
    linears = [module for module in modules if _can_pack(module)]
    same_bias = len({linear.bias is None for linear in linears}) == 1
    return _packed_linear(linears) if same_bias and len(linears) == len(modules) else None


def _can_pack(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear and _is_bf16_on_cpu(module.weight)


def _is_bf16_on_cpu(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and weight.is_cpu


def _packed_linear(linears: Sequence[nn.Linear]) -> PackedLinear:
    """From the cache, unless a weight has changed since."""
    packed = _packed.get(linears[0])
    if packed is None or packed.versions != _weight_versions(linears):
        packed = _packed[linears[0]] = PackedLinear(linears)
    return packed


def _weight_versions(linears: Sequence[nn.Linear]) -> list[tuple[int, int]]:
    """Differs as soon as a weight is replaced or written to."""
    return [(p.data_ptr(), p._version) for linear in linears for p in linear.parameters()]


@cache
def _is_available() -> bool:
    """Whether this build of torch packs weights, and multiplies by packed ones as by plain ones."""
    linear = nn.Linear(32, 32, bias=False, dtype=torch.bfloat16)
    x = torch.ones(1, 32, dtype=torch.bfloat16)
    try:
        with torch.no_grad():
            return torch.allclose(PackedLinear([linear])(x), F.linear(x, linear.weight), 0.02, 0.02)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
