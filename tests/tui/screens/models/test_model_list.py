"""The screen of models: the list, its folders, the details and evaluations, with a fake engine."""

import asyncio
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from textual.events import Key
from textual.widgets import Input, OptionList

from pipeline.files import artifact, digest_cache
from pipeline.files.digest_cache import DigestStore
from pipeline.project.params.load import Params
from pipeline.project.stage_graph import Project
from pipeline.stages.registry import GRAPH
from pipeline.views.model_library import Entry, Library
from pipeline.views.models import Model, check
from tests.helpers.checkpoints import sealed_copies
from tests.helpers.fake_engine import FakeInference
from tests.helpers.json_files import edit_json, read_json, write_json
from tests.helpers.models_screen import COUNT, LISTED, USUAL, Session, open_models
from tests.helpers.pilot import screen_opens, until
from tests.helpers.projects import new_houses, save
from tui.app import Workbench
from tui.dialogs import AskText, Reader
from tui.panes.menu import Menu
from tui.panes.table import Table, sorted_rows
from tui.screens.models.screen import ModelsScreen


@pytest.mark.slow
async def test_whether_a_model_keeps_its_limits_is_in_its_line_and_its_details(
    project: Path,
) -> None:
    path = project / "artifacts/evaluation/manifest.json"
    broken = [
        {"variant": "lora", "limit": name, "wanted": 1, "value": 0}
        for name in ("answers_kept", "must_keep")
    ]
    gate = {"passed": False, "variants": ["full", "lora"], "broken": broken}
    edit_json(path, gate=gate)
    async with open_models(project) as s:
        await s.point("freeze")
        assert "✓ intact" in s.details() and "evaluate.limits" not in s.details()
        await s.point("full")
        assert "evaluate.limits passed" in s.details()
        await s.point("lora")
        assert (
            "evaluate.limits failed: 2 limits · answers_kept 0, wanted at least 1 · must_keep 0"
            in s.details()
        )
        await s.pilot.resize_terminal(120, 40)
        await until(s.pilot, lambda: s.row("lora").rstrip().endswith("✗"))
        assert s.row("full").rstrip().endswith("✓")


async def test_an_empty_project_says_what_to_do(empty: Path) -> None:
    async with open_models(empty, 0) as s:
        await until(s.pilot, lambda: "No models yet. R runs the pipeline" in s.table.line(0).plain)
        await s.press("p")
        assert "has made no model yet" in s.messages()
        await s.ask("die katze")
        assert "No model is chosen" in s.messages()
        assert not s.engine.running, "there is nothing to prompt"


async def test_all_models_are_listed_in_the_order_of_the_pipeline(brief: Path) -> None:
    async with open_models(brief) as s:
        assert s.names() == LISTED
        assert all(
            "✓" in row for name, row in zip(s.names(), s.rows(), strict=True) if name != "sweep/"
        )
        assert s.row("lora").startswith("  ■ lora") and s.row("sweep/rank-1").startswith(
            "  ★   rank-1"
        )


async def test_the_models_of_the_parent_project_are_listed_too(brief: Path, tmp_path: Path) -> None:
    root = new_houses(tmp_path / "houses")
    shutil.copytree(brief / "artifacts/base", root / "artifacts/base")
    async with open_models(root / "child", 1) as s:
        assert [entry.label for entry in s.screen.table.entries] == ["base"]


@pytest.mark.slow
async def test_narrow_shows_the_important_columns_and_wide_all(brief: Path) -> None:
    async with open_models(brief) as s:
        assert s.header()[:5] == ["name", "rank", "learned", "kept", "forgot"]
        assert "params" not in s.header()
        await s.pilot.resize_terminal(120, 40)
        await until(s.pilot, lambda: s.header()[:4] == ["name", "rank", "learned", "kept"])
        assert "method" not in s.header()
        assert s.screen.field.region.width > 45
        await s.pilot.resize_terminal(300, 40)
        await until(s.pilot, lambda: "params" in s.header())
        await s.pilot.resize_terminal(30, 8)
        await until(s.pilot, lambda: s.header()[:1] == ["name"])


