"""A CUDA device that holds no numbers, for torch's CUDA build on a machine without a GPU: see
cuda_environment.py.

Inside `CudaDevice` what touches the device is fake (FakeTensorMode), and the CPU's tensors are
real. Where a number is read it is 1, or true.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# it logs what a probe tries in vain
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)


class CudaDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside the block tensors on `cuda` are fake."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> "CudaDevice":
        # torch.tensor(…, device="cuda") is then a copy, and not lifted to a device that computes
        # nothing
        self.lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        FakeTensor.tolist = lambda tensor: tensor.cpu().tolist()  # type: ignore[assignment, method-assign]  # it reads one by one
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        del FakeTensor.tolist
        torch._C._set_only_lift_cpu_tensors(self.lifts)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.removeprefix("aten::")
        leaves = tree_leaves((args, kwargs))
        there = any(isinstance(one, FakeTensor) for one in leaves)
        if name == "_pin_memory":  # all of this machine's memory will do
            return args[0]
        if not there and not any(
            isinstance(one, torch.device) and one.type == "cuda" for one in leaves
        ):
            return func(*args, **kwargs)
        if name == "_local_scalar_dense":
            return 1.0 if args[0].dtype.is_floating_point else args[0].dtype == torch.bool or 1
        if there and [str(result.type) for result in func._schema.returns] == ["bool"]:
            return True
        if (
            name == "_to_copy"
            and there
            and torch.device(kwargs.get("device") or "cuda").type == "cpu"
        ):
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name == "_to_copy" and not there:
            source: Tensor = args[0]
            with self.fake:
                return torch.empty_strided(
                    source.shape,
                    source.stride(),
                    dtype=kwargs.get("dtype") or source.dtype,
                    device=kwargs["device"],
                )
        if name == "copy_" and not isinstance(args[0], FakeTensor):
            return args[0].fill_(1)
        if name == "copy_" and not isinstance(args[1], FakeTensor):
            return args[0]
        with self.fake:
            return func(*args, **kwargs)
