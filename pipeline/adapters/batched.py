"""Many adapters on one frozen base: one forward of the base for all, their own products in a batch.

N adapters. A forward's rows belong to adapter 0 first, then to adapter 1, and so on: `Share` says how many to each.
Their tensors lie stacked, (N, ...), smaller ones filled up with zeros, which training keeps: the gradient of a row of A
that an adapter has not is a product with its column of B, and the other way round.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.adapters.batched_matmul import batched_lora_forward
from pipeline.adapters.lora import LoRALinear
from pipeline.models.base import CausalLM


class AdapterRouting:
    """Whose the rows of a forward are: `counts` to each adapter. With `off` the base's, whosever they are."""

    def __init__(self, adapters: int) -> None:
        self.off = False
        self._set((0,) * adapters)

    def _set(self, counts: tuple[int, ...]) -> None:
        self.counts = counts
        self.live = [n for n, rows in enumerate(counts) if rows]  # the adapters that have rows
        self.even = len({*counts} - {0}) == 1  # whether they all have as many

    @contextmanager
    def route(self, counts: tuple[int, ...]) -> Iterator[None]:
        """So many rows are each adapter's, while entered."""
        before = self.counts
        self._set(counts)
        try:
            yield
        finally:
            self._set(before)

    @contextmanager
    def base(self) -> Iterator[None]:
        """No row is an adapter's, while entered."""
        self.off = True
        try:
            yield
        finally:
            self.off = False

    def alone(self, number: int, rows: int) -> tuple[int, ...]:
        """The counts where all rows are those of one adapter."""
        return tuple(rows * (n == number) for n in range(len(self.counts)))

    def of_live(self, stacked: Tensor) -> Tensor:
        """(L, ...) of (N, ...): of the adapters that have rows."""
        return stacked if len(self.live) == len(self.counts) else stacked[self.live]


class BatchedLayer(nn.Module):
    """One layer of the base, and for each adapter the `part` that takes its place, or None where the base's stays."""

    def __init__(
        self, base: nn.Module, parts: Sequence[nn.Module | None], share: AdapterRouting, stacks: "StackedParameters"
    ) -> None:
        super().__init__()
        self.base, self.share = base, share
        self.parts = nn.ModuleList(nn.Identity() if part is None else part for part in parts)
        own = [{} if part is None else {k: p for k, p in part.named_parameters() if p.requires_grad} for part in parts]
        self.shapes = [{name: p.shape for name, p in values.items()} for values in own]
        names = dict.fromkeys(name for values in own for name in values)
        self.trained = {name: stacks.of([values.get(name) for values in own]) for name in names}
        for name, p in self.trained.items():
            self.register_parameter(name, p)

    def forward(self, x: Tensor) -> Tensor:
        if self.share.off:
            whole: Tensor = self.base(x)
            return whole
        before = x.shape if isinstance(self.base, nn.Embedding) else x.shape[:-1]  # (B, T) of (B, T) or (B, T, I)
        out = self.adapted(x.reshape(before.numel(), *x.shape[len(before) :]))
        return out.view(*before, out.shape[-1])

    def adapted(self, rows: Tensor) -> Tensor:
        """Each adapter's rows through its own layer, as where it trains alone."""
        stacked = {name: p.unbind(0) for name, p in self.trained.items()}
        shares = torch.split(rows, list(self.share.counts))
        return torch.cat([self._through(n, {k: v[n] for k, v in stacked.items()}, shares[n]) for n in self.share.live])

    def _through(self, number: int, stacked: dict[str, Tensor], rows: Tensor) -> Tensor:
        part, shapes = self.parts[number], self.shapes[number]
        if not shapes:
            out: Tensor = self.base(rows)
            return out
        own = {name: stacked[name][tuple(map(slice, shape))] for name, shape in shapes.items()}
        through: Tensor = functional_call(part, own, (rows,))
        return through

    def release(self) -> None:
        """The parts keep no numbers of what is stacked: there is one copy of them."""
        for part, shapes in zip(self.parts, self.shapes, strict=True):
            part.requires_grad_(False)
            for name in shapes:
                part.get_parameter(name).data = self.trained[name].data.new_empty(0)

    def alone(self, number: int) -> nn.Module:
        """The layer of one adapter, with what it has learned: the same numbers, no copy."""
        part, shapes = self.parts[number], self.shapes[number]
        for name, shape in shapes.items():
            part.get_parameter(name).data = self.trained[name].data[number][tuple(map(slice, shape))]
        return part if shapes else self.base


class BatchedLoRALinear(BatchedLayer):
    """A frozen linear plus an update for each adapter: y = Wx + b + sₙ·BₙAₙx for the rows of adapter n."""

    scales: Tensor

    def __init__(
        self, base: nn.Module, parts: Sequence[LoRALinear | None], share: AdapterRouting, stacks: "StackedParameters"
    ) -> None:
        super().__init__(base, parts, share, stacks)
        self.numbers = [1.0 if part is None else part.scale for part in parts]
        scales = torch.tensor(self.numbers)  # fp32: 16 bits are another scale
        self.register_buffer("scales", scales[:, None, None].to(self.trained["lora_A"].device))

    def forward(self, x: Tensor) -> Tensor:
        share = self.share
        if share.off or not share.even:
            return super().forward(x)
        A, B = (share.of_live(self.trained[name]).to(x.dtype) for name in ("lora_A", "lora_B"))
        return batched_lora_forward(x, self.base, A, B, share.of_live(self.scales))

    def adapted(self, rows: Tensor) -> Tensor:
        counts = list(self.share.counts)
        A, B = (self.trained[name].to(rows.dtype) for name in ("lora_A", "lora_B"))
        shares, out = torch.split(rows, counts), torch.split(self.base(rows), counts)
        each = zip(out, shares, A.unbind(0), B.unbind(0), self.numbers, strict=True)
        return torch.cat([torch.addmm(y, x @ a.T, b.T, alpha=s) for y, x, a, b, s in each])


