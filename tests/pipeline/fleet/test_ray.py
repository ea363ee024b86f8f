"""Sweeps on Ray: by itself, and on two nodes of this machine, whose workers and daemons die."""

import json
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

import psutil
import pytest

from pipeline.errors import UserError
from pipeline.fleet.engines import ray
from pipeline.fleet.run import find_run
from pipeline.fleet.settings import Cluster
from tests.helpers.projects import BRIEF, lora, make_base, new_project, wait_for
from tests.helpers.ray_nodes import RayNodes, ray_nodes
from tests.helpers.sent import PATIENCE, Sent, assert_as_in_one_pass

pytestmark = pytest.mark.xdist_group("ray")  # one cluster at a time
GRID = ["finetune", "sweep", "--grid", "rank=1,2", "--grid", "seed=0,1"]
PARTS = ["--parts", "2"]
LONG = ["--set", "finetune_lora.epochs=600", "--checkpoint-every", "100"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(new_project(tmp_path_factory.mktemp("ray") / "mini"), BRIEF)


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "project"))


@pytest.fixture
def nodes(tmp_path: Path, project: Path) -> Iterator[RayNodes]:
    with ray_nodes(tmp_path / "ray") as cluster:
        text = f"pool: {{engine: ray, address: '{cluster.address}', setup: ['export A=b']}}"
        (project / "fleet.yaml").write_text(text)
        yield cluster


@pytest.fixture
def send(project: Path, nodes: RayNodes) -> Iterator[Callable[..., Sent]]:
    sent = list[Sent]()

    def start(*arguments: str) -> Sent:
        sent.append(Sent(project, nodes.environment, [*arguments, *PARTS]))
        return sent[-1]

    yield start
    for sweep in sent:
        sweep.kill()


def engine(address: str) -> ray.Ray:
    return ray.Ray("pool", Cluster(engine="ray", address=address))


# What is refused


def test_without_the_package_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.errors.find_spec", lambda _name: None)
    with pytest.raises(
        UserError, match=r"pool.engine: ray needs ray. Run `.*lora-workbench\[ray\]"
    ):
        engine("").check()


def test_an_address_at_which_nothing_listens_is_refused_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=f"pool.address: {address} does not answer .*refused"):
            engine(address).check()


def test_an_address_of_something_else_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "TO_CONNECT", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        pool = engine(f"127.0.0.1:{other.getsockname()[1]}")
        pool.check()
        with pytest.raises(UserError, match=r"pool.address: .* not as Ray's head within 3 s"):
            pool.place()


@pytest.mark.parametrize(
    ("printed", "message"),
    [
        (
            "RuntimeError: Version mismatch: The cluster was started with:\n    Ray: 2.61.0\n",
            "another version of Ray or Python: The cluster was started with: Ray: 2.61.0 Install",
        ),
        ("W gcs_client: Unauthenticated: RPC error: InvalidAuthToken", "a:1 wants another token"),
        (
            "Trace\nConnectionError: no raylet is here\n",
            "Ray does not connect: ConnectionError: no",
        ),
    ],
)
def test_what_ray_prints_becomes_a_sentence(printed: str, message: str) -> None:
    assert message in ray._refusal("a:1", printed)


# A cluster of this machine alone


@pytest.mark.slow
def test_by_itself_a_sweep_in_parts_is_one_pass_to_the_bit(project: Path) -> None:
    (project / "fleet.yaml").write_text("pool: {engine: ray}\nlarge: {engine: ray, gpus: 99}")
    home, disk = project / "home", Path(f"/tmp/ray-{token_hex(4)}")
    home.mkdir()
    variables = {"RAY_TMPDIR": str(disk), "HOME": str(home)}
    brief = [*GRID, "--set", "finetune_lora.epochs=2"]
    try:
        told = lora(*brief, *PARTS, "--on", "large", cwd=project, **variables)
        assert told.returncode == 1 and told.stderr.count("\n") == 1
        assert "large: no node of Ray has 1 CPU, 99 GPU, which a unit needs" in told.stderr
        told = lora(*brief, *PARTS, "--on", "pool", cwd=project, **variables)
        assert told.returncode == 0, told.stderr
        assert "4 adapters, in 2 units on pool (ray)" in told.stderr
        assert "4 of 4 adapters are taken from the cache" in told.stderr
        # nothing of Ray's own is printed, kept at home, or goes on
        assert not [word for word in ("raylet", "INFO", "WARN") if word in told.stderr]
        assert not (home / ".ray").exists()
        wait_for(lambda: not processes_of(disk), PATIENCE)
    finally:
        shutil.rmtree(disk, ignore_errors=True)
    assert_as_in_one_pass(project, brief)


