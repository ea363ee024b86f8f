"""Ray: a remote call for each unit, on a cluster that is there or on one of this machine alone."""

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UserError, first_line, require
from pipeline.fleet.engines import Place, Queued, Submission, bytes_of, place_of
from pipeline.fleet.engines._attended import Attended
from pipeline.fleet.unit import attempt_command, attempts

TO_ANSWER, TO_CONNECT = 5.0, 30.0  # seconds
POLL = 0.5  # seconds after which Ctrl-C is heard; a longer call of Ray does not hear it
STORE = 80 << 20  # bytes of Ray's object store, nearly its least: nothing is in it
# no reports to its makers, no copy of the project's environment to the nodes under `uv run`
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
CONNECT = f"import ray, sys; ray.init(sys.argv[1], **{QUIET})"


class Attempt(NamedTuple):
    """A remote call that runs a unit. `before`: the unit's attempts until then."""

    call: Any
    folder: Path
    before: int

    @property
    def has_begun(self) -> bool:
        return len(attempts(self.folder)) > self.before


class Ray(Attended[Attempt]):
    """Ray chooses a node for each unit; that the unit is tried again is for `wait`."""

    unread = ("options", "time", "warn")

    def __init__(self, name: str, cluster: Any) -> None:
        super().__init__()
        self._name, self._cluster = name, cluster

    def check(self) -> None:
        require("engine: ray", f"{self._name}.engine: ray")
        if address := self._cluster.address:
            host, _, port = address.rpartition(":")
            try:
                socket.create_connection((host.strip("[]"), int(port)), TO_ANSWER).close()
            except (OSError, OverflowError) as error:
                raise UserError(
                    f"{self._name}.address: {address} does not answer ({first_line(error)}). Start "
                    "Ray there by `ray start --head`, or correct fleet.yaml."
                ) from None

    def place(self) -> Place:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        room = sum(map(self._room, nodes))
        if not room:
            needs = ", ".join(f"{need:,} {name}" for name, need in self._needs.items())
            raise UserError(
                f"{self._name}: no node of Ray has {needs}, which a unit needs. See `ray status`; "
                "edit cpus, gpus or memory in fleet.yaml."
            )
        return place_of(self._cluster, min(room, self._cluster.at_once), "1 core")

    def start(self, run: Submission, number: int) -> Attempt | None:
        if len(self._running) >= self._cluster.at_once:
            return None
        folder = run.unit_folder(number).resolve()
        command = attempt_command(folder)
        if setup := self._cluster.setup:
            command = ["bash", "-c", "\n".join([*setup, 'exec "$@"']), "bash", *command]
        log = str(run.folder.resolve() / f"ray-{number}.log")
        before = len(attempts(folder))
        return Attempt(self._remote.remote(command, log), folder, before)

    def look(self, attempt: Attempt) -> Queued | None:
        ray = self._ray
        if not ray.wait([attempt.call], timeout=0)[0]:
            return Queued("running" if attempt.has_begun else "queued")
        try:
            ray.get(attempt.call)
        except ray.exceptions.RayTaskError as error:  # nothing was run
            raise UserError(
                f"{self._name}: a node of Ray cannot start a unit ({first_line(error.cause)}). "
                f"It must see {attempt.folder} and {sys.executable}, as this machine does."
            ) from None
        except ray.exceptions.RayError:  # the worker or its node is gone
            pass
        return None

    def wait_for(self, attempt: Attempt) -> None:
        if not attempt.has_begun:
            self._ray.cancel(attempt.call)
        while not self._ray.wait([attempt.call], timeout=POLL)[0]:
            pass

    @property
    def _needs(self) -> dict[str, int]:
        """What a unit takes of a node, by Ray's names."""
        cluster = self._cluster
        memory = bytes_of(cluster.memory) if cluster.memory else 0
        needs = {"CPU": cluster.cpus or 1, "GPU": cluster.gpus, "memory": memory}
        return {name: need for name, need in needs.items() if need}

    def _room(self, resources: dict[str, float]) -> int:
        """How many units a node has room for."""
        return min(int(resources.get(name, 0) // need) for name, need in self._needs.items())

    @cached_property
    def _remote(self) -> Any:
        needs = self._needs
        return self._ray.remote(
            num_cpus=needs["CPU"],
            num_gpus=needs.get("GPU", 0),
            memory=needs.get("memory"),
            max_retries=0,
        )(_runner())

    @cached_property
    def _ray(self) -> Any:
        """The library, connected. Raises UserError."""
        os.environ.update(SETTINGS)  # before it is imported
        address = self._cluster.address
        if address:
            self._try_to_connect(address)
        elif "RAY_AUTH_MODE" not in os.environ:
            # else Ray writes a token into the home folder, for everybody to read
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        handler = signal.getsignal(signal.SIGTERM)
        import ray

        try:
            if address:
                ray.init(address, **QUIET)
            else:
                ray.init("local", include_dashboard=False, object_store_memory=STORE, **QUIET)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise UserError(f"{self._name}: Ray does not start: {first_line(error)}") from None
        finally:
            with suppress(ValueError):  # not in the main thread, where Ray leaves it
                signal.signal(signal.SIGTERM, handler)
        return ray

    def _try_to_connect(self, address: str) -> None:
        """In another process, which can be ended: Ray tries for minutes, and prints what it does.

        Raises UserError.
        """
        command = [sys.executable, "-P", "-c", CONNECT, address]
        try:
            told = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=TO_CONNECT
            )
        except subprocess.TimeoutExpired:
            raise UserError(
                f"{self._name}.address: {address} answers, but not as Ray's head within "
                f"{TO_CONNECT:.0f} s. Correct fleet.yaml; `ray status --address {address}` tells more."
            ) from None
        if told.returncode:
            raise UserError(f"{self._name}.address: {_refusal(address, told.stderr)}")


def _runner() -> Callable[[Sequence[str], str], int]:
    """What a worker runs. Defined in a function, so it travels by value, and of the standard
    library alone: a worker need not find our packages.
    """

    def lora_unit(command, log):  # type: ignore[no-untyped-def]
        import subprocess
        from pathlib import Path

        with Path(log).open("ab") as file:
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                # Ray kills the worker's group, which leaves no time for a checkpoint
                start_new_session=True,
                check=False,
            ).returncode

    return lora_unit


def _refusal(address: str, printed: str) -> str:
    """Why Ray did not connect, by what it printed."""
    if "InvalidAuthToken" in printed or "AuthenticationError" in printed:
        return (
            f"{address} wants another token. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to "
            "the file with the cluster's token."
        )
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    _, mismatch, versions = " ".join(lines).partition("Version mismatch: ")
    if mismatch:
        return f"another version of Ray or Python: {versions[:400]} Install the cluster's versions."
    reason = lines[-1] if lines else "it does not say why"
    return f"Ray does not connect: {reason} Type the command on a node of the cluster."


ENGINE = Ray
