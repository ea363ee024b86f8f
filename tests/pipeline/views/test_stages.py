"""What the watcher says of each stage is what running it would do."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.project import provenance
from pipeline.project.cache import cache_key
from pipeline.project.logs import run_state
from pipeline.project.runner import Event, Job, Note, Progress, run
from pipeline.project.stage_graph import Project
from pipeline.stages.registry import open_project
from pipeline.views.stages import (
    StageState,
    Status,
    going_on,
    outdated,
    project_signature,
    running_of,
)
from tests.helpers.json_files import edit_json
from tests.helpers.projects import (
    BRIEF,
    COMMAND,
    LORA,
    STAGES,
    make,
    make_one,
    new_project,
    note_texts,
    save,
    wait_for,
)
from tests.helpers.run_folders import hold


def project_of(root: Path) -> Project:
    return open_project(root / "params.yaml", BRIEF)


def states(root: Path, status: Status | None = None) -> dict[str, str]:
    found = (status or Status()).of(project_of(root))
    return {name: state.state for name, state in found.items()}


def test_a_finished_pipeline_is_current_and_an_empty_one_missing(project: Path) -> None:
    assert set(states(project).values()) == {"current"}
    shutil.rmtree(project / "artifacts")
    found = Status().of(project_of(project))
    assert {state.state for state in found.values()} == {"missing"}
    assert found["merge"].reasons == ("needs expand_vocab, finetune_lora",)


def test_a_changed_param_is_named_and_what_comes_after_waits(project: Path) -> None:
    save(
        project / "params.yaml",
        {"finetune_lora.rank": 2, "finetune_lora.target_modules": ["q_proj"]},
    )
    found = Status().of(project_of(project))
    assert found["finetune_lora"].state == "changed"
    assert found["finetune_lora"].reasons == (
        "rank 4 → 2",
        "target_modules q_proj k_proj v_proj o_proj → q_proj",
    )
    assert (found["merge"].state, found["merge"].reasons) == ("waits", ("after finetune_lora",))
    assert found["evaluate"].reasons == ("after finetune_lora, merge",)
    assert found["finetune_full"].state == "current"


def test_a_changed_input_an_edited_artifact_and_a_missing_file_are_named(project: Path) -> None:
    status = Status()
    assert set(states(project, status).values()) == {"current"}
    with (project / "data/pretrain.de.txt").open("a", encoding="utf-8") as file:
        file.write("der hund schläft\n")
    assert status.of(project_of(project))["pretrain"].reasons == ("data/pretrain.de.txt changed",)
    (project / "artifacts/lora_adapter/adapter_model.safetensors").write_bytes(b"")
    assert (
        "adapter_model.safetensors was changed"
        in status.of(project_of(project))["finetune_lora"].reasons[0]
    )
    (project / "data/prompts.yaml").unlink()
    assert "data/prompts.yaml is not a file" in status.of(project_of(project))["merge"].reasons[0]


@pytest.mark.parametrize("section", ["params", "inputs", "versions"])
@pytest.mark.parametrize("value", [["rank"], None])
def test_a_manifest_of_another_shape_is_a_reason_and_never_an_error(
    project: Path, section: str, value: object
) -> None:
    edit_json(project / "artifacts/lora_adapter/manifest.json", **{section: value})
    found = Status().of(project_of(project))["finetune_lora"]
    assert found.state == "changed"
    assert found.reasons == (
        "artifacts/lora_adapter/manifest.json is not a manifest of this project. Make the "
        "artifact again.",
    )


def test_builds_of_one_version_find_each_others_results_and_the_manifest_names_the_build(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch for a CPU on a login node, for CUDA on another."""
    real = dict(provenance.versions())
    number = real["torch"].partition("+")[0]

    def have(torch: str) -> StageState:
        monkeypatch.setattr(provenance, "versions", lambda *_: {**real, "torch": torch})
        return Status().of(project_of(project))["merge"]

    have(f"{number}+cu128")
    made = make(project, ["merge"], BRIEF, force=True)
    assert made["versions"]["torch"] == f"{number}+cu128"
    assert have(f"{number}+cpu").state == "current" == have(number).state
    shutil.rmtree(project / "artifacts/lora_merged")
    _, events = make_one(project, "merge", BRIEF)
    assert any("taken from the cache" in text for text in note_texts(events))
    found = have("2.0.1+cu128")
    assert (found.state, found.reasons) == ("changed", (f"torch {number} → 2.0.1",))
    keys = {cache_key({**made, "versions": {"torch": text}}) for text in ("2.9", "2.9+cpu")}
    assert len(keys) == 1 and keys != {cache_key({**made, "versions": {"torch": "2.8"}})}