def processes_of(disk: Path) -> list[str]:
    found = list[str]()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            found += [line for line in process.cmdline() if str(disk) in line]
    return found


# Two nodes


@pytest.mark.slow
def test_of_a_killed_worker_the_unit_goes_on_from_its_checkpoint(
    project: Path, send: Callable[..., Sent]
) -> None:
    sweep = send(*GRID, *LONG)
    wait_for(lambda: sweep.checkpoints(2), PATIENCE)
    unit = psutil.Process(sweep.attempts(2)[0]["pid"])
    (command,), worker = unit.children(), unit.parent()
    assert worker is not None and "lora_unit" in " ".join(worker.cmdline())
    worker.kill()
    wait_for(lambda: not unit.is_running() and not command.is_running(), PATIENCE)
    assert "units 2 are started again" in sweep.end()
    assert len(sweep.attempts(2)) == 2 and sweep.attempts(2)[1]["done"] > 0
    assert "resumed after step" in sweep.log(2)
    assert_as_in_one_pass(project, [*GRID, *LONG])


@pytest.mark.slow
def test_of_a_killed_raylet_the_unit_goes_on_on_the_other_node(
    project: Path, nodes: RayNodes, send: Callable[..., Sent]
) -> None:
    sweep = send(*GRID, *LONG)
    wait_for(lambda: sweep.checkpoints(1) and sweep.checkpoints(2), PATIENCE)
    on = {nodes.node_of(sweep.attempts(number)[0]["pid"]): number for number in (1, 2)}
    assert set(on) == {1, 2}
    nodes.kill_raylet(2)
    wait_for(lambda: len(sweep.attempts(on[2])) > 1, PATIENCE)
    assert nodes.node_of(sweep.attempts(on[2])[1]["pid"]) == 1
    sweep.end()
    assert "resumed after step" in sweep.log(on[2])
    assert_as_in_one_pass(project, [*GRID, *LONG])


@pytest.mark.slow
def test_cancelled_units_write_checkpoints_and_the_same_command_goes_on(
    project: Path, send: Callable[..., Sent]
) -> None:
    sweep = send(*GRID, *LONG)
    wait_for(lambda: sweep.checkpoints(1) and sweep.checkpoints(2), PATIENCE)
    run = find_run(project, "").name
    # another terminal knows neither address nor token
    told = lora("fleet", "cancel", run, cwd=project)
    assert told.returncode == 0 and "stopped: 1, 2" in told.stdout, told.stderr
    _, errors = sweep.process.communicate(timeout=PATIENCE)
    assert sweep.process.returncode == 1 and "2 of 2 units did not end well" in errors
    assert_stopped(project)

    sweep = send(*GRID, *LONG)
    wait_for(lambda: min(resumed(sweep)) > 0, PATIENCE)
    sweep.process.send_signal(signal.SIGINT)
    _, errors = sweep.process.communicate(timeout=PATIENCE)
    assert sweep.process.returncode == 130 and "Traceback" not in errors
    assert "are stopped; the same command goes on from their checkpoints" in errors
    assert_stopped(project)

    send(*GRID, *LONG).end()
    assert min(resumed(sweep)) > 1
    assert_as_in_one_pass(project, [*GRID, *LONG])


def resumed(sweep: Sent) -> list[int]:
    """How often each unit went on from a checkpoint."""
    return [sweep.log(number).count("resumed after step") for number in (1, 2)]


def assert_stopped(project: Path) -> None:
    (run,) = json.loads(lora("fleet", "--json", cwd=project).stdout)
    assert [unit["state"] for unit in run["units"]] == ["stopped", "stopped"]


@pytest.mark.slow
def test_a_wrong_token_and_a_lost_command(
    project: Path, nodes: RayNodes, send: Callable[..., Sent]
) -> None:
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token_hex(32)}
    told = lora(*GRID, *PARTS, "--on", "pool", cwd=project, **wrong)
    assert told.returncode == 1 and told.stderr.count("\n") == 1
    assert f"pool.address: {nodes.address} wants another token. Set RAY_AUTH_MODE" in told.stderr

    sweep = send(*GRID, *LONG)
    wait_for(lambda: sweep.checkpoints(1) and sweep.checkpoints(2), PATIENCE)
    units = [psutil.Process(sweep.attempts(number)[0]["pid"]) for number in (1, 2)]
    commands = [unit.children()[0] for unit in units]
    sweep.kill()
    # its units end with it
    wait_for(lambda: not any(process.is_running() for process in (*units, *commands)), PATIENCE)
