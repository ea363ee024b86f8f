"""The models of chosen steps: what they are, which are kept, which is best, and what takes them."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.adapters.config import WEIGHTS
from pipeline.inference.engine import load
from pipeline.project.logs.run_log import best_step, read_steps
from pipeline.project.runner import SAVED, Progress, run
from pipeline.stages.registry import open_project
from pipeline.training import saving
from pipeline.views.model_library import Library
from pipeline.views.models import adapters
from pipeline.views.runs import discover_runs
from tests.helpers.errors import user_error
from tests.helpers.families import new_lines_project
from tests.helpers.json_files import write_jsonl
from tests.helpers.projects import BRIEF, STAGES, folder_bytes, make, make_base, new_project

STAGE, FOLDER = "finetune_lora", "artifacts/lora_adapter"
GIVEN = ["epochs=6", "batch_size=2", "learning_rate=0.01", "eval_share=0.3", "eval_steps=1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(new_project(tmp_path_factory.mktemp("saving") / "p"), BRIEF)


@pytest.fixture
def project(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "p")


def trained(root: Path, *given: str, stage: str = STAGE) -> dict[str, Any]:
    overrides = [*BRIEF, *(f"{stage}.{value}" for value in (*GIVEN, *given))]
    return make(root, [stage], overrides, force=True)


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("stage", "folder", "weights"),
    [
        (STAGE, FOLDER, WEIGHTS),
        ("finetune_full", "artifacts/full_finetuned", "model.safetensors"),
        ("finetune_prompt", "artifacts/prompt", WEIGHTS),
    ],
)
def test_a_checkpoint_is_the_model_of_a_run_that_ends_there(
    project: Path, stage: str, folder: str, weights: str
) -> None:
    trained(project, "save_steps=4", stage=stage)
    saved = folder_bytes(project / folder / "checkpoint-8")
    assert saved.keys() >= {weights, "manifest.json", "loss.csv", "tokenizer.json"}
    trained(project, "max_steps=8", stage=stage)
    ended = folder_bytes(project / folder)
    assert {name for name in saved if saved[name] != ended[name]} == {"manifest.json"}
    assert saved.keys() == ended.keys()


@pytest.mark.slow
def test_peft_reads_a_checkpoint_as_we_do(tmp_path: Path) -> None:
    root = new_lines_project(tmp_path / "p", torch.float32)
    given = {"data": "data/lines.jsonl", "max_steps": 4, "save_steps": 2, "learning_rate": 0.05}
    make(root, [STAGE], [f"{STAGE}.{key}={value}" for key, value in given.items()])
    folder = root / FOLDER / "checkpoint-2"
    model = AutoModelForCausalLM.from_pretrained(root / "artifacts/expanded")
    theirs = PeftModel.from_pretrained(model, folder).eval()
    ours = load(root / "artifacts/expanded", folder).model
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        expected = theirs(ids).logits
        assert torch.allclose(ours(ids), expected, atol=1e-5)
    final = load(root / "artifacts/expanded", root / FOLDER).model
    assert not torch.allclose(final(ids), expected, atol=1e-3)


@pytest.mark.parametrize("limit", [1, 2, 100])
def test_the_last_checkpoints_and_the_best_are_kept(project: Path, limit: int) -> None:
    manifest = trained(project, "save_steps=3", f"save_total_limit={limit}")
    log = read_steps(project / FOLDER / "loss.csv")
    saved = [step for step in log if step.step % 3 == 0]
    best = min(saved, key=lambda step: step.eval_loss or 0.0)
    assert best.step < saved[-2].step, "with this learning rate"
    assert manifest["best_checkpoint"] == best.step
    expected = {best.step, *(step.step for step in saved[-limit:])}
    assert checkpoints(project / FOLDER) == sorted(expected)
    assert not (project / "runs" / STAGE / SAVED).exists()


def test_each_checkpoint_is_evaluated_though_evaluations_are_rarer(project: Path) -> None:
    manifest = trained(project, "save_steps=3", "eval_steps=100")
    log = read_steps(project / FOLDER / "loss.csv")
    assert [s.step for s in log if s.eval_loss is not None] == [
        *range(3, len(log) + 1, 3),
        *[len(log)] * (len(log) % 3 > 0),
    ]
    assert "best_checkpoint" in manifest
    assert "best_checkpoint" not in trained(project, "save_steps=3", "eval_share=0", "eval_steps=0")


def test_load_best_takes_the_weights_of_the_lowest_held_out_loss(project: Path) -> None:
    manifest = trained(project, "save_steps=1", "load_best=true")
    log = read_steps(project / FOLDER / "loss.csv")
    best = min(log, key=lambda step: step.eval_loss or 0.0).step
    assert manifest["best_step"] == best < len(log) - 1
    taken = load_file(project / FOLDER / WEIGHTS)
    for step in (best, len(log)):
        saved = load_file(project / FOLDER / f"checkpoint-{step}" / WEIGHTS)
        same = all(torch.equal(saved[name], taken[name]) for name in taken)
        assert same == (step == best)


def test_load_best_can_go_by_the_held_out_answers(project: Path) -> None:
    rows = []
    for line in (project / "data/finetune.de.txt").read_text(encoding="utf-8").splitlines():
        first, second, *rest = line.split()
        rows.append({"prompt": f"{first} {second}", "completion": f" {' '.join(rest)}"})
    write_jsonl(project / "data/pairs.jsonl", rows)
    asked = "samples={held_out: 4}", "data=data/pairs.jsonl", "eval_share=0.5"
    best_by = "metric_for_best_model=eval_answers", "load_best=true"
    manifest = trained(project, "save_steps=1", *asked, *best_by)
    log = read_steps(project / FOLDER / "loss.csv")
    assert all(step.eval_answers is not None for step in log)
    best = best_step(log, "eval_answers")
    assert best is not None
    assert best.eval_answers == max(step.eval_answers or 0.0 for step in log)
    assert manifest["best_step"] == manifest["best_checkpoint"] == best.step


def test_a_list_says_which_checkpoint_is_the_best(project: Path) -> None:
    trained(project, "save_steps=5", "load_best=true")
    found = {adapter.path.name: adapter for adapter in adapters(project / "artifacts")}
    best = json.loads((project / FOLDER / "manifest.json").read_text(encoding="utf-8"))
    named = [name for name, row in found.items() if "the best checkpoint" in row.weights_of]
    assert named == [f"checkpoint-{best['best_checkpoint']}"]
    assert found["lora_adapter"].weights_of.startswith(f"step {best['best_step']}, held-out loss ")
    assert all(row.problem is None for row in found.values())
    sizes = {row.size for row in found.values()}
    assert len(sizes) == 1, "an adapter's size is without its checkpoints"


def test_the_screens_show_the_checkpoints_of_a_run(project: Path) -> None:
    best = trained(project, "save_steps=5")["best_checkpoint"]
    saved = tuple(checkpoints(project / FOLDER))
    opened = open_project(project / "params.yaml")
    (shown,) = [row for row in discover_runs(project, opened) if row.stage == STAGE]
    assert (shown.checkpoints, shown.best) == (saved, best)
    library = Library(opened)
    found = {entry.shown_path: library.check(entry) for entry in library.scan()}
    for step in saved:
        entry = found[f"{FOLDER}/checkpoint-{step}"]
        assert (entry.group, entry.state) == ("lora_adapter", "verified")
        assert entry.model.weights_of.endswith("the best checkpoint") == (step == best)


def test_a_checkpoint_of_this_run_is_no_adapter_to_begin_with(project: Path) -> None:
    trained(project, "save_steps=5")
    init = f"{STAGE}.init_from={FOLDER}/checkpoint-5"
    assert "which this stage itself writes" in user_error(make, project, [STAGE], [*BRIEF, init])
    shutil.copytree(project / FOLDER / "checkpoint-5", project / "data/earlier")
    trained(project, "init_from=data/earlier", "max_steps=2")


def left_at(root: Path, last: int, given: Sequence[str], every: int) -> None:
    """Run the stage and leave it after a step, as if killed."""
    overrides = [*BRIEF, *(f"{STAGE}.{value}" for value in (*GIVEN, *given))]
    project = open_project(root / "params.yaml", overrides)
    events = run(project, STAGES[STAGE], force=True, checkpoint_every=every)
    next(event for event in events if isinstance(event, Progress) and event.done == last)
    events.close()


def test_checkpoints_of_other_settings_are_not_taken(project: Path) -> None:
    left_at(project, 7, ["save_steps=2", "learning_rate=0.02"], every=5)
    assert checkpoints(project / "runs" / STAGE / SAVED) == [2, 4, 6]
    trained(project, "save_steps=5")
    after = folder_bytes(project / FOLDER)
    trained(project, "save_steps=5")
    assert folder_bytes(project / FOLDER) == after
    assert not [name for name in after if name.startswith("checkpoint-2/")]


def test_a_full_disk_at_a_checkpoint_loses_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run comes by the step again, and ends with the bytes of an undisturbed one."""
    more = "save_steps=4", "save_total_limit=3", "save_optimizer=true"
    trained(project, *more)
    expected = folder_bytes(project / FOLDER)
    overrides = [*BRIEF, *(f"{STAGE}.{value}" for value in (*GIVEN, *more))]
    save = saving.save_logs

    def full(run: Path, out: Path) -> None:
        if out.name.startswith(".checkpoint-8."):
            (out / WEIGHTS).write_bytes(b"half")
            raise OSError(28, "No space left on device", str(out / WEIGHTS))
        save(run, out)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_logs", full)
        with pytest.raises(OSError, match="No space left"):
            make(project, [STAGE], overrides, force=True, checkpoint_every=5)
    assert folder_bytes(project / FOLDER) == expected, "the earlier result stays"
    assert checkpoints(project / "runs" / STAGE / SAVED) == [4]
    make(project, [STAGE], overrides, force=True)
    assert folder_bytes(project / FOLDER) == expected
    assert not list((project / "runs" / STAGE).glob("**/.*checkpoint*"))
