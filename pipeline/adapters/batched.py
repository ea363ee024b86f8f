"""Many adapters on one frozen base: one forward of the base, and batched products of updates.

N adapters. The first rows of a forward belong to adapter 0, the next to adapter 1, and so on:
`AdapterRouting` has the counts. Their tensors are stacked, (N, ...), smaller ones padded with
zeros, which training keeps at zero: the gradient of a padded row of A is a product with the same
padded column of B, and vice versa.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.adapters.lora import LoRALinear
from pipeline.models.base import CausalLM, LinearUpdate, LowRankLinear
from pipeline.models.device import to_device


class AdapterRouting:
    """Which rows of a forward belong to which adapter: `counts` has each adapter's number of rows.

    With `off` all rows go through the base only.
    """

    def __init__(self, adapters: int) -> None:
        self.off = False
        self._set((0,) * adapters)

    def _set(self, counts: tuple[int, ...]) -> None:
        self.counts = counts
        self.live = [n for n, rows in enumerate(counts) if rows]  # the adapters that have rows
        self.even = len({*counts} - {0}) == 1  # whether they all have the same number
        self._live_index: Tensor | None = None  # `live` on the device, for all layers

    @contextmanager
    def route(self, counts: tuple[int, ...]) -> Iterator[None]:
        """Inside the block each adapter has this many rows."""
        before = self.counts
        self._set(counts)
        try:
            yield
        finally:
            self._set(before)

    @contextmanager
    def base(self) -> Iterator[None]:
        """Inside the block all rows go through the base only."""
        self.off = True
        try:
            yield
        finally:
            self.off = False

    def select_live(self, stacked: Tensor) -> Tensor:
        """(N, ...) → (L, ...): only the adapters that have rows."""
        if len(self.live) == len(self.counts):
            return stacked
        if self._live_index is None:
            self._live_index = to_device(torch.tensor(self.live), stacked.device)
        return stacked.index_select(0, self._live_index)


class BatchedLayer(nn.Module):
    """A layer of the base, and the part that replaces it in each adapter, or None."""

    def __init__(
        self,
        base: nn.Module,
        parts: Sequence[nn.Module | None],
        routing: AdapterRouting,
        stacks: "StackedParameters",
    ) -> None:
        super().__init__()
        self.base, self.routing = base, routing
        self.parts = nn.ModuleList(nn.Identity() if part is None else part for part in parts)
        by_adapter: list[dict[str, nn.Parameter]] = []
        self.shapes: list[dict[str, torch.Size]] = []
        for part in self.parts:
            trained = {name: p for name, p in part.named_parameters() if p.requires_grad}
            by_adapter.append(trained)
            self.shapes.append({name: p.shape for name, p in trained.items()})
        self.trained = dict[str, nn.Parameter]()
        for name in dict.fromkeys(chain.from_iterable(by_adapter)):
            self.trained[name] = stacks.stack([named.get(name) for named in by_adapter])
            self.register_parameter(name, self.trained[name])

    def forward(self, x: Tensor) -> Tensor:
        if self.routing.off:
            out: Tensor = self.base(x)
            return out
        # (B, T) of (B, T) or (B, T, I)
        outer = x.shape if isinstance(self.base, nn.Embedding) else x.shape[:-1]
        out = self.adapted(x.reshape(outer.numel(), *x.shape[len(outer) :]))  # (B·T, O)
        return out.view(*outer, out.shape[-1])

    def adapted(self, rows: Tensor) -> Tensor:
        """Each adapter's rows through its own layer, computed as when it trains alone."""
        stacked = {name: p.unbind(0) for name, p in self.trained.items()}
        shares = torch.split(rows, list(self.routing.counts))
        out = []
        for n in self.routing.live:
            shapes = self.shapes[n].items()
            values = {name: stacked[name][n][_corner(shape)] for name, shape in shapes}
            if values:
                out.append(functional_call(self.parts[n], values, (shares[n],)))
            else:
                out.append(self.base(shares[n]))
        return torch.cat(out)

    def release(self) -> None:
        """Free the parts' own copies of the stacked parameters."""
        for part, shapes in zip(self.parts, self.shapes, strict=True):
            part.requires_grad_(False)
            for name in shapes:
                part.get_parameter(name).data = self.trained[name].data.new_empty(0)

    def layer_of(self, number: int) -> nn.Module:
        """The layer of one adapter with its current parameters, which are not copied."""
        part, shapes = self.parts[number], self.shapes[number]
        for name, shape in shapes.items():
            part.get_parameter(name).data = self.trained[name].data[number][_corner(shape)]
        return part if shapes else self.base


