"""Keeps models loaded: each base once in memory, adapters as views of it."""

import copy
import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from pipeline.adapters.attach import AdapterScale
from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.folder import quantization_of
from pipeline.adapters.peft import Reading
from pipeline.errors import UserError
from pipeline.files.base_model import base_fingerprint
from pipeline.files.digest_cache import Signature, signature
from pipeline.inference import engine
from pipeline.inference.engine import LoadedModel
from pipeline.models.base import CausalLM
from pipeline.models.device import device_for
from pipeline.project.params.sections import Quantization

Folders = Mapping[str, tuple[Path, Path | None]]  # name → base and adapter
Prepare = Callable[[LoadedModel], None]


def view(model: CausalLM) -> CausalLM:
    """A copy of the modules that shares all tensors, and can be changed by itself."""
    # deepcopy takes a tensor's copy from the memo, where there is one: modules become new objects
    # around the same storage
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()
    }
    return copy.deepcopy(model, memo | {id(buffer): buffer for buffer in model.buffers()})


class ResidentBase:
    """A loaded checkpoint, with the `signature` of its files when it was loaded.

    `loaded`: a model that stays as it was given, whatever becomes of its files.
    """

    def __init__(
        self,
        folder: Path,
        trust_remote_code: bool,
        quantization: Quantization,
        loaded: LoadedModel | None = None,
        make_room: Callable[[], bool] = lambda: False,
    ) -> None:
        self.folder, self.trusted = folder, trust_remote_code
        self.signature = None if loaded else signature(folder)
        self.loaded = loaded or engine.load(
            folder, None, "", trust_remote_code, quantization, make_room
        )

    @cached_property
    def fingerprint(self) -> Mapping[str, str]:
        """`base_fingerprint`, cached: a large base is not read again for each adapter."""
        return base_fingerprint(self.folder)


@dataclass(frozen=True)
class Resident:
    """A loaded model; an adapter can be applied at any strength."""

    loaded: LoadedModel
    base: ResidentBase
    signature: Signature  # of the adapter's folder
    spec: AdapterSpec | None = None  # of LoRA and DoRA
    strength: AdapterScale | None = None

    def at(self, s: float) -> LoadedModel:
        """The model at strength `s`, valid until the next call: 0 base, 1 as trained.

        Raises UserError for virtual tokens at any other strength.
        """
        self.refuse_strength(s)
        if self.loaded.adapter is not None and s == 0:
            return replace(self.loaded, model=self.base.loaded.model)
        if self.strength is not None:
            self.strength.set(s)
        return self.loaded

    def refuse_strength(self, s: float) -> None:
        """Raises UserError where `at` would."""
        if self.loaded.adapter is not None and self.strength is None and s not in (0, 1):
            virtual = self.loaded.model.virtual is not None
            what = "consists of virtual tokens, whose" if virtual else "is not LoRA, so its"
            raise UserError(
                f"{self.loaded.name} {what} strength cannot be scaled. Use strength 0 or 1."
            )

    def copy_at(self, s: float) -> CausalLM:
        """A model like `at(s)` that stays valid. It shares the tensors that `s` does not change."""
        adapted = view(self.at(1).model)
        if self.spec is not None:
            AdapterScale(adapted, self.base.loaded.model, self.spec).set(s)
        return adapted

    @property
    def current(self) -> bool:
        """Whether the files are unchanged since loading."""
        adapter = self.loaded.adapter
        if adapter is not None and signature(adapter) != self.signature:
            return False
        return self.base.signature in (None, signature(self.base.folder))


