"""`python -m bench recipe`: its tasks, what it concludes from runs, and a run on a toy."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from msgspec import structs

from bench import recipe_runs
from bench.recipe import RUNS, Measured, describe, good_settings, outcomes, read_runs, stopping
from bench.recipe_runs import COLUMNS, UNTRAINED
from bench.recipe_settings import CHOSEN, Setting, batch_size, for_rows, of_rows, plan, setting
from bench.recipe_tasks import TASKS, TIMES, RecipeTask, Row, _halves, _spoken, answer_of, prompt_of
from pipeline.calc.sources.open_model import built_in
from pipeline.data.answers.match import match
from pipeline.data.check import check
from pipeline.data.formats import read_examples
from pipeline.stages.methods.lora import WIDTH, FinetuneLora
from pipeline.stages.recipe import Machine, choose
from pipeline.stages.registry import METHODS
from tests.helpers.bases import toy_checkpoint
from tests.helpers.json_files import write_jsonl

SLOW, FAST = setting(2e-4, 8, 3), setting(1e-3, 16, 5, 4)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_task_has_the_same_rows_each_time_and_trains_on_none_that_is_held_out(
    task: RecipeTask,
) -> None:
    trained, held_out = task.split()
    assert (trained, held_out) == task.split()
    assert (len(trained), len(held_out)) == (task.rows, task.held_out)
    prompts = [prompt_of(row) for row in (*trained, *held_out)]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_rows_are_a_data_file_whose_answers_match_themselves(
    task: RecipeTask, tmp_path: Path
) -> None:
    rows = [row for part in task.split() for row in part]
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, rows)
    assert len(read_examples(path, path.name)) == len(rows)
    for answer in {answer_of(row) for row in rows[:50]}:
        matched = match(answer, answer)
        assert matched.as_expected or matched.rouge_l == 1


def test_what_is_asked_of_held_out_facts_and_topics_can_be_learned_from_training() -> None:
    for name in ("facts", "intents"):
        task = next(task for task in TASKS if task.name == name)
        trained, held_out = ({answer_of(row) for row in rows} for rows in task.split())
        assert held_out <= trained


def test_no_two_times_are_said_alike() -> None:
    said: dict[str, tuple[int, int]] = {}
    for hour, minute in TIMES:
        for half in _halves(hour):
            assert said.setdefault(_spoken(hour, minute, half), (hour, minute)) == (hour, minute)


def test_settings_are_those_of_finetune_lora_and_no_run_is_planned_twice() -> None:
    runs = list(plan())
    keys = [(task.name, each, seed) for task, each, seed in runs]
    assert len(set(keys)) == len(keys)
    for _, each, _ in runs:
        structs.replace(FinetuneLora(), **each.params(50))
    assert {(task.name, CHOSEN) for task in TASKS} <= {
        (t.name, of_rows(each, t.rows)) for t, each, _ in runs
    }
    assert [batch_size(rows) for rows in (50, 100, 200, 2000)] == [2, 4, 8, 16]


@pytest.mark.parametrize("rows", [50, 100, 2000])
def test_the_chosen_setting_is_what_lora_train_chooses_for_a_base_of_this_width(rows: int) -> None:
    base = built_in("smollm2-135m").shapes  # which the benchmark trains
    assert base.hidden == WIDTH
    data = replace(
        check([]),
        examples=rows,
        trained_tokens=20 * rows,
        quantiles={"max": 100},
        suggested_max_length=100,
    )
    recipe = choose(base, data, 0.1, Machine("cpu", 2**36, "fp32"), [METHODS["lora"]], {})
    chosen = {key.partition(".")[2]: value for key, value in recipe.values.items()}
    tried = for_rows(CHOSEN, rows).params(rows)
    del tried["train_embeddings"]  # without new tokens, new_rows trains none
    assert {key: chosen[key] for key in tried} == tried


def test_where_it_was_measured_the_chosen_setting_reaches_both_shares_on_every_task() -> None:
    measured = read_runs(RUNS)
    on_task = outcomes(measured)[CHOSEN]
    assert on_task.keys() == {each.task for each in measured} and len(on_task) >= 6
    for task, outcome in on_task.items():
        assert outcome.share >= 0.75 and outcome.kept >= 0.85, task


def _measured(task: str, own: Setting, right: float, kept: float = 1.0, **more: int) -> Measured:
    epoch, seed = more.get("epoch", own.epochs), more.get("seed", 0)
    return Measured(task, 50, own, seed, epoch, right, kept, 1.0, (1.0, 1.0), (right, right))


def test_a_setting_is_good_where_it_reaches_the_shares_on_every_task() -> None:
    rows = [
        *(_measured("a", SLOW, right, seed=seed) for seed, right in enumerate((0.5, 0.7))),
        _measured("a", FAST, 0.75),
        _measured("a", FAST, 1.0, epoch=2),  # no end of a run
        _measured("b", SLOW, 0.9),
        _measured("b", FAST, 0.9),
    ]
    found = outcomes(rows)
    assert found[SLOW]["a"].share == pytest.approx(0.6 / 0.75) and found[SLOW]["a"].seeds == 2
    assert set(good_settings(found)) == {SLOW, FAST}
    assert good_settings(outcomes([*rows, _measured("c", FAST, 1.0)])) == [FAST], (
        "SLOW was not tried on c"
    )
    assert good_settings(outcomes([*rows, _measured("c", FAST, 1.0, kept=0.84)])) == []
    assert good_settings(outcomes([*rows, _measured("c", FAST, 0.0)])) == [], (
        "a share of nothing is none"
    )


def test_many_rows_train_for_fewer_epochs_in_the_same_setting() -> None:
    assert (for_rows(SLOW, 2000).epochs, for_rows(FAST, 2000).epochs, for_rows(FAST, 100)) == (
        2,
        3,
        FAST,
    )
    assert all(
        of_rows(for_rows(each, rows), rows) == each for each in (SLOW, FAST) for rows in (100, 2000)
    )
    many = Measured("many", 2000, for_rows(FAST, 2000), 0, 3, 0.5, 1.0, 1.0, (1.0, 1.0), (0.5, 0.5))
    assert outcomes([many])[FAST]["many"].right == 0.5


def test_an_epoch_is_chosen_on_one_half_of_the_answers_and_counted_on_the_other() -> None:
    def after(epoch: int, loss: float, first: float, second: float) -> Measured:
        return Measured("a", 50, FAST, 0, epoch, 0.0, 1.0, 1.0, (loss, 0.0), (first, second))

    run = [
        after(5, 0.3, 0.6, 0.4),
        after(2, 0.1, 0.2, 0.1),
        after(3, 0.2, 0.9, 0.5),
        after(4, 0.25, 0.1, 0.8),
    ]
    assert stopping(run) == {
        "the last epoch": 0.4,
        "the lowest loss": 0.1,
        "the most right answers": 0.5,
        "the best epoch, known afterwards": 0.8,
    }
    assert stopping([after(5, 0.3, 0.6, 0.4)]) == {}, "of one epoch nothing can be chosen"


def test_what_was_measured_twice_counts_once(tmp_path: Path) -> None:
    told = {
        "task": "a",
        "rows": 50,
        **FAST._asdict(),
        "seed": 0,
        "epoch": 5,
        "loss_first": 1,
        "loss_second": 2,
    }
    path = tmp_path / "runs.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerow({**told, "right": 0.1, "kept": 0.9, "train_seconds": 7, "scores": "0 20"})
        writer.writerow({**told, "right": 0.5, "kept": 0.8, "train_seconds": 8, "scores": "0 100"})
        writer.writerow({**told, "seed": 1, "right": 0, "kept": 0})  # diverged
    once, diverged = read_runs(path)
    assert once == Measured("a", 50, FAST, 0, 5, 0.5, 0.8, 8.0, (1.0, 2.0), (0.0, 1.0))
    assert once.is_last and once.halves == (0.0, 1.0) and diverged.halves == (0.0, 0.0)
    assert describe(FAST) == "0.001 r16 5 ep retain 1×4"


@pytest.mark.slow
def test_runs_go_on_where_they_were_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(rng: object, _: bool) -> Row:
        number = rng.randrange(100)  # type: ignore[attr-defined]
        return {"prompt": f"The {number} is", "completion": f" {number + 1}."}

    toy_checkpoint(tmp_path / "toy", max_position_embeddings=128)
    task, short = RecipeTask("next", draw, 50, 4), setting(1e-3, 2, 2, 2)
    monkeypatch.setenv("LORA_BENCH_BASE", str(tmp_path / "toy"))
    monkeypatch.setattr(recipe_runs, "RUNS", tmp_path / "runs.csv")
    threads = torch.get_num_threads()
    for seeds in (1, 2, 2):
        monkeypatch.setattr(
            recipe_runs, "plan", lambda seeds=seeds: ((task, short, seed) for seed in range(seeds))
        )
        recipe_runs.main([])
        measured = read_runs(tmp_path / "runs.csv")
        assert [(each.setting, each.seed, each.epoch) for each in measured] == [
            (UNTRAINED, 0, 0),
            *((short, seed, 2) for seed in range(seeds)),
        ]
    torch.set_num_threads(threads)
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 1 + 3