class BatchedEmbedding(BatchedLayer):
    """An embedding of its own for each adapter: E (N, V, D)."""

    def adapted(self, rows: Tensor) -> Tensor:
        if not self.share.even:
            return super().adapted(rows)
        tables = self.share.of_live(self.trained["weight"])  # (L, V, D)
        L, _, D = tables.shape
        return tables.gather(1, rows.view(L, -1, 1).expand(-1, -1, D)).flatten(0, 1)


class BatchedHead(BatchedLayer):
    """A head of its own for each adapter: W (N, V, D)."""

    def adapted(self, rows: Tensor) -> Tensor:
        if not self.share.even:
            return super().adapted(rows)
        x = rows.view(len(self.share.live), -1, rows.shape[-1])  # (L, M, D)
        out = x @ self.share.of_live(self.trained["weight"]).transpose(1, 2)
        bias = self.trained.get("bias")
        return (out if bias is None else out + self.share.of_live(bias)[:, None]).flatten(0, 1)


class StackedParameters:
    """The trained tensors of N adapters, stacked: one parameter for what is one tensor in each of them, tied or not."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], nn.Parameter] = {}
        self._kept: list[Tensor] = []  # as long as their ids are looked up

    def of(self, tensors: Sequence[Tensor | None]) -> nn.Parameter:
        """(N, ...), as large in each dimension as the largest; zeros for an adapter that has none."""
        key = tuple(map(id, tensors))
        if key not in self._known:
            self._kept += [t for t in tensors if t is not None]
            self._known[key] = nn.Parameter(_stacked(tensors))
        return self._known[key]


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor:
    found = [t.detach() for t in tensors if t is not None]
    shape = [max(sizes) for sizes in zip(*(t.shape for t in found), strict=True)]
    out = found[0].new_zeros(len(tensors), *shape)
    for n, tensor in enumerate(tensors):
        if tensor is not None:
            out[n][tuple(map(slice, tensor.shape))] = tensor.detach()
    return out


def attach_many(model: CausalLM, ways: Sequence[Callable[[], object]]) -> AdapterRouting:
    """Give `model` an adapter for each of `ways`, which attach one to it as if it were alone; all are then trained at
    once."""
    own = dict(model.named_modules())
    found: list[dict[str, nn.Module]] = []
    for attach_one in ways:
        attach_one()
        found.append(_taken_off(model, own))
    share, stacks = AdapterRouting(len(ways)), StackedParameters()
    for name in dict.fromkeys(name for parts in found for name in parts):
        parts = [one.get(name) for one in found]
        model.set_submodule(name, _kind(parts)(own[name], parts, share, stacks))
    for layer in layers(model):
        layer.release()
    return share


def _taken_off(model: CausalLM, own: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The adapter's layers by the name of the base's, which are put back; what trains in full is copied."""
    parts: dict[str, nn.Module] = {}
    copies: dict[int, nn.Parameter] = {}
    for name, module in own.items():
        now = model.get_submodule(name)
        if now is not module:
            parts[name] = now
        elif any(p.requires_grad for p in module.parameters(recurse=False)):
            parts[name] = _copied(module, copies)
    for name in parts:
        model.set_submodule(name, own[name])
    model.requires_grad_(False)
    return parts


def _copied(module: nn.Module, copies: dict[int, nn.Parameter]) -> nn.Module:
    """The same layer with weights of its own; tied ones stay tied."""
    new = copy.copy(module)
    for p in module.parameters(recurse=False):
        copies.setdefault(id(p), nn.Parameter(p.detach().clone()))
    new._parameters = {name: p if p is None else copies[id(p)] for name, p in module._parameters.items()}
    return new


def _kind(parts: Sequence[nn.Module | None]) -> type[BatchedLayer]:
    kinds = {type(part) for part in parts if part is not None}
    if kinds == {LoRALinear} and not any(isinstance(part, LoRALinear) and part.moved for part in parts):
        return BatchedLoRALinear
    if None in parts or len(kinds) > 1:
        return BatchedLayer
    return {nn.Embedding: BatchedEmbedding, nn.Linear: BatchedHead}.get(kinds.pop(), BatchedLayer)


def layers(model: nn.Module) -> Iterator[BatchedLayer]:
    return (module for module in model.modules() if isinstance(module, BatchedLayer))


def trained_by(model: nn.Module, number: int) -> int:
    """Parameters that one adapter trains."""
    own = ((layer.trained[name], shape) for layer in layers(model) for name, shape in layer.shapes[number].items())
    return sum({id(p): shape.numel() for p, shape in own}.values())


@contextmanager
def only(model: CausalLM, number: int) -> Iterator[None]:
    """`model` with adapter `number` alone on it, while entered: as it is where one adapter is trained."""
    held = {name: module for name, module in model.named_modules() if isinstance(module, BatchedLayer)}
    for name, layer in held.items():
        model.set_submodule(name, layer.alone(number))
    try:
        yield
    finally:
        for name, layer in held.items():
            model.set_submodule(name, layer)
