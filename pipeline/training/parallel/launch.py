"""Start one run in several processes on this machine, as torchrun does, with a single message if it fails."""

import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Sequence

from pipeline.errors import UserError

LAUNCHER = "LORA_LAUNCHER"  # environment variable of the workers: the launcher's process id
POLL = 0.5  # seconds between checks of the parent process
GRACE = 30  # seconds from SIGTERM to SIGKILL, as in torchrun's agent


def end_with_launcher() -> None:
    """End this worker once its launcher is gone: SIGTERM, and SIGKILL after GRACE seconds.

    torchrun's agent stops its workers on a signal that it can handle, but not after SIGKILL or a second Ctrl-C. A
    thread polls the parent, because Linux's PR_SET_PDEATHSIG does not exist on macOS, misses a launcher that died
    earlier, and sends only one signal: SIGTERM writes a checkpoint, SIGKILL ends a worker that does not handle SIGTERM.
    """
    launcher = int(os.environ.get(LAUNCHER, os.getppid()))

    def stop_after_launcher() -> None:
        while os.getppid() == launcher:
            time.sleep(POLL)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)  # a collective that hangs holds the main thread, which then never handles SIGTERM
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=stop_after_launcher, name="launcher", daemon=True).start()


def launch(devices: int, arguments: Sequence[str]) -> int:
    """Run `lora` with these arguments in `devices` processes; returns the exit code.

    Raises UserError if there are fewer devices, or if the run failed without an error message from rank 0.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from pipeline.models.device import best_device, cores

    gpus = torch.cuda.device_count() if best_device().type == "cuda" else 0
    if devices > (gpus or cores()):
        limit = f"{gpus}, the number of GPUs" if gpus else f"{cores()}, the cores that this process may use"
        raise UserError(f"--devices must be at most {limit}, got {devices}. Lower it.")
    logging.disable(logging.CRITICAL)  # silences torchrun: this process does nothing else
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // devices)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ[LAUNCHER] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-P", "-m", "cli.main", *arguments)
    except SignalException as stop:
        return 128 + int(stop.sigval)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if codes.get(0, 0) > 0:
            return codes[0]
        killed = {rank: code for rank, code in codes.items() if code < 0}
        rank, code = next(iter(killed.items()), (min(codes), 1))
        reason = f"exited with code {code}"
        if code < 0:
            known = {number.value: number.name for number in signal.Signals}
            reason = f"was killed ({known.get(-code, f'signal {-code}')})"
        raise UserError(
            f"rank {rank} of {devices} {reason}. Run the same command to resume from the last checkpoint."
        ) from None
    return 0
