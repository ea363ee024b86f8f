"""A Slurm cluster on this machine: munged, a controller and nodes, each with its own processes.

No systemd, cgroups or database. How a node dies, and with it everything that a test leaves, stands
in `machine_process.py`.
"""

import os
import random
import secrets
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.machines import PATH, PATIENCE, Machine, Switch, alone

CONF = Path(__file__).with_suffix(".conf").read_text(encoding="utf-8")

TO_START = 30.0  # seconds; it takes 0.3, and where it never ends each test waits
IDLE_NODES = "sinfo", "-h", "-N", "-t", "idle"


@dataclass(frozen=True)
class Job:
    """A row of squeue. `name` is what scontrol and scancel take: 12, or 12_3 of an array."""

    name: str
    id: str
    task: int | None
    state: str
    node: str
    reason: str
    restarts: int


class Slurm:
    """Nodes count from 1: node 2 is node2 in Slurm's words."""

    def __init__(
        self, folder: Path, nodes: int, cpus: int, gpus: int, switch: Switch | None
    ) -> None:
        self.folder, self.switch = folder, switch
        self._numbers = range(1, nodes + 1)
        # A test may run in a job of another cluster.
        inherited = [name for name in os.environ if not name.startswith(("SLURM", "SBATCH"))]
        self.environment = {name: os.environ[name] for name in inherited}
        self.environment |= {"SLURM_CONF": str(folder / "client.conf"), "PATH": PATH}
        # Sockets lie there. Their paths have 107 characters at most; a test's folder may have more.
        self.disk = Path(f"/tmp/slurm-{secrets.token_hex(4)}")
        self._machines: dict[str, Machine] = {}
        self._configure(cpus, gpus)

    def _configure(self, cpus: int, gpus: int) -> None:
        # below those that the system gives to clients: one may take it while a daemon is down
        self._port, *ports = _free_ports(1 + len(self._numbers))
        text = CONF.format(
            host="slurmctld" if self.switch else socket.gethostname().split(".")[0],
            control=self._address(254),
            port=self._port,
            folder=self.folder,
            disk=self.disk,
            cpus=cpus,
            memory=max(4000, 1000 * cpus),
            resources=f"Gres=gpu:{gpus}" if gpus else "",
        )
        hosts = f"127.0.0.1 localhost\n{self._address(254)} slurmctld\n"
        for number, port in zip(self._numbers, ports, strict=True):
            text += f"NodeName=node{number} NodeAddr={self._address(number)} Port={port}\n"
            hosts += f"{self._address(number)} node{number}\n"
        files = {"slurm.conf": text, "hosts": hosts, "cgroup.conf": "CgroupPlugin=disabled\n"}
        # a command on a busy machine has patience
        files["client.conf"] = text.replace("MessageTimeout=2", "MessageTimeout=60")
        files["resolv.conf"] = "nameserver 127.0.0.1\n"
        files["munge.key"] = secrets.token_hex(32)
        if gpus:
            files["gres.conf"] = f"Name=gpu File={self.folder}/nvidia[0-{gpus - 1}]\n"
        (self.folder / "munge.key").touch(0o600)
        for name, content in files.items():
            (self.folder / name).write_text(content, encoding="utf-8")
        # GPUs in name only: Slurm hands out their numbers as CUDA_VISIBLE_DEVICES.
        for number in range(gpus):
            os.mknod(self.folder / f"nvidia{number}", stat.S_IFCHR, os.makedev(195, number))

    def _address(self, number: int) -> str:
        return self.switch.address(number) if self.switch else "127.0.0.1"

    def start(self) -> None:
        """Returns when all nodes are idle. Raises OSError or AssertionError if they cannot be."""
        (self.folder / "state").mkdir()
        munge = Path(f"{self.disk}-munge")
        munge.mkdir()
        options = [f"--{file}-file={munge}/{file}" for file in ("log", "pid", "seed")]
        options += [
            "--force",
            "--foreground",
            "--origin=127.0.0.1",
            f"--key-file={self.folder}/munge.key",
        ]
        self._machine("munge", "munged", *options, f"--socket={munge}/socket").start()
        self.wait_for((munge / "socket").exists, TO_START)
        self._machine("slurmctld", "slurmctld", "-D", "-f", str(self.folder / "slurm.conf")).start()
        # A node that begins before the controller answers waits a second until it asks again.
        self.wait_for(self._controller_answers, TO_START)
        self._boot(self._numbers)
        self.wait_for(lambda: self.run(*IDLE_NODES).count("\n") == len(self._numbers), TO_START)

    def _boot(self, numbers: Iterable[int]) -> None:
        daemon = ["slurmd", "-D", "-f", str(self.folder / "slurm.conf"), "-N"]
        # all at a time: each starts a Python
        nodes = {n: self._machine(f"node{n}", *daemon, f"node{n}") for n in numbers}
        for number, node in nodes.items():
            node.await_answer()
            if self.switch:
                self.switch.connect(number, node)
            node.tell("start")

    def _machine(self, name: str, program: str, *arguments: str) -> Machine:
        prefix = alone(self.folder, name, program == "slurmd") if self.switch else []
        command = [shutil.which(program, path=PATH) or program, *arguments]
        log = self.folder / f"{name}.err"
        self._machines[name] = Machine(log, f"{self.disk}-{name}", command, prefix)
        return self._machines[name]

    def _controller_answers(self) -> bool:
        with suppress(OSError), socket.create_connection((self._address(254), self._port), 5):
            return True
        return False

    def stop(self) -> None:
        for running in self._machines.values():
            running.begin_to_die()
        for running in self._machines.values():
            running.die()

    def run(self, *command: str) -> str:
        """Output of a command that must not fail."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def kill(self, number: int) -> None:
        """The machine dies: the daemon, and every process of its jobs."""
        self._machines[f"node{number}"].die()

    def partition(self, number: int) -> None:
        """The controller loses the node, whose jobs go on."""
        self._machines[f"node{number}"].tell("stop")

    def restore(self, number: int) -> None:
        """After `kill` or `partition`: the daemon runs again."""
        node = self._machines[f"node{number}"]
        if node.is_dead:
            self._boot([number])
        else:
            node.tell("start")

    def down(self, number: int) -> None:
        self._update(number, "DOWN", "Reason=test")

    def resume(self, number: int) -> None:
        self._update(number, "RESUME")

    def _update(self, number: int, state: str, *words: str) -> None:
        self.run("scontrol", "update", f"NodeName=node{number}", f"State={state}", *words)

    def state(self, number: int) -> str:
        """idle, mixed, allocated, down …; with * if the node does not answer."""
        return self.run("sinfo", "-h", "-N", "-n", f"node{number}", "-o", "%T").strip()

    def jobs(self) -> list[Job]:
        """All of them, also those that have ended; tasks of an array one by one."""
        fields = "JobArrayID", "ArrayJobID", "ArrayTaskID", "State", "NodeList", "Reason"
        layout = ",".join(f"{field}:|" for field in (*fields, "RestartCnt"))
        rows = self.run("squeue", "-h", "-r", "--states=all", "-O", layout).splitlines()
        return [_parse_job(row) for row in rows]

    def job(self, name: str) -> Job:
        return next(job for job in self.jobs() if job.name == name)

    def wait_for(self, holds: Callable[[], object], seconds: float = PATIENCE) -> float:
        """Seconds until it holds."""
        begin = time.monotonic()
        while not holds():
            assert time.monotonic() < begin + seconds, f"not in time:\n{self._report()}"
            time.sleep(0.05)
        return time.monotonic() - begin

    def _report(self) -> str:
        log = (self.folder / "slurmctld.log").read_text(encoding="utf-8")
        return self.run("sinfo", "-N", "-l") + self.run("squeue", "--states=all") + log[-2000:]


def _parse_job(row: str) -> Job:
    name, job, task, state, node, reason, restarts = row.split("|")[:7]
    number = int(task) if task.isdigit() else None
    return Job(name, job, number, state, node, reason, int(restarts))


def _free_ports(count: int) -> list[int]:
    ports: list[int] = []
    with ExitStack() as bound:
        while len(ports) < count:
            port = random.randrange(10_000, 32_000)
            free = bound.enter_context(socket.socket())
            with suppress(OSError):
                free.bind(("", port))
                ports.append(port)
    return ports


@contextmanager
def cluster(
    folder: Path, nodes: int = 4, cpus: int = 1, *, namespaces: bool = False, gpus: int = 0
) -> Iterator[Slurm]:
    """Idle nodes of so many CPUs and GPUs. The test is skipped where there can be none.

    With `namespaces` each is a machine to the others: its own address, host name and process ids.
    """
    _require("slurmctld", "slurmd", "sbatch", "munged", *(("ip", "unshare") if namespaces else ()))
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as running:
        try:
            switch = Switch(folder / "switch.err") if namespaces else None
            if switch:
                running.callback(switch.die)
            slurm = Slurm(folder, nodes, cpus, gpus, switch)
            running.callback(slurm.stop)
            slurm.start()
        except (OSError, AssertionError) as error:
            pytest.skip(f"Slurm does not start here: {error}")
        yield slurm


def _require(*programs: str) -> None:
    for program in programs:
        if shutil.which(program, path=PATH) is None:
            pytest.skip(f"{program} is not installed")
    if os.geteuid():
        pytest.skip("only root can start a cluster of Slurm")
