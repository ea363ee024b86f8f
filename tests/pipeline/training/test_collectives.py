"""Which errors of a collective mean a lost rank, which a lack of memory, and which a mistake that
must be seen.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.errors import UserError, is_out_of_memory
from pipeline.training.parallel import collectives, ranks
from pipeline.training.parallel.collectives import is_lost
from tests.helpers.fake_ranks import fake_rank

INTERNAL = "ncclInternalError: Internal check failed."
NCCL = (
    "NCCL error in: torch/csrc/distributed/c10d/NCCLUtils.cpp:94, {}, NCCL version "
    "2.27.5\n{}\nLast error:\n{}"
)
UNHANDLED = "ncclUnhandledCudaError: Call to CUDA function failed."
SYSTEM = (
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device "
    "error."
)


def of_nccl(reason: str, kind: str, last: str) -> dist.DistBackendError:
    return dist.DistBackendError(NCCL.format(reason, kind, last))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[…/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:7052."),
        RuntimeError(
            "[…/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:33979: Connection reset by "
            "peer."
        ),
        RuntimeError("[…/gloo/transport/tcp/pair.cc:602] writev [10.0.0.5]:2210: No route to host"),
        RuntimeError(
            "[…/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv "
            "operation to …"
        ),
        RuntimeError("Application timeout caused pair closure"),
        dist.DistNetworkError("Connection reset by peer"),
        dist.DistStoreError("wait timeout after 600000ms, keys: /default_pg/0//1"),
        dist.DistBackendError("NCCL communicator was aborted on rank 0. "),
        dist.DistBackendError(
            "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=…)"
        ),
        of_nccl(
            "remote process exited or there was a network error",
            "ncclRemoteError: A call failed possibly due to a network error or a remote process "
            "exiting prematurely.",
            "NET/IB : Got completion from peer 10.0.0.5<39138> with error 12, opcode 0, len 0, "
            "vendor err 129",
        ),
        of_nccl(
            "unhandled system error",
            SYSTEM,
            "socketProgress: Connection closed by remote peer gpu-2<51159>",
        ),
        of_nccl("internal error", INTERNAL, "Net : Connection closed by remote peer"),
    ],
)
def test_a_connection_that_fails_is_a_lost_rank(error: RuntimeError) -> None:
    with fake_rank(0, 2):
        assert is_lost(error) and not is_out_of_memory(error)
    assert not is_lost(error), "in a single process there is none to lose"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        of_nccl("unhandled cuda error", UNHANDLED, "Cuda failure 2 'out of memory'"),
        of_nccl("unhandled cuda error", UNHANDLED, "Failed to CUDA calloc 8388608 bytes"),
        of_nccl("unhandled cuda error", UNHANDLED, "Failed to CUDA calloc async 608 bytes"),
    ],
)
def test_memory_that_ran_out_inside_a_library_is_no_lost_rank(error: RuntimeError) -> None:
    with fake_rank(0, 2):
        assert is_out_of_memory(error) and not is_lost(error)


@pytest.mark.parametrize(
    "error",
    [
        of_nccl(
            "invalid usage",
            "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.",
            "",
        ),
        of_nccl(
            "invalid argument",
            "ncclInvalidArgument: Invalid value for an argument.",
            "invalid root 9",
        ),
        of_nccl("unhandled cuda error", UNHANDLED, "Cuda failure 1 'invalid argument'"),
        of_nccl(
            "unhandled system error",
            SYSTEM,
            "Error while creating shared memory segment nccl-x",
        ),
        dist.DistBackendError("NCCL only supports CUDA tensors, but got a tensor on cpu"),
        ValueError("ProcessGroupGloo::allgather: invalid tensor size at index 0"),
        RuntimeError(
            "[enforce fail at …/gloo/pair.cc:456] op.preamble.length <= op.nbytes. 2000 vs 4"
        ),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
        RuntimeError("the tracker's connection timed out"),
    ],
)
def test_a_mistake_is_neither(error: Exception) -> None:
    with fake_rank(0, 2):
        assert not is_lost(error) and not is_out_of_memory(error)


def test_a_sum_of_the_device_is_not_used_if_a_rank_was_lost_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NCCL's kernel is then aborted, and the tensor holds anything: no step is taken with it."""
    heartbeats: Any = SimpleNamespace(lost="")
    found = iter(["", "rank 1 of 2"])
    stream = SimpleNamespace(synchronize=lambda: setattr(heartbeats, "lost", next(found)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(dist, "all_reduce", lambda *_: None)
    monkeypatch.setattr(collectives, "_heartbeats", heartbeats)
    on_device: Any = SimpleNamespace(device=torch.device("cuda"))
    with fake_rank(0, 2):
        collectives.all_reduce(on_device)
        with pytest.raises(dist.DistNetworkError, match="rank 1 of 2"):
            collectives.all_reduce(on_device)
        assert is_lost(RuntimeError("a kernel that reads what was aborted")), (
            "and what follows of it is no mistake"
        )


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (
            of_nccl(
                "invalid usage", "ncclInvalidUsage: …", "Duplicate GPU detected : rank 0 and rank 1"
            ),
            None,
        ),
        (of_nccl("unhandled cuda error", UNHANDLED, "Failed to CUDA calloc 8388608 bytes"), None),
        (
            of_nccl("internal error", INTERNAL, "Net : Connection closed by remote peer"),
            "do not reach each other",
        ),
        (
            dist.DistNetworkError("The client socket has timed out after 60000ms"),
            "do not reach each other",
        ),
        (RuntimeError("makeDeviceForInterface(): unsupported gloo device"), "GLOO_SOCKET_IFNAME"),
    ],
)
def test_processes_that_do_not_meet_are_told_from_a_library_that_fails(
    error: RuntimeError, shown: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(dist, "init_process_group", fail)
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # restored afterwards
    with (
        pytest.raises(UserError if shown else type(error), match=shown) as raised,
        ranks.process_group("train"),
    ):
        pass
    assert shown or raised.value is error
