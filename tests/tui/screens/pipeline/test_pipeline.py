"""The pipeline screen: the tree, the params, the panes, on projects that change while it is
open.
"""

import shutil
import subprocess
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.evaluation.metrics_diff import metrics_since_commit
from pipeline.files import artifact
from pipeline.views.stage_tree import GROUP
from tests.helpers.extension import add_probes
from tests.helpers.pilot import until
from tests.helpers.pipeline_screen import (
    below,
    brief_params,
    choose,
    edit,
    facts,
    log_lines,
    messages,
    open_screen,
    params,
    row,
    rows,
    said,
    title,
)
from tests.helpers.projects import METHODS, PIPELINE, load, make, save
from tui.app import Workbench
from tui.panes.pane import Pane
from tui.screens.pipeline.screen import PipelineScreen
from tui.widgets.header import Header

SIZES = ((80, 24), (120, 40), (200, 60), (60, 16), (30, 8))


# The tree


@pytest.mark.slow
async def test_an_empty_project_says_what_is_missing_and_what_to_press(empty: Path) -> None:
    async with open_screen(empty) as (pilot, screen):
        assert row(screen, "pretrain") == "○ pretrain not made"
        shown = ["pretrain ○ not made yet", "next R runs all stages, S this one alone."]
        await until(pilot, lambda: facts(screen) == shown)
        await choose(pilot, screen, "merge")
        assert "why needs expand_vocab, finetune_lora" in facts(screen)
        await pilot.press("d")
        await until(pilot, lambda: screen.metrics.nothing == "Nothing was evaluated yet.")


@pytest.mark.slow
async def test_a_finished_project_is_up_to_date_and_a_change_of_its_params_is_seen(
    project: Path,
) -> None:
    brief_params(project)
    async with open_screen(project) as (pilot, screen):
        await until(pilot, lambda: all(row[0] == "✓" for row in rows(screen)))
        save(project / "params.yaml", {"finetune_lora.rank": 2})
        await until(pilot, lambda: row(screen, "lora") == "● lora rank 4 → 2")
        assert row(screen, "merge") == "◌ merge waits"
        await choose(pilot, screen, "finetune_lora")
        shown = ["finetune_lora ● changed", "why rank 4 → 2"]
        await until(pilot, lambda: facts(screen)[:2] == shown)
        assert any(line.startswith("run done in ") for line in facts(screen))


@pytest.mark.slow
async def test_the_row_of_evaluate_says_whether_limits_are_kept(project: Path) -> None:
    brief_params(project)
    save(project / "params.yaml", {"evaluate.limits": {"answers_kept": 1.0, "variants": ["lora"]}})
    make(project, ["evaluate"])
    async with open_screen(project, (200, 60)) as (pilot, screen):
        await until(
            pilot, lambda: row(screen, "evaluate").startswith("✗ evaluate gate failed: 1 limit")
        )
        await choose(pilot, screen, "evaluate")
        await until(pilot, lambda: facts(screen)[0] == "evaluate ✗ breaks evaluate.limits")
        assert facts(screen)[1] == "why gate failed: 1 limit" and facts(screen)[2].startswith(
            "answers_kept 0."
        )
        assert "retention_data" in facts(screen)[3]
        header = screen.query_one(Header)
        await until(pilot, lambda: header.state[0] == "✗ 1 limit broken")
        assert header.state[2] == "bold $error"
        save(project / "params.yaml", {"evaluate.limits": {"answers_kept": 0.0}})
        await until(pilot, lambda: row(screen, "evaluate").startswith("● evaluate limits"))


