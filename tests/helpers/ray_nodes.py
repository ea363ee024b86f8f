"""Ray on this machine: a head, and a second node, each with its own processes, and with a token."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from tests.helpers.machines import Machine

TO_START = 120.0  # seconds
START = "import sys; from ray.scripts.scripts import main; sys.exit(main())"
ALL_HERE = """
import sys, time, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]):
    time.sleep(0.1)
"""


class RayNodes:
    """`environment` is that of a user who has the token. Node 1 is the head."""

    def __init__(self, folder: Path) -> None:
        token = folder / "token"
        token.write_text(secrets.token_hex(32), encoding="utf-8")
        settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self._settings = [f"{name}={value}" for name, value in settings.items()]
        self.environment = {**os.environ, **settings}
        self._folder = folder
        # Sockets lie there. Their paths have 107 characters at most; a test's folder may have more.
        self._disk = f"/tmp/ray-{secrets.token_hex(4)}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.address = f"127.0.0.1:{self._port}"
        self._machines = list[Machine]()

    def start(self, nodes: int) -> None:
        """Nodes of one CPU each. Returns once all are there."""
        head = ["--head", f"--port={self._port}", f"--temp-dir={self._disk}-1"]
        self._add(1, *head, "--include-dashboard=false", "--disable-usage-stats")
        self._await(1)
        for number in range(2, nodes + 1):
            self._add(number, f"--address={self.address}")
        self._await(nodes)

    def _add(self, number: int, *options: str) -> None:
        program = [shutil.which("env") or "env", *self._settings, sys.executable, "-c", START]
        # any free ports: the nodes share those of one machine
        free = ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        size = ["--num-cpus=1", "--object-store-memory=80000000"]
        command = [*program, "start", "--block", *free, *size, *options]
        log = self._folder / f"ray{number}.err"
        machine = Machine(log, f"{self._disk}-{number}", command, [])
        self._machines.append(machine)
        machine.start()

    def _await(self, nodes: int) -> None:
        # a head that does not listen yet is asked again
        for _ in range(5):
            command = [sys.executable, "-c", ALL_HERE, self.address, str(nodes)]
            told = subprocess.run(
                command, env=self.environment, capture_output=True, text=True, timeout=TO_START
            )
            if not told.returncode:
                return
        raise AssertionError(told.stderr)

    def node_of(self, pid: int) -> int:
        """The number of the node on which a process runs."""
        above = {parent.pid for parent in psutil.Process(pid).parents()}
        return next(n for n, machine in enumerate(self._machines, 1) if machine.pid in above)

    def kill_raylet(self, number: int) -> None:
        """SIGKILL the node's daemon; what it started ends by itself, or does not."""
        machine = psutil.Process(self._machines[number - 1].pid)
        (raylet,) = (p for p in machine.children(recursive=True) if p.name() == "raylet")
        raylet.kill()

    def stop(self) -> None:
        for machine in reversed(self._machines):
            machine.die()


@contextmanager
def ray_nodes(folder: Path, nodes: int = 2) -> Iterator[RayNodes]:
    """A cluster that is there until the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as running:
        cluster = RayNodes(folder)
        running.callback(cluster.stop)
        cluster.start(nodes)
        yield cluster
