"""A distributed run: the same curve and adapter as in one process, and one message if a process
ends.
"""

import ctypes
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import UserError
from pipeline.files.artifact import digest
from pipeline.project.logs.run_log import read_steps
from pipeline.project.runner import checkpoints
from pipeline.training.parallel import launch
from tests.conftest import Lora
from tests.helpers import projects
from tests.helpers.families import TEXTS, new_lines_project
from tests.helpers.json_files import write_jsonl
from tests.helpers.process import Forked
from tests.helpers.projects import LORA, fresh, section_overrides

STAGE, FOLDER = "finetune_lora", "artifacts/lora_adapter"

PIDFD_GETFD = 438  # the system call that copies a file descriptor of another process
CURVE, WEIGHTS = 1e-5, 1e-4  # tolerances: sums in another order
SETTINGS = {
    "data": "data/lines.jsonl",
    "epochs": 3,
    "batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 1,
    "eval_share": 0.3,
    "eval_steps": 2,
    "retention_data": "data/old.jsonl",
    "retention_weight": 2,
    "retention_batch_size": 2,
    "learning_rate": 3e-4,  # Adam amplifies rounding by it
}


@pytest.fixture(scope="module")
def expanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp32 base and two dozen texts of very different lengths. Read it; do not write to it."""
    return new_lines_project(tmp_path_factory.mktemp("several") / "p")


@pytest.fixture
def project(expanded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(expanded, tmp_path / "p")


@pytest.fixture(scope="module")
def trivial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MiniGPT project, so that workers need not import transformers. Read it; do not write to
    it.
    """
    return projects.make_base(
        projects.new_project(tmp_path_factory.mktemp("trivial") / "p"), projects.BRIEF
    )


@pytest.fixture
def mini(trivial: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trivial, tmp_path / "p")


def on_two_devices(epochs: int) -> list[str]:
    return [LORA, "finetune", "lora", "--devices", "2", f"--set={STAGE}.epochs={epochs}"]


def command(*flags: str, **changes: object) -> list[str]:
    values = section_overrides(STAGE, {**SETTINGS, **changes})
    return [LORA, "finetune", "lora", *flags, *(f"--set={value}" for value in values)]


def started(root: Path, commands: Sequence[list[str]]) -> list[Forked]:
    """One process per command, with the environment variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": len(commands), "LOCAL_WORLD_SIZE": len(commands), "MASTER_PORT": port}
    variables = {name: str(number) for name, number in shared.items()} | {
        "MASTER_ADDR": "127.0.0.1"
    }
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(len(commands))]
    return [
        Forked(one, root, variables=variables | rank)
        for one, rank in zip(commands, ranks, strict=True)
    ]


def ended(processes: Sequence[Forked]) -> list[tuple[int, str]]:
    return [process.end() for process in processes]


def copied_run(root: Path, size: int, one: list[str], made: str = FOLDER) -> Path:
    """A copy of the adapter's folder after a run in `size` processes."""
    found = ended(started(root, [one] * size)) if size > 1 else [Forked(one, root).end()]
    assert [code for code, _ in found] == [0] * size, found
    assert not any(said for _, said in found[1:]), "only rank 0 prints"
    return shutil.copytree(root / made, root / f"{size}{len(list(root.iterdir()))}")


def curve(folder: Path) -> torch.Tensor:
    steps = read_steps(folder / "loss.csv")
    return torch.tensor([(s.loss, s.eval_loss or 0, s.divergence or 0, s.tokens) for s in steps])


def assert_same(folder: Path, other: Path) -> None:
    torch.testing.assert_close(curve(folder), curve(other), rtol=0, atol=CURVE)
    torch.testing.assert_close(tensors(folder), tensors(other), rtol=0, atol=WEIGHTS)


