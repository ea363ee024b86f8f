"""Runs that stop: killed and resumed, stopped early, stopped by a NaN."""

import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.data.examples import in_evaluation
from pipeline.data.formats import iter_examples
from pipeline.errors import UserError
from pipeline.models import import_base
from pipeline.models import load as loading
from pipeline.models.load import load_base
from pipeline.project.logs.run_log import Step, read_steps
from pipeline.project.runner import Progress, checkpoints, run
from pipeline.stages.registry import open_project
from pipeline.training.optimizer import FlatOptimizer, rate
from pipeline.training.step import Evaluation, LossPath
from tests.helpers.errors import user_error
from tests.helpers.families import FAMILIES, TEXTS, new_lines_project, new_project
from tests.helpers.json_files import write_jsonl, write_texts
from tests.helpers.process import Forked
from tests.helpers.projects import (
    LORA,
    STAGES,
    WORK,
    folder_bytes,
    fresh,
    load,
    make,
    section_overrides,
)
from tests.helpers.real import run_stage

STAGE, FOLDER = "finetune_lora", "artifacts/lora_adapter"
SETTINGS = {
    "data": "data/lines.jsonl",
    "epochs": 40,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "precision": "bf16",
    "schedule": "cosine",
    "warmup_steps": 5,
    "max_grad_norm": 1,
    "eval_share": 0.3,
    "eval_steps": 2,
    "patience": 2,
    "retention_data": "data/old.jsonl",
    "retention_weight": 2,
    "retention_batch_size": 1,
    "learning_rate": 0.05,
}


def given(**changes: object) -> list[str]:
    return section_overrides(STAGE, {**SETTINGS, **changes})