def test_an_artifact_that_vanished_under_others_is_missing_and_they_wait(project: Path) -> None:
    shutil.rmtree(project / "artifacts/expanded")
    found = Status().of(project_of(project))
    assert found["expand_vocab"].state == "missing"
    assert (found["finetune_lora"].state, found["finetune_lora"].reasons) == (
        "waits",
        ("after expand_vocab",),
    )
    assert found["evaluate"].state == "waits"


@pytest.mark.parametrize(
    ("params", "stage", "reason"),
    [
        ("base: minigpt\nmerge: {}\n", "merge", "finetune_lora is not a stage of this project"),
        (
            "finetune_lora: {data: data/pretrain.de.txt}\n",
            "finetune_lora",
            "pretrain is not a stage of this project",
        ),
    ],
)
def test_a_stage_that_needs_one_without_a_section_says_which_section_to_add(
    tmp_path: Path, params: str, stage: str, reason: str
) -> None:
    root = new_project(tmp_path)
    (root / "params.yaml").write_text(params, encoding="utf-8")
    project = open_project(root / "params.yaml")
    found = Status().of(project)
    assert found[stage].state == "missing" and found[stage].reasons[0].startswith(reason)
    with pytest.raises(UserError, match=reason):
        make(root, [stage])


def test_without_a_section_for_new_words_the_trained_base_is_fine_tuned(tmp_path: Path) -> None:
    root = new_project(tmp_path)
    text = (
        "base: minigpt\npretrain: {epochs: 1}\nfinetune_lora: {data: data/pretrain.de.txt, "
        "epochs: 1}\nmerge: {}\n"
    )
    (root / "params.yaml").write_text(text, encoding="utf-8")
    project = open_project(root / "params.yaml")
    assert {state.state for state in Status().of(project).values()} == {"missing"}
    make(root, ["pretrain", "finetune_lora", "merge"])
    assert {state.state for state in Status().of(project).values()} == {"current"}
    assert project.variants["lora"] == ("pretrain", "finetune_lora")


@pytest.mark.slow
def test_running_it_makes_it_current_again(project: Path) -> None:
    save(project / "params.yaml", {"finetune_lora.rank": 2})
    make(project, ["finetune_lora", "finetune_sweep", "merge", "evaluate"], BRIEF)
    assert set(states(project).values()) == {"current"}