def tensors(folder: Path) -> Mapping[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("size", "flags", "changes"),
    [
        (2, [], {}),
        (3, [], {"batch_size": 1, "retention_batch_size": 1}),  # two of the three ranks are idle
        (2, [], {"quantization": "nf4-dq", "train_embeddings": "new_rows"}),
        (2, ["--shard"], {}),
        (3, ["--shard"], {"tokens_per_batch": 12}),
        (
            3,
            ["--shard"],
            {"batch_size": 2, "gradient_checkpointing": "full", "train_embeddings": "all"},
        ),
        (4, ["--shard"], {"quantization": "nf4-dq", "gradient_checkpointing": "full"}),
    ],
    ids=[
        "data parallel",
        "some idle",
        "quantized",
        "sharded",
        "sharded, filled with tokens",
        "sharded, checkpointed, idle",
        "sharded, quantized",
    ],
)
def test_several_processes_learn_what_one_learns(
    project: Path, size: int, flags: list[str], changes: dict[str, object]
) -> None:
    alone = copied_run(project, 1, command(**changes))
    several = copied_run(fresh(project, STAGE), size, command(*flags, **changes))
    assert_same(several, alone)
    assert digest(several / "adapter_config.json") == digest(alone / "adapter_config.json")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("quantization", ["none", "nf4", "nf4-dq", "int8"])