@pytest.fixture(scope="module")
def expanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 base, ready to be trained on two dozen texts of very different lengths. Read it; do
    not write to it.
    """
    return new_lines_project(tmp_path_factory.mktemp("resume") / "p", torch.bfloat16)


@pytest.fixture
def project(expanded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(expanded, tmp_path / "p")


def stopped_after(root: Path, overrides: list[str], last: int, every: int) -> None:
    """Run the stage with a checkpoint every `every` steps, and abandon it after step `last`."""
    project = open_project(root / "params.yaml", overrides)
    events = run(project, STAGES[STAGE], WORK[STAGE], checkpoint_every=every)
    next(event for event in events if isinstance(event, Progress) and event.done == last)
    events.close()


def unbroken(root: Path, overrides: list[str]) -> tuple[dict[str, bytes], list[Step]]:
    run_stage(fresh(root, STAGE), STAGE, overrides)
    return folder_bytes(root / FOLDER), read_steps(root / FOLDER / "loss.csv")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "lora_dropout": 0.3,
            "neftune_alpha": 5,
            "gradient_checkpointing": "selective",
            "patience": 0,
            "epochs": 3,
        },
        {
            "optimizer": "adamw-8bit",
            "weight_decay": 0.1,
            "warmup_steps": 0,
            "warmup_ratio": 0.2,
            "max_steps": 30,
        },
        {
            "optimizer": "muon",
            "weight_decay": 0.1,
            "adam_beta2": 0.95,
            "schedule": "warmup_stable_decay",
            "min_lr_ratio": 0.1,
            "decay_ratio": 0.5,
            "max_steps": 20,
            "layers_to_transform": "last 1",
            "exclude_modules": "[k_proj]",
            "train_embeddings": "none",
            "modules_to_save": "[lm_head, norm]",
        },
        {
            "adapter_precision": "bf16",
            "train_embeddings": "new_rows",
            "schedule": "linear",
            "patience": 0,
            "epochs": 4,
        },
        {
            "precision": "fp16",
            "gradient_accumulation_steps": 1,
            "retention_weight": 0,
            "train_embeddings": "none",
            "patience": 0,
            "epochs": 2,
        },
        {
            "dora": "true",
            "init_lora_weights": "pissa",
            "loraplus_ratio": 4,
            "rank_pattern": "{v_proj: 2}",
            "adapter_precision": "bf16",
            "patience": 0,
            "epochs": 3,
        },
        {
            "save_steps": 3,
            "save_total_limit": 2,
            "save_optimizer": "true",
            "load_best": "true",
            "patience": 0,
            "epochs": 5,
        },
        {"tokens_per_batch": 24, "patience": 0, "epochs": 4},
    ],
    ids=[
        "fp32 adapters",
        "dropout and noise",
        "8-bit moments",
        "muon, some blocks, modules in full",
        "bf16 adapters, new rows",
        "fp16",
        "refinements",
        "saved steps",
        "batches filled with tokens",
    ],
)
@pytest.mark.sampled(7)
@pytest.mark.slow
def test_pitfall_20_resume_gives_the_bytes_of_an_unbroken_run_wherever_it_was_killed(
    project: Path, changes: dict[str, object]
) -> None:
    overrides = given(**changes)
    expected, steps = unbroken(project, overrides)
    last = len(steps)
    assert 8 < last < 100, "it stopped early, if it was to"
    for stops, every in (([4], 3), ([1, 6, 7, last - 1], 1), ([last], 1), ([last], 5)):
        fresh(project, STAGE)
        for stop in stops:
            stopped_after(project, overrides, stop, every)
        said = run_stage(project, STAGE, overrides)
        done = stops[-1] // every * every
        assert (f"resumed after step {done}" in said) == (done > 0), (
            "no step is skipped or repeated"
        )
        assert folder_bytes(project / FOLDER) == expected, (stops, every)


def test_pitfall_20_resume_goes_on_at_the_learning_rate_and_the_tokens_where_it_was(
    project: Path,
) -> None:
    overrides = given(patience=0, epochs=4)
    stopped_after(project, overrides, 8, 3)
    run_stage(project, STAGE, overrides)
    settings = load(project / "params.yaml", overrides).finetune_lora
    steps = read_steps(project / FOLDER / "loss.csv")
    assert [step.step for step in steps] == list(range(1, len(steps) + 1))
    assert [step.learning_rate for step in steps] == pytest.approx(
        [rate(settings, number, len(steps)) for number in range(1, len(steps) + 1)]
    )
    assert all(later.tokens > earlier.tokens for earlier, later in pairwise(steps))
    each = steps[len(steps) // settings.epochs - 1].tokens
    assert steps[-1].tokens == settings.epochs * each, "every epoch has the same labels"


@pytest.mark.slow
def test_pitfall_20_resume_after_sigkill(project: Path) -> None:
    overrides = given(epochs=20, patience=0)
    expected, _ = unbroken(project, overrides)
    fresh(project, STAGE)
    command = [LORA, "finetune", "lora", *(part for one in overrides for part in ("--set", one))]
    log = project / "runs" / STAGE / "loss.csv"
    running = Forked([*command, "--checkpoint-every", "7"], project)
    while not log.exists() or log.read_bytes().count(b"\n") < 40:
        assert running.process.is_alive()
        time.sleep(0.001)
    running.process.kill()
    assert running.end()[0] == -signal.SIGKILL
    code, errors = Forked(command, project).end()
    assert code == 0 and "resumed after step" in errors
    assert folder_bytes(project / FOLDER) == expected


# Early stop


@pytest.mark.slow
def test_training_stops_when_nothing_gets_better_and_gives_the_weights_of_its_best_step(
    project: Path,
) -> None:
    """The best step ends an epoch, so a run of that many epochs without patience ends with the same
    weights.
    """
    settings = {"schedule": "constant", "eval_steps": 0, "retention_weight": 0}
    said = run_stage(project, STAGE, given(**settings, epochs=40, patience=2))
    found = read_steps(project / FOLDER / "loss.csv")
    losses = [step.eval_loss for step in found if step.eval_loss is not None]
    best = losses.index(min(losses)) + 1
    assert 1 < best < 38 and len(losses) == best + 2, "two evaluations after the best one"
    total = 40 * found[-1].step // len(losses)
    assert (
        f"stopped at step {found[-1].step} of {total}: the evaluation loss no longer improves"
        in said
    )
    stopped = load_file(project / FOLDER / "adapter_model.safetensors")
    run_stage(project, STAGE, given(**settings, epochs=best, patience=0))
    cut = load_file(project / FOLDER / "adapter_model.safetensors")
    assert read_steps(project / FOLDER / "loss.csv") == found[: len(found) // len(losses) * best]
    assert cut.keys() == stopped.keys() and all(
        torch.equal(cut[name], stopped[name]) for name in cut
    )
    run_stage(project, STAGE, given(**settings, epochs=len(losses), patience=0))
    last = load_file(project / FOLDER / "adapter_model.safetensors")
    assert any(not torch.equal(last[name], stopped[name]) for name in last), (
        "the last weights differ"
    )


def test_the_evaluation_is_the_loss_of_the_examples_held_out_and_of_no_other(project: Path) -> None:
    """The evaluation loss equals the loss of a run on the held-out examples alone at almost no
    learning rate.
    """
    data = project / "data/lines.jsonl"
    found = list(iter_examples(data, "lines"))
    held = [example for example in found if in_evaluation(example, 0.3)]
    assert 2 < len(held) < len(found) / 2
    still = {
        "learning_rate": 1e-30,
        "epochs": 1,
        "gradient_accumulation_steps": 1,
        "batch_size": 64,
        "retention_weight": 0,
        "patience": 0,
    }
    still["warmup_steps"] = 0
    run_stage(project, STAGE, given(precision="fp32", **still))
    (step,) = read_steps(project / FOLDER / "loss.csv")
    for part, expected in (
        (held, step.eval_loss),
        ([e for e in found if e not in held], step.loss),
    ):
        write_jsonl(data, ({"text": e.text} for e in part))
        run_stage(project, STAGE, given(precision="fp32", **still, eval_share=0, eval_steps=0))
        (alone,) = read_steps(project / FOLDER / "loss.csv")
        assert expected == pytest.approx(alone.loss, rel=1e-3)


def test_lines_that_are_added_move_no_example_between_training_and_evaluation(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.txt"
    lines = [f"line {number}" for number in range(400)]
    path.write_text("\n".join(lines), encoding="utf-8")
    before = {e.text: in_evaluation(e, 0.25) for e in iter_examples(path, "a.txt")}
    path.write_text(
        "\n".join(["a new first line", *lines[::-1], "and a last one"]), encoding="utf-8"
    )
    after = {e.text: in_evaluation(e, 0.25) for e in iter_examples(path, "a.txt")}
    assert before.items() <= after.items()
    assert 0.19 < sum(before.values()) / len(before) < 0.31
    more = {e.text: in_evaluation(e, 0.5) for e in iter_examples(path, "a.txt")}
    assert all(more[text] for text, held in after.items() if held), (
        "a larger share holds out more, none instead"
    )


# NaN


def with_a_nan(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One token's embedding is infinite, which the first norm turns into NaN; only line 8 has that
    token.
    """
    for module in (loading, import_base):  # which would refuse such a base
        monkeypatch.setattr(module, "refuse_not_finite", lambda *_: None)
    root = new_project(root, FAMILIES["qwen3"], torch.bfloat16)
    tokenizer = load_base(root / "base").tokenizer
    words = [word for word in " ".join(TEXTS).split() if "J" not in word]
    lines = [" ".join(words[start : start + 3]) for start in range(20)]
    write_texts(root / "data/lines.jsonl", [*lines[:7], "Japan", *lines[7:]])
    (token,) = {*tokenizer.encode("Japan")} - {
        id_ for line in lines for id_ in tokenizer.encode(line)
    }
    path = root / "base/model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][token] = torch.inf
    save_file(weights, path, metadata={"format": "pt"})
    make(root, ["pretrain", "expand_vocab"], ["expand_vocab.tokens=[]"])
    return root


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_nan_stops_the_run_naming_the_lines_and_keeps_the_checkpoint_before_it(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = with_a_nan(tmp_path / "p", monkeypatch)
    plain = {"precision": precision, "epochs": 3, "patience": 0, "eval_share": 0, "eval_steps": 0}
    overrides = given(**plain, gradient_accumulation_steps=1, train_embeddings="none")
    message = user_error(run_stage, root, STAGE, overrides)
    assert "finetune_lora: the loss is nan and the gradient norm nan at step " in message
    assert "data/lines.jsonl:8" in message and message.count("data/lines.jsonl:") == 2, (
        "the batch's two lines"
    )
    assert (
        "Lower finetune_lora.learning_rate" in message
        and "are kept in runs/finetune_lora." in message
    )
    step = int(message.split(" at step ")[1].split(",")[0])
    assert step > 2, "with this seed"
    (kept,) = checkpoints(root / "runs" / STAGE)
    assert kept.name == f"checkpoint-{step - 1:09d}"
    state = load_file(kept / "state.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert not (root / FOLDER).exists()
    stopped_after(fresh(root, STAGE), overrides, step - 1, step - 1)
    (before,) = checkpoints(root / "runs" / STAGE)
    expected = load_file(before / "state.safetensors")
    assert all(
        torch.equal(state[name], expected[name]) for name in expected if name != "loss_scale"
    )


def test_a_nan_on_what_is_retained_names_the_retained_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = with_a_nan(tmp_path / "p", monkeypatch)
    write_texts(root / "data/kept.jsonl", ["old", "Japan", "new"])
    write_texts(root / "data/lines.jsonl", ["a plain line", "another one"])
    kept = {"retention_data": "data/kept.jsonl", "retention_weight": 1, "retention_batch_size": 1}
    overrides = given(
        epochs=9,
        patience=0,
        eval_share=0,
        eval_steps=0,
        gradient_accumulation_steps=1,
        train_embeddings="none",
        **kept,
    )
    with pytest.raises(
        UserError, match=r"the divergence from the base nan and the gradient norm nan at"
    ) as error:
        run_stage(root, STAGE, overrides)
    assert "on data/kept.jsonl:2. Lower" in str(error.value) and "the loss is nan" not in str(
        error.value
    )


@pytest.mark.slow
def test_a_checkpoint_goes_with_its_result_though_the_process_was_killed_between_them_and_another_runs_stays(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, overrides = project / f"runs/{STAGE}", given(patience=0, epochs=4)

    def to_the_end() -> None:
        for _ in run(
            open_project(project / "params.yaml", overrides),
            STAGES[STAGE],
            WORK[STAGE],
            checkpoint_every=3,
        ):
            pass

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.project.runner.discard_checkpoints", lambda _: None)
        to_the_end()
    assert checkpoints(folder)
    to_the_end()
    assert not checkpoints(folder)
    stopped_after(project, given(patience=0, epochs=5), 4, 3)
    (other,) = checkpoints(folder)
    damaged = folder / "checkpoint-000000001"
    damaged.mkdir()
    (damaged / "manifest.json").write_text('{"files": {}, "key": ""}')
    to_the_end()
    assert checkpoints(folder) == [other, damaged]


@pytest.mark.slow
def test_a_process_that_goes_while_a_step_is_evaluated_leaves_no_checkpoint_of_weights_that_were_not_logged(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer has taken the step, but its record is not logged: a checkpoint would repeat it
    on resume.
    """
    overrides, real, seen = given(patience=0, epochs=4), Evaluation.after_step, list[int]()

    def going(
        self: Evaluation,
        path: LossPath,
        optimizer: FlatOptimizer,
        live: Sequence[int],
        step: int,
        answers: Mapping[int, float] | None = None,
    ) -> dict[int, float]:
        seen.append(optimizer.steps)
        if len(seen) == 2:
            raise RuntimeError("gloo: Connection closed by peer")
        return real(self, path, optimizer, live, step, answers)

    with monkeypatch.context() as patched:
        patched.setattr(Evaluation, "after_step", going)
        patched.setattr("pipeline.training.loop.is_lost", lambda error: "gloo" in str(error))
        with pytest.raises(UserError, match=r"or cannot be reached\. The last periodic"):
            run_stage(project, STAGE, overrides)
    assert seen == [2, 4]
    assert not checkpoints(project / f"runs/{STAGE}")
    assert "resumed" not in run_stage(project, STAGE, overrides)
