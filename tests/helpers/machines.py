"""Machines that a test starts and kills: processes, in a network of their own if it asks for it."""

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tests.helpers import machine_process

PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"])
PATIENCE = 120.0  # seconds, for a busy machine

# What makes a process a machine of its own: host name, process ids, files that name hosts, and a
# network. The name server refuses at once: one that does not answer takes 10 s for each look-up.
UNSHARE = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child"]
ENTER = """
mount -t proc proc /proc
mount --bind "$0/hosts" /etc/hosts
mount --bind "$0/resolv.conf" /etc/resolv.conf
hostname "$1"
shift
exec "$@"
"""


def alone(folder: Path, name: str, network: bool) -> list[str]:
    """What starts a command in namespaces; `hosts` and `resolv.conf` lie in `folder`."""
    net = ["--net"] if network else []
    return [*UNSHARE, *net, "sh", "-ec", ENTER, str(folder), name]


class Machine:
    """A process of `machine_process.py`; `prefix` may put it into namespaces."""

    def __init__(self, log: Path, disk: str, command: Sequence[str], prefix: Sequence[str]) -> None:
        python = [sys.executable, "-I", "-S", machine_process.__file__, disk, *command]
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
            self._subnet, self.link = subnet, f"slurm-test{subnet}"
            new = f"ip link add {self.link} type veth peer name uplink netns {self._machine.pid}"
            done = subprocess.run(new.split(), env={"PATH": PATH}, capture_output=True, text=True)
            if "exists" not in done.stderr:
                break
        if done.returncode:
            raise OSError(done.stderr.strip())
        _ip(None, f"addr add {self.address(254)}/24 dev {self.link}", f"link set {self.link} up")
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