@pytest.mark.slow
def test_a_sharded_base_gives_the_bits_of_a_whole_one(project: Path, quantization: str) -> None:
    if quantization == "int8":
        pytest.importorskip("bitsandbytes")
    found = []
    for flag in ("--no-shard", "--shard"):
        folder = copied_run(
            fresh(project, STAGE), 2, command(flag, quantization=quantization, epochs=1)
        )
        found.append((curve(folder), tensors(folder)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("loss", "changes"),
    [("dpo", {}), ("kto", {}), ("orpo", {"tokens_per_batch": 30})],
    ids=["dpo", "kto", "orpo, filled with tokens"],
)
@pytest.mark.sampled(2)
@pytest.mark.slow
def test_several_processes_learn_the_preferences_that_one_learns(
    project: Path, loss: str, changes: dict[str, object]
) -> None:
    words = " ".join(TEXTS).split()
    rows = [
        {
            "prompt": " ".join(words[n : n + 3]),
            "chosen": f" {words[n + 4]}",
            "rejected": " " + " ".join(words[n : n + 5]),
        }
        for n in range(20)
    ]
    write_jsonl(project / "data/pairs.jsonl", rows)
    given = {
        "data": "data/pairs.jsonl",
        "loss": loss,
        "epochs": 2,
        "batch_size": 3,
        "eval_share": 0.3,
        **changes,
    }
    asked = [
        LORA,
        "finetune",
        "dpo",
        *(f"--set=finetune_dpo.{key}={value}" for key, value in given.items()),
    ]
    found, rewards = [], []
    for size in (1, 2):
        shutil.rmtree(project / ".lora-cache", ignore_errors=True)
        shutil.rmtree(project / "runs", ignore_errors=True)
        folder = copied_run(project, size, asked, "artifacts/dpo_adapter")
        steps = read_steps(folder / "loss.csv")
        found.append(tensors(folder))
        rewards.append(
            torch.tensor(
                [
                    (s.loss, s.eval_loss or 0, s.reward_margin or 0, s.reward_accuracy or 0)
                    for s in steps
                ]
            )
        )
    torch.testing.assert_close(*rewards, rtol=0, atol=CURVE)
    torch.testing.assert_close(*found, rtol=0, atol=WEIGHTS)


def test_pitfall_21_a_sharded_run_writes_the_whole_adapter(project: Path, cli: Lora) -> None:
    folder = copied_run(project, 2, command("--shard", train_embeddings="all"))
    made = tensors(folder)
    assert all(tensor.numel() and tensor.isfinite().all() for tensor in made.values())
    assert any(tensor.any() for key, tensor in made.items() if key.endswith("lora_B.weight")), (
        "it learned something"
    )
    assert (
        cli("adapters", "verify", str(folder), "--base", "artifacts/expanded", cwd=project)[0] == 0
    )


@pytest.mark.slow
def test_a_checkpoint_does_not_depend_on_how_many_processes_made_it(project: Path) -> None:
    one = command(epochs=20)
    whole, log = copied_run(project, 1, one), project / f"runs/{STAGE}/loss.csv"
    for before, after in ((2, 1), (1, 2)):
        running = started(fresh(project, STAGE), [one] * before)
        wait_for(lambda: len(read_steps(log)) >= 3, running)
        for process in running:
            assert process.process.pid
            os.kill(process.process.pid, signal.SIGTERM)
        codes = [code for code, _ in ended(running)]
        assert codes == [128 + signal.SIGTERM, *[0] * (before - 1)]
        assert checkpoints(log.parent)
        assert_same(copied_run(project, after, one), whole)


def wait_for(condition: Callable[[], bool], running: Sequence[Forked]) -> None:
    while not condition():
        assert all(process.process.is_alive() for process in running), "it ended before"
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize(("overlooked", "flags"), [(False, []), (True, []), (True, ["--shard"])])
def test_a_killed_process_ends_the_run_with_one_message_and_a_checkpoint(
    mini: Path, overlooked: bool, flags: list[str]
) -> None:
    """`overlooked`: its connections stay open, so that gloo waits for what it would have sent."""
    slow = [*on_two_devices(epochs=1000), "--checkpoint-every", "100000", *flags]
    log = mini / f"runs/{STAGE}/loss.csv"
    with (
        ExitStack() as stack,
        subprocess.Popen(slow, cwd=mini, stderr=subprocess.PIPE, text=True) as running,
    ):
        while not log.exists() or len(read_steps(log)) < 3:
            assert running.poll() is None
            time.sleep(0.01)
        second = second_of(running.pid)
        if overlooked:
            stack.enter_context(sockets_of(second))
        os.kill(second, signal.SIGKILL)
        _, said = running.communicate()
    step = len(read_steps(log))
    assert running.returncode == 1
    (error,) = [line for line in said.splitlines() if line.startswith("error")]
    by_rank_0 = (
        f"rank 1 of 2 ended, or cannot be reached. A checkpoint after step {step} of" in error
    )
    # it stopped rank 0 first
    by_launcher = "rank 1 of 2 was killed (SIGKILL). Run the same command to resume" in error
    assert by_rank_0 or by_launcher, error
    assert "Traceback" not in said
    (kept,) = checkpoints(log.parent)
    assert kept.name == f"checkpoint-{step:09d}"


@contextmanager
def sockets_of(pid: int) -> Iterator[None]:
    """Hold the open sockets of a process, which so outlive it."""
    if not hasattr(os, "pidfd_open"):
        pytest.skip("only Linux copies the open files of another process")
    process, copied = os.pidfd_open(pid), []
    try:
        for path in Path(f"/proc/{pid}/fd").iterdir():
            if path.readlink().name.startswith("socket:"):
                copied.append(
                    ctypes.CDLL(None, use_errno=True).syscall(
                        PIDFD_GETFD, process, int(path.name), 0
                    )
                )
        if -1 in copied:
            pytest.skip(
                f"the sockets of another process are not copied: {os.strerror(ctypes.get_errno())}"
            )
        yield
    finally:
        for descriptor in (process, *copied):
            if descriptor >= 0:
                os.close(descriptor)


def second_of(launcher: int) -> int:
    """The process id of rank 1."""
    for pid in children_of(launcher):
        if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return pid
    raise AssertionError("there is no second process")


def children_of(parent: int) -> list[int]:
    numbers = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    return [pid for pid in numbers if state_of(pid)[1] == str(parent)]


def state_of(pid: int) -> tuple[str, str]:
    """(state, parent) of a process; state Z if it has ended or does not exist."""
    try:
        state, parent, *_ = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    except OSError:
        return "Z", ""
    return state, parent


@pytest.mark.parametrize(
    ("number", "whole_group", "times"),
    [
        (signal.SIGKILL, False, 1),
        pytest.param(signal.SIGTERM, False, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, False, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, True, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, True, 1, marks=pytest.mark.slow),
        # the launcher does not wait for its workers any longer
        pytest.param(signal.SIGINT, True, 2, marks=pytest.mark.slow),
    ],
    ids=[
        "SIGKILL",
        "SIGTERM",
        "SIGINT to the launcher",
        "SIGINT to its group",
        "SIGHUP",
        "SIGINT twice",
    ],
)
@pytest.mark.slow
def test_no_process_outlives_its_launcher_and_the_run_can_be_resumed(
    mini: Path, number: signal.Signals, whole_group: bool, times: int
) -> None:
    slow, log = on_two_devices(epochs=1000), mini / f"runs/{STAGE}/loss.csv"
    # as from a terminal: these tests may themselves run under nohup, which children inherit
    heard = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-c", heard, *slow]
    with subprocess.Popen(
        command, cwd=mini, stderr=subprocess.DEVNULL, start_new_session=True
    ) as running:
        while not log.exists() or len(read_steps(log)) < 3:
            assert running.poll() is None
            time.sleep(0.01)
        workers = children_of(running.pid)
        assert len(workers) == 2
        for _ in range(times):
            (os.killpg if whole_group else os.kill)(running.pid, number)
            time.sleep(0.01)
        assert running.wait(60) == (-number if number == signal.SIGKILL else 128 + number)
    wait_until_gone(workers)
    (kept,) = checkpoints(log.parent)
    step = int(kept.name.split("-")[1])
    assert step == len(read_steps(log)), "the last logged step"
    alone = [LORA, "finetune", "lora", f"--set={STAGE}.epochs=1000"]
    resumed = Forked(alone, mini)
    wait_for(lambda: len(read_steps(log)) > step, [resumed])
    assert resumed.process.pid
    os.kill(resumed.process.pid, signal.SIGTERM)
    assert f"resumed after step {step}\n" in resumed.end()[1]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("devices", "shell"), [("1", ""), ("2", "exec "), ("1", "exec ")])