@pytest.mark.slow
async def test_a_group_is_folded_by_keys_and_unfolded_for_one_that_is_asked_for(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_probes(empty, monkeypatch)
    async with open_screen(empty) as (pilot, screen):
        assert row(screen, "▸") == "○ ▸ probes 0/2"
        assert row(screen, "overview").startswith("○ overview not made")
        count, tree = len(rows(screen)), screen.rows
        assert "probe_size" not in [row.key for row in tree.shown]
        tree.point(GROUP)
        await until(pilot, lambda: title(screen, "facts").startswith("probe_norm "))
        await pilot.press("space")
        assert len(rows(screen)) == count + 2
        await pilot.press("down", "down", "left")  # from a member to its group
        assert len(rows(screen)) == count
        assert tree.pointed and tree.pointed.key == GROUP
        await pilot.press("enter")
        assert len(rows(screen)) == count + 2
        await pilot.press("left")
        await choose(pilot, screen, "probe_size")
        assert tree.pointed and tree.pointed.key == "probe_size"


@pytest.mark.slow
async def test_an_artifact_that_vanishes_is_missing(project: Path) -> None:
    brief_params(project)
    async with open_screen(project) as (pilot, screen):
        await until(pilot, lambda: row(screen, "merge") == "✓ merge")
        shutil.rmtree(project / "artifacts/lora_merged")
        await until(pilot, lambda: row(screen, "merge") == "○ merge not made")


@pytest.mark.slow
async def test_a_base_that_is_missing_says_so_and_is_seen_when_it_comes(empty: Path) -> None:
    save(empty / "params.yaml", {"base": "./models/mine"})
    async with open_screen(empty, (200, 60)) as (pilot, screen):
        await until(pilot, lambda: "base must be minigpt" in row(screen, "import"))
        (empty / "models/mine").mkdir(parents=True)
        (empty / "models/mine/notes.txt").touch()
        await until(pilot, lambda: "it has no config.json" in said(screen))
        (empty / "models/mine/config.json").write_text("{}", encoding="utf-8")
        (empty / "models/mine/model.safetensors").touch()
        await until(pilot, lambda: row(screen, "import") == "○ import not made")


@pytest.mark.slow
@pytest.mark.usefixtures("held_threads")
async def test_params_and_each_state_are_there_before_all_files_are_hashed(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold, real = threading.Event(), artifact.verify

    def slow(folder: Path) -> dict[str, Any]:
        if folder.name == "full_finetuned":
            hold.wait(30)
        return real(folder)

    monkeypatch.setattr(artifact, "verify", slow)
    brief_params(project)
    app = Workbench(project / "params.yaml")
    try:
        async with app.run_test(size=(120, 40)) as pilot:
            screen = app.screen
            assert isinstance(screen, PipelineScreen)
            await until(
                pilot, lambda: rows(screen) and row(screen, "expand_vocab") == "✓ expand_vocab"
            )
            assert row(screen, "full") == "· full …"
            await until(pilot, lambda: "d_model" in params(screen))
            hold.set()
            await until(pilot, lambda: all(row[0] == "✓" for row in rows(screen)))
    finally:
        hold.set()


# Params


@pytest.mark.slow
async def test_a_param_is_checked_while_one_types_and_written_on_enter(project: Path) -> None:
    brief_params(project)
    path = project / "params.yaml"
    before = path.read_text(encoding="utf-8")
    async with open_screen(project) as (pilot, screen):
        form = screen.params
        await choose(pilot, screen, "finetune_lora")
        await edit(pilot, screen, "rank", "0")
        assert "✗ finetune_lora.rank must be at least 1, got 0" in below(screen)
        await pilot.press("enter")
        assert form.is_typing and path.read_text(encoding="utf-8") == before
        await pilot.press("escape")
        assert not form.is_typing and form.has_focus
        await pilot.press("enter", *"16")  # replaces the value, which is selected
        assert "Enter writes finetune_lora.rank, Esc keeps 4" in below(screen)
        await pilot.press("enter")
        await until(pilot, lambda: load(path).finetune_lora.rank == 16)
        assert path.read_text(encoding="utf-8") == before.replace("  rank: 4", "  rank: 16", 1)
        await until(pilot, lambda: row(screen, "lora") == "● lora rank 4 → 16")
        assert form.has_focus
        await until(
            pilot, lambda: params(screen)["rank"].split() == ["●", "rank", "16", "was", "4"]
        )
        assert title(screen, "params") == "Params  1 changed"
        await pilot.press("z")
        await until(pilot, lambda: path.read_text(encoding="utf-8") == before)


KINDS: tuple[tuple[str, str, str, object], ...] = (
    ("expand_vocab", "data", "[data/finetune.de.txt]", ("data/finetune.de.txt",)),
    ("expand_vocab", "data", "", ()),
    ("expand_vocab", "tokens", "euro, [INST], [/INST]", ("euro", "[INST]", "[/INST]")),
    ("finetune_lora", "target_modules", "q_proj, v_proj", ("q_proj", "v_proj")),
    ("finetune_lora", "learning_rate", "1e-4", 1e-4),
    ("finetune_lora", "train_embeddings", "new_rows", "new_rows"),
    (
        "finetune_lora",
        "rank_pattern",
        "v_proj: 8, '.*[01].q_proj': 2",
        {"v_proj": 8, ".*[01].q_proj": 2},
    ),
    ("finetune_lora", "alpha_pattern", "{v_proj: 1e-1}", {"v_proj": 0.1}),
    ("finetune_lora", "retention_data", "data/keep.txt", "data/keep.txt"),
    ("finetune_lora", "retention_data", "", ""),
    ("finetune_lora", "gradient_checkpointing", "selective", "selective"),
    (
        "finetune_lora",
        "data",
        "a b.csv, {path: c.txt, weight: 0.5}",
        ("a b.csv", {"path": "c.txt", "weight": 0.5}),
    ),
    ("finetune_lora", "data", "data/saved", "data/saved"),
    ("finetune_lora", "columns", "prompt: question", {"prompt": "question"}),
    ("pretrain", "tie_embeddings", "true", True),
)


@pytest.mark.slow
async def test_every_kind_of_value_is_written(empty: Path) -> None:
    async with open_screen(empty) as (pilot, screen):
        for stage, key, text, value in KINDS:
            await choose(pilot, screen, stage)
            await edit(pilot, screen, key, text)
            await pilot.press("enter")
            await until(pilot, partial(is_written, empty, stage, key, value))
        assert "finetune_lora.retention_data: (empty) written to params.yaml" in messages(screen)


def is_written(root: Path, stage: str, key: str, value: object) -> bool:
    return bool(getattr(getattr(load(root / "params.yaml"), stage), key) == value)


@pytest.mark.slow
async def test_the_grid_of_a_sweep_is_edited_as_it_stands_in_the_file(empty: Path) -> None:
    async with open_screen(empty) as (pilot, screen):
        await choose(pilot, screen, "finetune_sweep")
        field = screen.params.input
        for text, problem in (
            (
                "rank: 4",
                "finetune_sweep.grid.rank must be a list of values, such as [1, 2], or a range",
            ),
            ("rank: [0]", "finetune_sweep.grid.rank must be at least 1, got 0"),
            (
                "rnk: [1]",
                "finetune_sweep.grid.rnk: adapters that train together can differ in seed, ",
            ),
            ("rank: [1, 2", "finetune_sweep.grid must be a mapping of keys to lists of values"),
        ):
            await edit(pilot, screen, "grid", text)
            assert problem in below(screen)
            await pilot.press("enter", "escape")
        assert not screen.workbench.message_history
        await edit(pilot, screen, "grid", "rank: [2, 4], learning_rate: [1e-3, 0.002]")
        await pilot.press("enter")
        await until(pilot, lambda: screen.workbench.message_history)
        assert (
            "finetune_sweep.grid: rank: [2, 4], learning_rate: [1e-3, 0.002] written"
            in messages(screen)
        )
        assert load(empty / "params.yaml").finetune_sweep.grid == {
            "rank": (2, 4),
            "learning_rate": (0.001, 0.002),
        }
        assert field.value == "rank: [2, 4], learning_rate: [1e-3, 0.002]" and not screen.unsaved()


@pytest.mark.slow
async def test_the_base_is_a_param_of_the_stage_that_imports_it(empty: Path) -> None:
    save(empty / "params.yaml", {"base": "./models/mine"})
    async with open_screen(empty) as (pilot, screen):
        for key, text, value in (
            ("base", "org/model@main", "org/model@main"),
            ("trust_remote_code", "true", True),
        ):
            await edit(pilot, screen, key, text)
            await pilot.press("enter")
            await until(
                pilot,
                lambda k=key, v=value: getattr(load(empty / "params.yaml").origin, k) == v,  # type: ignore[misc]
            )


@pytest.mark.slow
async def test_garbage_in_a_field_is_one_sentence(empty: Path) -> None:
    before = (empty / "params.yaml").read_bytes()
    async with open_screen(empty) as (pilot, screen):
        await choose(pilot, screen, "pretrain")
        await edit(pilot, screen, "epochs", "60")
        for text in (
            "",
            " ",
            "[",
            "{",
            "nan",
            "1:30",
            "0x10",
            "5.0",
            "x: y",
            "9" * 30,
            "ß",
            "&a",
            "2026-99-99",
        ):
            screen.params.input.value = text
            await pilot.press("enter")
            assert below(screen).count("pretrain.epochs must be") == 1, text
    assert (empty / "params.yaml").read_bytes() == before


@pytest.mark.slow
async def test_up_and_down_step_through_the_values_of_a_choice(empty: Path) -> None:
    async with open_screen(empty) as (pilot, screen):
        await choose(pilot, screen, "finetune_lora")
        await edit(pilot, screen, "train_embeddings", "all")
        choices = list(screen.params.fields[screen.params.key].choices)
        assert choices == ["all", "new_rows", "none"]
        await pilot.press("down")
        assert screen.params.input.value == "new_rows"
        await pilot.press("up", "up", "enter")
        await until(
            pilot, lambda: load(empty / "params.yaml").finetune_lora.train_embeddings == "none"
        )


@pytest.mark.slow
async def test_what_is_typed_and_not_written_is_said_when_it_is_left(empty: Path) -> None:
    async with open_screen(empty) as (pilot, screen):
        await choose(pilot, screen, "pretrain")
        await edit(pilot, screen, "epochs", "7")
        assert screen.unsaved() == "what is typed but not written, pretrain.epochs: 7"
        await pilot.press("tab", "shift+tab")  # to another pane and back: it is still there
        assert screen.unsaved()
        await choose(pilot, screen, "merge")
        await until(pilot, lambda: "Not written: pretrain.epochs: 7" in messages(screen))
        assert not screen.unsaved()
        await choose(pilot, screen, "pretrain")
        await edit(pilot, screen, "epochs", "7")
        await pilot.press("escape")
        assert not screen.unsaved() and messages(screen).count("Not written") == 1


@pytest.mark.slow
async def test_a_change_by_hand_shows_but_not_over_what_is_being_typed(empty: Path) -> None:
    async with open_screen(empty) as (pilot, screen):
        await choose(pilot, screen, "pretrain")
        await edit(pilot, screen, "epochs", "7")
        save(empty / "params.yaml", {"pretrain.epochs": 9, "pretrain.seed": 3})
        screen.params.unfolded.add("training")
        await until(pilot, lambda: screen.params.given["seed"] == 3)
        assert screen.params.input.value == "7"
        await pilot.press("enter")
        await until(pilot, lambda: load(empty / "params.yaml").pretrain.epochs == 7)


@pytest.mark.parametrize("size", [(80, 24), (60, 16)], ids=str)
@pytest.mark.sampled(2)
@pytest.mark.slow
async def test_every_param_is_reached_by_keys_and_seen_with_its_meaning(
    empty: Path, size: tuple[int, int]
) -> None:
    async with open_screen(empty, size) as (pilot, screen):
        await choose(pilot, screen, "finetune_lora")
        await pilot.press("p")
        form = screen.params
        form.unfolded |= {"training", "data", "evaluation", "memory"}
        await pilot.press("g")
        keys = list(form.fields)
        seen = []
        while form.key not in seen:
            seen.append(form.key)
            line = form.lines().index(params(screen)[form.key])
            await until(pilot, lambda n=line: 0 <= n - form.scroll_y < form.size.height)  # type: ignore[misc]
            await pilot.press("down")
        assert {*keys} < {*seen} and len(seen) > 40


@pytest.mark.slow
async def test_a_param_is_found_in_all_groups_and_opened_from_elsewhere(empty: Path) -> None:
    async with open_screen(empty) as (pilot, screen):
        await choose(pilot, screen, "finetune_lora")
        await pilot.press("p", "/", *"neftune")
        assert list(params(screen)) == ["(training)", "neftune_alpha"]
        await pilot.press("enter", "down", "enter", *"5", "enter")
        await until(pilot, lambda: load(empty / "params.yaml").finetune_lora.neftune_alpha == 5)
        screen.workbench.go("pipeline", stage="pretrain", param="heads")
        await until(pilot, lambda: title(screen, "facts").startswith("pretrain "))
        await until(pilot, lambda: screen.params.key == "heads" and screen.params.has_focus)


# Panes


@pytest.mark.slow
async def test_panes_are_shown_by_key_and_tab(empty: Path) -> None:
    async with open_screen(empty, (80, 24)) as (pilot, screen):
        for keys, pane in (
            (("L",), "log"),
            (("d",), "metrics"),
            (("p",), "params"),
            (("tab",), "log"),
            (("tab",), "metrics"),
            (("shift+tab",), "log"),
            (("tab", "tab", "tab"), "params"),
        ):
            await pilot.press(*keys)
            assert [one.id for one in screen.query("#panes > Pane") if one.display] == [pane]
            assert screen.focused_pane is screen.query_one(f"#{pane}", Pane)


async def test_params_stay_beside_another_pane_where_there_is_room(empty: Path) -> None:
    async with open_screen(empty) as (pilot, screen):
        for key, panes in (
            ("p", ["params", "log"]),
            ("d", ["params", "metrics"]),
            ("p", ["params", "metrics"]),
        ):
            await pilot.press(key)
            assert [one.id for one in screen.query("#panes > Pane") if one.display] == panes


@pytest.mark.slow
async def test_all_sizes_show_a_tree_and_a_pane_and_none_over_another(empty: Path) -> None:
    async with open_screen(empty) as (pilot, screen):
        for size in SIZES:
            await pilot.resize_terminal(*size)
            await pilot.press("tab")
            await pilot.pause()
            seen = [pane for pane in screen.query(Pane) if pane.display and pane.region]
            assert {"stages"} < {pane.id for pane in seen}, size
            assert all(screen.region.contains_region(pane.region) for pane in seen), size
            assert not any(a.region.overlaps(b.region) for a in seen for b in seen if a is not b), (
                size
            )
            for keys in (
                ("+",),
                ("+",),
                ("p", "enter", "escape"),
                ("L", "end"),
                ("v", "escape"),
                ("?", "escape"),
            ):
                await pilot.press(*keys)


@pytest.mark.slow
async def test_the_steps_of_a_run_are_in_its_log(project: Path) -> None:
    async with open_screen(project) as (pilot, screen):
        await choose(pilot, screen, "finetune_lora")
        assert log_lines(screen)[-1].startswith("step ")
        assert "predicted at the peak" in " ".join(log_lines(screen))
        assert any(line.startswith("loss ") for line in facts(screen))
        await choose(pilot, screen, "expand_vocab")
        nothing = "Nothing was printed: the pipeline has not run this stage since its log began."
        assert " ".join(line.strip() for line in log_lines(screen)) == nothing


@pytest.mark.parametrize(
    "text", ['{"a": 1' + "0" * 400 + "}", "[" * 100_000], ids=["a long number", "deep"]
)
def test_metrics_that_cannot_be_read_are_one_message(tmp_path: Path, text: str) -> None:
    metrics = tmp_path / "metrics.json"
    metrics.write_text(text, encoding="utf-8")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    with pytest.raises(UserError, match=r"^metrics\.json cannot be read: "):
        metrics_since_commit(metrics)


@pytest.mark.slow
async def test_metrics_are_compared_with_the_last_commit(project: Path) -> None:
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (
        ["init", "-q"],
        ["add", "-A", "artifacts/evaluation"],
        ["commit", "-qm", "first"],
    ):
        subprocess.run([*git, *words], cwd=project, check=True)
    async with open_screen(project) as (pilot, screen):
        metrics = screen.metrics
        await until(pilot, lambda: metrics.nothing == "As in the last commit.")
        save(project / "params.yaml", {"finetune_lora.rank": 2})
        trained = [
            "pretrain",
            "train_from_scratch",
            *(name for method in METHODS if (name := f"finetune_{method}") in PIPELINE),
        ]
        make(
            project,
            ["finetune_lora", "merge", "evaluate"],
            [f"{name}.epochs=2" for name in trained],
        )
        await pilot.press("d")
        await until(pilot, lambda: any("lora.trainable " in line for line in metrics.texts()), 30)
        line = next(line for line in metrics.texts() if "lora.trainable " in line)
        assert line.split() == ["lora.trainable", "16,768", "14,720", "−2048"]


async def test_a_project_without_a_section_that_others_need_is_shown_with_what_to_add(
    empty: Path,
) -> None:
    (empty / "params.yaml").write_text(
        "base: minigpt\nfinetune_lora: {}\nmerge: {}\n", encoding="utf-8"
    )
    async with open_screen(empty) as (pilot, screen):
        assert [line.split()[1] for line in rows(screen)] == ["pretrain", "lora", "merge"]
        (empty / "params.yaml").write_text("base: minigpt\nmerge: {}\n", encoding="utf-8")
        screen.workbench.project_watch.look_now()
        await until(pilot, lambda: len(rows(screen)) == 2)
        await choose(pilot, screen, "merge")
        await until(pilot, lambda: "Add `finetune_lora: {}`" in said(screen))
        await pilot.press("S")
        await until(pilot, lambda: "finetune_lora" in messages(screen))
