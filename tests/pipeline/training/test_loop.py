"""The loop around the steps, on a toy: what it says and keeps when a run ends early, and how the
next one goes on.
"""

import gc
import math
import os
import re
import shutil
import signal
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from pipeline.adapters.attach import attach
from pipeline.adapters.batched import attach_many
from pipeline.adapters.config import AdapterSpec
from pipeline.errors import Interrupted, UserError
from pipeline.files import artifact
from pipeline.files.text import in_units
from pipeline.models.base import CausalLM
from pipeline.project.logs.run_log import Sample, parse_sample, read_run_outcomes, read_steps
from pipeline.project.params.sections import Training
from pipeline.project.runner import Event, Job, Note, Progress, checkpoints
from pipeline.project.stage_graph import Project
from pipeline.stages.methods.full import COUNTED as FULL
from pipeline.stages.methods.lora import FinetuneLora
from pipeline.training import loop
from pipeline.training.batched import ManyAdapters
from pipeline.training.batches import Batches
from pipeline.training.data import Prompts
from pipeline.training.loop import train
from pipeline.training.memory.prediction import (
    MemoryMeter,
    measure_memory,
    predict_peak_memory,
    predicted_peak,
    release,
)
from pipeline.training.optimizer import FlatOptimizer
from pipeline.training.parallel.collectives import SLOWEST_STEP, CollectiveError
from pipeline.training.retention import RetentionLoss
from pipeline.training.step import Evaluation, Learner, LossPath, StepBatch
from pipeline.training.task import TrainingTask, build_optimizer, prepare_model
from tests.helpers.json_files import read_json
from tests.helpers.projects import STAGES, folder_bytes, played
from tests.helpers.real import listed, notes, toy, windows_of, with_lora

TOTAL = 6  # two epochs of three steps; the second is the largest
DATA = listed(windows_of((4, 9, 2, 7, 6, 3)))


def settings(**changes: Any) -> Training:
    return Training(**{"epochs": 2, "learning_rate": 1e-2, **changes})


def new_job(run: Path, every: int | None = None, key: str = "key") -> Job:
    run.mkdir(parents=True, exist_ok=True)
    return Job(cast(Project, None), STAGES["finetune_full"], run / "out", run, key, every)


def new_task(
    given: Training | None = None, model: CausalLM | None = None, seed: int = 0, **more: Any
) -> TrainingTask:
    return TrainingTask.of_one(
        model or toy("llama"), Batches(DATA, 2, seed), given or settings(), FULL, **more
    )


def weights_of(run: Path, task: TrainingTask | None = None, **job: Any) -> torch.Tensor:
    """The weights after a whole run."""
    return played(train(new_job(run, **job), task or new_task()))[0].weights


def until(events: Iterator[Event], step: int) -> list[Event]:
    """What the run tells until it has taken a step."""
    seen: list[Event] = []
    for event in events:
        seen.append(event)
        if isinstance(event, Progress) and event.done == step:
            return seen
    raise AssertionError(f"it ended before step {step}")


def abandon(run: Path, step: int, every: int, task: TrainingTask | None = None) -> None:
    events = train(new_job(run, every), task or new_task())
    until(events, step)
    events.close()


def kept(run: Path) -> list[str]:
    return [path.name for path in checkpoints(run)]


# Signals


@contextmanager
def handled(*numbers: int) -> Iterator[list[int]]:
    """What arrives of these signals while no run holds it."""
    arrived: list[int] = []
    before = {
        number: signal.signal(number, lambda got, _: arrived.append(got)) for number in numbers
    }
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_after_the_step_and_the_next_run_ends_as_an_unbroken_one(
    number: int, tmp_path: Path
) -> None:
    expected = weights_of(tmp_path / "whole")
    with handled(number) as arrived:
        before, events = signal.getsignal(number), train(new_job(tmp_path / "run"), new_task())
        until(events, 2)
        os.kill(os.getpid(), number)
        with pytest.raises(
            Interrupted, match=r"^finetune_full: stopped after step 3 of 6$"
        ) as stopped:
            list(events)
        assert (stopped.value.signal_number, arrived) == (number, [])
        assert signal.getsignal(number) is before
    assert kept(tmp_path / "run") == ["checkpoint-000000003"]
    optimizer, said = played(train(new_job(tmp_path / "run"), new_task()))
    assert "finetune_full: resumed after step 3" in [event.text for event in said]
    assert torch.equal(optimizer.weights, expected)
    logs = [(tmp_path / name / "loss.csv").read_bytes() for name in ("whole", "run")]
    assert logs[0] == logs[1]