async def test_what_a_model_keeps_and_learned_are_bars_with_numbers(brief: Path) -> None:
    metrics = read_json(brief / "artifacts/evaluation/metrics.json")
    async with open_models(brief) as s:
        for name in ("full", "lora"):
            numbers = metrics[name]
            assert f"{numbers['forgetting']['answers_kept']:.0%}" in s.row(name)
            assert f"{numbers['new_completed'] / numbers['new_sentences']:.0%}" in s.row(name)
        assert "–" in s.row("sweep/rank-1")
        await s.point("lora")
        assert (
            f"keeps {metrics['lora']['forgetting']['answers_kept']:.0%} of the base's answers"
            in s.details()
        )


async def test_what_a_model_learned_of_held_out_examples_or_preferences_is_shown_too(
    project: Path,
) -> None:
    """As Results does: without sentences that can be completed, the loss; of answers that were
    compared, the share.
    """
    metrics = rewrite_metrics(project)
    async with open_models(project) as s:
        assert f"loss {metrics['full']['new_loss']:.3f}" in s.row("full")
        assert "40%" in s.row("merged")
        await s.point("merged")
        assert "40% of its answers to new prompts are as expected" in s.details()
        assert "62%" in s.row("freeze")
        await s.point("freeze")
        assert "ROUGE-L with expected answers 0.62" in s.details()
        assert "75%" in s.row("lora")
        await s.point("lora")
        assert "prefers 75% of the chosen answers" in s.details()
        column = next(column for column in s.table._columns if column.title == "learned")
        assert column.order
        rows = sorted_rows(s.screen.table.entries, column, False)
        order = [row.label for row in rows if isinstance(row, Entry) and column.order(row)]
        losses = sorted(
            (numbers["new_loss"], name)
            for name, numbers in metrics.items()
            if name not in ("lora", "freeze", "merged")
        )
        assert order == ["lora", "freeze", "merged", *(name for _, name in losses if name in order)]


def rewrite_metrics(project: Path) -> dict[str, Any]:
    """The evaluation as if nothing could be completed; one model had answered, and one had learned
    preferences.
    """
    path = project / "artifacts/evaluation/metrics.json"
    metrics = read_json(path)
    variants = {
        name: numbers
        for name, numbers in metrics.items()
        if isinstance(numbers, dict) and "new_loss" in numbers
    }
    for numbers in variants.values():
        numbers.pop("new_completed", None)
    variants["freeze"]["answers"] = {"n": 0, "as_expected": 0, "similar": {"rouge_l": 0.62}}
    variants["merged"]["answers"] = {"n": 20, "as_expected": 8}
    variants["lora"]["preferences"] = {"after": {"accuracy": 0.75}}
    write_json(path, metrics)
    return variants


async def test_the_least_forgetful_model_is_on_top_after_one_key(brief: Path) -> None:
    async with open_models(brief) as s:
        await s.press("greater_than_sign")
        kept = {
            e.label: e.verdict.kept
            for e in s.screen.table.entries
            if e.verdict and e.verdict.kept is not None
        }
        assert [kept[name] for name in s.names()[: len(kept)]] == sorted(
            kept.values(), reverse=True
        )
        assert "kept ▼" in " ".join(s.header())
        assert s.names()[len(kept) :] == ["sweep/rank-1", "sweep/rank-2"], (
            "without a value: last, folders unfolded"
        )
        await s.press("less_than_sign", "less_than_sign", "less_than_sign")
        assert s.header()[:2] == ["name", "▲"]
        assert s.names() == sorted(s.names())
        await s.press("less_than_sign")
        assert s.names() == LISTED