@pytest.mark.slow
def test_what_dvc_has_started_ends_with_it(mini: Path, devices: str, shell: str) -> None:
    """DVC runs a command by a shell, which some replace by the command, and tells it of no
    signal.
    """
    command = [LORA, "finetune", "lora", "--devices", devices, f"--set={STAGE}.epochs=1000"]
    code = (
        f"import subprocess; subprocess.run({shell + shlex.join(command)!r} + '; true' * "
        f"{not shell}, shell=True)"
    )
    log, variables = mini / f"runs/{STAGE}/loss.csv", {**os.environ, "DVC_STAGE": STAGE}
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=mini, stderr=subprocess.DEVNULL, env=variables
    ) as dvc:
        while not log.exists() or len(read_steps(log)) < 3:
            assert dvc.poll() is None
            time.sleep(0.01)
        processes = children_of(dvc.pid)
        processes += children_of(processes[0])
        assert (
            len(processes) == {("1", ""): 2, ("2", "exec "): 3, ("1", "exec "): 1}[devices, shell]
        )
        dvc.kill()
    wait_until_gone(processes)
    (kept,) = checkpoints(log.parent)
    assert kept.name == f"checkpoint-{len(read_steps(log)):09d}"


@pytest.mark.slow
def test_under_nohup_a_closed_terminal_ends_nothing(mini: Path) -> None:
    with subprocess.Popen(
        ["nohup", *on_two_devices(epochs=1000)],
        cwd=mini,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as running:
        log = mini / f"runs/{STAGE}/loss.csv"
        while not log.exists() or len(read_steps(log)) < 3:
            assert running.poll() is None
            time.sleep(0.01)
        for process in (running.pid, *children_of(running.pid)):
            os.kill(process, signal.SIGHUP)
        steps = len(read_steps(log))
        while len(read_steps(log)) < steps + 10:
            assert running.poll() is None
            time.sleep(0.01)
        running.terminate()


@pytest.mark.slow
def test_a_process_that_lives_and_does_not_answer_ends_the_run(mini: Path) -> None:
    code = (
        "from datetime import timedelta; from cli.main import main; from pipeline.training import "
        "loop; loop.SLOWEST_STEP = timedelta(seconds=3); main()"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
        }
    command, log = (
        [sys.executable, "-c", code, *on_two_devices(epochs=1000)[1:]],
        mini / f"runs/{STAGE}/loss.csv",
    )
    first, second = (
        subprocess.Popen(
            command,
            cwd=mini,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **shared, "RANK": n},
        )
        for n in "01"
    )
    try:
        while not log.exists() or len(read_steps(log)) < 3:
            assert first.poll() is None
            time.sleep(0.01)
        second.send_signal(signal.SIGSTOP)
        _, said = first.communicate(timeout=60)
    finally:
        second.kill()
        second.communicate()
    lost = (
        f"rank 1 of 2 ended, or cannot be reached. A checkpoint after step {len(read_steps(log))} "
        "of"
    )
    assert first.returncode == 1 and lost in said and "Traceback" not in said