def test_the_second_signal_is_handled_as_without_a_run(tmp_path: Path) -> None:
    with handled(signal.SIGTERM, signal.SIGINT) as arrived:
        events = train(new_job(tmp_path / "run"), new_task())
        until(events, 1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert arrived == [signal.SIGTERM]
        with pytest.raises(Interrupted) as stopped:
            list(events)
    assert stopped.value.signal_number == signal.SIGINT, "the last one that was held"


def test_a_signal_that_arrives_as_its_handler_is_installed_ends_the_run_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install = signal.signal

    def install_and_receive(number: int, handler: Any) -> Any:
        before = install(number, handler)
        if number == signal.SIGTERM and "hold" in getattr(handler, "__name__", ""):
            os.kill(os.getpid(), number)
        return before

    with handled(signal.SIGTERM) as arrived:
        monkeypatch.setattr(signal, "signal", install_and_receive)
        with pytest.raises(Interrupted, match=r"stopped after step 1 of 6$"):
            list(train(new_job(tmp_path / "run"), new_task()))
        assert not arrived


def test_a_signal_after_the_last_step_ends_the_run_too(tmp_path: Path) -> None:
    with handled(signal.SIGTERM):
        events = train(new_job(tmp_path / "run"), new_task())
        until(events, TOTAL)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(
            Interrupted, match=r"^finetune_full: stopped after the last step$"
        ) as stopped:
            list(events)
    assert stopped.value.signal_number == signal.SIGTERM


def test_under_nohup_a_closed_terminal_is_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        events = train(new_job(tmp_path / "run"), new_task())
        until(events, 1)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        events.close()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_in_a_thread_trains_the_same_and_leaves_signals_alone(tmp_path: Path) -> None:
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(weights_of(tmp_path / "thread")))
    thread.start()
    thread.join()
    assert torch.equal(found[0], weights_of(tmp_path / "main"))


# Memory, and other errors


class Fails(LossPath):
    """Raises `error` when it reads step `at` (from 0), or before the first step if that is −1."""

    def __init__(self, model: CausalLM, error: Exception, at: int) -> None:
        super().__init__(model)
        self._error, self._at = error, at

    def base(self) -> AbstractContextManager[None]:
        if self._at < 0:
            raise self._error
        return nullcontext()

    def batches(self, orders: Mapping[int, Batches], number: int) -> Iterator[StepBatch]:
        if number == self._at:
            raise self._error
        return super().batches(orders, number)


def failing(error: Exception, at: int, **more: Any) -> TrainingTask:
    task = new_task()
    return replace(task, path=Fails(task.model, error, at), **more)


def step_size(number: int) -> str:
    """The predicted peak of a step."""
    task = new_task()
    return in_units(
        predict_peak_memory(task.model, FULL, task.settings, task.batches[number][0]) or 0
    )


@pytest.mark.parametrize("at", [0, 2, 5])
def test_where_memory_runs_out_the_steps_before_are_kept(at: int, tmp_path: Path) -> None:
    expected = weights_of(tmp_path / "whole")
    assert step_size(5) not in (step_size(4), step_size(3))
    with pytest.raises(CollectiveError) as error:
        weights_of(
            tmp_path / "run", failing(RuntimeError("CUDA out of memory. Tried 9 GiB\nmore"), at)
        )
    assert re.fullmatch(
        rf"finetune_full: out of memory in step {at + 1} \(CUDA out of memory\. Tried 9 GiB\)\. The calculator "
        rf"predicts {step_size(at)}; .* with finetune_full.gradient_checkpointing=full.*\. "
        rf"A checkpoint after step {at} of 6 is kept\.",
        str(error.value),
    )
    assert kept(tmp_path / "run") == [f"checkpoint-{at:09d}"]
    optimizer, said = played(train(new_job(tmp_path / "run"), new_task()))
    assert (f"resumed after step {at}" in notes(said)) == (at > 0)
    assert torch.equal(optimizer.weights, expected)


def test_where_memory_runs_out_after_the_last_step_its_size_is_told_and_it_is_kept(
    tmp_path: Path,
) -> None:
    class Greedy(Asked):
        def answers(self, step: int) -> list[Sample]:  # noqa: ARG002
            raise MemoryError

    task = asked(TOTAL)
    prompts = cast(Prompts, Greedy(task.model, TOTAL))
    with pytest.raises(
        CollectiveError, match=r"A checkpoint after step 6 of 6 is kept\.$"
    ) as error:
        weights_of(tmp_path, replace(task, prompts=prompts))
    assert f"The calculator predicts {step_size(TOTAL - 1)}" in str(error.value)


def test_before_the_first_step_there_is_only_advice(tmp_path: Path) -> None:
    with pytest.raises(CollectiveError) as error:
        weights_of(tmp_path / "run", failing(MemoryError(), -1, less_memory="Buy some."))
    assert str(error.value) == "finetune_full: out of memory in step 1 (MemoryError). Buy some."
    assert kept(tmp_path / "run") == []


@pytest.mark.parametrize("at", [-1, 2])
def test_any_other_error_is_raised_as_it_is(at: int, tmp_path: Path) -> None:
    wrong = RuntimeError("shapes differ")
    with pytest.raises(RuntimeError) as error:
        weights_of(tmp_path / "run", failing(wrong, at))
    assert error.value is wrong and kept(tmp_path / "run") == []
    with pytest.raises(CollectiveError, match=r"^as it says$"):
        weights_of(tmp_path / "run", failing(UserError("as it says"), at))


