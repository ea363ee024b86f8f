"""Keeps models loaded: each base once in memory, adapters as views of it."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from pipeline.adapters.attach import AdapterScale
from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.folder import quantization_of
from pipeline.adapters.peft import Reading, load_adapter
from pipeline.errors import UserError
from pipeline.files.base_model import base_fingerprint
from pipeline.files.digest_cache import Signature, signature
from pipeline.inference import engine
from pipeline.inference.engine import LoadedModel
from pipeline.models.base import CausalLM
from pipeline.models.device import device_for
from pipeline.project.params.sections import Quantization


def view(model: CausalLM) -> CausalLM:
    """A copy of the modules that shares all tensors: modules attached to or replaced in it do not
    affect `model`.
    """
    # deepcopy takes what the memo holds for copied: modules become new objects around the same
    # storage
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()
    }
    return copy.deepcopy(model, memo | {id(buffer): buffer for buffer in model.buffers()})


class ResidentBase:
    """A loaded checkpoint, with the `signature` of its files when it was loaded."""

    def __init__(
        self,
        folder: Path,
        trust_remote_code: bool,
        quantization: Quantization,
        loaded: LoadedModel | None = None,
        make_room: Callable[[], bool] = lambda: False,
    ) -> None:
        self.folder, self.signature, self.trusted = folder, signature(folder), trust_remote_code
        self.loaded = loaded or engine.load(
            folder, None, "", trust_remote_code, quantization, make_room
        )

    @cached_property
    def fingerprint(self) -> Mapping[str, str]:
        """Cached, so that a large base is not read again for each adapter."""
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
        """The model at adapter strength `s`, valid until the next call: 0 is the base, 1 the
        adapter as trained.

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
        """A model like `at(s)` that stays valid. It shares the tensors that the strength does not
        change.
        """
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
        return signature(self.base.folder) == self.base.signature


class ModelPool:
    """Models by name. A base stays loaded while any of them uses it.

    With `parks`, a model that finds no room on the device takes that of the models unused for
    longest. These leave memory, and come back when they are asked for: nobody else may hold them.
    """

    def __init__(self, parks: bool = False) -> None:
        # weak: a base's memory is freed with the last model on it; one per quantization, as they
        # are other weights
        self._bases: WeakValueDictionary[tuple[Path, Quantization], ResidentBase] = (
            WeakValueDictionary()
        )
        self._models: dict[str, Resident] = {}  # the last used at the end
        self._parks = parks
        self._parked: dict[str, tuple[Path, Path | None, bool]] = {}  # with base, adapter and trust

    @property
    def names(self) -> list[str]:
        return [*self._models, *self._parked]

    @property
    def bases(self) -> list[ResidentBase]:
        """Those in memory."""
        return [*{id(model.base): model.base for model in self._models.values()}.values()]

    @property
    def device(self) -> torch.device | None:
        """Of the model that was used last; None without models."""
        return next(
            (model.loaded.model.device for model in reversed([*self._models.values()])), None
        )

    def load(
        self, name: str, base: Path, adapter: Path | None, trust_remote_code: bool = False
    ) -> tuple[Resident, bool]:
        """Load a model as `name`; also whether its base was loaded already. Raises UserError as
        engine.load.
        """
        folder, quantization = base.resolve(), quantization_of(adapter)
        shared = self._bases.get((folder, quantization))
        # a base whose files changed is loaded beside the old one, which models that are still
        # loaded keep
        resident = shared is not None and shared.signature == signature(folder)
        if shared is None or not resident:
            shared = None  # its memory may be needed
            shared = ResidentBase(
                base, trust_remote_code, quantization, make_room=self._park_oldest
            )
        self._bases[folder, quantization] = shared
        if adapter is None:
            model = Resident(replace(shared.loaded, name=name, base=base), shared, ())
        else:
            # before loading: a change then shows
            adapted, files = view(shared.loaded.model), signature(adapter)
            spec = load_adapter(
                adapted, base, adapter, Reading(fingerprint=lambda _: shared.fingerprint)
            )
            loaded = LoadedModel(name, adapted.eval(), shared.loaded.tokenizer, base, adapter)
            lora = spec if isinstance(spec, AdapterSpec) else None
            scales = AdapterScale(adapted, shared.loaded.model, lora) if lora is not None else None
            model = Resident(loaded, shared, files, lora, scales)
        # the adapter was then verified against other weights
        if signature(shared.folder) != shared.signature:
            raise UserError(f"{shared.folder} changed while it was loaded. Load it again.")
        self._parked.pop(name, None)
        self._models[name] = model
        # called for its side effect: sets the number of threads for this model
        device_for(model.loaded.model)
        return model, resident

    def add(self, loaded: LoadedModel) -> None:
        """Take a model that is loaded already; with its adapter, if it has one, it counts as a
        base.
        """
        alone = replace(loaded, adapter=None)
        base = ResidentBase(loaded.base, False, quantization_of(loaded.adapter), alone)
        self._models[loaded.name] = Resident(alone, base, ())

    def unload(self, name: str) -> None:
        """Drop a model. Raises UserError if it is not loaded."""
        if self._parked.pop(name, None) is None:
            self.loaded(name)
            del self._models[name]

    def get(self, name: str) -> Resident:
        """The model called `name`, reloaded if its files changed or if it was parked. Raises
        UserError.
        """
        if name in self._parked:
            return self.load(name, *self._parked[name])[0]
        if self.loaded(name).current:
            self._models[name] = self._models.pop(name)
            return self._models[name]
        return self.load(name, *_source(self._models[name]))[0]

    def loaded(self, name: str) -> Resident:
        """The model called `name`, as it is in memory. Raises UserError."""
        if name not in self._models:
            raise UserError(f"{name} is not loaded. Loaded: {', '.join(self.names) or 'nothing'}.")
        return self._models[name]

    def _park_oldest(self) -> bool:
        """Free the model unused for longest; False if there is none."""
        if not self._parks or not self._models:
            return False
        name = next(iter(self._models))
        self._parked[name] = _source(self._models.pop(name))
        return True


def _source(model: Resident) -> tuple[Path, Path | None, bool]:
    return model.loaded.base, model.loaded.adapter, model.base.trusted