@pytest.mark.slow
async def test_the_menu_sorts_by_any_column_and_the_same_again_turns_around(brief: Path) -> None:
    async with open_models(brief) as s:

        async def sort(column: str) -> None:
            await s.press("s")
            options = (await screen_opens(s.pilot, Menu)).query_one(OptionList)
            options.highlighted = options.get_option_index(column)
            await s.press("enter")

        await sort("rank")
        ranked = ["sweep/rank-1", "sweep/rank-2", "lora"]
        assert s.names()[:3] == ranked  # those with a rank; unknown ones stay last
        await sort("rank")
        assert s.names()[:3] == ranked[::-1]
        await sort("")
        assert s.names() == LISTED


async def test_a_click_on_the_header_sorts_and_on_a_line_moves_the_cursor(brief: Path) -> None:
    async with open_models(brief) as s:
        await s.pilot.click("#models Table", offset=(6, 0))
        await until(s.pilot, lambda: s.header()[:2] == ["name", "▲"])
        await s.pilot.click("#models Table", offset=(8, 2))
        await until(s.pilot, lambda: s.pointed() == s.names()[1])


@pytest.mark.slow
async def test_folders_fold_and_a_large_one_is_folded_at_first(project: Path) -> None:
    for number in range(9):
        shutil.copytree(project / "artifacts/sweep/rank-1", project / f"artifacts/many/a-{number}")
    async with open_models(project, COUNT + 9) as s:
        assert s.names() == [*USUAL, "many/", *LISTED[-3:]]
        assert s.row("many/").split() == ["▸", "many", "(9)", "9", "unmeasured"]
        await s.press(*["down"] * len(USUAL), "enter")
        assert s.names()[10:19] == [f"many/a-{number}" for number in range(9)]
        assert "many" in s.table.texts()[9] and "a-0" in s.table.texts()[10]
        await s.press("down", "down", "left")
        assert s.names() == [*USUAL, "many/", *LISTED[-3:]], (
            "left on one of its models folds a folder"
        )
        await s.press("right", "down")
        assert s.pointed() == "many/a-0"
        await s.press("up", "space")
        assert len(s.screen.table.chosen) == 9


async def test_moves_as_in_every_list(brief: Path) -> None:
    async with open_models(brief, size=(80, 16)) as s:
        for key, name in (
            ("end", "sweep/rank-2"),
            ("home", "base"),
            ("j", "expanded"),
            ("G", "sweep/rank-2"),
        ):
            await s.press(key)
            assert s.pointed() == name
        assert s.table.scroll_offset.y > 0, "the cursor's line is visible"
        await s.press("g", "pagedown", "k")
        assert s.pointed() not in ("base", "sweep/rank-2")


async def test_the_filter_looks_in_all_columns_and_escape_clears_it(brief: Path) -> None:
    async with open_models(brief) as s:
        await s.press("slash", *"adapter")
        names = ["lora", "prefix", "prompt", "sweep/", "sweep/rank-1", "sweep/rank-2"]
        assert s.names() == names  # their kind, which is not among the columns shown
        await s.press("escape")
        assert (s.names(), s.table.has_focus) == (LISTED, True)


async def test_space_chooses_and_takes_away_and_p_chooses_the_pipelines_models(brief: Path) -> None:
    async with open_models(brief) as s:
        await s.press("space")
        assert s.rows()[0].startswith("●")
        await s.press("space")
        assert s.screen.table.chosen == []
        await s.press("p")
        assert [entry.label for entry in s.screen.table.chosen_entries()] == USUAL
        await s.press("p")
        assert s.screen.table.chosen == []