def test_where_a_process_goes_the_steps_before_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "is_lost", lambda error: "gloo" in str(error))
    with pytest.raises(
        CollectiveError,
        match=r"or cannot be reached\. A checkpoint after step 2 of 6 is kept\. Run",
    ):
        weights_of(tmp_path / "run", failing(RuntimeError("gloo: Connection closed"), 2))
    assert kept(tmp_path / "run") == ["checkpoint-000000002"]


def test_the_tensors_of_a_step_that_failed_are_freed() -> None:
    held: list[Any] = []

    def inner() -> None:
        activations = torch.zeros(3)
        held.append(weakref.ref(activations))
        raise ValueError("inside")

    def outer() -> None:
        gradients = torch.zeros(3)
        held.append(weakref.ref(gradients))
        try:
            inner()
        except ValueError:
            raise RuntimeError("out of memory\nand where") from None

    caught: list[BaseException] = []
    try:
        outer()
    except RuntimeError as error:
        caught.append(error)
    assert [each() is not None for each in held] == [True, True]
    assert release(caught[0]) == "out of memory"
    gc.collect()
    assert [each() for each in held] == [None, None]


# Checkpoints


def cut_log(run: Path) -> None:
    lines = (run / "loss.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "loss.csv").write_text("".join(lines[:4]), encoding="utf-8")


def seal_without_logs(run: Path) -> None:
    (folder,) = checkpoints(run)
    artifact.seal(folder, {"key": "key", "step": 4})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (cut_log, "run/loss.csv has fewer than 4 lines"),
        (lambda run: (run / "loss.csv").unlink(), "run/loss.csv has fewer than 4 lines"),
        (
            lambda run: (*run.glob("*/state.safetensors"),)[0].write_bytes(b""),
            "state.safetensors was changed after",
        ),
        (seal_without_logs, "'logs'"),
    ],
    ids=["log cut", "log gone", "state damaged", "manifest of another version"],
)
def test_an_unusable_checkpoint_is_named_and_training_starts_over(
    change: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    abandon(tmp_path / "run", 5, 4)
    assert kept(tmp_path / "run") == ["checkpoint-000000004"]
    change(tmp_path / "run")
    optimizer, said = played(train(new_job(tmp_path / "run"), new_task()))
    assert said[0].text.startswith(
        "finetune_full: the checkpoint is not used and training starts over: "
    )
    assert reason in said[0].text and "resumed" not in notes(said)
    assert torch.equal(optimizer.weights, weights_of(tmp_path / "whole"))
    assert kept(tmp_path / "run") == []


def test_a_checkpoint_of_other_params_is_not_used(tmp_path: Path) -> None:
    abandon(tmp_path / "run", 5, 4)
    said = until(train(new_job(tmp_path / "run", key="other"), new_task()), 1)
    assert said[0].text.endswith("starts over: it was made with other params, data or code")


def test_the_newest_usable_checkpoint_is_taken(tmp_path: Path) -> None:
    run = tmp_path / "run"
    abandon(run, 2, 2)
    shutil.copytree(run / "checkpoint-000000002", tmp_path / "older")
    abandon(run, 5, 4)
    shutil.copytree(tmp_path / "older", run / "checkpoint-000000002")
    (run / "checkpoint-000000004/state.safetensors").write_bytes(b"")
    optimizer, said = played(train(new_job(run), new_task()))
    assert said[0].text == "finetune_full: resumed after step 2" and "not used" not in notes(said)
    assert torch.equal(optimizer.weights, weights_of(tmp_path / "whole"))


def test_a_run_goes_on_from_the_state_of_another_or_says_that_it_cannot(tmp_path: Path) -> None:
    first = new_task()
    optimizer, _ = played(train(new_job(tmp_path / "first"), first))
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    second = replace(new_task(model=first.model), state=state)
    with pytest.raises(UserError, match="A checkpoint after step 2 of 6 is kept"):
        second = replace(second, path=Fails(first.model, MemoryError(), 2))
        weights_of(tmp_path / "second", second)
    assert (
        load_file(tmp_path / "second/checkpoint-000000002/state.safetensors")["step"] == TOTAL + 2
    )
    other, said = played(train(new_job(tmp_path / "other"), replace(new_task(), state=state)))
    assert (
        said[0].text == "finetune_full: the optimizer's state is of other settings and is not used"
    )
    assert other.steps == TOTAL and torch.equal(other.weights, weights_of(tmp_path / "whole"))


# What it tells and logs


@pytest.mark.parametrize("seed", [0, 1])
def test_what_it_says_and_logs_of_memory_and_losses(seed: int, tmp_path: Path) -> None:
    task = new_task(seed=seed)
    _, said = played(train(new_job(tmp_path), task))
    steps = read_steps(tmp_path / "loss.csv")
    assert [event for event in said if isinstance(event, Progress)] == [
        Progress(step.step, TOTAL, f"loss {step.loss:.3f}") for step in steps
    ]
    rows = [
        line.split(",")
        for line in (tmp_path / "telemetry.csv").read_text(encoding="utf-8").splitlines()[1:]
    ]
    assert [row[4] for row in rows] == ["cpu"] * TOTAL
    tokens = [sum(batch.ids.numel() for batch in task.batches[number]) for number in range(TOTAL)]
    assert (tokens[4] > max(tokens[1:4])) == (seed == 1), (
        "a larger one after an epoch's steps is not waited for"
    )
    # the first step allocates what later ones keep
    largest = max(range(1, 4), key=lambda number: tokens[number])
    (batch,) = task.batches[largest]
    predicted, measured = (
        predict_peak_memory(task.model, FULL, task.settings, batch),
        int(rows[-1][6]),
    )
    assert {int(row[5]) for row in rows} == {predicted} and measured == pytest.approx(
        predicted, rel=0.05
    )
    assert [int(row[6]) for row in rows] == [0] * largest + [measured] * (TOTAL - largest)
    assert [event for event in said if isinstance(event, Note)] == [
        Note(
            f"finetune_full: {in_units(int(rows[0][5]))} of tensors predicted at the peak of the "
            "largest step",
            True,
        ),
        Note(
            f"finetune_full: {in_units(measured)} of tensors measured at the peak of the largest "
            "step",
            True,
        ),
    ]
    assert not task.model.training


def test_progress_shows_the_evaluation_of_the_steps_that_have_one(tmp_path: Path) -> None:
    evaluation = Evaluation(Batches(listed(windows_of((5, 6), seed=1)), 2, 0), 4, 0)
    _, said = played(train(new_job(tmp_path), new_task(evaluation=evaluation)))
    steps = read_steps(tmp_path / "loss.csv")
    assert [step.step for step in steps if step.eval_loss is not None] == [4, TOTAL]
    shown = [event.text for event in said if isinstance(event, Progress)]
    for step, text in zip(steps, shown, strict=True):
        held_out = "" if step.eval_loss is None else f"  eval loss {step.eval_loss:.3f}"
        assert text == f"loss {step.loss:.3f}{held_out}"


class Rewarded(LossPath):
    """Its rewards are the numbers of batches read since they were asked for."""

    rewards = True
    _read = 0

    def losses(self, batch: StepBatch) -> torch.Tensor:
        self._read += 1
        return super().losses(batch)

    def measured(self) -> Mapping[str, float]:
        read, self._read = self._read, 0
        return {"reward_accuracy": float(read)}


def test_rewards_of_a_step_and_of_what_is_held_out_are_told_apart(tmp_path: Path) -> None:
    evaluation = Evaluation(Batches(listed(windows_of((5, 6, 7), seed=1)), 1, 0), 2, 0)
    task = new_task(settings(max_steps=3), evaluation=evaluation)
    played(train(new_job(tmp_path), replace(task, path=Rewarded(task.model))))
    found = [
        (step.reward_accuracy, step.eval_accuracy) for step in read_steps(tmp_path / "loss.csv")
    ]
    assert found == [(1, None), (1, 3), (1, 3)]


def test_a_model_that_reads_one_sequence_at_a_time_is_noted(tmp_path: Path) -> None:
    class Unpacked(LossPath):
        supports_packing = False

    task = new_task()
    said = until(train(new_job(tmp_path), replace(task, path=Unpacked(task.model))), 1)
    assert (
        said[0].text
        == "finetune_full: this model reads one sequence at a time; training is slower for it"
    )


def overfitting() -> TrainingTask:
    evaluation = Evaluation(Batches(listed(windows_of((9, 8, 7, 6), seed=1)), 4, 0), 1, 2)
    return new_task(
        settings(epochs=40, schedule="constant", learning_rate=2e-2), evaluation=evaluation
    )


def test_a_run_that_no_longer_improves_stops_with_its_best_weights_also_if_it_is_killed_then(
    tmp_path: Path,
) -> None:
    task = overfitting()
    optimizer, said = played(train(new_job(tmp_path / "run", every=1), task))
    losses = [step.eval_loss or 0.0 for step in read_steps(tmp_path / "run/loss.csv")]
    best = losses.index(min(losses)) + 1
    assert 1 < best == len(losses) - 2 < 100
    assert (
        f"finetune_full: stopped at step {best + 2} of 120: the evaluation loss no longer improves"
        in notes(said)
    )
    cut = new_task(settings(epochs=40, schedule="constant", learning_rate=2e-2, max_steps=best))
    assert torch.equal(weights_of(tmp_path / "cut", cut), optimizer.weights)
    assert torch.equal(
        torch.cat([p.detach().view(-1) for p in task.model.parameters()]), optimizer.weights[0]
    )
    again, said = played(train(new_job(tmp_path / "run"), overfitting()))
    assert f"finetune_full: resumed after step {best + 2}" in notes(said) and "stopped at" in notes(
        said
    )
    assert not [event for event in said if isinstance(event, Progress)]
    assert torch.equal(again.weights, optimizer.weights)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_model_is_prepared_for_its_device_and_stays_where_it_is(
    on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class Model:
        device = torch.device("meta")
        checkpoint_blocks = calls.append

        def prepare_cpu_training(self) -> None:
            calls.append("cpu")

        def prepare_for_accelerator(self, device: torch.device) -> None:
            calls.append(device)

    monkeypatch.setattr("pipeline.training.task.device_for", lambda model: model.device)
    monkeypatch.setattr(
        "pipeline.training.task.uses_cpu_kernels",
        lambda device: on_cpu and device.type == "meta",
    )
    assert prepare_model(cast(CausalLM, Model()), "full") == Model.device
    assert calls == ["full", "cpu" if on_cpu else Model.device]


class Asked:
    """Prompts whose answer tells which weights the model had."""

    def __init__(self, model: CausalLM, every: int) -> None:
        self._model, self.every = model, every

    def answers(self, step: int) -> list[Sample]:
        with torch.no_grad():
            logits = self._model.eval()(torch.tensor([[5, 6, 7]]))
        self._model.train()
        return [Sample(step, "5 6 7", f"{float(logits.sum()):.4f}")]


def asked(every: int, **changes: Any) -> TrainingTask:
    model = toy("llama")
    return new_task(settings(**changes), model, prompts=cast(Prompts, Asked(model, every)))


@pytest.mark.parametrize(
    ("every", "changes", "steps"),
    [(2, {}, [2, 4, 6]), (4, {}, [4, 6]), (0, {}, [3, 6]), (0, {"eval_steps": 5}, [5, 6])],
)
def test_prompts_are_answered_every_so_often_and_after_the_last_step(
    every: int, changes: dict[str, Any], steps: list[int], tmp_path: Path
) -> None:
    assert torch.equal(
        weights_of(tmp_path / "run", asked(every, **changes)), weights_of(tmp_path / "without")
    )
    answers = [
        *map(
            parse_sample, (tmp_path / "run/samples.jsonl").read_text(encoding="utf-8").splitlines()
        )
    ]
    assert [answer.step for answer in answers] == steps
    assert len({answer.answer for answer in answers}) == len(steps), "of the weights at that step"


def test_answers_are_part_of_what_a_checkpoint_needs(tmp_path: Path) -> None:
    weights_of(tmp_path / "whole", asked(1))
    for name in ("run", "cut"):
        abandon(tmp_path / name, 5, 4, asked(1))
    weights_of(tmp_path / "run", asked(1))
    for file in ("samples.jsonl", "loss.csv"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    for file in ("loss.csv", "samples.jsonl"):
        shutil.copytree(tmp_path / "cut", tmp_path / file)
        log = tmp_path / file / file
        log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:3]))
        said = until(train(new_job(tmp_path / file), asked(1)), 1)
        assert f"{file} has fewer than 4 lines" in said[0].text


