"""Trackers follow a run from outside: they have each step once, and whatever happens to them, the
run has its bytes.
"""

import fcntl
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.project.cache import cache_key
from pipeline.project.logs import follower, trackers
from pipeline.project.logs.follower import Followed
from pipeline.project.logs.run_log import SAMPLES, parse_sample, read_steps
from pipeline.project.logs.trackers import TrackedRun, wandb
from pipeline.stages.registry import open_project
from tests.conftest import Built, Lora
from tests.helpers.json_files import read_json
from tests.helpers.process import Forked, forked
from tests.helpers.projects import BRIEF, LORA, ROOT, folder_bytes, make, refusal

STAGE, PLACE = "finetune_lora", "artifacts/lora_adapter"
EVERY = "finetune_lora.samples={prompts: [der hund, die katze], every: 4}"
LONG = "finetune_lora.epochs=60"
Values = dict[str, list[tuple[int, float]]]  # metric → (step, value)


def told(value: str) -> list[str]:
    return [f"--set={one}" for one in (*BRIEF, value)]


def lora(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`lora …` in a child of the fork server; its trackers are processes of their own."""
    command, variables = forked("cli.main", *arguments), {**os.environ, **environment}
    return subprocess.run(
        command, cwd=cwd, env=variables, capture_output=True, text=True, check=False
    )


def train(root: Path, *settings: str, **environment: str) -> str:
    """`lora finetune lora` once its trackers are done: its stderr."""
    given = [f"--set={one}" for one in (*BRIEF, *settings)]
    done = lora(
        "finetune",
        "lora",
        "--force",
        *given,
        cwd=root,
        TRACKIO_DIR=str(root / "trackio"),
        **environment,
    )
    assert done.returncode == 0, done.stderr
    wait(root)
    return done.stderr


def wait(root: Path) -> None:
    """Until no follower holds its lock."""
    for path in root.glob("runs/*/.finetune_*.lock"):
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)


def key_of(root: Path, place: str = PLACE) -> str:
    manifest = read_json(root / place / "manifest.json")
    return cache_key(manifest)[:8]


def expected(folder: Path) -> Values:
    """What a log says, by the names that trackers have."""
    steps = read_steps(folder / "loss.csv")
    return {
        "train/loss": [(step.step, step.loss) for step in steps],
        "train/grad_norm": [(step.step, step.grad_norm) for step in steps],
        "eval/loss": [(step.step, step.eval_loss) for step in steps if step.eval_loss is not None],
    }


def of(values: Values) -> dict[str, list[tuple[int, Any]]]:
    """The same up to the rounding of fp32."""
    return {
        name: [(step, pytest.approx(value, rel=1e-6)) for step, value in points]
        for name, points in values.items()
    }


# Each tracker's runs, read by its own reader or by none of its code.


def in_tensorboard(root: Path, run: str) -> tuple[Values, list[str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(root / "runs/tensorboard" / run), {"scalars": 0, "tensors": 0})
    events.Reload()
    values = {
        name: [(one.step, one.value) for one in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }
    texts = [name for name in events.Tags()["tensors"] if name.startswith("samples/")]
    return values, [
        one.tensor_proto.string_val[0].decode() for name in texts for one in events.Tensors(name)
    ]


def in_wandb(root: Path, run: str) -> tuple[Values, list[str]]:
    values, texts = Values(), list[str]()
    for folder in sorted(root.glob(f"runs/wandb/wandb/offline-run-*-{run}")):
        for record in wandb_records(folder / f"run-{run}.wandb"):
            items = {
                (one.nested_key or [one.key])[-1]: one.value_json for one in record.history.item
            }
            for name in items.keys() & {"train/loss", "train/grad_norm", "eval/loss"}:
                values.setdefault(name, []).append(
                    (json.loads(items["step"]), json.loads(items[name]))
                )
        for table in sorted(folder.glob("files/media/table/*.json")):
            texts += [f"{prompt} → {answer}" for _, prompt, answer in read_json(table)["data"]]
    return values, texts


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline run: a header, then LevelDB's log format (blocks of 32 KiB)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part, at = part + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            record = Record()
            record.ParseFromString(part)
            part = b""
            yield record


def in_trackio(root: Path, run: str) -> tuple[Values, list[str]]:
    values, texts = Values(), list[str]()
    (path,) = (root / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute(
            "SELECT step, metrics FROM metrics WHERE run_name = ? ORDER BY step", (run,)
        ).fetchall()
    for step, metrics in rows:
        for name, value in json.loads(metrics).items():
            if name.startswith("samples/"):
                texts.append(value)
            else:
                values.setdefault(name, []).append((step, value))
    return values, texts


def in_mlflow(root: Path, run: str) -> tuple[Values, list[str]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{root}/runs/mlflow/mlflow.db")
    (experiment,) = (one for one in client.search_experiments() if one.name == root.name)
    (found,) = client.search_runs([experiment.experiment_id], f"tags.mlflow.runName = '{run}'")
    assert (found.info.status, found.data.params["rank"]) == ("FINISHED", "4")
    values = {
        name: [(one.step, one.value) for one in client.get_metric_history(found.info.run_id, name)]
        for name in found.data.metrics
    }
    texts = [
        path.read_text(encoding="utf-8")
        for path in sorted(root.glob("runs/mlflow/artifacts/**/samples/*.txt"))
    ]
    return values, [
        part for text in texts for part in text.strip().replace("\n→", " →").split("\n\n")
    ]


def in_dvclive(root: Path, run: str) -> tuple[Values, list[str]]:
    assert run.startswith(STAGE)
    values = Values()
    for path in (root / "dvclive" / STAGE / "plots/metrics").rglob("*.tsv"):
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
        name = (
            path.relative_to(root / "dvclive" / STAGE / "plots/metrics").with_suffix("").as_posix()
        )
        values[name] = [(int(step), float(value)) for step, value in rows]
    last = read_json(root / "dvclive" / STAGE / "metrics.json")
    assert last["train"]["loss"] == values["train/loss"][-1][1]
    return values, []


READERS = {
    "dvclive": in_dvclive,
    "mlflow": in_mlflow,
    "tensorboard": in_tensorboard,
    "trackio": in_trackio,
    "wandb": in_wandb,
}


@pytest.fixture(scope="module")
def followed(brief: Path, built: Built) -> Path:
    """A project with a run that every tracker followed. Read it; do not write to it."""

    def build(root: Path) -> None:
        shutil.copytree(brief, root, dirs_exist_ok=True)
        subprocess.run(
            [sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=root, check=True
        )
        train(
            root, EVERY, LONG, "finetune_lora.eval_share=0.3", f"report_to=[{', '.join(READERS)}]"
        )

    return built("followed", build)


def test_each_tracker_is_found_and_has_a_reader_here() -> None:
    assert sorted(trackers.TRACKERS) == sorted(READERS)


@pytest.mark.parametrize("tracker", READERS)
@pytest.mark.slow
def test_a_tracker_has_every_step_once_and_the_samples(followed: Path, tracker: str) -> None:
    values, texts = READERS[tracker](followed, f"{STAGE}-{key_of(followed)}")
    log = expected(followed / PLACE)
    assert len(log["train/loss"]) > 100 and len(log["eval/loss"]) > 10
    assert {name: values[name] for name in log} == of(log)
    if tracker != "dvclive":  # DVC shows no texts
        samples = [
            parse_sample(line)
            for line in (followed / PLACE / SAMPLES).read_text("utf-8").splitlines()
        ]
        shown = sorted(" ".join(text.split()) for text in texts)
        assert shown == sorted(" ".join(f"{one.prompt} → {one.answer}".split()) for one in samples)


@pytest.mark.slow
def test_the_artifact_is_the_same_to_the_byte_and_taken_from_the_cache(
    followed: Path, project: Path
) -> None:
    make(project, [STAGE], [*BRIEF, EVERY, LONG, "finetune_lora.eval_share=0.3"], force=True)
    assert folder_bytes(project / PLACE) == folder_bytes(followed / PLACE)
    make(
        project, [STAGE], [*BRIEF, EVERY, LONG, "finetune_lora.eval_share=0.3", "report_to=[wandb]"]
    )
    notes = read_json(project / "runs" / STAGE / "run.json")["notes"]
    assert "nothing to do, taken from the cache" in notes[0]


def fake(folder: Path, library: str, init: str) -> str:
    """A PYTHONPATH on which a library has other code."""
    (folder / library).mkdir(parents=True)
    (folder / library / "__init__.py").write_text(init, encoding="utf-8")
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH", str(ROOT)))))


RUN = "class Run:\n    def define_metric(self, *_, **__): pass\n    def finish(self, **_): pass\n"
RUN += "    def log(self, _): {}\n"
INIT = "import os, time, signal\nopen({mark!r}, 'w').write(str(os.getpid()))\n"
SETTINGS = "def Settings(**_): return None\ndef init(**_): return Run()\n"
ILLS = {  # what a tracker does, and what is said of it
    "killed amid a run": (
        INIT + RUN.format("os.kill(os.getpid(), signal.SIGKILL)") + SETTINGS,
        "killed by signal 9",
    ),
    "no import": (
        INIT + "raise ImportError('built for another Python')\n",
        "built for another Python",
    ),
    "hangs": (
        INIT + RUN.format("time.sleep(10**6)") + SETTINGS,
        "wandb is still reading the run's log",
    ),
    "error amid a run": (
        INIT + RUN.format("raise RuntimeError('no \\x1b[31mroom')") + SETTINGS,
        "no ␛[31mroom",
    ),
}


@pytest.mark.sampled(4)  # one that hangs is waited for ten seconds
@pytest.mark.parametrize("ill", ILLS)
@pytest.mark.slow
def test_whatever_befalls_a_tracker_the_run_has_its_bytes(
    project: Path, tmp_path: Path, ill: str
) -> None:
    make(project, [STAGE], [*BRIEF, LONG, EVERY], force=True)
    alone, mark = folder_bytes(project / PLACE), tmp_path / "pid"
    code, said = ILLS[ill]
    path = fake(tmp_path / "fake", "wandb", code.replace("{mark!r}", repr(str(mark))))
    given = [f"--set={one}" for one in (*BRIEF, LONG, EVERY, "report_to=[wandb]")]
    begun = time.monotonic()
    done = lora("finetune", "lora", "--force", *given, cwd=project, PYTHONPATH=path)
    assert time.monotonic() - begun < 60
    assert done.returncode == 0 and folder_bytes(project / PLACE) == alone
    assert said in done.stderr and "Traceback" not in done.stderr
    pid = int(mark.read_text())
    if ill == "hangs":
        os.kill(pid, signal.SIGKILL)
    wait(project)
    # What it did not get is sent later, in a run of its own: the broken one may have any part of
    # it.
    again = lora("runs", "export", STAGE, "--to", "wandb", cwd=project, WANDB_MODE="offline")
    assert again.returncode == 0, again.stderr
    (folder,) = project.glob("runs/wandb/wandb/offline-run-*")
    values, _ = in_wandb(project, folder.name.split("-", 3)[3])
    log = expected(project / PLACE)
    assert values == of({name: points for name, points in log.items() if points})


@pytest.mark.slow
def test_a_tracker_that_hangs_is_ended_in_bounded_time(project: Path, tmp_path: Path) -> None:
    make(project, [STAGE], BRIEF)
    hanging = INIT.replace("{mark!r}", repr(str(tmp_path / "pid"))) + "time.sleep(10**6)\n"
    path = fake(tmp_path / "fake", "wandb", hanging)
    (project / "runs/wandb").mkdir()
    (project / "runs" / STAGE / "loss.csv").touch()  # written after 1.0
    run = read_json(project / "runs" / STAGE / "run.json")
    given = Followed(
        str(project), STAGE, False, "k" * 64, {}, "", str(project / "runs" / STAGE), run["started"]
    )
    code = "import sys; from pipeline.project.logs import follower as f; f.PATIENCE = 2; f.main()"
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, "wandb"],
        input=json.dumps(vars(given)).encode(),
        env={**os.environ, "PYTHONPATH": path},
        cwd=project,
        check=False,
    )
    assert done.returncode == -signal.SIGALRM and time.monotonic() - begun < 20


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_in_the_same_events(project: Path) -> None:
    settings = [*told("finetune_lora.epochs=150"), "--set=report_to=[tensorboard]"]
    command = [LORA, "finetune", "lora", "--checkpoint-every", "10", *settings]
    log, run = project / "runs" / STAGE / "loss.csv", project / "runs" / STAGE
    before = log.stat().st_mtime_ns
    running = Forked(command, project)
    while running.process.is_alive() and not (
        log.stat().st_mtime_ns > before and len(read_steps(log)) > 200
    ):
        time.sleep(0.01)
    running.process.kill()
    assert running.end()[0] == -signal.SIGKILL
    wait(project)
    assert list(run.glob("checkpoint-*"))
    code, errors = Forked(command, project).end()
    assert code == 0 and "resumed after step" in errors
    wait(project)
    values, _ = in_tensorboard(project, f"{STAGE}-{key_of(project)}")
    assert {"train/loss": values["train/loss"]} == of(
        {"train/loss": expected(project / PLACE)["train/loss"]}
    )
    state = read_json(next((project / "runs/tensorboard").glob(".*.json")))
    assert (state["attempt"], state["sending"]) == (1, 0)


@pytest.mark.slow
def test_runs_one_after_the_other_are_told_apart(project: Path) -> None:
    """Both are in one run folder, and the second begins before the first was read."""
    keys = []
    for rate in ("1e-3", "1e-4"):
        given = [
            f"--set={one}"
            for one in (*BRIEF, f"finetune_lora.learning_rate={rate}", "report_to=[tensorboard]")
        ]
        code, errors = Forked([LORA, "finetune", "lora", *given], project).end()
        assert code == 0, errors
        keys.append((key_of(project), expected(project / PLACE)["train/loss"]))
    wait(project)
    assert keys[0] != keys[1]
    for key, losses in keys:
        assert in_tensorboard(project, f"{STAGE}-{key}")[0]["train/loss"] == of({"": losses})[""]


@pytest.mark.slow
def test_each_adapter_of_a_sweep_is_a_run(project: Path) -> None:
    make(project, ["finetune_sweep"], [*BRIEF, EVERY])
    for tracker in ("tensorboard", "trackio", "wandb"):
        done = lora(
            "runs",
            "export",
            "finetune_sweep",
            "--to",
            tracker,
            cwd=project,
            TRACKIO_DIR=str(project / "trackio"),
        )
        assert done.returncode == 0 and "sent" in done.stdout, done.stderr
    key = key_of(project, "artifacts/sweep")
    for name in ("rank-1", "rank-2"):
        log = {"train/loss": expected(project / "artifacts/sweep" / name)["train/loss"]}
        run = f"finetune_sweep-{key}/{name}"
        for reader in (in_tensorboard, in_trackio):
            assert {"train/loss": reader(project, run)[0]["train/loss"]} == of(log)
        assert {"train/loss": in_wandb(project, run.replace("/", "-"))[0]["train/loss"]} == of(log)


@pytest.mark.slow
def test_a_run_is_sent_once_however_often_it_is_exported(project: Path) -> None:
    make(project, [STAGE], [*BRIEF, EVERY])
    for _ in range(2):
        done = lora("runs", "export", "--to", "tensorboard", "--out", "events", cwd=project)
        assert done.returncode == 0 and "events" in done.stdout
    (file,) = (project / "events" / f"{STAGE}-{key_of(project)}").iterdir()
    assert file.name.startswith("events.out.tfevents")


def test_lora_runs_lists_what_can_be_sent(project: Path, cli: Lora) -> None:
    make(project, [STAGE], [*BRIEF, "finetune_lora.rank=2"])
    code, out, _ = cli("runs", "--json", cwd=project)
    rows = {row["key"]: row for row in json.loads(out) if row["run"].startswith(STAGE)}
    assert code == 0 and len(rows) == 2
    assert rows[key_of(project)]["steps"] == len(read_steps(project / PLACE / "loss.csv"))
    assert "rank 2" in rows[key_of(project)]["run"]
    assert key_of(project) in cli("runs", cwd=project)[1]
    assert "There is no run nothing" in refusal(
        cli("runs", "export", "nothing", "--to", "wandb", cwd=project)
    )


def test_a_tracker_that_is_not_installed_is_named_and_the_run_goes_on(
    project: Path, cli: Lora, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers.TRACKERS["wandb"], "LIBRARY", "no_such_library")
    code, out, err = cli("finetune", "lora", "--force", *told("report_to=wandb"), cwd=project)
    assert code == 0 and "lora_adapter" in out
    assert (
        "report_to: no_such_library is not installed. Run `pip install "
        "'lora-workbench[trackers]'`, and send" in err
    )
    assert "--to wandb: no_such_library is not" in refusal(
        cli("runs", "export", "--to", "wandb", cwd=project)
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "report_to=[tensorbord]",
            "report_to must name trackers of dvclive, mlflow, tensorboard, trackio, wandb, got",
        ),
        ("report_to=3", "report_to must be a name or a list of names, got 3"),
    ],
)
def test_what_cannot_be_reported_to_is_refused_first(
    project: Path, cli: Lora, setting: str, message: str
) -> None:
    assert message in refusal(cli("finetune", "lora", "--force", f"--set={setting}", cwd=project))


def test_dvclive_may_write_into_the_folder_that_dvc_has(tmp_path: Path) -> None:
    (tmp_path / ".dvc").mkdir()
    run = TrackedRun("p", STAGE, "n", {}, tmp_path, True)
    tracker = trackers.TRACKERS["dvclive"].Tracker(run)
    tracker.log(1, {"train/loss": 2.0})
    tracker.finish("done")
    assert (tmp_path / STAGE / "metrics.json").is_file()


def test_without_a_netrc_that_can_be_read_wandb_is_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".netrc").write_bytes(b"# \xe4\nmachine api.wandb.ai login x password y\n")
    assert wandb._mode() == "offline"


def test_report_to_is_shown_with_its_source(project: Path, cli: Lora) -> None:
    rows = json.loads(
        cli("params", "show", "--json", "--set=report_to=[wandb, wandb]", cwd=project)[1]
    )
    assert rows[1] == {"key": "report_to", "value": ["wandb"], "source": "--set"}
    assert open_project(project / "params.yaml").params.report_to == ()


def test_names_and_texts_of_files_are_harmless_in_a_tracker(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    folder.mkdir()
    header = (project / "runs" / STAGE / "loss.csv").read_text(encoding="utf-8").splitlines()[0]
    (folder / "loss.csv").write_text(
        f"{header}\n1,1,2.5,0.1,inf,4\n2,1,nan,0.1,1,8\n", encoding="utf-8"
    )
    hostile = {"step": 1, "prompt": "\x1b[31m<b>", "answer": "a\n# b"}
    (folder / SAMPLES).write_text(json.dumps(hostile) + "\nnonsense\n[1]\n", encoding="utf-8")
    params = {
        "../a b": "x\x1b]0;y\x07" * 400,
        "n": float("nan"),
        **{f"k{n}": [n] for n in range(300)},
    }
    one = follower.Follower(
        "tensorboard", Followed(str(project), STAGE, False, "../" * 9, params, str(folder))
    )
    assert one.wait(120) and one.problem() == ""
    values, texts = in_tensorboard(project, "finetune_lora-.._.._")
    assert values["train/loss"] == [(1, 2.5)] and values["train/grad_norm"] == [(2, 1.0)]
    assert texts == ["    ␛[31m<b>\n    → a\n    # b"]
    flat = dict(follower._flat(params))
    assert (
        len(flat) == follower.MAX_PARAMS and flat["_a_b"] == ("x␛]0;y␇" * 400)[: follower.MAX_TEXT]
    )