@pytest.mark.slow
async def test_details_are_facts_and_all_fields_come_on_a_key(brief: Path) -> None:
    async with open_models(brief) as s:
        await s.point("lora")
        for fact in (
            "lora · rank 4 · α 1 ·",
            "trained in full: embed_tokens lm_head",
            " k out q v",
        ):
            assert fact in s.details()
        assert "✓ intact" in s.details() and "target_modules" not in s.details()
        await s.press("i")
        reader = await screen_opens(s.pilot, Reader)
        await until(s.pilot, lambda: reader.page.plain)
        manifest = artifact.read_manifest(brief / "artifacts/lora_adapter")
        shown = reader.page.plain
        assert manifest["inputs"]["artifacts/expanded"][:12] in shown
        assert manifest["versions"]["torch"] in shown
        assert "target_modules" in shown
        await s.press("escape")
        await s.press("end", "up", "up")
        await until(s.pilot, lambda: "E evaluates them" in s.shown_details())


@pytest.mark.slow
async def test_the_spectrum_is_measured_on_a_key_and_kept(
    brief: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_cache, "SETTLED", -1)
    async with open_models(brief) as s:
        await s.press("m")
        assert "Only an adapter that changes weights" in s.messages()
        await s.point("lora")
        await until(s.pilot, lambda: s.details().startswith("ΔW  m measures"))
        await s.press("m")
        await until(s.pilot, lambda: "2 80%" in s.details())  # 2² of 2² + 1²
        assert "0.lora_adapter_q" in s.details()
    async with open_models(brief) as s:  # the next start
        await s.point("lora")
        await until(s.pilot, lambda: "2 80%" in s.details())
        assert not s.engine.done("spectrum")


@pytest.mark.slow
async def test_adapters_that_the_pipeline_does_not_evaluate_are_evaluated_on_a_key(
    project: Path,
) -> None:
    async with open_models(project) as s:
        await s.press("E")
        assert "the pipeline evaluates its own models" in s.messages()
        await s.press("end", "up", "up", "E")  # the folder
        assert s.row("sweep/rank-1").count("measuring…") == 2
        await until(s.pilot, lambda: "Adapters evaluated: 2." in s.messages())
        await until(
            s.pilot,
            lambda: "%" in s.row("sweep/") and "%" in s.row("sweep/rank-2"),
        )
        metrics = read_json(project / "artifacts/measured/metrics.json")
        await until(s.pilot, lambda: not any("measuring" in row for row in s.rows()))
        for name in ("sweep/rank-1", "sweep/rank-2"):
            assert f"{metrics[f'artifacts/{name}']['forgetting']['answers_kept']:.0%}" in s.row(
                name
            )
        await s.press("E")
        assert s.messages().count("what was evaluated stays") == 2


@pytest.mark.slow
async def test_an_adapter_that_is_evaluated_and_breaks_a_limit_is_no_failure(project: Path) -> None:
    save(project / "params.yaml", {"evaluate.limits": {"new_loss": 0}})
    async with open_models(project) as s:
        await s.press("end", "E")
        broken = "evaluate.limits: 1 limit is broken, by artifacts/sweep/rank-2"
        await until(s.pilot, lambda: broken in s.messages() or "Not evaluated" in s.messages(), 120)
        assert broken in s.messages() and "Not evaluated" not in s.messages()
        await until(s.pilot, lambda: "✗" in s.row("sweep/rank-2"))


@pytest.mark.slow
async def test_an_evaluation_that_fails_says_why(project: Path) -> None:
    (project / "data/pretrain.de.txt").unlink()
    async with open_models(project) as s:
        await s.press("end", "E")
        await until(s.pilot, lambda: "Not evaluated:" in s.messages())
        assert "pretrain.de.txt" in s.messages()
        assert "measuring" not in s.row("sweep/rank-2")


async def test_another_screen_can_select_a_model_and_give_a_prompt(project: Path) -> None:
    for number in range(9):
        shutil.copytree(project / "artifacts/sweep/rank-1", project / f"artifacts/many/a-{number}")
    async with open_models(project, COUNT + 9) as s:
        s.app.go("models", select=project / "artifacts/many/a-7")
        await until(s.pilot, lambda: s.pointed() == "many/a-7")
        s.app.go("models", prompt="die katze")
        await until(s.pilot, lambda: s.screen.field.text == "die katze")
        assert s.screen.field.has_focus


