"""Start one run in several processes, as torchrun does; a failure is one message a machine."""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

from pipeline.errors import Lost, UserError

LAUNCHER = "LORA_LAUNCHER"  # environment variable of the workers: the launcher's process id
POLL = 0.5  # seconds between checks of the parent process
GRACE = 30  # seconds from SIGTERM to SIGKILL, as in torchrun's agent
MEET = 300  # seconds in which all machines have to start
# torchrun's settings for one machine
ALONE = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}


def end_with_launcher() -> None:
    """End this process once its launcher is gone, or DVC, which started it.

    It gets SIGTERM, and SIGKILL after GRACE seconds. DVC passes no signal on, and torchrun's agent
    stops its workers neither after SIGKILL nor after a second Ctrl-C. A thread polls the parent,
    because Linux's PR_SET_PDEATHSIG does not exist on macOS, misses a launcher that died earlier,
    and sends only one signal: SIGTERM writes a checkpoint, SIGKILL ends a worker that does not
    handle SIGTERM.
    """
    given = os.environ.get(LAUNCHER, "")
    launcher = int(given) if given.isdecimal() else os.getppid()
    shell = dvc = None
    if LAUNCHER not in os.environ and "DVC_STAGE" in os.environ:
        import psutil  # 10 ms that only this case pays

        # by which DVC runs a command: bash is replaced by it, dash waits for it
        shell = psutil.Process(launcher)
        dvc = shell.ppid() if shell.name().endswith("sh") else None

    def stop_after_launcher() -> None:
        while os.getppid() == launcher and (dvc is None or shell is None or shell.ppid() == dvc):
            time.sleep(POLL)
        os.kill(os.getpid(), signal.SIGTERM)
        # a collective that hangs holds the main thread, which then never handles SIGTERM
        time.sleep(GRACE)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=stop_after_launcher, name="launcher", daemon=True).start()


def launch(
    devices: int,
    arguments: Sequence[str],
    nodes: int = 1,
    endpoint: str = "",
    node_rank: int | None = None,
) -> int:
    """Run `lora` in `devices` processes on each of `nodes` machines; returns the exit code.

    `endpoint`: host and port of machine 0, at which all of them meet; `node_rank`: this machine's
    number, if None that of Slurm, else by its address and arrival.

    Raises UserError if there are fewer devices or the machines do not meet, and Lost if the run
    failed without an error message from this machine.
    """
    # before torch, which reads it as it is imported
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from pipeline.models.device import best_device, cores
    from pipeline.project.process import hangs_up

    gpus = torch.cuda.device_count() if best_device().type == "cuda" else 0
    if devices > (gpus or cores()):
        limit = f"{cores()}, the cores that this process may use"
        if gpus:
            limit = f"{gpus}, the number of GPUs"
        raise UserError(f"--devices must be at most {limit}, got {devices}. Lower it.")
    meeting = None
    if endpoint:
        meeting = _Meeting(endpoint, nodes, _slurm_node(nodes) if node_rank is None else node_rank)
    logging.disable(logging.CRITICAL)  # silences torchrun
    # only the main thread has any
    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGINT) if is_main else ()
    handlers = {number: signal.getsignal(number) for number in numbers}
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // devices)))
    os.environ[LAUNCHER] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=devices,
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle=",".join(["SIGTERM", "SIGINT", "SIGQUIT", *["SIGHUP"] * hangs_up()]),
        **(meeting.settings if meeting else ALONE),
    )
    try:
        elastic_launch(config, sys.executable)("-P", "-m", "lora_workbench", *arguments)
    except SignalException as stop:
        return 128 + int(stop.sigval)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        first = [failure.exitcode for failure in error.failures.values() if failure.local_rank == 0]
        if first and first[0] > 0:  # it has said why
            return first[0]
        rank = next((rank for rank, code in codes.items() if code < 0), min(codes))
        code = codes[rank]
        reason = f"exited with code {code}"
        if code < 0:
            known = {number.value: number.name for number in signal.Signals}
            reason = f"was killed ({known.get(-code, f'signal {-code}')})"
        raise Lost(
            f"rank {rank} of {devices * nodes} {reason}. Run the same command to resume from the "
            "last checkpoint."
        ) from None
    finally:
        # `lora train` goes on in this process
        logging.disable(logging.NOTSET)
        os.environ.pop(LAUNCHER, None)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


