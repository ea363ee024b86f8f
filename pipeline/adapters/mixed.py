"""Rows of many adapters in one forward: the base's product for all, and each row's own update.

Unlike batched.py, which trains a fixed set, adapters come and go here, and any number of rows
belongs to each. A forward's rows stand in the order of `RowRouting.route`, those of an adapter side
by side.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from pipeline.adapters.attach import adaptable
from pipeline.adapters.lora import AdapterLayer, LoRALinear
from pipeline.models.base import CausalLM, LowRankLinear, RowUpdate
from pipeline.models.device import to_device

# up to so many rows, one product with all adapters' A is faster than one for each adapter
STACKED_ROWS = 32


class MixedAdapter:
    """An adapter's `layers` by the names of the base's, with the scales of its updates.

    The scales are those of now, times `strength`, whatever is set in the layers later.
    """

    def __init__(self, layers: Mapping[str, nn.Module], strength: float = 1.0) -> None:
        self.layers = layers
        self.scales = {
            name: strength * layer.scale for name, layer in layers.items() if is_low_rank(layer)
        }


def is_low_rank(layer: nn.Module | None) -> TypeGuard[LoRALinear]:
    """Whether it adds s·BAx and does nothing else: no DoRA."""
    return type(layer) is LoRALinear


def changed_layers(adapted: CausalLM, base: CausalLM) -> dict[str, nn.Module] | None:
    """The layers in which an adapted view of `base` differs from it.

    None if one of them is no layer whose rows can be computed apart: a linear, the embedding or the
    head.
    """
    layers = {}
    for name, module in base.named_modules():
        current = adapted.get_submodule(name)
        now, before = current._parameters, module._parameters
        same = now.keys() == before.keys() and all(_same(now[key], before[key]) for key in now)
        if isinstance(current, AdapterLayer) or not same:
            if not (adaptable(module) or name in (base.embedding_name, base.head_name)):
                return None
            layers[name] = current
    return layers


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.data_ptr() == second.data_ptr()


class Share(NamedTuple):
    """The rows start:stop, which belong to one adapter."""

    adapter: MixedAdapter
    start: int
    stop: int


class RowRouting:
    """Which rows of a forward belong to which adapter; those of none go through the base only."""

    def __init__(self) -> None:
        self.version = 0  # another number after each change
        self.rows = 0  # of all adapters and of none
        self.shares = list[Share]()
        self.stacked = list[MixedAdapter]()
        self._routed: tuple[list[MixedAdapter | None], list[int]] = [], []
        self._masks = dict[object, tuple[Tensor, Tensor]]()

    def route(self, adapters: Sequence[MixedAdapter | None], counts: Sequence[int]) -> None:
        """In the following forwards the next `counts[n]` rows belong to `adapters[n]`."""
        if (adapters, counts) == self._routed:
            return
        self._routed = [*adapters], [*counts]
        self.version += 1
        self.shares, self._masks = [], {}
        stop = 0
        for adapter, count in zip(adapters, counts, strict=True):
            start, stop = stop, stop + count
            if adapter is not None and self.shares and self.shares[-1].adapter is adapter:
                start = self.shares.pop().start
            if adapter is not None:
                self.shares.append(Share(adapter, start, stop))
        self.rows = stop
        live = [share.adapter for share in self.shares]
        # adapters without rows stay stacked for a while: stacking copies their tensors in every
        # layer
        stacked = [*dict.fromkeys([*self.stacked, *live])]
        if len(stacked) > 2 * max(len(live), 4):
            stacked = live
        # an equal list stays the same object, by which layers know that their stack is valid
        if stacked != self.stacked:
            self.stacked = stacked

    def clear(self) -> None:
        """Route all rows to the base, and forget the adapters."""
        self.stacked = []
        self.route([], [])

    def masks(self, updates: Sequence[tuple[int, float]], like: Tensor) -> tuple[Tensor, Tensor]:
        """Scales (rows, ΣR), and which of their entries belong to another adapter than the row.

        They are for the rows' product with A of all stacked adapters. `updates`: rank and scale of
        each adapter.
        """
        key = (*updates,)
        if key not in self._masks:
            scales = torch.zeros(self.rows, sum(rank for rank, _ in updates))
            foreign = torch.ones(scales.shape, dtype=torch.bool)
            shares = {share.adapter: share for share in self.shares}
            stop = 0
            for adapter, (rank, scale) in zip(self.stacked, updates, strict=True):
                start, stop = stop, stop + rank
                if adapter in shares:
                    rows = slice(shares[adapter].start, shares[adapter].stop)
                    scales[rows, start:stop], foreign[rows, start:stop] = scale, False
            scales = to_device(scales.to(like.dtype), like.device)
            self._masks[key] = scales, to_device(foreign, like.device)
        return self._masks[key]


class StackedUpdates(NamedTuple):
    """The low-rank updates of some adapters on one layer."""

    adapters: Sequence[MixedAdapter]
    A: Tensor  # (ΣR, I)
    B: Tensor  # transposed, (ΣR, O)
    updates: list[tuple[int, float]]  # each adapter's rank and scale


class MixedLayer(LowRankLinear):
    """Layer `name` of the base, and for the rows of each adapter its own layer."""

    def __init__(self, base: nn.Module, name: str, routing: RowRouting) -> None:
        super().__init__()
        self.base, self.name, self.routing = base, name, routing
        self._version = -1  # of the routing that was read
        self._stack: StackedUpdates | None = None

    def forward(self, x: Tensor) -> Tensor:
        # (B, T), where the ids are (B, T) and other inputs (B, T, I)
        outer = x.shape if isinstance(self.base, nn.Embedding) else x.shape[:-1]
        rows = x.reshape(outer.numel(), *x.shape[len(outer) :])
        out: Tensor = self.base(rows)  # (N, O)
        if self._version != self.routing.version:
            self.read_routing(rows.dtype)
        if self._masks is not None and self._stack is not None:
            scales, foreign = self._masks
            # masked, not only multiplied by 0: another adapter's product with this row may be
            # infinite
            low = (rows @ self._stack.A.T).mul_(scales).masked_fill_(foreign, 0)  # (N, ΣR)
            out.addmm_(low, self._stack.B)
        for selected, A, B, scale in self._updates:
            out[selected].addmm_(rows[selected] @ A.T, B.T, alpha=scale)
        for selected, layer, _ in self._replacements:
            out[selected] = layer(rows[selected])
        return out.view(*outer, out.shape[-1])

    def linear_update(self) -> None:
        """None: rows differ in their updates."""

    def updates_version(self) -> int:
        return self.routing.version

    def row_updates(self) -> list[RowUpdate]:
        name, shares = self.name, self.routing.shares
        return [
            RowUpdate(slice(start, stop), adapter.layers[name], adapter.scales.get(name))
            for adapter, start, stop in shares
            if name in adapter.layers
        ]

    def read_routing(self, dtype: torch.dtype = torch.float32) -> None:
        """Keep what forwards in `dtype` need to know of the routing until it changes."""
        routing, updates = self.routing, self.row_updates()
        low_rank = [update for update in updates if update.scale is not None]
        self._replacements = [update for update in updates if update.scale is None]
        self._masks = None
        self._updates = list[tuple[slice, Tensor, Tensor, Any]]()
        if len(low_rank) > 1 and routing.rows <= STACKED_ROWS:
            if self._stack is None or self._stack.adapters is not routing.stacked:
                self._stack = self._stacked(dtype)
            self._masks = routing.masks(self._stack.updates, self._stack.A)
        else:
            for selected, layer, scale in low_rank:
                A, B = (factor.to(dtype) for factor in layer.pair())
                self._updates.append((selected, A, B, scale))
        if not routing.stacked:
            self._stack = None
        self._version = routing.version

    def _stacked(self, dtype: torch.dtype) -> StackedUpdates:
        As, Bs, updates = list[Tensor](), list[Tensor](), list[tuple[int, float]]()
        for adapter in self.routing.stacked:
            layer = adapter.layers.get(self.name)
            if is_low_rank(layer):
                A, B = layer.pair()
                As.append(A.to(dtype))
                Bs.append(B.to(dtype).T)
                updates.append((len(A), adapter.scales[self.name]))
            else:
                updates.append((0, 0.0))
        return StackedUpdates(self.routing.stacked, torch.cat(As), torch.cat(Bs), updates)