def test_only_a_model_that_compiles_is_compiled(tmp_path: Path) -> None:
    model = toy("llama")
    model.compiles = False
    for task in (
        new_task(settings(compile=True), model),
        replace(pair(), learners=[named("a", compile=True)]),
    ):
        with pytest.raises(
            UserError, match=r"^finetune_full: compile is true, but only .* Set compile to false\.$"
        ):
            weights_of(tmp_path / "run", task)


def test_a_gpu_without_bf16_is_noted_where_bf16_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Moved(Exception):
        pass

    def move(_: object) -> None:
        raise Moved

    def first(precision: str, device: str, fast: str) -> str:
        """What is said before the model is moved to the device."""
        task = new_task(settings(precision=precision))
        monkeypatch.setattr(task.model, "to", move)
        monkeypatch.setattr(loop, "prepare_model", lambda *_: torch.device(device))
        monkeypatch.setattr(loop, "fast_precision", lambda _: fast)
        said: list[Event] = []
        with pytest.raises(Moved):
            said.extend(train(new_job(tmp_path / "run"), task))
        events = train(new_job(tmp_path / "run"), task)
        try:
            return next(events).text
        except Moved:
            return ""

    assert "no bf16 instructions and is slow with it. Set finetune_full.precision=fp16" in first(
        "bf16", "cuda", "fp16"
    )
    assert [
        first("bf16", "cuda", "bf16"),
        first("fp32", "cuda", "fp16"),
        first("bf16", "cpu", "fp32"),
    ] == ["", "", ""]


