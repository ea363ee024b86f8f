"""Searches of a sweep: what they draw, which adapters they stop, what they learn from, and which
one is chosen.
"""

import difflib
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load as tensors

from pipeline.data.formats import read_examples
from pipeline.errors import UserError
from pipeline.evaluation.selection import choose, pareto
from pipeline.inference import engine
from pipeline.inference.score import score
from pipeline.project.logs.run_log import read_steps
from pipeline.project.runner import Note, run
from pipeline.stages.methods.sweep import FinetuneSweep, grid_around, variants
from pipeline.stages.methods.sweep import run as sweep
from pipeline.stages.registry import open_project
from pipeline.stages.searches import SEARCHES, Trial, halving, optuna, random
from tests.helpers.bases import toy_checkpoint
from tests.helpers.json_files import read_json
from tests.helpers.process import Forked
from tests.helpers.projects import (
    LORA,
    STAGES,
    folder_bytes,
    load,
    make_base,
    new_project,
    played,
    refusal,
)

STAGE = STAGES["finetune_sweep"]
RATES = {"low": 1e-5, "high": 1e-2, "log": True}
HELD_OUT = ["finetune_lora.eval_share=0.3", "finetune_lora.epochs=5"]


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(
        new_project(tmp_path_factory.mktemp("searches") / "mini"), ["pretrain.epochs=3"]
    )


def settings_of(grid: Any, search: str = "random", **keys: Any) -> FinetuneSweep:
    return FinetuneSweep(grid=grid, search=search, **keys)


def given_(grid: Any, search: str, *more: str) -> list[str]:
    """The overrides of a sweep with held-out examples."""
    values = [f"finetune_sweep.grid={json.dumps(grid)}", f"finetune_sweep.search={search}"]
    return [*HELD_OUT, *values, *(f"finetune_sweep.{one}" for one in more)]


def swept(root: Path, overrides: Sequence[str], **options: Any) -> tuple[dict[str, Any], list[Any]]:
    """Adapter → outcome, and the events."""
    manifest, events = played(
        run(open_project(root / "params.yaml", overrides), STAGE, sweep, **options)
    )
    assert read_json(root / "artifacts/sweep/sweep.json") == manifest["adapters"]
    return manifest["adapters"], events


# What is drawn


@given(st.data())
def test_random_search_draws_distinct_combinations_inside_lists_and_ranges_the_same_by_seed(
    data: st.DataObject,
) -> None:
    low, high = sorted(
        data.draw(st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=2, unique=True))
    )
    least = data.draw(st.integers(1, 30))
    most, log = data.draw(st.integers(least + 1, 60)), data.draw(st.booleans())
    grid = {
        "learning_rate": {"low": low, "high": high, "log": log},
        "rank": {"low": least, "high": most, "log": log},
        "dora": (False, True),
    }
    own = settings_of(
        grid, trials=data.draw(st.integers(1, 40)), search_seed=data.draw(st.integers(0, 2**63 - 1))
    )
    drawn = random.draw(own)
    assert drawn == random.draw(own) and 1 <= len(drawn) <= own.trials
    assert all(drawn.count(values) == 1 for values in drawn)
    for values in drawn:
        assert low <= values["learning_rate"] <= high and least <= values["rank"] <= most
        assert isinstance(values["rank"], int) and values["dora"] in (False, True)


def test_draws_spread_over_a_range_and_over_its_powers_of_ten() -> None:
    even = [
        v["alpha"]
        for v in random.draw(
            settings_of({"alpha": {"low": 0.0, "high": 1.0, "log": False}}, trials=200)
        )
    ]
    assert 0.4 < sum(even) / len(even) < 0.6
    rates = [
        v["learning_rate"] for v in random.draw(settings_of({"learning_rate": RATES}, trials=200))
    ]
    thirds = [sum(low <= rate < 10 * low for rate in rates) for low in (1e-5, 1e-4, 1e-3)]
    assert min(thirds) > 45


def test_a_grid_with_fewer_combinations_than_trials_is_drawn_whole() -> None:
    drawn = random.draw(settings_of({"rank": (1, 2), "seed": (0, 1, 2)}, trials=50))
    assert len(drawn) == 6


def test_several_grids_are_tried_one_after_the_other(mini: Path) -> None:
    grids = [
        {"rank": [13], "target_modules": ["attention"]},
        {"rank": [8, 9], "target_modules": ["feed_forward"]},
    ]
    params = load(mini / "params.yaml", [f"finetune_sweep.grid={json.dumps(grids)}"])
    assert [
        (a.rank, a.target_modules)
        for a in variants(params.finetune_lora, params.finetune_sweep).values()
    ] == [*((13, ("attention",)), (8, ("feed_forward",)), (9, ("feed_forward",)))]