@pytest.mark.slow
async def test_a_model_deleted_while_selected_is_deselected(project: Path) -> None:
    async with open_models(project) as s:
        await s.point("lora")
        await s.press("space")
        shutil.rmtree(project / "artifacts/lora_adapter")
        await until(s.pilot, lambda: len(s.names()) == len(LISTED) - 1)
        assert s.screen.table.chosen == []
        await until(s.pilot, lambda: "lora" not in str(s.screen.details_pane.border_title))


async def test_a_refused_adapter_says_why_in_full_and_is_never_asked(project: Path) -> None:
    path = project / "artifacts/lora_adapter/adapter_config.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"r": 4', '"r": 8'), encoding="utf-8")
    async with open_models(project) as s:
        await s.point("lora")
        reason = "r was edited: it is 8, but the adapter was trained with 4"
        assert "✗" in s.row("lora")
        assert reason in s.details()
        await s.ask("die katze")
        await s.answered()
        assert reason in s.answers[0].error
        assert s.engine.done("load") == []


@pytest.mark.slow
async def test_v_checks_again_and_new_models_appear_by_themselves(project: Path) -> None:
    async with open_models(project) as s:
        shutil.copytree(project / "artifacts/lora_adapter", project / "artifacts/second")
        await s.checked(COUNT + 1)
        assert "second" in s.names()
        await s.press("v")
        await s.checked(COUNT + 1)
        assert "checked again" in s.messages()


@pytest.mark.slow
async def test_a_folder_is_added_remembered_and_taken_away(project: Path, tmp_path: Path) -> None:
    other = tmp_path / "others"
    shutil.copytree(project / "artifacts/base", other / "mine")

    async def name(s: Session, folder: Path) -> None:
        await s.press("f")
        await screen_opens(s.pilot, AskText)
        s.app.screen.query_one(Input).value = str(folder)
        await s.press("enter")

    async with open_models(project) as s:
        await name(s, tmp_path / "nowhere")
        await until(s.pilot, lambda: "nowhere is not a folder" in s.messages())
        await name(s, Path("~nobody-of-this-name/models"))
        await until(s.pilot, lambda: "~nobody-of-this-name/models is not a folder" in s.messages())
        await name(s, Path("n" * 300))
        await until(s.pilot, lambda: "File name too long" in s.messages())
        await name(s, other)
        await s.checked(COUNT + 1)
        assert {"others/", "others/mine"} <= set(s.names())
    async with open_models(project, COUNT + 1) as s:
        await name(s, other)
        await s.checked(COUNT)


async def test_a_saved_folder_that_is_gone_is_reported(project: Path) -> None:
    app = Workbench(project / "params.yaml")
    app.state.folders = [str(project / "gone")]
    app.remember()
    async with open_models(project) as s:
        assert "gone is not a folder" in s.messages()