def test_hashing_happens_once_until_a_file_changes(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.files import artifact

    status, hashed = Status(), list[str]()
    real = artifact.file_digest

    def counting(path: Path) -> str:
        hashed.append(path.name)
        return real(path)

    monkeypatch.setattr(artifact, "file_digest", counting)
    status.of(project_of(project))
    assert hashed
    hashed.clear()
    status.of(project_of(project))
    assert hashed == []


def test_the_signature_changes_with_params_data_runs_and_artifacts(project: Path) -> None:
    seen = {project_signature(project_of(project))}
    for name in ("data/prompts.yaml", "artifacts/base/config.json", "runs/pretrain/run.json"):
        (project / name).write_text("changed", encoding="utf-8")
        seen.add(project_signature(project_of(project)))
    assert len(seen) == 4


def test_of_a_stage_that_goes_on_the_journal_alone_is_read(project: Path) -> None:
    folder = project / "runs/finetune_lora"
    writer = run_state.Writer(folder)
    with hold(folder):
        states = Status().of(project_of(project))
        before = project_signature(project_of(project), running_of(states))
        assert running_of(states) == ["finetune_lora"]
        writer.progress(3, 10, "loss 1.2")
        assert project_signature(project_of(project), running_of(states)) == before
        now = going_on(project_of(project), states)
        assert now and now["finetune_lora"].run and now["finetune_lora"].run.done == 3
        assert now == Status().of(project_of(project))
    assert going_on(project_of(project), states) is None


def test_a_base_that_cannot_be_used_is_the_reason_of_its_stage(project: Path) -> None:
    (project / "tied").mkdir()
    for base, reason in (
        ("nowhere", "base must be minigpt, a checkpoint folder"),
        ("x" * 300, "base must be minigpt, a checkpoint folder"),
        ("~nobody-here/model", "base must be minigpt, a checkpoint folder"),
        ("none.gguf", "No such file or directory. Put the file there"),
        ("tied", "tied is not a checkpoint: it has no config.json"),
        ("params.yaml", "is not a GGUF file"),
    ):
        save(project / "params.yaml", {"base": base})
        found = Status().of(project_of(project))
        assert found["import"].state == "changed" and reason in found["import"].reasons[0], base
        assert "\n" not in found["import"].reasons[0]
        assert found["expand_vocab"].state == "waits"
    shutil.rmtree(project / "artifacts")
    found = Status().of(project_of(project))
    assert found["import"].state == "missing" and "is not a GGUF file" in found["import"].reasons[0]


@pytest.mark.parametrize("base", ["models/mine", "models/mine.gguf"])
def test_the_signature_changes_with_a_local_base(project: Path, base: str) -> None:
    save(project / "params.yaml", {"base": base})
    file = project / (base if base.endswith(".gguf") else f"{base}/config.json")
    seen = [project_signature(project_of(project))]
    file.parent.mkdir(parents=True)
    for text in ("one", "another", None):
        file.unlink() if text is None else file.write_text(text, encoding="utf-8")
        seen.append(project_signature(project_of(project)))
    assert all(one != other for one, other in pairwise(seen))


def status_of(project: Path) -> str:
    """Of finetune_lora, by the params file as it stands."""
    return Status().of(open_project(project / "params.yaml"))["finetune_lora"].state


@pytest.mark.slow
def test_a_stage_in_another_process_is_seen_running_stopped_resumed_and_killed(
    project: Path,
) -> None:
    folder = project / "runs/finetune_lora"
    command = [LORA, *COMMAND["finetune_lora"], "--force", "--set", "finetune_lora.epochs=20000"]
    save(project / "params.yaml", {"finetune_lora.epochs": 20000})
    process = subprocess.Popen(command, cwd=project, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    wait_for(
        lambda: (
            (now := run_state.read(folder)) is not None and now.state == "running" and now.done > 1
        )
    )
    assert run_state.alive(folder)
    now = run_state.read(folder)
    assert now is not None
    assert (now.pid, now.total, now.first) == (process.pid, 120_000, 1)
    assert now.text.startswith("loss ")
    assert now.eta is not None and now.eta > 1
    assert status_of(project) == "running"
    process.send_signal(signal.SIGINT)
    process.communicate()
    stopped = Status().of(open_project(project / "params.yaml"))["finetune_lora"]
    assert stopped.state == "stopped"
    assert "stopped after step" in stopped.reasons[0]

    process = subprocess.Popen(command, cwd=project, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    wait_for(
        lambda: (
            (now := run_state.read(folder)) is not None
            and now.pid == process.pid
            and now.done > now.first
        )
    )
    now = run_state.read(folder)
    assert now is not None
    assert now.first > 1, "it went on from the checkpoint"
    assert any("resumed after step" in note for note in now.notes)
    process.kill()
    process.communicate()
    assert not run_state.alive(folder)
    assert status_of(project) == "died"


def test_a_failure_keeps_its_message(project: Path) -> None:
    stage = STAGES["merge"]

    def failing(_: Job) -> Iterator[Event]:
        yield Note("about to fail")
        yield Progress(1, 2, "half")
        raise UserError("merge.prompts is broken.")

    save(project / "params.yaml", {"merge.max_logit_difference": 0.5})
    with pytest.raises(UserError):
        list(run(project_of(project), stage, failing))  # type: ignore[arg-type]
    found = Status().of(project_of(project))["merge"]
    assert found.state == "failed"
    assert found.reasons == ("merge.prompts is broken.", "max_logit_difference 1e-05 → 0.5")
    assert found.run is not None
    assert (found.run.notes, found.run.done, found.run.total) == (["about to fail"], 1, 2)


def test_a_stage_taken_from_the_cache_is_done(project: Path) -> None:
    make_one(project, "merge", BRIEF)
    now = run_state.read(project / "runs/merge")
    assert now is not None
    assert now.state == "done"
    assert "taken from the cache" in now.notes[0]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"state": "running"}', '{"pid": 1, "unknown": 2}']
)
def test_a_damaged_journal_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text, encoding="utf-8")
    assert run_state.read(tmp_path) is None