class BatchedLoRALinear(BatchedLayer, LowRankLinear):
    """y = Wx + b + sₙ·BₙAₙx for the rows of adapter n, with a frozen W."""

    scales: Tensor

    def __init__(self, *inputs: Any) -> None:
        """As BatchedLayer."""
        super().__init__(*inputs)
        loras = [part if isinstance(part, LoRALinear) else None for part in self.parts]
        self.scale_list = [1.0 if lora is None else lora.scale for lora in loras]
        scales = torch.tensor(self.scale_list)  # fp32: 16 bits would round them
        # (N, 1, 1)
        self.register_buffer("scales", scales[:, None, None].to(self.trained["lora_A"].device))
        self.drops = any(lora is not None and lora.dropout for lora in loras)

    def forward(self, x: Tensor) -> Tensor:
        routing = self.routing
        if routing.off or not routing.even or self.drops:
            return super().forward(x)
        A, B = (
            routing.select_live(self.trained[name]).to(x.dtype) for name in ("lora_A", "lora_B")
        )
        return batched_lora_forward(x, self.base, A, B, routing.select_live(self.scales))

    def linear_update(self) -> LinearUpdate | None:
        """Base and factors, if all live adapters have as many rows and nothing is dropped."""
        routing = self.routing
        if routing.off or not routing.even or self.drops or type(self.base) is not nn.Linear:
            return None
        A, B = (routing.select_live(self.trained[name]) for name in ("lora_A", "lora_B"))
        if len({*self.scale_list}) > 1:
            return LinearUpdate(self.base, A * routing.select_live(self.scales), B, 1.0)
        return LinearUpdate(self.base, A, B, self.scale_list[0])

    def adapted(self, rows: Tensor) -> Tensor:
        counts = list(self.routing.counts)
        A, B = (self.trained[name].to(rows.dtype).unbind(0) for name in ("lora_A", "lora_B"))
        shares, outs = torch.split(rows, counts), torch.split(self.base(rows), counts)
        updated = []
        for n, part in enumerate(self.parts):
            x = shares[n]
            if self.drops and isinstance(part, LoRALinear) and len(x):
                x = part.dropped(x)
            updated.append(torch.addmm(outs[n], x @ A[n].T, B[n].T, alpha=self.scale_list[n]))
        return torch.cat(updated)


def batched_lora_forward(
    x: Tensor, base: nn.Module, A: Tensor, B: Tensor, scales: Tensor
) -> Tensor:
    """Wx + b + sₙ·BₙAₙx, (..., O): A (L, R, I), B (L, O, R), scales (L, 1, 1)."""
    if type(base) is nn.Linear and base.bias is not None:
        out: Tensor = _BatchedLoRA.apply(x, base.weight, base.bias, A, B, scales)  # type: ignore[no-untyped-call]
        return out
    rows = x.reshape(len(A), -1, x.shape[-1])  # (L, M, I)
    low = (torch.bmm(rows, A.transpose(1, 2)) * scales).to(x.dtype)  # (L, M, R)
    frozen: Tensor = base(x)  # (..., O)
    out = torch.baddbmm(frozen.reshape(*rows.shape[:2], -1), low, B.transpose(1, 2))
    return out.view_as(frozen)