# Halving


@given(st.integers(2, 256), st.integers(1, 5000), st.integers(2, 5))
def test_rungs_keep_one_in_so_many_and_end_before_the_last_step(
    adapters: int, steps: int, factor: int
) -> None:
    own = settings_of({"rank": (1, 2, 3, 4, 5)}, "halving", reduction_factor=factor)
    rungs = halving.rungs(own, adapters, steps)
    before, at = adapters, 0
    for step, left in rungs.items():
        assert at < step < steps and left >= 1
        assert left <= before // factor
        before, at = left, step
    if adapters >= factor and steps >= factor:
        assert before < factor, "the last rung leaves too few for another"


def test_rungs_of_27_adapters_are_those_of_the_paper() -> None:
    assert halving.rungs(settings_of({"rank": tuple(range(1, 28))}, "halving"), 27, 81) == {
        3: 9,
        9: 3,
        27: 1,
    }


@pytest.mark.slow
def test_halving_stops_the_worst_and_the_others_end_as_in_a_plain_sweep(mini: Path) -> None:
    grid = {"learning_rate": [1e-5, 1e-3, 3e-3, 3e-2], "seed": [0, 1]}
    plain, _ = swept(mini, given_(grid, "grid"))
    whole = {name: read_steps(mini / f"artifacts/sweep/{name}/loss.csv") for name in plain}
    weights = {
        name: (mini / f"artifacts/sweep/{name}/adapter_model.safetensors").read_bytes()
        for name in plain
    }
    # not a cached one
    halved, events = swept(mini, given_(grid, "halving", "reduction_factor=2"), force=True)
    total = next(iter(plain.values()))["steps"]
    rungs = halving.rungs(settings_of({"rank": (1, 2)}, "halving", reduction_factor=2), 8, total)
    assert sorted(row["steps"] for row in halved.values()) == sorted(
        [*(4 * [min(rungs)]), *(2 * [[*rungs][1]]), [*rungs][2], total]
    )
    live = set(halved)
    for step, left in rungs.items():
        at = {
            name: read_steps(mini / f"artifacts/sweep/{name}/loss.csv")[step - 1].eval_loss
            for name in live
        }
        live = set(sorted(at, key=lambda name: at[name] or 0)[:left])
        assert {name for name, row in halved.items() if row["steps"] > step} == live
    for name, row in halved.items():
        for mine, other in zip(
            read_steps(mini / f"artifacts/sweep/{name}/loss.csv"), whole[name], strict=False
        ):
            assert mine.loss == pytest.approx(other.loss, rel=1e-5, abs=1e-5)
        assert row.get("dropped", False) == (row["steps"] < total)
    (winner,) = live
    found = tensors((mini / f"artifacts/sweep/{winner}/adapter_model.safetensors").read_bytes())
    for key, tensor in tensors(weights[winner]).items():
        assert float((found[key] - tensor).norm()) <= 1e-5 * (1 + 10 * float(tensor.norm()))
    assert choose(halved) == winner
    assert (
        sum(
            "is not among the 4 lowest" in event.text for event in events if isinstance(event, Note)
        )
        == 4
    )


@pytest.mark.parametrize("step", [2, 5, 9])
@pytest.mark.sampled(3)
@pytest.mark.slow
def test_a_killed_halving_goes_on_and_ends_with_the_same_bytes(mini: Path, step: int) -> None:
    given = given_(
        {"learning_rate": [1e-5, 1e-3, 3e-3, 3e-2], "seed": [0, 1]}, "halving", "reduction_factor=2"
    )
    killed(mini, given, step)


# Optuna


@pytest.mark.parametrize("step", [3, 14, 27])
@pytest.mark.sampled(3)
@pytest.mark.slow
def test_a_killed_search_of_optuna_goes_on_and_ends_with_the_same_bytes(
    mini: Path, step: int
) -> None:
    grid = {"learning_rate": RATES, "rank": [1, 2, 4]}
    killed(mini, given_(grid, "optuna", "trials=6", "generation=2"), step)