def test_machines_have_to_meet(mini: Path, cli: Lora) -> None:
    for flags, said in (
        (["--nnodes", "2"], "--nnodes and --rdzv-endpoint go together"),
        (["--rdzv-endpoint", "127.0.0.1:29400"], "--nnodes and --rdzv-endpoint go together"),
        (
            ["--nnodes", "2", "--rdzv-endpoint", "127.0.0.1"],
            "--rdzv-endpoint must be HOST:PORT of a machine",
        ),
        (
            ["--nnodes", "2", "--rdzv-endpoint", "127.0.0.1:70000"],
            "--rdzv-endpoint must be HOST:PORT of a machine",
        ),
        (
            ["--nnodes", "2", "--rdzv-endpoint", "0.0.0.0:29400"],
            "--rdzv-endpoint must be HOST:PORT of a machine",
        ),
        (["--node-rank", "1"], "--node-rank must be less than --nnodes, which is 1, got 1"),
        (
            ["--nnodes", "2", "--rdzv-endpoint", "127.0.0.1:7", "--node-rank", "2"],
            "--node-rank must be less than",
        ),
    ):
        code, _, err = cli("finetune", "lora", *flags, cwd=mini)
        assert code == 1 and err.startswith(f"error: {said}") and err.count("\n") == 1
    assert launch.LAUNCHER not in os.environ, "this process is no launcher yet"


@pytest.mark.slow
def test_a_process_whose_launcher_dies_before_it_has_begun_ends_too(mini: Path) -> None:
    with subprocess.Popen(on_two_devices(epochs=2), cwd=mini, stderr=subprocess.DEVNULL) as running:
        while len(workers := children_of(running.pid)) < 2:
            assert running.poll() is None
            time.sleep(0.001)
        running.kill()
    wait_until_gone(workers)


def test_a_worker_that_does_not_handle_sigterm_is_killed() -> None:
    """As when its main thread waits in a collective that hangs."""
    code = (
        "import signal, time; from pipeline.training.parallel import launch; "
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); launch.GRACE = 0.1; "
        "launch.end_with_launcher(); time.sleep(60)"
    )
    gone = subprocess.Popen(["true"])
    gone.wait()
    worker = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, launch.LAUNCHER: str(gone.pid)}
    )
    assert worker.returncode == -signal.SIGKILL


def wait_until_gone(processes: Sequence[int]) -> None:
    limit = time.monotonic() + 60
    while left := [pid for pid in processes if state_of(pid)[0] != "Z"]:
        if time.monotonic() > limit:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"{len(left)} of {len(processes)} processes are left")
        time.sleep(0.05)


def test_more_devices_than_there_are_are_refused(mini: Path, cli: Lora) -> None:
    available = torch.cuda.device_count() or len(os.sched_getaffinity(0))
    code, out, err = cli("finetune", "lora", "--devices", str(available + 1), cwd=mini)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: --devices must be at most {available}, the ")
    assert err.endswith(f"got {available + 1}. Lower it.\n") and err.count("\n") == 1