def test_a_journal_that_cannot_be_written_stops_no_stage(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    real = Path.write_text
    monkeypatch.setattr(
        Path,
        "write_text",
        lambda path, *a, **k: full() if path.name.startswith("run.") else real(path, *a, **k),
    )
    manifest = make(project, ["merge"], BRIEF, force=True)
    assert manifest["stage"] == "merge"


def test_a_lock_file_of_a_process_that_is_gone_is_not_alive(tmp_path: Path) -> None:
    assert not run_state.alive(tmp_path)
    (tmp_path / "lock").write_text("", encoding="utf-8")
    assert not run_state.alive(tmp_path)
    (tmp_path / "lock").write_text(str(os.getpid()), encoding="utf-8")
    assert not run_state.alive(tmp_path), "the process lives, but holds nothing"
    (tmp_path / "lock").write_text("9" * 5000, encoding="utf-8")
    assert not run_state.alive(tmp_path), "no process has this number"


# What lies there was made from what lies there


@pytest.fixture
def retrained(project: Path) -> Path:
    """LoRA trained again: the merge and the evaluation are of the adapter before."""
    make(project, ["finetune_lora"], [*BRIEF, "finetune_lora.rank=2"])
    return project


def test_what_was_made_from_an_earlier_adapter_is_out_of_date_whatever_the_params_say(
    retrained: Path,
) -> None:
    project = open_project(retrained / "params.yaml")  # not those that it was made with
    adapter = "artifacts/lora_adapter changed"
    assert outdated(project, ["evaluate"]) == {
        "merge": (adapter,),
        "evaluate": (adapter, "artifacts/lora_merged is out of date"),
    }
    assert outdated(project, ["merge", "finetune_full"]) == {"merge": (adapter,)}
    assert outdated(project, ["finetune_lora"]) == {}


@pytest.mark.slow
def test_it_is_up_to_date_once_all_that_comes_after_is_made_again(retrained: Path) -> None:
    assert outdated(project_of(retrained), ["evaluate"])
    make(retrained, ["merge", "evaluate"], BRIEF)
    assert outdated(project_of(retrained), STAGES) == {}


def test_what_is_made_from_something_out_of_date_is_too(project: Path) -> None:
    with (project / "data/pretrain.de.txt").open("a", encoding="utf-8") as file:
        file.write("der hund schläft\n")
    found = outdated(project_of(project), ["finetune_full"])
    assert found == {
        "pretrain": ("data/pretrain.de.txt changed",),
        "expand_vocab": ("data/pretrain.de.txt changed", "artifacts/base is out of date"),
        "finetune_full": ("artifacts/expanded is out of date",),
    }


def test_nothing_is_said_of_what_has_no_manifest_or_lost_what_it_was_made_from(
    project: Path,
) -> None:
    shutil.rmtree(project / "artifacts/lora_adapter")
    (project / "artifacts/expanded/manifest.json").write_text(
        '{"files": {}, "inputs": []}', encoding="utf-8"
    )
    (project / "artifacts/evaluation/manifest.json").unlink()
    assert outdated(project_of(project), STAGES) == {}
