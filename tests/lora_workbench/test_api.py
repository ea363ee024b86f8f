"""`import lora_workbench`: the same files and numbers as the commands, and a message for a clash."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lora_workbench as lw
from tests.conftest import Lora
from tests.helpers.projects import BRIEF, ROOT, folder_bytes

ADAPTER = "artifacts/lora_adapter"


def test_a_run_makes_the_bytes_that_the_command_makes(project: Path, cli: Lora) -> None:
    values = {"finetune_lora.rank": 2, "finetune_lora.epochs": 2}
    given = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    assert cli("finetune", "lora", "--force", *given, cwd=project)[0] == 0
    expected = folder_bytes(project / ADAPTER)
    events: list[object] = []
    result = lw.Project(project, values).run(force=True, on_event=events.append)
    assert folder_bytes(result.folder) == expected
    assert result.folder == project / ADAPTER
    assert result.manifest["params"]["rank"] == 2
    assert [step.step for step in result.steps] == list(range(1, len(result.steps) + 1))
    done = [event.done for event in events if isinstance(event, lw.Progress)]
    assert done == [step.step for step in result.steps]


def test_answers_and_metrics_are_those_of_the_commands(project: Path, cli: Lora) -> None:
    model = lw.load(project / ADAPTER)
    printed = json.loads(cli("prompt", "der hund", "--adapter", ADAPTER, "--json", cwd=project)[1])
    assert lw.generate(model, "der hund").strip() == printed["completion"]
    sampled = {lw.generate(model, "der", temperature=2.0, seed=seed) for seed in range(5)}
    assert len(sampled) > 1
    metrics = lw.evaluate(project, [project / ADAPTER])
    printed = json.loads(cli("evaluate", "--adapter", ADAPTER, "--json", cwd=project)[1])
    assert metrics == printed
    assert lw.evaluate(lw.Project(project, BRIEF)).keys() >= {"base", "lora"}


def test_an_adapter_has_the_base_of_its_own_project_wherever_one_stands(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other/artifacts/expanded"
    other.mkdir(parents=True)
    (other / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path / "other")
    model = lw.load(project / ADAPTER)
    assert lw.generate(model, "der hund")


def test_merge_and_export_write_what_the_commands_write(
    project: Path, cli: Lora, tmp_path: Path
) -> None:
    certificate = lw.merge(project / ADAPTER, tmp_path / "merged")
    out = str(tmp_path / "by_command")
    assert cli("merge", "--adapter", ADAPTER, "--out", out, cwd=project)[0] == 0
    merged, by_command = folder_bytes(tmp_path / "merged"), folder_bytes(tmp_path / "by_command")
    assert merged["model.safetensors"] == by_command["model.safetensors"]
    assert json.loads(merged["certificate.json"]) == json.loads(json.dumps(certificate))
    lines = lw.export(project / ADAPTER, tmp_path / "peft")
    assert lines == [f"{tmp_path / 'peft'}  for PEFT"]
    assert (tmp_path / "peft/adapter_model.safetensors").is_file()


def test_the_calculator_answers_as_the_command(cli: Lora, tmp_path: Path) -> None:
    answer = lw.calc("qwen3-8b", rank=8).answer()
    code, out, _ = cli("calc", "--model", "qwen3-8b", "--r", "8", "--json", cwd=tmp_path)
    assert code == 0 and json.loads(out) == json.loads(json.dumps(answer))
    assert lw.calc("qwen3-8b", rank=8).memory.peak == answer["memory"]["peak"]


def test_a_sweep_names_its_best_adapter(project: Path) -> None:
    found = lw.sweep(project, {"rank": [1, 2]}, set={"finetune_lora.epochs": 2})
    rows = found["adapters"]
    assert rows.keys() == {"rank-1", "rank-2"}
    assert found["best"] == min(rows, key=lambda name: rows[name]["final_loss"])


def test_runs_have_names_and_are_compared(project: Path) -> None:
    for rank in (2, 3):
        opened = lw.Project(project, {"finetune_lora.rank": rank, "finetune_lora.epochs": 2})
        opened.run(name=f"r{rank}")
    opened = lw.Project(project)
    assert {run.name for run in opened.runs() if run.name} == {"r2", "r3"}
    found = opened.compare("r2", "r3")
    assert found.settings == {"rank": (2, 3)}
    assert all("new_loss" in metrics for metrics in found.metrics), "evaluated as by the command"
    with pytest.raises(lw.UserError, match="There is no run r9"):
        opened.runs("r9")
    with pytest.raises(lw.UserError, match="r2 is a run already, with other settings"):
        lw.Project(project, {"finetune_lora.rank": 4}).run(name="r2")


def test_data_files_are_read_and_checked(project: Path) -> None:
    file = project / "data/finetune.de.txt"
    assert lw.data.check([str(file)]).ok
    assert len(list(lw.data.read(file, "finetune.de.txt"))) == 8


def test_a_new_project_is_the_one_that_the_command_makes(tmp_path: Path, cli: Lora) -> None:
    added = lw.new(tmp_path / "made", methods=["lora"])
    assert {"params.yaml", "dvc.yaml", ".dvc"} <= {*added}
    assert cli("new", str(tmp_path / "typed"), "--methods", "lora", cwd=tmp_path)[0] == 0
    made, typed = folder_bytes(tmp_path / "made"), folder_bytes(tmp_path / "typed")
    temporary = {name for name in {*made, *typed} if name.startswith(".dvc/tmp/")}
    assert made.keys() - temporary == typed.keys() - temporary
    assert all(made[name] == typed[name] for name in made.keys() - temporary)
    assert "pretrain" in lw.Project(tmp_path / "made").stages

    events: list[object] = []
    (tmp_path / "made/dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    assert lw.new(tmp_path / "made", on_event=events.append) == []
    (note,) = events
    assert isinstance(note, lw.Note) and "made/dvc.yaml is kept" in note.text
    with pytest.raises(lw.UserError, match="is the program's own repository"):
        lw.new(ROOT)


def test_a_project_is_opened_by_its_folder_whatever_its_name_or_by_its_file(tmp_path: Path) -> None:
    lw.new(tmp_path / "run.v2")
    by_folder, by_file = (lw.Project(tmp_path / name) for name in ("run.v2", "run.v2/params.yaml"))
    assert by_folder.folder == by_file.folder == tmp_path / "run.v2"
    assert by_folder.stages == by_file.stages


def test_a_mistake_is_a_user_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(lw.UserError, match="does not exist"):
        lw.Project(tmp_path)
    with pytest.raises(lw.UserError, match="lora train needs --base"):
        lw.train("", [], tmp_path / "run")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lw.nothing


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append({str(ROOT)!r})\n{code}"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", ["pipeline", "cli", "tui"])
def test_a_module_of_the_users_in_the_way_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.py").write_text("mine = 1\n", encoding="utf-8")
    done = python("import lora_workbench as lw; lw.calc", tmp_path)
    assert done.returncode == 1
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith(f"ImportError: {tmp_path / name}.py hides lora-workbench's own package")
    loaded = f"import {name}, lora_workbench as lw\nprint({name}.mine)\nlw.calc"
    done = python(loaded, tmp_path)
    assert done.stdout == "1\n" and "hides lora-workbench's own package" in done.stderr


def test_importing_it_imports_nothing_else(tmp_path: Path) -> None:
    code = "import lora_workbench; print([m for m in sys.modules if m.split('.')[0] in HEAVY])"
    done = python(f"HEAVY = {{'torch', 'pipeline', 'cli', 'rich'}}\n{code}", tmp_path)
    assert done.stdout == "[]\n", done.stderr
