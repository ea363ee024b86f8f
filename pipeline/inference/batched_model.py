"""One forward for many sequences on one base, each with its own adapter or none."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from pipeline.adapters.mixed import (
    MixedAdapter,
    MixedLayer,
    RowRouting,
    changed_layers,
    is_low_rank,
)
from pipeline.inference.model_pool import Resident, ResidentBase, view
from pipeline.models.base import CausalLM
from pipeline.models.generate import agrees, last_states
from pipeline.models.kernels.decode import fast_decoding
from pipeline.models.pages import PackedCache, PagePool, Prefix, SequenceCache


class Part(NamedTuple):
    """Tokens of one sequence to read now, after those in its cache."""

    adapter: MixedAdapter | None
    cache: SequenceCache
    ids: Sequence[int]


class BatchedModel:
    """A view of a loaded base in which each row goes through its own adapter."""

    def __init__(self, base: ResidentBase) -> None:
        self.model = view(base.loaded.model).eval()
        self.pool = PagePool()
        # what sequences have read, by model and the strength of its adapter
        self._prefixes: WeakKeyDictionary[nn.Module, dict[float, Prefix]] = WeakKeyDictionary()
        self._routing, self._fast = RowRouting(), ExitStack()
        # by the adapter's model; None if its rows cannot be computed beside others
        self._layers: WeakKeyDictionary[nn.Module, dict[str, nn.Module] | None] = (
            WeakKeyDictionary()
        )
        # by the adapter's model and by strength
        self._adapters: WeakKeyDictionary[nn.Module, WeakValueDictionary[float, MixedAdapter]] = (
            WeakKeyDictionary()
        )
        self._fast.enter_context(fast_decoding(self.model))
        self.works = self.model.mixes_lengths and self._agrees(None, base.loaded.model)

    def takes(self, resident: Resident) -> bool:
        """Whether sequences of this model can be read beside others. Tried once per adapter."""
        model = resident.loaded.model
        if not self.works or resident.loaded.adapter is None:
            return self.works
        if model not in self._layers:
            model = resident.at(1).model
            layers = (
                changed_layers(model, resident.base.loaded.model) if model.virtual is None else None
            )
            if layers is not None:
                self._install(layers)
                if not self._agrees(MixedAdapter(layers), model):
                    layers = None
            self._layers[model] = layers
        return self._layers[model] is not None

    def adapter(self, resident: Resident, strength: float) -> MixedAdapter | None:
        """What `logits` needs to know of a model that it `takes`."""
        if resident.loaded.adapter is None or strength == 0:
            return None
        model = resident.loaded.model
        by_strength = self._adapters.setdefault(model, WeakValueDictionary())
        adapter = by_strength.get(strength)
        layers = self._layers[model]
        assert layers is not None
        if adapter is None:
            if all(map(is_low_rank, layers.values())):
                resident.at(1)
                adapter = MixedAdapter(layers, strength)
            else:  # a strength is set in the layers themselves, so each needs its own
                copied = resident.copy_at(strength)
                adapter = MixedAdapter({name: copied.get_submodule(name) for name in layers})
            by_strength[strength] = adapter
        return adapter

    def prefixes(self, resident: Resident, strength: float) -> Prefix:
        """Where the prefixes begin that a model has read at this strength."""
        adapted = resident.loaded.adapter is not None and strength != 0
        model = (resident if adapted else resident.base).loaded.model
        by_strength = self._prefixes.setdefault(model, {})
        return by_strength.setdefault(strength if adapted else 0.0, Prefix())

    @torch.no_grad()
    def logits(self, parts: Sequence[Part]) -> Tensor:
        """After the last token of each part, (N, V). Parts of one adapter must stand side by side.

        The caches get the new tokens, unless an exception is raised.
        """
        lengths = [len(part.ids) for part in parts]
        adapters = [part.adapter for part in parts]
        cache = PackedCache([part.cache for part in parts], lengths)
        self._routing.route(adapters, lengths)
        states = last_states(self.model, cache, [part.ids for part in parts])
        self._routing.route(adapters, [1] * len(parts))
        logits = self.model.logits(states)
        cache.advance()
        return logits

    def forget(self) -> None:
        """Free what is kept of adapters for the next forward."""
        if self._routing.stacked:
            self._routing.clear()
            for layer in self.model.modules():
                if isinstance(layer, MixedLayer):
                    layer.read_routing()

    def _install(self, layers: dict[str, nn.Module]) -> None:
        new = [
            name for name in layers if not isinstance(self.model.get_submodule(name), MixedLayer)
        ]
        if new:
            self._fast.close()
            for name in new:
                self.model.set_submodule(
                    name, MixedLayer(self.model.get_submodule(name), name, self._routing)
                )
            self._fast.enter_context(fast_decoding(self.model))

    def _agrees(self, adapter: MixedAdapter | None, alone: CausalLM) -> bool:
        """Whether two short sequences side by side get the logits that each gets alone.

        The first has the adapter, whose model is `alone`, the other has none.
        """

        def read(caches: Sequence[SequenceCache], parts: Sequence[Sequence[int]]) -> Tensor:
            pairs = zip((adapter, None), caches, parts, strict=True)
            return self.logits([Part(*pair) for pair in pairs])

        return agrees(alone, read)