@pytest.mark.slow
def test_devices_are_processes_that_share_the_work_and_what_is_made_is_found_again(
    mini: Path,
) -> None:
    first = subprocess.run(
        on_two_devices(epochs=1), cwd=mini, capture_output=True, text=True, check=False
    )
    assert first.returncode == 0, first.stderr
    assert first.stdout.count(FOLDER) == 1
    alone = [LORA, "finetune", "lora", f"--set={STAGE}.epochs=1"]
    found = ended(started(mini, [alone] * 2))
    assert [code for code, _ in found] == [0, 0]
    assert "taken from the cache" in found[0][1]


def test_what_one_process_cannot_do_is_said_once_by_the_first(project: Path) -> None:
    good, bad = command(), command(target_modules="nix")
    (code, said), (other, silent) = ended(started(project, [good, bad]))
    assert (code, other, silent) == (1, 0, "")
    *notes, error = said.splitlines()
    assert error.startswith("error: target_modules: 'nix' matches no linear layer")
    assert all("; advised: " in note for note in notes)


def test_only_several_processes_share_a_base_and_only_training_is_shared(
    project: Path, cli: Lora
) -> None:
    code, _, err = cli("finetune", "lora", "--shard", cwd=project)
    assert code == 1
    assert err == (
        "error: --shard shares the base among several devices. Say how many with --devices.\n"
    )
    merged = ended(started(project, [[LORA, "merge"]] * 2))
    assert merged == [(1, "error: merge runs in one process. Call it without torchrun.\n"), (0, "")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "numbered"),
    [
        ("127.0.0.1", True),
        ("localhost", False),
        pytest.param(
            "127.0.1.1",  # of a machine's name in Debian
            False,
            marks=pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.1 is the only one"),
        ),
    ],
)
def test_machines_that_meet_train_together(
    mini: Path, tmp_path: Path, host: str, numbered: bool
) -> None:
    """Both are this one: the first has the port, the second joins it."""
    endpoint = f"{host}:{free_port()}"
    roots = [mini, shutil.copytree(mini, tmp_path / "other")]
    running = []
    for number, root in enumerate(roots):
        where = [
            "--nnodes",
            "2",
            "--rdzv-endpoint",
            endpoint,
            *["--node-rank", str(number)] * numbered,
        ]
        command = [LORA, "finetune", "lora", *where, f"--set={STAGE}.epochs=2"]
        running.append(subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert sum((root / FOLDER).exists() for root in roots) == 1, "that of rank 0"
    assert "done; rank 0 writes" in "".join(said)


@pytest.mark.slow
def test_nodes_of_slurm_have_the_numbers_that_slurm_gives(mini: Path, tmp_path: Path) -> None:
    """Node 1 starts first: with the address alone it would be the host."""
    where = ["--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    command = [LORA, "finetune", "lora", *where, f"--set={STAGE}.epochs=2"]
    roots = [shutil.copytree(mini, tmp_path / "other"), mini]
    running = []
    for number in (1, 0):
        slurm = {**os.environ, "SLURM_NNODES": "2", "SLURM_NODEID": str(number)}
        running.append(
            subprocess.Popen(
                command, cwd=roots[number], env=slurm, stderr=subprocess.PIPE, text=True
            )
        )
        time.sleep(3 * number)
    said = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert [(root / FOLDER).exists() for root in roots] == [True, False], "that of node 0"


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        ({}, None),
        ({"SLURM_NNODES": "2", "SLURM_NODEID": "1"}, 1),
        ({"SLURM_STEP_NUM_NODES": "2", "SLURM_NNODES": "4", "SLURM_NODEID": "0"}, 0),
        ({"SLURM_STEP_NUM_NODES": "1", "SLURM_NNODES": "2", "SLURM_NODEID": "0"}, None),
        ({"SLURM_NNODES": "4", "SLURM_NODEID": "3"}, None),  # another number than --nnodes
        ({"SLURM_NNODES": "2"}, None),  # in the shell of salloc
    ],
)
def test_a_node_s_number_is_slurm_s_in_a_step_of_as_many_nodes(
    environment: Mapping[str, str], number: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch._slurm_node(2) == number


@pytest.mark.parametrize("number", ["2", "-1", "first", ""])
def test_a_number_that_slurm_cannot_have_given_is_one_message(
    number: str, mini: Path, cli: Lora, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NNODES", "2")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_NODEID", number)
    where = ["--nnodes", "2", "--rdzv-endpoint", "127.0.0.1:29400"]
    code, _, err = cli("finetune", "lora", *where, cwd=mini)
    assert (code, err) == (
        1,
        f"error: SLURM_NODEID must be a number from 0 to 1, got {number!r}. Unset it, or name this "
        "machine's number with --node-rank.\n",
    )


def test_machines_that_did_not_meet_are_told_how_long_this_one_has_waited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch.distributed import DistNetworkError

    class Clock:
        now = 5000.0

        def monotonic(self) -> float:
            return self.now

        def sleep(self, _: float) -> None:
            self.now += 70

    def nobody(*_: object) -> None:
        raise DistNetworkError("Connection refused")

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(launch, "time", Clock())
    monkeypatch.setattr(launch, "_open_store", nobody)
    with pytest.raises(UserError, match=r"did not meet at 127\.0\.0\.1:7 within 350 s\. Run"):
        launch._Meeting("127.0.0.1:7", 2, 1)


@pytest.mark.slow
def test_a_machine_that_waits_for_the_others_ends_with_ctrl_c(mini: Path) -> None:
    where = ["--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    for number in ("0", "1"):  # one that has the port, one that waits for it
        with subprocess.Popen(
            [LORA, "finetune", "lora", *where, "--node-rank", number], cwd=mini
        ) as waiting:
            time.sleep(8)
            assert waiting.poll() is None
            waiting.send_signal(signal.SIGINT)
            assert waiting.wait(10) == 128 + signal.SIGINT


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_process_that_fails_has_its_own_exit_code_in_the_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import logging

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
    from torch.distributed.launcher import api

    monkeypatch.setenv(launch.LAUNCHER, "")  # restored afterwards, with what else `launch` sets
    for name in ("OMP_NUM_THREADS", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(logging, "disable", lambda _: None)

    def run(*_: str) -> None:
        raise ChildFailedError("cli.main", {1: ProcessFailure(1, 7, 3, "")})

    monkeypatch.setattr(api, "elastic_launch", lambda *_: run)
    with pytest.raises(UserError, match=r"rank 1 of 1 exited with code 3\. Run the same command"):
        launch.launch(1, [])


def test_torchrun_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """One machine's rendezvous is that of --standalone, several machines' is the static one, and
    neither is changed.
    """
    import logging

    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
    from torch.distributed.launcher import api

    monkeypatch.setenv(launch.LAUNCHER, "")  # restored afterwards, with what else `launch` sets
    for name in ("OMP_NUM_THREADS", "TORCH_CPP_LOG_LEVEL", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(logging, "disable", lambda _: None)
    found: list[api.LaunchConfig] = []
    both = threading.Barrier(2, timeout=60)  # the first has the store

    def run(config: api.LaunchConfig) -> None:
        found.append(config)
        if config.max_nodes > 1:
            both.wait()

    monkeypatch.setattr(api, "elastic_launch", lambda config, _: lambda *_: run(config))
    before = dict(vars(DynamicRendezvousHandler))
    assert launch.launch(1, []) == 0
    endpoint = f"127.0.0.1:{free_port()}"
    first = threading.Thread(target=launch.launch, args=(1, [], 2, endpoint, 0))
    first.start()
    assert launch.launch(1, [], 2, endpoint, 1) == 0
    first.join()
    assert dict(vars(DynamicRendezvousHandler)) == before
    assert [config.rdzv_backend for config in found] == ["c10d", "static", "static"]
    assert sorted(config.rdzv_configs["rank"] for config in found[1:]) == [0, 1]