class _BatchedLoRA(torch.autograd.Function):
    """`batched_lora_forward` with one call per product: small models spend their time on calls.

    A step of MiniGPT with LoRA on all linears takes 1/1.05 of the time for 4 adapters, 1/1.1 for 32
    (CPU seconds of one thread, in turns).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor, scales: Tensor
    ) -> Tensor:
        rows = x.reshape(len(A), -1, x.shape[-1])  # (L, M, I)
        out = torch.nn.functional.linear(x, weight, bias)
        low = torch.bmm(rows, A.mT).mul_(scales)  # (L, M, R)
        out.view(len(A), -1, out.shape[-1]).baddbmm_(low, B.mT)
        ctx.save_for_backward(rows, weight, low, A, B, scales)
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """With g = ∂L/∂y and l = s·Ax: ∂B = gᵀl, ∂l = gB, ∂A = s·(∂l)ᵀx, ∂x = gW + s·∂l·A."""
        rows, weight, low, A, B, scales = ctx.saved_tensors
        g = outputs[0].reshape(len(A), -1, outputs[0].shape[-1])  # (L, M, O)
        # (L, R, M): in this order the product takes half the time
        d_low = torch.bmm(B.mT, g.mT).mul_(scales)
        d_x = None
        if ctx.needs_input_grad[0]:  # not in the first layer that trains
            d_x = outputs[0] @ weight
            d_x.view_as(rows).baddbmm_(d_low.mT, A)
        return d_x, None, None, torch.bmm(d_low, rows), torch.bmm(g.mT, low), None


class _BatchedProduct(torch.autograd.Function):
    """xWᵀ for x (L, M, I) and W (L, O, I).

    Autograd's own ∂W has the layout of Wᵀ, and copying it took as long as all low-rank products of
    a small model's step.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.bmm(x, weight.mT)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        d_x = torch.bmm(outputs[0], weight) if ctx.needs_input_grad[0] else None
        return d_x, torch.bmm(outputs[0].mT, x)


class BatchedEmbedding(BatchedLayer):
    """One embedding per adapter: E (N, V, D)."""

    def adapted(self, rows: Tensor) -> Tensor:
        if not self.routing.even:
            return super().adapted(rows)
        tables = self.routing.select_live(self.trained["weight"])  # (L, V, D)
        L, V, _ = tables.shape
        firsts = torch.arange(0, L * V, V, device=rows.device)[:, None]  # (L, 1)
        # on CUDA the backward of `gather` adds in another order each time
        return F.embedding((rows.view(L, -1) + firsts).flatten(), tables.flatten(0, 1))  # (L·M, D)


class BatchedHead(BatchedLayer):
    """One head per adapter: W (N, V, D)."""

    def adapted(self, rows: Tensor) -> Tensor:
        if not self.routing.even:
            return super().adapted(rows)
        x = rows.view(len(self.routing.live), -1, rows.shape[-1])  # (L, M, D)
        weight = self.routing.select_live(self.trained["weight"])  # (L, V, D)
        out: Tensor = _BatchedProduct.apply(x, weight)  # type: ignore[no-untyped-call]  # (L, M, V)
        bias = self.trained.get("bias")
        if bias is not None:
            out = out + self.routing.select_live(bias)[:, None]
        return out.flatten(0, 1)


class StackedParameters:
    """The trained tensors of N adapters, stacked; tied tensors share one parameter."""

    def __init__(self) -> None:
        self._by_ids: dict[tuple[int, ...], nn.Parameter] = {}
        self._alive: list[Tensor] = []  # so that no id is reused

    def stack(self, tensors: Sequence[Tensor | None]) -> nn.Parameter:
        """(N, ...), each dimension that of the largest tensor; zeros for an adapter without one."""
        key = tuple(map(id, tensors))
        if key not in self._by_ids:
            present = {n: t.detach() for n, t in enumerate(tensors) if t is not None}
            self._alive += present.values()
            shape = [max(sizes) for sizes in zip(*(t.shape for t in present.values()), strict=True)]
            stacked = next(iter(present.values())).new_zeros(len(tensors), *shape)
            for n, tensor in present.items():
                stacked[n][_corner(tensor.shape)] = tensor
            self._by_ids[key] = nn.Parameter(stacked)
        return self._by_ids[key]


