"""One run on two machines, played by network namespaces: one of its ranks is killed, the link
between them cut.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import pytest
from safetensors.torch import load_file

from pipeline.project.logs.run_log import read_steps
from pipeline.project.runner import checkpoints
from pipeline.training.parallel.heartbeats import LOST_AFTER
from tests.helpers import projects
from tests.helpers.projects import LORA, make_base

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("network")]
# of the namespaces, which no other run has
NAMES = [f"lora-{os.getpid()}-{number}" for number in range(2)]
ADDRESSES = ["198.18.0.1", "198.18.0.2"]  # reserved for such tests, and in the namespaces alone
ENDPOINT = f"{ADDRESSES[0]}:29400"
STAGE = "finetune_lora"
LOST = "ended, or cannot be reached."


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    """Two namespaces with a wire between them."""
    with ExitStack() as removed:
        for name in NAMES:
            try:
                ip("netns", "add", name)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(
                    "network namespaces need root and iproute2: "
                    f"{getattr(error, 'stderr', '') or error}"
                )
            removed.callback(ip, "netns", "del", name)  # and the wire
        ip(*f"link add wire netns {NAMES[0]} type veth peer name wire netns {NAMES[1]}".split())
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/30", "dev", "wire")
            for device in ("lo", "wire"):
                ip("-n", name, "link", "set", device, "up")
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(
        projects.new_project(tmp_path_factory.mktemp("machines") / "p"), ["pretrain.epochs=2"]
    )


@pytest.fixture
def machines(base: Path, tmp_path: Path) -> list[Path]:
    """The project's folder on each machine: they share no disk."""
    return [shutil.copytree(base, tmp_path / f"machine{number}") for number in range(2)]


class Machine:
    """`lora finetune lora` in one of the namespaces, as its user starts it and sees it end."""

    def __init__(self, number: int, root: Path, epochs: int, by_arrival: bool) -> None:
        command = [
            LORA,
            "finetune",
            "lora",
            "--nnodes",
            "2",
            "--rdzv-endpoint",
            ENDPOINT,
            "--checkpoint-every=100000",
        ]
        command += [] if by_arrival else ["--node-rank", str(number)]
        inside = ["ip", "netns", "exec", NAMES[number], *command, f"--set={STAGE}.epochs={epochs}"]
        self.log = root / f"runs/{STAGE}/loss.csv"
        self._printed: IO[str] = (root / "printed").open("w+")
        self.process = subprocess.Popen(
            inside, cwd=root, stdout=self._printed, stderr=subprocess.STDOUT
        )

    def end(self, seconds: float) -> tuple[int, str]:
        """Exit code and what it printed, once it has ended."""
        code = self.process.wait(seconds)
        self._printed.seek(0)
        return code, self._printed.read()

    def steps(self) -> int:
        return len(read_steps(self.log)) if self.log.exists() else 0


@contextmanager
def running(folders: Sequence[Path], epochs: int) -> Iterator[list[Machine]]:
    """Both machines' runs; what is left of them ends with the block."""
    # an even number of epochs without --node-rank
    both = [
        Machine(number, folder, epochs, epochs % 2 == 0) for number, folder in enumerate(folders)
    ]
    try:
        yield both
    finally:
        for name in NAMES:
            for pid in subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True
            ).stdout.split():
                os.kill(int(pid), signal.SIGKILL)
        for machine in both:
            machine.process.wait()


def wait_for_steps(both: Sequence[Machine], number: int, seconds: float = 120) -> int:
    """The steps that are logged, once these are."""
    limit = time.monotonic() + seconds
    while both[0].steps() < number:
        assert all(machine.process.poll() is None for machine in both), [
            machine.end(1) for machine in both
        ]
        assert time.monotonic() < limit, f"no step {number} in {seconds} s"
        time.sleep(0.02)
    return both[0].steps()


def rank_of(machine: int) -> int:
    """The process id of the rank on a machine."""
    found = subprocess.run(
        ["ip", "netns", "pids", NAMES[machine]], capture_output=True, text=True, check=True
    )
    for pid in map(int, found.stdout.split()):
        if f"RANK={machine}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return pid
    raise AssertionError("it has no rank")


def one_message(printed: str) -> str:
    (message,) = [line for line in printed.splitlines() if not line.endswith("of the largest step")]
    return message


