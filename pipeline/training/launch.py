"""Start one run in several processes on this machine, as torchrun does, with one message where it fails."""

import logging
import os
import sys
import uuid
from collections.abc import Sequence

from pipeline.errors import UserError


def launch(devices: int, arguments: Sequence[str]) -> int:
    """`lora` with these arguments in `devices` processes; returns the exit code.

    Raises UserError where the process that speaks could not say why the run ended.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # torchrun's own words: this process does nothing else
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
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