def test_dropout_and_noise_each_change_what_is_learned_and_neither_of_zero_does(
    tmp_path: Path,
) -> None:
    def learned(name: str, **noise: float) -> torch.Tensor:
        own = FinetuneLora(epochs=1, learning_rate=1e-2, **noise)  # type: ignore[arg-type]
        return weights_of(
            tmp_path / name, new_task(own, with_lora(toy("llama"), dropout=own.lora_dropout))
        )

    plain = learned("plain")
    assert torch.equal(learned("none", lora_dropout=0.0, neftune_alpha=0.0), plain)
    assert not torch.equal(learned("dropout", lora_dropout=0.5), plain)
    assert not torch.equal(learned("noise", neftune_alpha=5.0), plain)


def test_settings_without_lora_plus_give_every_parameter_one_rate() -> None:
    """Adam's first step is as long as the rate, whatever the gradient."""
    optimizer = build_optimizer(with_lora(toy("llama")), settings())
    before = optimizer.weights.clone()
    optimizer.gradient.fill_(3.0)
    optimizer.step(0.01)
    torch.testing.assert_close(optimizer.weights, before - 0.01)


# Divergence


def test_a_loss_that_is_not_finite_is_computed_once_and_names_at_most_eight_lines(
    tmp_path: Path,
) -> None:
    read: list[int] = []

    class Counted(LossPath):
        def batches(self, orders: Mapping[int, Batches], number: int) -> Iterator[StepBatch]:
            read.append(number)
            return super().batches(orders, number)

    model = toy("llama")
    batches = Batches(listed(windows_of((3,) * 20)), 10, 0)
    task = TrainingTask.of_one(model, batches, settings(learning_rate=1e30), FULL)
    run = tmp_path / "runs/finetune_full"
    with pytest.raises(loop.NotFinite) as error:
        weights_of(run, replace(task, path=Counted(model)))
    lines = ", ".join(task.batches.locations(1)[:8])
    assert re.fullmatch(
        rf"finetune_full: the loss is [\d.]+ and the gradient norm nan at step 2, on {lines} and 2 more\. Lower "
        r"finetune_full\.learning_rate, .* The weights before that step are kept in runs/finetune_full\.",
        str(error.value),
    )
    assert read == [0, 1]
    assert kept(run) == ["checkpoint-000000001"]
    # the checkpoint says that it still runs
    with pytest.raises(loop.NotFinite, match="at step 2, on"):
        weights_of(
            run, TrainingTask.of_one(toy("llama"), batches, settings(learning_rate=1e30), FULL)
        )