def curve(root: Path) -> list[float]:
    return [step.loss for step in read_steps(root / "artifacts/lora_adapter/loss.csv")]


def finish(folders: Sequence[Path], epochs: int, alone: Path, resumed: int | None = None) -> None:
    """Run to the end on both machines: rank 0's has what one process makes, the other says where it
    is.
    """
    subprocess.run(
        [LORA, "finetune", "lora", f"--set={STAGE}.epochs={epochs}"], cwd=alone, check=True
    )
    with running(folders, epochs) as both:
        (code, first), (other, second) = (machine.end(300) for machine in both)
    assert (code, other) == (0, 0), first + second
    assert resumed is None or f"{STAGE}: resumed after step {resumed}\n" in first
    assert (
        one_message(second) == f"{STAGE}: done; rank 0 writes artifacts/lora_adapter on its machine"
    )
    assert curve(folders[0]) == pytest.approx(curve(alone), abs=1e-5)
    made, expected = (
        load_file(root / "artifacts/lora_adapter/adapter_model.safetensors")
        for root in (folders[0], alone)
    )
    assert all((made[name] - expected[name]).abs().max() < 1e-4 for name in expected)
    assert not (folders[1] / "artifacts/lora_adapter").exists()


def test_two_machines_train_what_one_process_trains(
    machines: list[Path], base: Path, tmp_path: Path
) -> None:
    finish(machines, 21, shutil.copytree(base, tmp_path / "alone"))


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_ends_the_run_on_both_machines(
    machines: list[Path], base: Path, tmp_path: Path, lost: int
) -> None:
    with running(machines, 100) as both:
        wait_for_steps(both, 30)
        os.kill(rank_of(lost), signal.SIGKILL)
        ends = [machine.end(60) for machine in both]
    assert [code for code, _ in ends] == [1, 1], ends
    killed, left = one_message(ends[lost][1]), one_message(ends[1 - lost][1])
    assert killed.startswith(
        f"error: rank {lost} of 2 was killed (SIGKILL). Run the same command to resume"
    )
    # the store ends with the launcher of rank 0, in which nobody reads of it any more
    names = [f"rank {lost} of 2", f"the machine at {ADDRESSES[0]}"][: 2 - lost]
    assert any(left.startswith(f"error: {STAGE}: {name} {LOST} ") for name in names)
    assert left.endswith("Run the same command to resume.")
    step = both[0].steps()
    assert lost == 0 or f"A checkpoint after step {step} of 600 is kept." in left
    kept = [int(folder.name.split("-")[1]) for folder in checkpoints(both[0].log.parent)]
    assert kept == [step] * lost, "rank 0 writes the checkpoint, unless it is the one that is gone"
    finish(machines, 100, shutil.copytree(base, tmp_path / "alone"), step if lost else None)


def test_a_link_that_is_cut_for_half_a_minute_delays_the_run(machines: list[Path]) -> None:
    with running(machines, 100_000) as both:
        wait_for_steps(both, 30)
        ip("-n", NAMES[0], "link", "set", "wire", "down")
        time.sleep(30)
        stood_at = both[0].steps()
        ip("-n", NAMES[0], "link", "set", "wire", "up")
        wait_for_steps(both, stood_at + 30, LOST_AFTER)


def test_a_link_that_stays_cut_ends_the_run_on_both_machines(
    machines: list[Path], base: Path, tmp_path: Path
) -> None:
    with running(machines, 100) as both:
        wait_for_steps(both, 30)
        ip("-n", NAMES[0], "link", "set", "wire", "down")
        try:
            ends = [machine.end(LOST_AFTER + 60) for machine in both]
        finally:
            ip("-n", NAMES[0], "link", "set", "wire", "up")
    step = both[0].steps()
    assert [code for code, _ in ends] == [1, 1], ends
    kept = f"A checkpoint after step {step} of 600 is kept.", "Checkpoints are with rank 0."
    names = "rank 1 of 2", f"the machine at {ADDRESSES[0]}"
    expected = [
        f"error: {STAGE}: {name} {LOST} {note} Run the same command to resume."
        for name, note in zip(names, kept, strict=True)
    ]
    assert [one_message(printed) for _, printed in ends] == expected
    finish(machines, 100, shutil.copytree(base, tmp_path / "alone"), step)