def _corner(shape: Sequence[int]) -> tuple[slice, ...]:
    """The part of a padded tensor that holds one of this shape."""
    return tuple(map(slice, shape))


def attach_many(model: CausalLM, attachers: Sequence[Callable[[], object]]) -> AdapterRouting:
    """Give `model` one adapter per function of `attachers`; all then train at once.

    Each function attaches its adapter as if it were the only one.
    """
    base = dict(model.named_modules())
    adapters: list[dict[str, nn.Module]] = []
    # each as if alone, then taken off: so it starts with the numbers of a run of its own
    for attach_one in attachers:
        attach_one()
        adapters.append(_detach(model, base))
    routing = AdapterRouting(len(attachers))
    stacks = StackedParameters()
    for name in dict.fromkeys(chain.from_iterable(adapters)):
        parts = [layers_by_name.get(name) for layers_by_name in adapters]
        kinds = {type(part) for part in parts}
        # runs any parts one after another; the other classes compute one product for all
        layer: type[BatchedLayer] = BatchedLayer
        present = [part for part in parts if part is not None]
        if all(isinstance(part, LoRALinear) and part.adds_to_base for part in present):
            layer = BatchedLoRALinear
        elif kinds == {nn.Embedding}:
            layer = BatchedEmbedding
        elif kinds == {nn.Linear}:
            layer = BatchedHead
        model.set_submodule(name, layer(base[name], parts, routing, stacks))
    for batched in batched_layers(model).values():
        batched.release()
    return routing


def _detach(model: CausalLM, base: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Put the base's layers back and return the adapter's by name.

    Modules that train in full are copied.
    """
    parts: dict[str, nn.Module] = {}
    # by the id of the base's parameter, so that tied ones stay tied
    copies: dict[int, nn.Parameter] = {}
    for name, module in base.items():
        current = model.get_submodule(name)
        if current is module:
            parameters = {key: p for key, p in module._parameters.items() if p is not None}
            if not any(p.requires_grad for p in parameters.values()):
                continue
            # trained in full: the adapter gets copies, so that the next one starts from the base's
            # numbers
            current = copy.copy(module)
            current._parameters = {**module._parameters}
            for key, p in parameters.items():
                copies.setdefault(id(p), nn.Parameter(p.detach().clone()))
                current._parameters[key] = copies[id(p)]
        parts[name] = current
    for name in parts:
        model.set_submodule(name, base[name])
    model.requires_grad_(False)
    return parts


def batched_layers(model: nn.Module) -> dict[str, BatchedLayer]:
    return {
        name: module for name, module in model.named_modules() if isinstance(module, BatchedLayer)
    }


def lora_layers(model: nn.Module) -> Iterator[tuple[int, str, LoRALinear]]:
    """Each adapter's number, and its LoRA linears with the names of the base's.

    The only adapter of a model is number 0.
    """
    batched = batched_layers(model)
    for name, layer in batched.items():
        for number, part in enumerate(layer.parts):
            if isinstance(part, LoRALinear):
                yield number, name, part
    if not batched:
        for name, module in model.named_modules():
            if isinstance(module, LoRALinear):
                yield 0, name, module


def trained_by(model: nn.Module, number: int) -> int:
    """Number of parameters that one adapter trains; tied ones count once."""
    sizes = dict[nn.Parameter, int]()
    for layer in batched_layers(model).values():
        for name, shape in layer.shapes[number].items():
            sizes[layer.trained[name]] = shape.numel()
    return sum(sizes.values())


@contextmanager
def only_adapter(model: CausalLM, number: int) -> Iterator[None]:
    """Inside the block `model` has the layers of adapter `number` alone."""
    batched = batched_layers(model)
    for name, layer in batched.items():
        model.set_submodule(name, layer.layer_of(number))
    try:
        yield
    finally:
        for name, layer in batched.items():
            model.set_submodule(name, layer)
