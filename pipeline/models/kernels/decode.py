"""Generation's one token at a time on the CPU: weights that lie as a single row's product wants them, and fewer calls.

As weights are stored, a CPU reads them for a single row at less than half of the rate that its memory has.
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
from pipeline.models.kernels.llama_decode import OneToken, fits

AGREEMENT = 0.05  # of the hidden states' norm: bf16 rounds otherwise where sums are taken in another order


class Packed:
    """y = Wx + b of a linear, or of several that read the same x, end to end. W is a copy in oneDNN's own layout."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.made_of = _state(linears)
        weight = torch.cat([one.weight.detach() for one in linears])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        self.bias = None if linears[0].bias is None else torch.cat([one.bias.detach() for one in linears])

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


_packed: WeakKeyDictionary[nn.Module, Packed] = WeakKeyDictionary()  # by the first of the linears
_agreed: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextmanager
def one_at_a_time(model: nn.Module) -> Iterator[int]:
    """`model` quick where one token follows a cache, for inference; yields how many of its modules are.

    bf16 on the CPU alone. The packed copies of the weights are kept for the next time: they live as long as the model.
    """
    forwards: dict[nn.Module, Callable[..., Tensor]] = {}
    if _available():
        blocks = _quick_blocks(model)
        joined = {linear for quick in blocks.values() for linear in quick.joined}
        forwards.update({block: MethodType(quick, block) for block, quick in blocks.items()})
        forwards.update({one: _packed_of([one]) for one in model.modules() if _packs(one) and one not in joined})
    with _instead(forwards):
        yield len(forwards)


def _quick_blocks(model: nn.Module) -> dict[nn.Module, OneToken]:
    """The blocks of a known shape, if the model computes with them what it computes without."""
    if not isinstance(model, CausalLM) or not _quick(next(model.blocks.parameters())) or not _agreed.get(model, True):
        return {}
    quick = {block: OneToken(block, _joined) for block in model.blocks if fits(block)}
    if quick and model not in _agreed:
        _agreed[model] = _agree(model, quick)
    return quick if _agreed.get(model) else {}


@torch.no_grad()
def _agree(model: CausalLM, quick: Mapping[nn.Module, OneToken]) -> bool:
    def probed() -> Tensor:
        cache = model.new_cache()
        model.hidden_states(torch.arange(4)[None], cache=cache)
        return model.hidden_states(torch.tensor([[4]]), cache=cache).float()

    wanted = probed()
    try:
        with _instead({block: MethodType(one, block) for block, one in quick.items()}):
            found = probed()
    except Exception:  # whatever is raised in a block that is put together otherwise
        return False
    return bool((found - wanted).norm() <= AGREEMENT * wanted.norm())


@contextmanager
def _instead(forwards: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """Other forwards while entered, but for modules that another generation has already changed."""
    changed = [module for module in forwards if "forward" not in module.__dict__]
    for module in changed:
        module.forward = forwards[module]
    try:
        yield
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)


def _joined(modules: Sequence[nn.Module]) -> Packed | None:
    linears = [one for one in modules if _packs(one)]
    alike = len({one.bias is None for one in linears}) == 1
    return _packed_of(linears) if alike and len(linears) == len(modules) else None


def _packs(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear and _quick(module.weight)


def _quick(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and weight.is_cpu


def _packed_of(linears: Sequence[nn.Linear]) -> Packed:
    known = _packed.get(linears[0])
    if known is None or known.made_of != _state(linears):
        known = _packed[linears[0]] = Packed(linears)
    return known


def _state(linears: Sequence[nn.Linear]) -> list[tuple[int, int]]:
    """Another one when a weight is replaced or written to."""
    return [(p.data_ptr(), p._version) for one in linears for p in one.parameters()]


@cache
def _available() -> bool:
    """Whether this build of torch packs weights and multiplies by them as by the plain ones."""
    linear = nn.Linear(32, 32, bias=False, dtype=torch.bfloat16)
    x = torch.ones(1, 32, dtype=torch.bfloat16)
    try:
        with torch.no_grad():
            return torch.allclose(Packed([linear])(x), F.linear(x, linear.weight), 0.02, 0.02)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
