"""A CUDA device that computes no numbers, for torch's CUDA build on a machine without a GPU: see
cuda_environment.py.

Inside `CudaDevice` its tensors lie in the host's memory: what torch checks before it launches a
kernel is checked, and the kernels do nothing. Inside `FakeCudaDevice` they are fake
(FakeTensorMode) and take no memory. Where a number is read it is 1, or true.
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


def is_on_device(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type == "cuda"


class CudaDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __enter__(self) -> "CudaDevice":
        # torch.tensor(…, device="cuda") is then a copy, which dispatch sees
        self.lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN asks a card of its own accord
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch._C._set_only_lift_cpu_tensors(self.lifts)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.removeprefix("aten::")
        if name == "_pin_memory":  # all of this machine's memory will do
            return args[0]
        if any(map(is_on_device, tree_leaves((args, kwargs)))):
            if name == "_local_scalar_dense":
                return 1.0 if args[0].dtype.is_floating_point else args[0].dtype == torch.bool or 1
            if [str(result.type) for result in func._schema.returns] == ["bool"]:
                return True
            if name == "_to_copy" and torch.device(kwargs.get("device") or "cuda").type == "cpu":
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if name == "copy_" and not is_on_device(args[0]):
                return args[0].fill_(1)
        return self.compute(func, args, kwargs)

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


class FakeCudaDevice(CudaDevice):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> "FakeCudaDevice":
        FakeTensor.tolist = lambda tensor: tensor.cpu().tolist()  # type: ignore[assignment, method-assign]  # it reads one by one
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        del FakeTensor.tolist

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        leaves = tree_leaves((args, kwargs))
        if not any(
            is_on_device(leaf) or (isinstance(leaf, torch.device) and leaf.type == "cuda")
            for leaf in leaves
        ):
            return func(*args, **kwargs)
        name = func._schema.name
        if name == "aten::copy_" and not is_on_device(args[1]):
            return args[0]
        with self.fake:
            if name != "aten::_to_copy" or is_on_device(args[0]):
                return func(*args, **kwargs)
            dtype = kwargs.get("dtype") or args[0].dtype
            layout = args[0].shape, args[0].stride()
            return torch.empty_strided(*layout, dtype=dtype, device=kwargs["device"])
