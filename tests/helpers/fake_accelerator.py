"""A stand-in for an accelerator: a device whose tensors lie on the CPU, and which refuses, as a GPU
does, to compute with tensors that were left there.

What runs on it gives the CPU's numbers, so that tests see without a GPU whether everything was
moved.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from pipeline.models import device

try:
    from torch.utils.backend_registration import (
        _DummyBackendModule,
        _setup_privateuseone_for_python_backend,
    )
# torch 2.9, the oldest that the project runs on: there the tests on this device are skipped
except ImportError:
    _DummyBackendModule = object  # type: ignore[misc, assignment]
    _setup_privateuseone_for_python_backend = None  # type: ignore[assignment]

NAME = "standin"
MOVES = {"aten::copy_", "aten::_to_copy"}  # what may have tensors of two devices
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm"}
ran: set[str] = set()  # names of the operations that ran there


class There(Tensor):
    """A tensor on the device; `held` is the one on the CPU that has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "There":
        made: There = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, *args, **(kwargs or {}))

    def _data(self) -> Tensor:
        return There(self.held)

    def _set_data(self, value: Tensor) -> None:
        assert isinstance(value, There)
        vars(Tensor.__base__)["data"].__set__(self, value)
        self.held = value.held

    def tolist(self) -> Any:
        return self.held.tolist()

    data = property(_data, _set_data)


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """The operation on the CPU's tensors; its results are on the device asked for, or else on its
    inputs' device.
    """
    name = func._schema.name
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    there = [one for one in tensors if isinstance(one, There)]
    # numbers may be anywhere
    left = [one for one in tensors if not isinstance(one, There) and one.dim()]
    if there and left and name not in MOVES:
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, found {NAME} and cpu"
        )
    asked = kwargs.get("device")
    to_there = bool(there) if asked is None else torch.device(asked).type == NAME
    if asked is not None:
        kwargs = {**kwargs, "device": "cpu"}
    args, kwargs = tree_map(lambda one: one.held if isinstance(one, There) else one, (args, kwargs))
    found = func(*args, **kwargs)
    if to_there:
        ran.add(name)
    same = {id(one.held): one for one in there}  # in-place operations give back what they got

    def wrapped(one: Any) -> Any:
        if not isinstance(one, Tensor) or isinstance(one, There):
            return one
        known = same.get(id(one))
        return known if known is not None else There(one) if to_there else one

    return tree_map(wrapped, found)


class _Factories(TorchFunctionMode):
    """These move what they make in a way that no Python backend sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (
            func in (torch.tensor, torch.as_tensor)
            and torch.device(kwargs.get("device") or "cpu").type == NAME
        ):
            return func(*args, **{**kwargs, "device": "cpu"}).to(NAME)
        if func is Tensor.new_tensor and isinstance(args[0], There):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(NAME)
        if func is Tensor.__getitem__ and isinstance(args[0], There) and isinstance(args[1], list):
            return args[0][torch.tensor(args[1]).to(NAME)]
        return func(*args, **kwargs)


class _Module(_DummyBackendModule):
    """What torch asks of `torch.standin`: away from `standin()` there is no accelerator."""

    def __init__(self) -> None:
        self.present = False

    def is_available(self) -> bool:
        return self.present

    def device_count(self) -> int:
        return int(self.present)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_module = _Module()


def _cannot_have_it() -> bool:
    return _setup_privateuseone_for_python_backend is None or torch.cuda.is_available()


def register() -> torch.library.Library | None:
    """Make the device known, once a process and before its first backward: autograd counts devices
    then.

    It is known for as long as what is returned is kept. None: this torch cannot have such a device;
    or it has a GPU, for which it would then pin no memory.
    """
    if _cannot_have_it():
        return None
    _setup_privateuseone_for_python_backend(NAME, backend_module=_module)
    library = torch.library.Library("_", "IMPL")  # type: ignore[no-untyped-call]
    library.fallback(_run, "PrivateUse1")  # type: ignore[no-untyped-call]
    return library


@contextmanager
def standin() -> Iterator[torch.device]:
    """The device, while entered; `ran` begins empty. Skips the test where torch cannot have it."""
    if _cannot_have_it():
        pytest.skip("this torch has no devices written in Python, or it has a GPU")
    ran.clear()
    _module.present = True
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    # a moved parameter stays the same one, as on a GPU
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with _Factories():
            yield torch.device(NAME)
    finally:
        _module.present = False
        torch.__future__.set_swap_module_params_on_conversion(swaps)


@contextmanager
def best(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The best device here, for models of any size."""
    with standin() as there:
        monkeypatch.setattr(device, "best_device", lambda: there)
        monkeypatch.setattr(device, "LARGE", 0)
        # two threads sum in another order than the CPU's one
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        yield there


@contextmanager
def strays(there: torch.device) -> Iterator[list[str]]:
    """The modules that are called while parameters of theirs are not on the device."""
    found: list[str] = []

    def note(module: nn.Module, _inputs: Any) -> None:
        if any(p.device.type != there.type for p in module.parameters(recurse=False)):
            found.append(type(module).__name__)

    hook = nn.modules.module.register_module_forward_pre_hook(note)
    yield found
    hook.remove()


def narrow(there: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without numbers of 64 bits, as Apple's GPU is."""
    run = _run

    def narrowed(func: Any, *args: Any, **kwargs: Any) -> Any:
        made = run(func, *args, **kwargs)
        if any(
            isinstance(t, Tensor) and t.device.type == NAME and t.dtype == torch.float64
            for t in tree_leaves(made)
        ):
            raise TypeError(f"{func}: the device does not support float64")
        return made

    monkeypatch.setattr(sys.modules[__name__], "_run", narrowed)
    monkeypatch.setattr(device, "WITHOUT_FP64", there.type)


def used() -> bool:
    """Whether a matrix product ran there; asked once."""
    found = bool(PRODUCTS & ran)
    ran.clear()
    return found


def alike(one: str, other: str) -> bool:
    """Whether two texts are the same but for the last digits of the numbers in them."""
    (words, numbers), (others, known) = map(_taken_apart, (one, other))
    return words == others and numbers == pytest.approx(known, rel=1e-3, abs=1e-4)


def _taken_apart(text: str) -> tuple[list[str], list[float]]:
    parts = re.split(r"(\d+\.\d+(?:e-?\d+)?)", text)
    return parts[::2], [float(number) for number in parts[1::2]]