# Many learners


def named(name: str, rate: float = 1e-2, seed: int = 0, **changes: Any) -> Learner:
    return Learner(settings(learning_rate=rate, **changes), Batches(DATA, 2, seed), name=name)


def pair(rates: Sequence[float] = (1e-2, 1e-3), **more: Any) -> TrainingTask:
    """Two adapters, a and b, on one base."""
    model = toy("llama")
    torch.manual_seed(0)
    routing = attach_many(
        model, [lambda: attach(model, AdapterSpec(2, 4.0, ("q_proj", "v_proj")), None)] * 2
    )
    learners = [named(name, rate) for name, rate in zip("ab", rates, strict=True)]
    return TrainingTask(model, learners, ManyAdapters(model, routing), **more)


class Diverges(ManyAdapters):
    """The losses of some learners are NaN from the second step on."""

    diverging: Sequence[int] = ()
    _number = 0

    def batches(self, orders: Mapping[int, Batches], number: int) -> Iterator[StepBatch]:
        self._number = number
        return super().batches(orders, number)

    def losses(self, batch: StepBatch) -> torch.Tensor:
        wrong = [math.nan if self._number and n in self.diverging else 1.0 for n in batch.labels]
        return super().losses(batch) * torch.tensor(wrong)


def diverging(*learners: int) -> TrainingTask:
    task = pair()
    assert isinstance(task.path, ManyAdapters)
    path = Diverges(task.model, task.path._routing)
    path.diverging = learners
    return replace(task, path=path)


def test_each_of_many_has_its_log_and_progress_shows_the_range_of_their_losses(
    tmp_path: Path,
) -> None:
    for old in ("gone", "earlier"):
        (tmp_path / old).mkdir()
        (tmp_path / old / "loss.csv").write_text("", encoding="utf-8")
    outcome = {"state": "stopped early", "steps": 4}
    task = pair(earlier={"earlier": outcome})
    model = task.model
    _, said = played(
        train(new_job(tmp_path), replace(task, prompts=cast(Prompts, Asked(model, 6))))
    )
    a, b = (read_steps(tmp_path / name / "loss.csv") for name in "ab")
    shown = [event.text for event in said if isinstance(event, Progress)]
    for one, other, text in zip(a, b, shown, strict=True):
        low, high = sorted((one.loss, other.loss))
        assert text == f"2 adapters, loss {low:.3f} to {high:.3f}"
    assert len(a) == TOTAL and a[-1] != b[-1]
    assert sorted(path.parent.name for path in tmp_path.glob("*/loss.csv")) == ["a", "b", "earlier"]
    assert read_run_outcomes(tmp_path) == {"earlier": "stopped early"}
    asked_a, asked_b = (
        parse_sample((tmp_path / name / "samples.jsonl").read_text(encoding="utf-8"))
        for name in "ab"
    )
    assert asked_a.step == asked_b.step == TOTAL and asked_a.answer != asked_b.answer, (
        "each with its own adapter"
    )


