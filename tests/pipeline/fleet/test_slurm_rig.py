"""The cluster that tests of the fleet run on: what it does to jobs is what Slurm does."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.machines import PATIENCE
from tests.helpers.slurm import Slurm, cluster

SLEEP = "echo $SLURMD_NODENAME; exec sleep 300"
# A process that no parent is left of: the step ends, and it would stay.
ORPHAN = "(setsid sleep 301 & echo $! > orphan); echo $SLURMD_NODENAME; sleep 302"


def submit(slurm: Slurm, script: str, *options: str) -> str:
    """What its attempts print is appended to the file `out`, or `out.N` of an array."""
    files = [f"--chdir={slurm.folder}", "--open-mode=append", "--output=log"]
    printed = "exec >> out${SLURM_ARRAY_TASK_ID:+.$SLURM_ARRAY_TASK_ID}"  # Slurm writes to the log
    return slurm.run(
        "sbatch", "--parsable", *files, *options, "--wrap", f"{printed}\n{script}"
    ).strip()


def output(slurm: Slurm, name: str = "out") -> list[str]:
    path = slurm.folder / name
    return path.read_text(encoding="utf-8").split() if path.exists() else []


def await_state(slurm: Slurm, name: str, state: str, restarts: int = 0) -> None:
    def holds() -> bool:
        job = slurm.job(name)
        return (job.state, job.restarts) == (state, restarts)

    slurm.wait_for(holds)


def await_outputs(slurm: Slurm, count: int) -> int:
    """Attempts that began so far: the node of the last."""
    slurm.wait_for(lambda: len(output(slurm)) == count)
    return int(output(slurm)[-1].removeprefix("node"))


def processes_of(folder: Path) -> list[str]:
    """Command lines that name it, or processes that run in it."""
    found = []
    for process in psutil.process_iter():
        try:
            place = [*process.cmdline(), process.cwd()]
        except psutil.Error:
            continue
        if process.pid != os.getpid() and str(folder) in " ".join(place):
            found.append(" ".join(place))
    return found


def test_an_array_ends_on_several_nodes_and_nothing_is_left(tmp_path: Path) -> None:
    with cluster(tmp_path / "slurm", nodes=4) as slurm:
        array = submit(slurm, "echo $SLURMD_NODENAME; sleep 0.3", "--array=0-3")
        slurm.wait_for(lambda: {job.state for job in slurm.jobs()} == {"COMPLETED"})
        jobs = slurm.jobs()
        assert [job.name for job in jobs] == [f"{array}_{task}" for task in range(4)]
        assert [job.task for job in jobs] == [0, 1, 2, 3] and {job.id for job in jobs} == {array}
        assert [output(slurm, f"out.{job.task}") for job in jobs] == [[job.node] for job in jobs]
        assert len({job.node for job in jobs}) > 1
        submit(slurm, ORPHAN)
        await_outputs(slurm, 1)
        assert len(processes_of(slurm.folder)) > 6
    assert processes_of(slurm.folder) == []
    assert not psutil.pid_exists(int((slurm.folder / "orphan").read_text()))
    assert not list(Path("/tmp").glob(f"{slurm.disk.name}*"))


@pytest.mark.slow
def test_a_job_of_a_dead_node_is_requeued_on_another(tmp_path: Path) -> None:
    with cluster(tmp_path / "slurm", nodes=2) as slurm:
        job = submit(slurm, ORPHAN)
        dead = await_outputs(slurm, 1)
        other = 3 - dead
        orphan = int((slurm.folder / "orphan").read_text())
        slurm.kill(dead)
        assert not psutil.pid_exists(orphan)
        slurm.wait_for(lambda: slurm.state(dead).startswith("down"))
        assert slurm.state(other) == "idle"
        assert await_outputs(slurm, 2) == other
        await_state(slurm, job, "RUNNING", restarts=1)
        slurm.restore(dead)
        slurm.wait_for(lambda: slurm.state(dead) == "idle")
        slurm.run("scancel", job)
        await_state(slurm, job, "CANCELLED", restarts=1)


@pytest.mark.slow
def test_a_job_goes_on_where_only_the_daemon_is_lost(tmp_path: Path) -> None:
    with cluster(tmp_path / "slurm", nodes=2) as slurm:
        job = submit(slurm, ORPHAN)
        lost = await_outputs(slurm, 1)
        orphan = psutil.Process(int((slurm.folder / "orphan").read_text()))
        slurm.partition(lost)
        assert await_outputs(slurm, 2) == 3 - lost
        await_state(slurm, job, "RUNNING", restarts=1)
        assert orphan.is_running()
        slurm.restore(lost)
        slurm.wait_for(lambda: slurm.state(lost) == "idle")


@pytest.mark.slow
def test_a_requeue_and_a_node_that_is_set_down_begin_a_job_again(tmp_path: Path) -> None:
    with cluster(tmp_path / "slurm", nodes=2) as slurm:
        job = submit(slurm, SLEEP)
        await_outputs(slurm, 1)
        slurm.run("scontrol", "requeue", job)
        node = await_outputs(slurm, 2)
        await_state(slurm, job, "RUNNING", restarts=1)
        slurm.down(node)
        assert await_outputs(slurm, 3) == 3 - node
        await_state(slurm, job, "RUNNING", restarts=2)
        assert slurm.state(node).startswith("down")
        slurm.resume(node)
        slurm.wait_for(lambda: slurm.state(node) == "idle")


@pytest.mark.slow
def test_a_warning_before_the_time_limit_reaches_the_batch_process_alone(tmp_path: Path) -> None:
    script = 'trap "echo warned; exit 7" USR1\n(trap "echo child" USR1; sleep 300) & wait'
    with cluster(tmp_path / "slurm", nodes=1) as slurm:
        job = submit(slurm, script, "--time=1", "--signal=B:USR1@55")
        await_state(slurm, job, "FAILED")
        assert output(slurm) == ["warned"]


@pytest.mark.slow
def test_gpus_are_handed_out_by_number(tmp_path: Path) -> None:
    with cluster(tmp_path / "slurm", nodes=1, cpus=2, gpus=2) as slurm:
        submit(slurm, "echo $CUDA_VISIBLE_DEVICES; sleep 1", "--array=0-1", "--gpus=1")
        slurm.wait_for(lambda: {job.state for job in slurm.jobs()} == {"COMPLETED"})
        assert sorted(output(slurm, "out.0") + output(slurm, "out.1")) == ["0", "1"]


@pytest.mark.slow
def test_nodes_with_namespaces_are_machines_to_each_other(tmp_path: Path) -> None:
    seen = 'echo "$(hostname) $(ip -4 -o address show eth0 | tr -s " " | cut -d" " -f4)"'
    with (
        cluster(tmp_path / "slurm", nodes=3, namespaces=True) as slurm,
        cluster(tmp_path / "other", nodes=1, namespaces=True) as other,
    ):
        assert slurm.switch and other.switch
        names = slurm.switch.link, other.switch.link
        links = {link for link in socket.if_nameindex() if link[1] in names}
        job = submit(slurm, f"srun sh -c '{seen}'\ngetent hosts node2", "--nodes=2")
        elsewhere = submit(other, seen)
        await_state(slurm, job, "COMPLETED")
        await_state(other, elsewhere, "COMPLETED")
        words = output(slurm)
        machines = dict(zip(words[:4:2], words[1:4:2], strict=True))
        assert set(machines) == {"node1", "node2"} and len(set(machines.values())) == 2
        assert words[4] in machines["node2"]
        assert output(other)[0] == "node1" and output(other)[1] not in machines.values()
        (slurm.folder / "out").unlink()
        gang = submit(slurm, "srun sh -c 'hostname; sleep 300'", "--nodes=2")
        slurm.wait_for(lambda: sorted(output(slurm)) == ["node1", "node2"])
        slurm.kill(2)
        slurm.wait_for(lambda: sorted(output(slurm)[2:]) == ["node1", "node3"])
        slurm.restore(2)
        slurm.wait_for(lambda: slurm.state(2) == "idle")
        await_state(slurm, gang, "RUNNING", restarts=1)
    assert processes_of(tmp_path) == []
    assert len(links) == 2
    # the kernel removes a network soon after its last process
    other.wait_for(lambda: not links & set(socket.if_nameindex()))


@pytest.mark.slow
@pytest.mark.parametrize("namespaces", [False, True])
def test_nothing_is_left_of_a_test_that_was_killed(tmp_path: Path, namespaces: bool) -> None:
    with cluster(tmp_path / "first", nodes=1, namespaces=namespaces):
        pass  # or skipped
    code = f"""
import time
from pathlib import Path
from tests.helpers.slurm import cluster
with cluster(Path({str(tmp_path / "killed")!r}), nodes=2, namespaces={namespaces}) as slurm:
    slurm.run("sbatch", "--chdir=" + str(slurm.folder), "--wrap", {ORPHAN!r})
    slurm.wait_for((slurm.folder / "orphan").exists)
    print(slurm.disk, flush=True)
    time.sleep(600)
"""
    test = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert test.stdout is not None
    disk = Path(test.stdout.readline().strip())
    test.send_signal(signal.SIGKILL)
    test.communicate()
    end = time.monotonic() + PATIENCE
    while processes_of(tmp_path) or any(disk.parent.glob(f"{disk.name}*")):
        assert time.monotonic() < end, processes_of(tmp_path)
        time.sleep(0.05)


def test_a_machine_without_slurm_skips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    reason = pytest.raises(pytest.skip.Exception, match="slurmctld is not installed")
    with reason, cluster(tmp_path):
        pass
