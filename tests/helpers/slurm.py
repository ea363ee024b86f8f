"""A Slurm cluster on this machine: munged, a controller and nodes, each with its own processes.

No systemd, cgroups or database. How a node dies, and with it everything that a test leaves, stands
in `machine.py`.
"""

import os
import random
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import machine

PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"])
PATIENCE = 120.0  # seconds, for a busy machine

CONF = """\
ClusterName=tests
SlurmctldHost={host}({control})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
# Of auth/slurm all clusters of a machine would have one socket, /run/slurm/sack.socket.
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits as long: 120 s by default, and 5 is the least that Slurm takes.
AuthInfo=socket={disk}-munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={disk}-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=1000
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=5
KillWait=2
CompleteWait=0
MinJobAge=600
MailProg=/bin/true
GresTypes=gpu
NodeName=DEFAULT CPUs={cpus} RealMemory={memory} {resources}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

# What makes a process a machine of its own: address, host name, process ids, and files that name
# hosts. The name server refuses at once: else each look-up waits 10 s.
UNSHARE = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec"]
ENTER = """
mount -t proc proc /proc
mount --bind "$0/hosts" /etc/hosts
mount --bind "$0/resolv.conf" /etc/resolv.conf
hostname "$1"
shift
exec "$@"
"""


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


class Machine:
    """A process of `machine.py`; `prefix` may put it into namespaces."""

    def __init__(self, log: Path, disk: str, command: Sequence[str], prefix: Sequence[str]) -> None:
        python = [sys.executable, "-I", "-S", machine.__file__, disk, *command]
        self._log = log
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                [*prefix, *python],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PATH": PATH},
            )
        self.pid = self._process.pid
        assert self._process.stdin is not None and self._process.stdout is not None
        self._words, self._answers = self._process.stdin, self._process.stdout

    def start(self) -> None:
        self.await_answer()
        self.tell("start")

    def tell(self, word: str) -> None:
        with suppress(BrokenPipeError):
            print(word, file=self._words, flush=True)
        self.await_answer()

    def await_answer(self) -> None:
        """To the last word, or that it is ready."""
        if not self._answers.readline():
            raise OSError(self._log.read_text(encoding="utf-8").strip()[-300:])

    def begin_to_die(self) -> None:
        with suppress(BrokenPipeError):
            self._words.close()

    def die(self) -> None:
        self.begin_to_die()
        self._process.wait(PATIENCE)
        self._answers.close()

    @property
    def is_dead(self) -> bool:
        return self._process.returncode is not None


class Switch:
    """A network of machines, in a namespace: a bridge there, a link to it here. Both vanish with
    its process.
    """

    def __init__(self, log: Path) -> None:
        self._machine = Machine(log, f"{log}.disk", [], ["unshare", "--net"])
        try:
            self._machine.await_answer()
            self._link()
        except BaseException:
            self._machine.die()
            raise

    def _link(self) -> None:
        # A name that is taken is another cluster's. 198.18.0.0/15 is for such tests (RFC 2544).
        for subnet in range(256):
            self._subnet, link = subnet, f"slurm-test{subnet}"
            new = f"ip link add {link} type veth peer name uplink netns {self._machine.pid}"
            done = subprocess.run(new.split(), env={"PATH": PATH}, capture_output=True, text=True)
            if "exists" not in done.stderr:
                break
        if done.returncode:
            raise OSError(done.stderr.strip())
        _ip(None, f"addr add {self.address(254)}/24 dev {link}", f"link set {link} up")
        hub = "link add hub type bridge", "link set hub up", "link set uplink master hub up"
        _ip(self._machine, *hub)

    def address(self, number: int) -> str:
        return f"198.18.{self._subnet}.{number}"

    def connect(self, number: int, node: Machine) -> None:
        # The same hardware address after a restart: others remember it.
        hardware = f"address 02:00:00:00:00:{number:02x}"
        port = f"port{node.pid}"
        link = f"link add {port} type veth peer name eth0 {hardware} netns {node.pid}"
        _ip(self._machine, link, f"link set {port} master hub up")
        up = "link set eth0 up", "link set lo up"
        _ip(node, f"addr add {self.address(number)}/24 dev eth0", *up)

    def die(self) -> None:
        self._machine.die()


def _ip(where: Machine | None, *commands: str) -> None:
    enter = ["nsenter", "--net", "--target", str(where.pid)] if where else []
    environment, text = {"PATH": PATH}, "\n".join(commands)
    command = [*enter, "ip", "-batch", "-"]
    done = subprocess.run(command, input=text, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr.strip())


class Slurm:
    """Nodes count from 1: node 2 is node2 in Slurm's words."""

    def __init__(
        self, folder: Path, nodes: int, cpus: int, gpus: int, switch: Switch | None
    ) -> None:
        self.folder, self._switch = folder, switch
        self._numbers = range(1, nodes + 1)
        # A test may run in a job of another cluster.
        inherited = [name for name in os.environ if not name.startswith(("SLURM", "SBATCH"))]
        self.environment = {name: os.environ[name] for name in inherited}
        self.environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
        # Sockets lie there. Their paths have 107 characters at most; a test's folder may have more.
        self._disk = f"/tmp/slurm-{secrets.token_hex(4)}"
        self._machines: dict[str, Machine] = {}
        self._configure(cpus, gpus)

    def _configure(self, cpus: int, gpus: int) -> None:
        # below those that the system gives to clients: one may take it while a daemon is down
        self._port, *ports = _free_ports(1 + len(self._numbers))
        text = CONF.format(
            host=socket.gethostname().split(".")[0],
            control=self._address(254),
            port=self._port,
            folder=self.folder,
            disk=self._disk,
            cpus=cpus,
            memory=max(4000, 1000 * cpus),
            resources=f"Gres=gpu:{gpus}" if gpus else "",
        )
        hosts = "127.0.0.1 localhost\n"
        for number, port in zip(self._numbers, ports, strict=True):
            text += f"NodeName=node{number} NodeAddr={self._address(number)} Port={port}\n"
            hosts += f"{self._address(number)} node{number}\n"
        files = {"slurm.conf": text, "hosts": hosts, "cgroup.conf": "CgroupPlugin=disabled\n"}
        files["resolv.conf"] = "nameserver 127.0.0.1\n"
        files["munge.key"] = secrets.token_hex(32)
        if gpus:
            files["gres.conf"] = f"Name=gpu File={self.folder}/nvidia[0-{gpus - 1}]\n"
        for name, content in files.items():
            (self.folder / name).write_text(content, encoding="utf-8")
        (self.folder / "munge.key").chmod(0o600)
        # GPUs in name only: Slurm hands out their numbers as CUDA_VISIBLE_DEVICES.
        for number in range(gpus):
            os.mknod(self.folder / f"nvidia{number}", stat.S_IFCHR, os.makedev(195, number))

    def _address(self, number: int) -> str:
        return self._switch.address(number) if self._switch else "127.0.0.1"

    def start(self) -> None:
        """Returns when all nodes are idle. Raises OSError or AssertionError if they cannot be."""
        (self.folder / "state").mkdir()
        munge = Path(f"{self._disk}-munge")
        munge.mkdir()
        options = [f"--{file}-file={munge}/{file}" for file in ("log", "pid", "seed")]
        options += ["--force", "--foreground", f"--key-file={self.folder}/munge.key"]
        self._machine("munge", "munged", *options, f"--socket={munge}/socket").start()
        self.wait_for((munge / "socket").exists)
        self._machine("slurmctld", "slurmctld", "-D", "-f", self.environment["SLURM_CONF"]).start()
        # A node that begins before the controller answers waits a second until it asks again.
        self.wait_for(self._controller_answers)
        self._boot(self._numbers)
        self.wait_for(lambda: self.run(*IDLE_NODES).count("\n") == len(self._numbers))

    def _boot(self, numbers: Iterable[int]) -> None:
        daemon = ["slurmd", "-D", "-f", self.environment["SLURM_CONF"], "-N"]
        # all at a time: each starts a Python
        nodes = {n: self._machine(f"node{n}", *daemon, f"node{n}") for n in numbers}
        for number, node in nodes.items():
            node.await_answer()
            if self._switch:
                self._switch.connect(number, node)
            node.tell("start")

    def _machine(self, name: str, program: str, *arguments: str) -> Machine:
        is_node = name.startswith("node")
        alone = [*UNSHARE, ENTER, str(self.folder), name] if self._switch and is_node else []
        command = [shutil.which(program, path=PATH) or program, *arguments]
        log = self.folder / f"{name}.err"
        self._machines[name] = Machine(log, f"{self._disk}-{name}", command, alone)
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
