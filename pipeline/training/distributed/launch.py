"""Start one run in several processes on this machine, as torchrun does, with one message where it fails."""

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
POLL = 0.5  # seconds between two looks at the parent
GRACE = 30  # seconds from SIGTERM to SIGKILL, as many as torchrun's agent gives


def end_with_launcher() -> None:
    """Watch the process that started this worker; once it is gone, stop this one: SIGTERM, after GRACE seconds SIGKILL.

    torchrun's agent stops its workers when it gets a signal that it can handle, but not after SIGKILL or a second
    Ctrl-C. A thread polls the parent, because Linux's PR_SET_PDEATHSIG does not exist on macOS, misses a launcher that
    died first, and sends one signal only: SIGTERM writes a checkpoint, and SIGKILL ends what does not handle it.
    """
    launcher = int(os.environ.get(LAUNCHER, os.getppid()))
    threading.Thread(target=_stop_after, args=(launcher,), name="launcher", daemon=True).start()


def _stop_after(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(POLL)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)  # a collective that hangs holds the main thread, which then never handles SIGTERM
    os.kill(os.getpid(), signal.SIGKILL)


def launch(devices: int, arguments: Sequence[str]) -> int:
    """`lora` with these arguments in `devices` processes; returns the exit code.

    Raises UserError where there are fewer devices, and where the process that speaks could not say why the run ended.
    """
    _refuse_missing(devices)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from pipeline.models.device import cores

    logging.disable(logging.CRITICAL)  # torchrun's own words: this process does nothing else
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
        how = f"was stopped by signal {-code}" if code < 0 else f"ended with code {code}"
        raise UserError(
            f"process {rank} of {devices} {how}, and with it the run. Run the same command to go on from its last "
            "checkpoint."
        ) from None
    return 0


def _refuse_missing(devices: int) -> None:
    import torch

    from pipeline.models.device import cores

    gpus = torch.cuda.device_count()
    if devices > (gpus or cores()):
        what = f"{gpus}, the GPUs here" if gpus else f"{cores()}, the cores that this process may use"
        raise UserError(f"--devices must be at most {what}, got {devices}. Lower it.")