class _Meeting:
    """The machines of a run, met at its endpoint; `settings` are then those of torchrun.

    They meet here because torchrun's own waits are deaf to Ctrl-C. None can join a run later, so
    the rendezvous is torchrun's static one, which asks for the others no more: where a connection
    is cut, it does not end the workers before they have written a checkpoint. Raises UserError.
    """

    def __init__(self, endpoint: str, nodes: int, node_rank: int | None) -> None:
        from torch.distributed import DistNetworkError

        address, local = _addresses(endpoint)
        self._endpoint, self._nodes, self._started = endpoint, nodes, time.monotonic()
        is_host = node_rank == 0
        if node_rank is None:
            # 127.0.1.1, which Debian gives to a machine's name, is no interface's address
            is_host = local == address or ip_address(address).is_loopback
        while True:
            try:
                # the host's serves the run: it is kept
                self._store = _open_store(endpoint, is_host)
                rank = self._join(0 if is_host else node_rank)
                break
            except DistNetworkError:  # the port is taken, nobody is there yet, or the host has left
                self._wait()
            is_host = node_rank == 0  # else another process of this machine has the port
        self.settings = {
            "run_id": "lora",
            "rdzv_backend": "static",
            "rdzv_endpoint": endpoint,
            "rdzv_configs": {"rank": rank, "timeout": MEET},
            "local_addr": local,
        }

    def _join(self, node_rank: int | None) -> int:
        """This machine's number, once all are there."""
        rank = self._store.add("arrived", 1) if node_rank is None else node_rank
        if self._store.add(f"machine {rank}", 1) > 1 or rank >= self._nodes:
            raise UserError(
                f"machine {rank} of {self._nodes} is there already. Give each its own "
                "--node-rank, from 0 to "
                f"{self._nodes - 1}, or stop the command on all of them and start it again."
            )
        machines = [f"machine {number}" for number in range(self._nodes)]
        try:
            while not self._store.check(machines):
                self._wait()
        except (KeyboardInterrupt, UserError):
            self._store.delete_key(f"machine {rank}")  # it may be started again
            raise
        return rank

    def _wait(self) -> None:
        seconds = time.monotonic() - self._started
        if seconds > MEET:
            raise UserError(
                f"the {self._nodes} machines did not meet at {self._endpoint} within "
                f"{seconds:.0f} s. Run the same command on each; --rdzv-endpoint is the address of "
                "one of them, and a port that is free there."
            )
        time.sleep(POLL)


def _slurm_node(nodes: int) -> int | None:
    """This machine's number among the nodes of a Slurm step, or None if it is not in one of so
    many. Raises UserError.
    """
    count = os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES")
    number = os.environ.get("SLURM_NODEID")
    if count != str(nodes) or number is None:
        return None
    if not number.isdecimal() or int(number) >= nodes:
        raise UserError(
            f"SLURM_NODEID must be a number from 0 to {nodes - 1}, got {number[:40]!r}. Unset it, "
            "or name this machine's number with --node-rank."
        )
    return int(number)


def _open_store(endpoint: str, is_host: bool) -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, _, port = endpoint.rpartition(":")
    patience = timedelta(seconds=2)
    return TCPStore(
        host, int(port), None, is_host, patience, wait_for_workers=False, multi_tenant=True
    )


def _addresses(endpoint: str) -> tuple[str, str]:
    """The endpoint's address and this machine's on the way there, whose interface gloo is told.

    torchrun would guess it from the machine's name, which often belongs to no interface. Raises
    UserError.
    """
    import psutil

    host, _, port = endpoint.rpartition(":")
    try:
        if not 0 < int(port) < 2**16:
            raise ValueError
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        if ip_address(address[0]).is_unspecified:  # 0.0.0.0, which is every machine
            raise ValueError
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            local = probe.getsockname()[0]
    except (OSError, ValueError):
        raise UserError(
            "--rdzv-endpoint must be HOST:PORT of a machine that this one reaches, got "
            f"{endpoint}. Correct it."
        ) from None
    for name, addresses in psutil.net_if_addrs().items():
        if any(interface.address == local for interface in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    return str(address[0]), local