def killed(root: Path, overrides: Sequence[str], step: int) -> None:
    """Kill the sweep in its `step`th step of the optimizer and run it again."""
    command = [
        LORA,
        "finetune",
        "sweep",
        "--force",
        "--checkpoint-every",
        "2",
        *(f"--set={one}" for one in overrides),
    ]
    code, errors = Forked(command, root).end()
    assert code == 0, errors
    expected = folder_bytes(root / "artifacts/sweep")
    code, _ = Forked(command, root, ("pipeline.training.optimizer.FlatOptimizer.step", step)).end()
    assert code == -signal.SIGKILL
    code, errors = Forked(command, root).end()
    assert code == 0 and ("resumed after step" in errors) == (step > 2)
    assert folder_bytes(root / "artifacts/sweep") == expected
    assert not (root / "runs/finetune_sweep/passes").exists()


def test_optuna_is_told_what_each_adapter_of_a_generation_lost_and_asks_for_the_next(
    mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, plain = list[list[Trial]](), optuna.ask

    def watched(own: Any, tried: Sequence[Trial]) -> Any:
        asked.append([*tried])
        return plain(own, tried)

    # what the registry has loaded: another test may have read it before
    monkeypatch.setitem(SEARCHES._loaded, "optuna", optuna.SEARCH._replace(ask=watched))
    given = given_(
        {"learning_rate": RATES, "rank": [1, 2, 4]}, "optuna", "trials=5", "generation=2"
    )
    rows, _ = swept(mini, given, force=True)
    assert [len(tried) for tried in asked] == [0, 2, 4] and len(rows) == 5
    told = [(trial.values["rank"], trial.loss) for trial in asked[-1]]
    assert told == [(row["values"]["rank"], row["eval_loss"]) for row in [*rows.values()][:4]]
    logs = {path.parent.name for path in (mini / "runs/finetune_sweep").glob("*/loss.csv")}
    assert logs == set(rows), "the logs of all passes are there"


@pytest.mark.parametrize("sampler", ["tpe", "gp", "qmc"])
@pytest.mark.slow
def test_a_sampler_asks_the_same_for_the_same_losses_inside_the_ranges(sampler: str) -> None:
    own = settings_of(
        {"learning_rate": RATES, "rank": (1, 2)}, "optuna", trials=12, generation=4, sampler=sampler
    )
    first = optuna.ask(own, [])
    tried = [Trial(values, abs(values["learning_rate"] - 1e-3)) for values in first]
    assert len(first) == 4 and optuna.ask(own, []) == first
    assert optuna.ask(own, tried) == optuna.ask(own, tried)
    assert all(1e-5 <= values["learning_rate"] <= 1e-2 for values in optuna.ask(own, tried))
    diverged = [trial._replace(loss=None) for trial in tried[:1]] + tried[1:]
    assert optuna.ask(own, diverged), "a diverged adapter is a result too"


def test_tpe_learns_from_the_losses_and_ends_after_its_trials() -> None:
    """Where the loss rises with the rate its later draws lie lower than where it falls."""
    own = settings_of({"learning_rate": RATES}, "optuna", trials=40, generation=8)

    def later(sign: float) -> list[float]:
        tried = list[Trial]()
        while asked := optuna.ask(own, tried):
            tried += [Trial(values, sign * values["learning_rate"]) for values in asked]
        assert len(tried) <= 40
        return [trial.values["learning_rate"] for trial in tried[16:]]

    assert sorted(later(1.0))[12] * 10 < sorted(later(-1.0))[12]


def test_without_optuna_it_is_said_how_to_get_it(
    mini: Path, monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    monkeypatch.setattr(
        "pipeline.errors.find_spec", lambda name: None if name == "optuna" else name
    )
    given = [f"--set={one}" for one in given_({"learning_rate": RATES}, "optuna", "trials=4")]
    err = refusal(cli("finetune", "sweep", *given, cwd=mini))
    assert (
        "finetune_sweep.search optuna needs optuna. Run `pip install 'lora-workbench[optuna]'`."
        in err
    )


# What is kept, and which is chosen


def test_the_divergence_of_each_adapter_is_that_which_evaluate_measures(mini: Path) -> None:
    rows, _ = swept(
        mini, [*given_({"rank": [1, 4]}, "grid"), "finetune_sweep.old_data=data/pretrain.de.txt"]
    )
    base, old = mini / "artifacts/expanded", read_examples(mini / "data/pretrain.de.txt", "old")
    before = score(engine.load(base), old)
    for name, row in rows.items():
        measured = score(engine.load(base, mini / "artifacts/sweep" / name), old, before).divergence
        assert row["divergence"] == pytest.approx(measured, rel=1e-3) and measured > 0


POINT = st.tuples(st.integers(0, 6), st.integers(0, 6))


@given(st.lists(POINT, min_size=1, max_size=30))
def test_the_pareto_front_is_what_a_sweep_over_rising_losses_finds(
    points: list[tuple[int, int]],
) -> None:
    rows = {
        str(n): {"state": "done", "eval_loss": float(x), "final_loss": 0.0, "divergence": float(y)}
        for n, (x, y) in enumerate(points)
    }
    front, least = set[str](), 99
    for x in sorted({x for x, _ in points}):
        lowest = min(y for other, y in points if other == x)
        if lowest < least:
            front |= {str(n) for n, point in enumerate(points) if point == (x, lowest)}
            least = lowest
    assert pareto(rows) == front
    best = choose(rows)
    assert rows[best]["eval_loss"] == min(x for x, _ in points)
    limit = points[0][1]
    assert rows[choose(rows, limit)]["eval_loss"] == min(x for x, y in points if y <= limit)


def test_of_adapters_that_diverged_or_were_stopped_at_a_rung_none_is_chosen() -> None:
    row = {"state": "done", "eval_loss": 3.0, "final_loss": 1.0}
    rows = {
        "a": row,
        "b": {**row, "eval_loss": 1.0, "state": "diverged"},
        "c": {**row, "eval_loss": 2.0, "dropped": True},
    }
    assert choose(rows) == "a" and pareto(rows) == set()
    assert (
        choose(
            {"a": {**row, "eval_loss": None}, "b": {**row, "eval_loss": None, "final_loss": 0.5}}
        )
        == "b"
    )
    with pytest.raises(UserError, match="No adapter of the sweep has a finite loss"):
        choose({"b": rows["b"]})
    with pytest.raises(UserError, match="No adapter of the sweep has a finite loss"):
        choose({"b": rows["b"]}, 0.1)
    with pytest.raises(UserError, match=r"--max-divergence needs .*finetune_sweep.old_data"):
        choose(rows, 0.1)
    with pytest.raises(
        UserError, match=r"--max-divergence 0.1: no adapter .* closest is a, 0.2. Raise it"
    ):
        choose({"a": {**row, "divergence": 0.2}}, 0.1)


def test_apply_writes_the_winners_values_and_those_of_set_and_nothing_else(
    mini: Path, cli: Any
) -> None:
    path = mini / "params.yaml"
    before = path.read_text(encoding="utf-8")
    given = given_(
        {"learning_rate": [1e-5, 2e-3], "target_modules": [["v_proj"]], "alpha": [2.0]}, "grid"
    )
    try:
        code, out, err = cli(
            "finetune", "sweep", "--apply", *(f"--set={one}" for one in given), cwd=mini
        )
        assert code == 0, err
        rows = read_json(mini / "artifacts/sweep/sweep.json")
        best = min(rows, key=lambda name: rows[name]["eval_loss"])
        assert f"best: {best}, held-out loss" in out
        after = path.read_text(encoding="utf-8")
        was, now = yaml.safe_load(before), yaml.safe_load(after)
        shared = {"eval_share": 0.3, "epochs": 5}  # all adapters had them
        assert now == {
            **was,
            "finetune_lora": {**was["finetune_lora"], **rows[best]["values"], **shared},
        }
        changed = [
            line
            for line in difflib.ndiff(before.splitlines(), after.splitlines())
            if line[0] in "+-"
        ]
        assert len(changed) > 3 and all(line[0] + line[2:] in out for line in changed)
        comments = [
            [line.partition("#")[2] for line in text.splitlines() if "#" in line]
            for text in (before, after)
        ]
        assert comments[0] == comments[1]
        lora = load(path).finetune_lora
        assert (lora.target_modules, lora.alpha, lora.eval_share) == (("v_proj",), 2.0, 0.3)
        assert lora.learning_rate == rows[best]["values"]["learning_rate"]
        code, out, _ = cli(
            "finetune", "sweep", "--apply", *(f"--set={one}" for one in given), cwd=mini
        )
        assert code == 0 and "params.yaml has these values already." in out
    finally:
        path.write_text(before, encoding="utf-8")


def test_apply_after_a_sweep_that_failed_writes_nothing(mini: Path, cli: Any) -> None:
    before = (mini / "params.yaml").read_bytes()
    grid = "finetune_sweep.grid={learning_rate: [1e28, 1e30]}"
    code, _, err = cli("finetune", "sweep", "--apply", "--set", grid, cwd=mini)
    assert code == 1 and "all adapters diverged" in err
    assert (mini / "params.yaml").read_bytes() == before


def test_over_sweeps_around_the_advised_rate_and_the_projects_own_rank(
    mini: Path, tmp_path: Path, cli: Any
) -> None:
    code, out, err = cli(
        "finetune", "sweep", "--over", "learning_rate", "--set=finetune_lora.epochs=1", cwd=mini
    )
    assert code == 0, err
    rows = read_json(mini / "artifacts/sweep/sweep.json")
    assert [row["values"]["learning_rate"] for row in rows.values()] == [
        0.00022,
        0.00067,
        0.002,
        0.006,
        0.018,
    ]
    assert "Set finetune_lora.eval_share" in out, "the training loss decides, and that is said"
    toy_checkpoint(tmp_path / "toy")
    imported = open_project(mini / "params.yaml", [f"base={tmp_path}/toy", "finetune_lora.rank=2"])
    assert grid_around(imported, ["learning_rate", "rank"]) == {
        "learning_rate": [1.1e-4, 3.3e-4, 1e-3, 3e-3, 9e-3],
        "rank": [1, 2, 4, 8],
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["grid={rank: {low: 4, high: 4}}"],
            "finetune_sweep.grid.rank.low must be below high = 4, got 4. Change",
        ),
        (
            ["grid={rank: {low: 0, high: 4}}"],
            "finetune_sweep.grid.rank.low must be at least 1, got 0.",
        ),
        (["grid={rank: {low: 1}}"], "finetune_sweep.grid.rank must be a list of values"),
        (["grid={rank: {low: 1, high: 2, step: 1}}"], "unknown key finetune_sweep.grid.rank.step"),
        (
            ["grid={dora: {low: 1, high: 2}}"],
            "finetune_sweep.grid.dora has no numbers between two values.",
        ),
        (
            ["grid={weight_decay: {low: 0, high: 1, log: true}}"],
            "low must be more than 0 in a logarithmic range, got 0",
        ),
        (
            ["grid={rank: {low: 1, high: 4}}"],
            "finetune_sweep.grid.rank is a range, of which search grid cannot train",
        ),
        (
            ["search=bayes"],
            "finetune_sweep.search must be one of grid, halving, optuna, random, got 'bayes'.",
        ),
        (
            ["search=random"],
            "finetune_sweep.trials is 0, but search random draws as many combinations.",
        ),
        (["search=random", "trials=257"], "finetune_sweep.trials must be at most 256"),
        (
            ["search=random", "trials=3", "grid={}"],
            "finetune_sweep.grid is empty, but search random draws from it.",
        ),
        (
            ["search=random", "trials=3", "grid=[{rank: [1]}, {rank: [2]}]"],
            "finetune_sweep.grid is a list, but search",
        ),
        (
            ["trials=3"],
            "finetune_sweep.trials is 3, but search grid does not read it. Remove it, or set "
            "search to",
        ),
        (
            ["search=halving", "sampler=gp"],
            "finetune_sweep.sampler is gp, but search halving does not read it.",
        ),
        (
            ["search=halving", "grid={rank: [1, 2]}"],
            "finetune_sweep.reduction_factor is 3, but there are only 2",
        ),
        (
            ["search=halving", "trials=16", "grid={rank: [1, 2]}"],
            "finetune_sweep.reduction_factor is 3, but there are only 2",
        ),
        (
            ["search=halving", "trials=16", "grid={}"],
            "finetune_sweep.grid is empty, but search halving draws from it.",
        ),
        (
            ["search=halving"],
            "finetune_sweep.search halving compares held-out losses, but there is no evaluation "
            "set.",
        ),
        (["search=[grid]"], "finetune_sweep.search must be one of"),
        (
            ["grid=[[{rank: [1]}]]"],
            "finetune_sweep.grid must be a mapping of keys to lists of values",
        ),
        (
            ["grid=[{rank: [0]}]"],
            "finetune_sweep.grid.0.rank must be at least 1, got 0. Change it in --set.",
        ),
        (["grid=[3]"], "finetune_sweep.grid must be a mapping of keys to lists of values"),
    ],
)
def test_a_search_that_cannot_be_is_refused_in_one_line(
    cli: Any, mini: Path, given: list[str], message: str
) -> None:
    assert message in refusal(
        cli("finetune", "sweep", *(f"--set=finetune_sweep.{one}" for one in given), cwd=mini)
    )


def test_over_takes_keys_that_have_values_around_them_and_no_grid_beside(
    cli: Any, mini: Path
) -> None:
    assert "--over takes one of learning_rate" in refusal(
        cli("finetune", "sweep", "--over", "seed", cwd=mini)
    )
    both = cli(
        "finetune", "sweep", "--over", "rank", "--set", "finetune_sweep.grid={rank: [1]}", cwd=mini
    )
    assert "each make the grid. Give one of them" in refusal(both)
