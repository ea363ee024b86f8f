"""Start one run in several processes, as torchrun does, with a single message on each machine if it fails."""

import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

from pipeline.errors import UserError

LAUNCHER = "LORA_LAUNCHER"  # environment variable of the workers: the launcher's process id
POLL = 0.5  # seconds between checks of the parent process
GRACE = 30  # seconds from SIGTERM to SIGKILL, as in torchrun's agent
MEET = 300  # seconds in which all machines have to start


def end_with_launcher() -> None:
    """End this process once its launcher is gone, or DVC, which started it: SIGTERM, and SIGKILL after GRACE seconds.

    DVC passes no signal on, and torchrun's agent stops its workers neither after SIGKILL nor after a second Ctrl-C. A
    thread polls the parent, because Linux's PR_SET_PDEATHSIG does not exist on macOS, misses a launcher that died
    earlier, and sends only one signal: SIGTERM writes a checkpoint, SIGKILL ends a worker that does not handle SIGTERM.
    """
    given = os.environ.get(LAUNCHER, "")
    launcher = int(given) if given.isdecimal() else os.getppid()
    shell = dvc = None
    if LAUNCHER not in os.environ and "DVC_STAGE" in os.environ:
        import psutil  # 10 ms that only this case pays

        shell = psutil.Process(launcher)  # by which DVC runs a command: bash is replaced by it, dash waits for it
        dvc = shell.ppid() if shell.name().endswith("sh") else None

    def stop_after_launcher() -> None:
        while os.getppid() == launcher and (dvc is None or shell is None or shell.ppid() == dvc):
            time.sleep(POLL)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)  # a collective that hangs holds the main thread, which then never handles SIGTERM
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=stop_after_launcher, name="launcher", daemon=True).start()


def launch(devices: int, arguments: Sequence[str], nodes: int = 1, endpoint: str = "") -> int:
    """Run `lora` with these arguments in `devices` processes, on each of `nodes` machines; returns the exit code.

    `endpoint`: host and port of one of the machines, at which all of them meet. Raises UserError if there are fewer
    devices, if the machines do not meet, or if the run failed without an error message from this machine.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # before torch, which reads it as it is imported
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from pipeline.models.device import best_device, cores
    from pipeline.project.process import hangs_up

    gpus = torch.cuda.device_count() if best_device().type == "cuda" else 0
    if devices > (gpus or cores()):
        limit = f"{gpus}, the number of GPUs" if gpus else f"{cores()}, the cores that this process may use"
        raise UserError(f"--devices must be at most {limit}, got {devices}. Lower it.")
    between_machines = _between_machines(endpoint) if endpoint else {}
    logging.disable(logging.CRITICAL)  # silences torchrun: this process does nothing else
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // devices)))
    os.environ[LAUNCHER] = str(os.getpid())
    # No machine joins a run later, so once the agents have met they need not talk: where a connection is cut, an agent
    # would wait for an answer, or end its workers before they have written a checkpoint and said why.
    for method, answer in {"num_nodes_waiting": 0, "_keep_alive": None, "shutdown": True}.items():
        setattr(DynamicRendezvousHandler, method, lambda _, answer=answer: answer)
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=devices,
        run_id="lora" if endpoint else str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint or "localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle=",".join(["SIGTERM", "SIGINT", "SIGQUIT", *["SIGHUP"] * hangs_up()]),
        **between_machines,
    )
    try:
        elastic_launch(config, sys.executable)("-P", "-m", "cli.main", *arguments)
    except SignalException as stop:
        return 128 + int(stop.sigval)
    except RendezvousError:
        raise UserError(
            f"the {nodes} machines did not meet at {endpoint} within {MEET} s. Run the same command on each; "
            "--rdzv-endpoint is the address of one of them, and a port that is free there."
        ) from None
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        first = [failure.exitcode for failure in error.failures.values() if failure.local_rank == 0]
        if first and first[0] > 0:  # it has said why
            return first[0]
        killed = {rank: code for rank, code in codes.items() if code < 0}
        rank, code = next(iter(killed.items()), (min(codes), 1))
        reason = f"exited with code {code}"
        if code < 0:
            known = {number.value: number.name for number in signal.Signals}
            reason = f"was killed ({known.get(-code, f'signal {-code}')})"
        raise UserError(
            f"rank {rank} of {devices * nodes} {reason}. Run the same command to resume from the last checkpoint."
        ) from None
    return 0


def _between_machines(endpoint: str) -> dict[str, Any]:
    """torchrun's settings that it would guess from the machine's name, which often belongs to no network interface."""
    import psutil

    host, _, port = endpoint.rpartition(":")
    try:
        if not 0 < int(port) < 2**16:
            raise ValueError
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            own = probe.getsockname()[0]
    except (OSError, ValueError):
        raise UserError(
            f"--rdzv-endpoint must be HOST:PORT of a machine that this one reaches, got {endpoint}. Correct it."
        ) from None
    for name, addresses in psutil.net_if_addrs().items():
        if own in (one.address for one in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    return {
        "local_addr": own,
        "rdzv_configs": {"is_host": own == address[0], "join_timeout": MEET, "read_timeout": MEET},
    }