class ModelPool:
    """Models by name: at most `most`, on at most `most_bases` bases.

    A base stays loaded while any of them uses it. `prepare` changes it before its first use, unless
    its adapters were trained on a quantized one.

    The model unused for longest makes room for another. With `parks` it also does where the device
    has no memory left, and is loaded again when it is asked for; nobody else may hold it then.
    """

    def __init__(
        self,
        parks: bool = False,
        most: float = math.inf,
        most_bases: float = math.inf,
        prepare: Prepare | None = None,
    ) -> None:
        # weak: a base's memory is freed with the last model on it; one per quantization, as they
        # are other weights
        self._bases: WeakValueDictionary[tuple[Path, Quantization], ResidentBase] = (
            WeakValueDictionary()
        )
        self._models = OrderedDict[str, Resident]()  # the last used at the end
        self._parks, self._most, self._most_bases = parks, most, most_bases
        self._prepare = prepare
        self._parked: dict[str, tuple[Path, Path | None, bool]] = {}  # with base, adapter and trust
        self._in_use = Counter[str]()
        self._lock = threading.RLock()  # guards `_models` and `_in_use`

    @property
    def names(self) -> list[str]:
        return [*self._models, *self._parked]

    @property
    def bases(self) -> list[ResidentBase]:
        """The bases in memory."""
        models = [*self._models.values()]  # at once: another thread may use one
        return [*{id(model.base): model.base for model in models}.values()]

    @property
    def device(self) -> torch.device | None:
        """The device of the model that was used last; None without models."""
        models = [*self._models.values()]  # at once, as in `bases`
        return models[-1].loaded.model.device if models else None

    def load(
        self, name: str, base: Path, adapter: Path | None, trust_remote_code: bool = False
    ) -> tuple[Resident, bool]:
        """The model, loaded as `name`, and whether its base was there already. Raises UserError."""
        quantization = quantization_of(adapter)
        # a base whose files changed is loaded beside the old one, which models that are still
        # loaded keep; if none does, its memory may be needed
        shared = self._find_base(base, quantization)
        resident = shared is not None
        self._make_room(name, shared)  # before: two large models may not fit side by side
        if shared is None:
            shared = ResidentBase(
                base, trust_remote_code, quantization, make_room=self._park_oldest
            )
            if self._prepare and quantization == "none":
                self._prepare(shared.loaded)
        self._bases[base.resolve(), quantization] = shared
        if adapter is None:
            model = Resident(replace(shared.loaded, name=name, base=base), shared, ())
        else:
            adapted = view(shared.loaded.model)
            # before loading: a change during it then shows
            files = signature(adapter)
            reading = Reading(fingerprint=lambda _: shared.fingerprint)
            spec = engine.attach_for_inference(adapted, base, adapter, reading)
            loaded = LoadedModel(name, adapted.eval(), shared.loaded.tokenizer, base, adapter)
            lora = spec if isinstance(spec, AdapterSpec) else None
            scales = AdapterScale(adapted, shared.loaded.model, lora) if lora is not None else None
            model = Resident(loaded, shared, files, lora, scales)
        # if its files changed, the adapter was verified against other weights
        if signature(shared.folder) != shared.signature:
            raise UserError(f"{shared.folder} changed while it was loaded. Load it again.")
        self._parked.pop(name, None)
        self._put(name, model)
        # called for its side effect: sets the number of threads, as `engine.load` does
        device_for(shared.loaded.model)
        return model, resident

    def load_next(
        self, name: str, base: Path, adapter: Path | None, trust_remote_code: bool = False
    ) -> LoadedModel:
        """`load` a model in place of all others: of these, only a base that it shares stays.

        The rest is freed first as by `engine.free`, whoever holds it. Raises UserError.
        """
        shared = self._find_base(base, quantization_of(adapter))
        for other in self._models.values():
            if other.loaded.adapter is not None:
                engine.free(other.loaded)
            if other.base is not shared:
                engine.free(other.base.loaded)
        self._models.clear()
        return self.load(name, base, adapter, trust_remote_code)[0].loaded

    def in_turn(self, models: Folders, trust_remote_code: bool = False) -> Iterator[LoadedModel]:
        """Each model by `load_next`; those on one base in a row, so that it is loaded once."""
        by_base: dict[tuple[Path, Quantization], list[str]] = {}
        for name, (base, adapter) in models.items():
            by_base.setdefault((base.resolve(), quantization_of(adapter)), []).append(name)
        for name in chain.from_iterable(by_base.values()):
            yield self.load_next(name, *models[name], trust_remote_code)

    def _find_base(self, base: Path, quantization: Quantization) -> ResidentBase | None:
        """The base in memory, if its files are unchanged."""
        shared = self._bases.get((base.resolve(), quantization))
        return shared if shared and shared.signature == signature(base.resolve()) else None

    def add(self, loaded: LoadedModel) -> None:
        """Take a loaded model, never to be reloaded; with an adapter, both count as a base."""
        alone = replace(loaded, adapter=None)
        base = ResidentBase(loaded.base, False, quantization_of(loaded.adapter), alone)
        self._put(loaded.name, Resident(alone, base, ()))

    def unload(self, name: str) -> None:
        """Drop a model. Raises UserError if it is not loaded."""
        with self._lock:
            if self._parked.pop(name, None) is None:
                self.loaded(name)
                del self._models[name]

    def get(self, name: str) -> Resident:
        """The model, reloaded if its files changed or if it was parked. Raises UserError."""
        if name in self._parked:
            return self.load(name, *self._parked[name])[0]
        return self.find(name) or self.load(name, *_source(self.loaded(name)))[0]

    def find(self, name: str) -> Resident | None:
        """The model called `name` if it is in memory and its files are unchanged."""
        model = self._models.get(name)
        if model is None or not model.current:
            return None
        with self._lock:
            if self._models.get(name) is model:
                self._models.move_to_end(name)
        return model

    def loaded(self, name: str) -> Resident:
        """The model called `name`, as it is in memory. Raises UserError."""
        model = self._models.get(name)
        if model is None:
            raise UserError(f"{name} is not loaded. Loaded: {', '.join(self.names) or 'nothing'}.")
        return model

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Keeps a model in memory."""
        with self._lock:
            self._in_use[name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._in_use[name] -= 1
                if not self._in_use[name]:
                    del self._in_use[name]  # any name that a client sends comes here

    def _put(self, name: str, model: Resident) -> None:
        """Set a model, as the one that was used last."""
        with self._lock:
            self._models[name] = model
            self._models.move_to_end(name)

    def _make_room(self, name: str, base: ResidentBase | None) -> None:
        """Drop models until one more, on `base` or (None) a new one, is within the limits."""
        with self._lock:
            for other in [*self._parked, *self._models]:
                if self._has_room(name, base):
                    return
                if other != name and not self._in_use[other]:
                    self.unload(other)

    def _has_room(self, name: str, base: ResidentBase | None) -> bool:
        bases = {id(model.base) for key, model in self._models.items() if key != name}
        more = base is None or id(base) not in bases
        return len(bases) + more <= self._most_bases and len({*self.names} - {name}) < self._most

    def _park_oldest(self) -> bool:
        """Free the model unused for longest; False if there is none."""
        if not self._parks or not self._models:
            return False
        name = next(iter(self._models))
        self._parked[name] = _source(self._models.pop(name))
        return True


def _source(model: Resident) -> tuple[Path, Path | None, bool]:
    return model.loaded.base, model.loaded.adapter, model.base.trusted