def test_one_that_diverges_is_told_and_its_neighbour_trains_on_also_after_a_resume(
    tmp_path: Path,
) -> None:
    optimizer, said = played(train(new_job(tmp_path / "whole"), diverging(1)))
    (told,) = (event.text for event in said if "is stopped" in event.text)
    assert re.fullmatch(
        r"finetune_full: b is stopped: at step 2, on f\.txt:\d, f\.txt:\d, its loss is nan and its gradient norm nan\. "
        r"Lower its learning_rate\.",
        told,
    )
    table = read_json(tmp_path / "whole/sweep.json")
    assert table == {"b": {"state": "diverged", "steps": 1}}
    assert [len(read_steps(tmp_path / "whole" / name / "loss.csv")) for name in "ab"] == [TOTAL, 1]
    abandon(tmp_path / "run", 5, 4, diverging(1))
    resumed = diverging(1)
    again, said = played(train(new_job(tmp_path / "run"), resumed))
    assert "resumed after step 4" in notes(said) and "is stopped" not in notes(said)
    assert torch.equal(again.weights[0], optimizer.weights[0])
    assert [(each.stopped, each.diverged) for each in resumed.learners] == [
        (None, False),
        (1, True),
    ]
    for file in ("a/loss.csv", "b/loss.csv", "sweep.json"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize(
    ("rows", "told"), [(4, r"(f\.txt:\d, ){4}"), (6, r"(f\.txt:\d, ){3}f\.txt:\d and 2 more, ")]
)
def test_of_one_that_diverges_at_most_four_lines_are_named(
    rows: int, told: str, tmp_path: Path
) -> None:
    task, batches = diverging(1), Batches(listed(windows_of((3,) * rows)), rows, 0)
    learners = [replace(each, batches=batches) for each in task.learners]
    _, said = played(train(new_job(tmp_path), replace(task, learners=learners)))
    assert re.search(rf"at step 2, on {told}its loss is nan", notes(said))


def test_where_all_diverge_the_run_ends_and_the_weights_before_are_kept(tmp_path: Path) -> None:
    with pytest.raises(loop.NotFinite) as error:
        weights_of(tmp_path / "run", diverging(0, 1))
    assert (
        str(error.value)
        == "finetune_full: all adapters diverged: none has a finite loss. Lower learning_rate."
    )
    assert kept(tmp_path / "run") == ["checkpoint-000000001"]
    assert read_run_outcomes(tmp_path / "run") == {"a": "diverged", "b": "diverged"}
    with pytest.raises(loop.NotFinite):
        weights_of(tmp_path / "run", diverging(0, 1))


def test_at_a_rung_only_the_lowest_loss_trains_on_also_after_a_resume(tmp_path: Path) -> None:
    def rung() -> TrainingTask:
        return pair((1e-2, 1e-5), evaluation=Evaluation(Batches(DATA, 2, 0), 100, 0, 2, {2: 1}))

    optimizer, said = played(train(new_job(tmp_path / "whole"), rung()))
    assert "finetune_full: b stopped after step 2: its evaluation loss is not the lowest" in notes(
        said
    )
    a, b = (read_steps(tmp_path / "whole" / name / "loss.csv") for name in "ab")
    assert (len(a), len(b)) == (TOTAL, 2)
    assert (
        a[1].eval_loss is not None
        and b[1].eval_loss is not None
        and a[1].eval_loss < b[1].eval_loss
    )
    assert read_run_outcomes(tmp_path / "whole") == {"b": "stopped early"}
    for stop, every in ((2, 2), (4, 3)):
        run = tmp_path / f"run{stop}"
        abandon(run, stop, every, rung())
        again, _ = played(train(new_job(run), rung()))
        assert torch.equal(again.weights, optimizer.weights)
        for file in ("a/loss.csv", "b/loss.csv", "sweep.json"):
            assert (run / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


# Memory


def test_the_forecast_is_of_the_larger_of_what_is_learned_and_what_is_retained() -> None:
    model = with_lora(toy("llama"))
    own = FinetuneLora(retention_data="t", retention_weight=1.0, retention_batch_size=2, epochs=2)
    for length in (2, 40):
        retain = RetentionLoss(model, listed(windows_of((length,) * 6, seed=3)), own)
        task = TrainingTask.of_one(model, Batches(DATA, 2, 0), own, FULL, retain=retain)
        (learned,), (retained,) = task.batches[1], retain.batches[1]
        sizes = [
            predict_peak_memory(model, FULL, own, *each)
            for each in ((learned, False), (retained, True))
        ]
        assert predicted_peak(task, 1) == max(size for size in sizes if size is not None)
        plain = predict_peak_memory(model, FULL, own, retained, False)
        assert sizes[1] is not None and plain is not None and (sizes[1] > plain) == (length == 40)
    assert predicted_peak(replace(task, method=None), 1) == 0


class Watched:
    """A meter that notes during which record it runs."""

    peak, beside = 0, ""

    def __init__(self) -> None:
        self.running, self.watched = False, 0

    def watch(self, tensors: Iterable[torch.Tensor]) -> None:
        self.watched = sum(tensor.numel() for tensor in tensors)

    def __enter__(self) -> None:
        self.running = True

    def __exit__(self, *_: object) -> None:
        self.running = False


@pytest.mark.parametrize(("number", "measured"), [(0, 1), (1, 1), (3, 3), (9, None)])
def test_one_record_is_measured_and_never_the_first(number: int, measured: int | None) -> None:
    model = torch.nn.BatchNorm1d(3)
    optimizer, meter, seen = FlatOptimizer(model), Watched(), dict[int, bool]()

    def records() -> Iterator[int]:
        for each in range(5):
            seen[each] = meter.running
            yield each

    found = measure_memory(
        cast(MemoryMeter, meter), number, cast(CausalLM, model), optimizer, records()
    )
    assert list(found) == list(range(5))
    assert [each for each, running in seen.items() if running] == (
        [] if measured is None else [measured]
    )
    assert meter.watched == 6 + 7 + 2 * 6, (
        "parameters, buffers, the optimizer's weights and gradient"
    )


# Processes


@contextmanager
def group(store: Path) -> Iterator[None]:
    """A process group of this process alone, in which collectives are those of a distributed
    run.
    """
    minute = timedelta(minutes=1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1, timeout=minute
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("sharded", [False, True, None])
def test_a_run_of_one_process_in_a_group_is_one_without_a_group(
    sharded: bool | None, tmp_path: Path
) -> None:
    alone = weights_of(tmp_path / "alone", new_task(model=with_lora(toy("llama"))))
    with group(tmp_path / "members"):
        found = weights_of(
            tmp_path / "group", new_task(model=with_lora(toy("llama")), sharded=sharded)
        )
        gloo = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
        assert gloo.options._timeout == SLOWEST_STEP, (
            "of a step; until the first one the group's own limit holds"
        )
    assert torch.equal(found, alone)
    assert (
        folder_bytes(tmp_path / "group")["loss.csv"] == folder_bytes(tmp_path / "alone")["loss.csv"]
    )


class HeldOut:
    """Held-out questions, of which a given number is answered as expected after each evaluation."""

    def __init__(self, right: Mapping[int, int]) -> None:
        self._right = right

    def answers(self, step: int) -> list[Sample]:
        return [Sample(step, f"question {n}", str(n < self._right[step]), "True") for n in range(4)]


def evaluated(right: Mapping[int, int], **changes: Any) -> TrainingTask:
    """A task that is evaluated after each of its steps, where so many answers of 4 are right."""
    given = settings(eval_steps=1, samples={"held_out": 4}, **changes)
    evaluation = Evaluation(Batches(DATA, 2, seed=None), 1, given.patience)
    return new_task(given, evaluation=evaluation, questions=cast(Prompts, HeldOut(right)))


def test_held_out_answers_are_logged_beside_the_loss_and_change_nothing_that_is_trained(
    tmp_path: Path,
) -> None:
    right = {step: min(step, 4) for step in range(1, TOTAL + 1)}
    assert torch.equal(
        weights_of(tmp_path / "run", evaluated(right)), weights_of(tmp_path / "without")
    )
    steps = read_steps(tmp_path / "run/loss.csv")
    assert [step.eval_answers for step in steps] == [right[step.step] / 4 for step in steps]
    samples = [
        *map(
            parse_sample, (tmp_path / "run/samples.jsonl").read_text(encoding="utf-8").splitlines()
        )
    ]
    assert [sample.step for sample in samples] == [step for step in right for _ in range(4)]
    assert samples[0] == Sample(1, "question 0", "True", "True") and samples[1].answer == "False"

    abandon(tmp_path / "cut", 5, 4, evaluated(right))
    weights_of(tmp_path / "cut", evaluated(right))
    for file in ("samples.jsonl", "loss.csv"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "run" / file).read_bytes()


def test_the_best_weights_may_be_those_with_the_most_expected_answers(tmp_path: Path) -> None:
    # of two with as many the later one, whose loss is lower
    right = {1: 1, 2: 3, 3: 2, 4: 3, 5: 0, 6: 0}
    best = evaluated(right, patience=9, metric_for_best_model="eval_answers")
    optimizer, _ = played(train(new_job(tmp_path / "best"), best))
    steps = read_steps(tmp_path / "best/loss.csv")
    assert min(steps, key=lambda step: step.eval_loss or 0).step == TOTAL, (
        "by loss the last would be the best"
    )
    assert torch.equal(
        optimizer.weights, weights_of(tmp_path / "four", new_task(settings(max_steps=4)))
    )

    stopped = evaluated(right, patience=1, metric_for_best_model="eval_answers")
    _, said = played(train(new_job(tmp_path / "stopped"), stopped))
    assert len(read_steps(tmp_path / "stopped/loss.csv")) == 3
    assert any("share of expected answers no longer improves" in str(event) for event in said)


def test_answers_can_only_choose_the_best_where_some_are_asked() -> None:
    with pytest.raises(
        UserError, match=r"^metric_for_best_model is eval_answers, but samples\.held_out"
    ):
        settings(metric_for_best_model="eval_answers")
    with pytest.raises(
        UserError, match=r"^metric_for_best_model is eval_answers, but no best model is chosen"
    ):
        settings(metric_for_best_model="eval_answers", samples={"held_out": 4})