@pytest.mark.slow
async def test_names_come_at_once_visible_verdicts_first_and_what_is_typed_meanwhile_comes_through(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys arrive from a thread, as from a terminal: a screen that is busy drawing gets them too
    late.
    """
    drawn: list[int] = []
    checked: list[str] = []
    arrange = Table._arrange

    def count(self: Table[Any], line: int | None = None) -> None:
        drawn.append(self.line_count)
        arrange(self, line)

    def slow(model: Model, *arguments: Any, **named: Any) -> Any:
        # as of a larger adapter: else all verdicts may be there before the first key
        time.sleep(0.005)
        checked.append(model.path.name)
        return check(model, *arguments, **named)

    monkeypatch.setattr(Table, "_arrange", count)
    monkeypatch.setattr("pipeline.views.model_library.check", slow)
    models = 1 + len(sealed_copies(empty, 300))
    app = Workbench(empty / "params.yaml")
    app.first_screen, app.inference = "models", FakeInference()
    async with app.run_test(size=(120, 40)) as pilot:
        s, loop = Session(pilot), asyncio.get_running_loop()
        while not (isinstance(app.screen, ModelsScreen) and s.table.rows):
            await asyncio.sleep(0.01)
        assert len(s.screen.table.entries) == models and not all(
            entry.verdict for entry in s.screen.table.entries
        )

        def type_() -> None:
            for key in ["slash", *"a-29"]:
                loop.call_soon_threadsafe(
                    app.post_message, Key(key, "/" if key == "slash" else key)
                )
                time.sleep(0.1 if key == "slash" else 0.02)

        await asyncio.to_thread(type_)
        await until(pilot, lambda: len(s.names()) == 12)  # a-29, a-290 to a-299, their folder
        await s.checked(models)
        assert s.screen.focused_pane and s.screen.focused_pane.filter_text == "a-29"
        assert all("✓" in row for row in s.rows()[1:])
        soon = checked.index("a-299")
        assert soon < models - 20, "those that are visible are checked before the others"
        assert len(drawn) < 60, "a redraw for many verdicts, not one for each"


@pytest.mark.slow
async def test_digests_of_an_earlier_start_are_shown_and_never_loaded_by(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is hashed at its first prompt, whatever verdict the list shows."""
    monkeypatch.setattr(digest_cache, "SETTLED", -1)
    full = project / "artifacts/full_finetuned"
    sealed = artifact.contents(full)
    weights = bytearray((full / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (full / "model.safetensors").write_bytes(weights)
    with monkeypatch.context() as forged:
        forged.setattr(artifact, "contents", lambda _: sealed)
        store = DigestStore()
        store.contents(full)
        store.save()
    async with open_models(project) as s:
        assert "✓" in s.row("full")
        await s.point("full")
        await s.ask("die katze")
        await s.answered()
        assert "model.safetensors was changed" in s.completions()
        assert not s.engine.done("load")
        await s.press("escape", "escape", "v")
        await until(s.pilot, lambda: "✗" in s.row("full"))


def test_the_next_start_reads_and_checks_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until a file changes: then this model alone."""
    monkeypatch.setattr(digest_cache, "SETTLED", -1)
    copies = sealed_copies(tmp_path, 3)

    def start() -> list[Entry]:
        return list(Library(Project(tmp_path, Params(GRAPH.sections), GRAPH)).scan())

    assert not any(entry.is_read or entry.verdict for entry in start()), "names come first"
    library = Library(Project(tmp_path, Params(GRAPH.sections), GRAPH))
    first = list(library.check_all(library.scan()))
    assert sorted(start(), key=lambda entry: entry.label) == sorted(
        first, key=lambda entry: entry.label
    )
    weights = copies[1] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert [entry.label for entry in start() if entry.verdict is None] == [copies[1].name]
    library = Library(Project(tmp_path, Params(GRAPH.sections), GRAPH))
    library.forget()
    assert not any(entry.verdict for entry in library.scan())


def test_a_damaged_cache_costs_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_cache, "SETTLED", -1)
    sealed_copies(tmp_path, 2)
    library = Library(Project(tmp_path, Params(GRAPH.sections), GRAPH))
    first = list(library.check_all(library.scan()))
    path = library.cache.path
    stored = read_json(path)
    key = next(iter(stored["entries"]))
    for damage in ("[", "{}", "[]", json.dumps({**stored, "format": 0})):
        path.write_text(damage, encoding="utf-8")
        assert not any(entry.verdict for entry in Library(library.project).scan())
    stored["entries"][key][1] = {"nonsense": 1}
    write_json(path, stored)
    again = Library(library.project)
    assert [entry.label for entry in again.check_all(again.scan())] == [
        entry.label for entry in first if entry.model.path.name in key
    ]
