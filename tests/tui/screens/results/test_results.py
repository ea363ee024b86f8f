"""The Results screen: which adapter to ship, and all that the stages wrote, as a user meets
them.
"""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text
from textual.pilot import Pilot
from textual.widgets import ContentSwitcher, OptionList, Static

from tests.helpers.extension import PROBES, add_probes
from tests.helpers.json_files import read_json, write_json
from tests.helpers.pilot import AppSession, screen_opens, until
from tests.helpers.projects import make, save
from tui.app import Workbench
from tui.dialogs import Menu
from tui.screens.results.figures import PicturePane
from tui.screens.results.methods import DetailPane, MethodsPane, ScatterPane
from tui.screens.results.pages import ListPane, PagePane, PageReader, PagesView
from tui.screens.results.screen import ResultsScreen
from tui.screens.results.sweep import PlotsPane, SweepPane
from tui.screens.results.views import Views
from tui.widgets.pane import Pane


class Session(AppSession[ResultsScreen]):
    """The app on its results, with what was asked of other screens."""

    kind = ResultsScreen

    def __init__(self, pilot: Pilot[None], asked: list[tuple[str, dict[str, Any]]]) -> None:
        super().__init__(pilot)
        self.asked = asked

    @property
    def view(self) -> str | None:
        return self.screen.query_one(ContentSwitcher).current

    def drawn(self, pane: Any) -> str:
        """The text of a pane's block."""
        return text_of(self.screen.query_one(pane).query_one(Static))

    def title(self, pane: Any) -> str:
        return str(self.screen.query_one(pane).border_title)

    async def choose(self, key: str) -> None:
        """Choose a line of the menu that is open."""
        menu = self.app.screen
        assert isinstance(menu, Menu)
        options = menu.query_one(OptionList)
        options.highlighted = options.get_option_index(key)
        await self.press("enter")


def text_of(static: Static) -> str:
    content = static.content
    return content.plain if isinstance(content, Text) else str(content)


@asynccontextmanager
async def results(
    project: Path, size: tuple[int, int] = (120, 40), read: bool = True
) -> AsyncIterator[Session]:
    asked: list[tuple[str, dict[str, Any]]] = []
    app = Workbench(project / "params.yaml")
    app.go = lambda name, **request: asked.append((name, request))  # type: ignore[method-assign, assignment]
    async with app.run_test(size=size) as pilot:
        await pilot.press("3")
        session = Session(pilot, asked)
        await until(pilot, lambda: not read or session.screen.results.seen is not None)
        yield session


@pytest.mark.slow
async def test_the_model_that_forgot_least_is_marked_at_once(brief: Path) -> None:
    async with results(brief) as user:
        pane = user.screen.query_one(MethodsPane)
        least = pane.evaluation and pane.evaluation.forgot_least
        assert least is not None and pane.pointed is least
        assert f"forgot least: {least.name}" in user.title(MethodsPane)
        assert pane.table.has_focus
        assert least.stage.title in user.title(DetailPane)
        assert least.name in user.drawn(ScatterPane)


@pytest.mark.parametrize("key", ["c", "enter"])
async def test_a_model_is_prompted_beside_its_base(brief: Path, key: str) -> None:
    async with results(brief) as user:
        user.screen.query_one(MethodsPane).point("lora")
        await user.press(key)
        artifacts = brief / "artifacts"
        assert user.asked == [
            ("chat", {"models": [artifacts / "expanded", artifacts / "lora_adapter"]})
        ]


@pytest.mark.slow
async def test_a_base_is_prompted_alone(brief: Path) -> None:
    async with results(brief) as user:
        user.screen.query_one(MethodsPane).point("base")
        await user.press("c")
        assert user.asked == [("chat", {"models": [brief / "artifacts/base"]})]


@pytest.mark.slow
async def test_a_model_whose_weights_are_gone_is_not_prompted(project: Path) -> None:
    shutil.rmtree(project / "artifacts/lora_adapter")
    async with results(project) as user:
        user.screen.query_one(MethodsPane).point("lora")
        await user.press("c")
        assert user.asked == []
        assert "lora has no weights here" in user.app.message_history[-1].text


@pytest.mark.slow
async def test_o_shows_the_curve_and_i_all_numbers(brief: Path) -> None:
    async with results(brief) as user:
        user.screen.query_one(MethodsPane).point("full")
        await user.press("o", "i")
        assert user.asked == [("curves", {"run": "finetune_full"})]
        assert isinstance(user.app.screen, PageReader)
        await until(
            user.pilot,
            lambda: "KL from base" in user.app.screen.query_one("MarkdownPage").plain,  # type: ignore[attr-defined]
        )


@pytest.mark.slow
async def test_sorting_keeps_the_cursor_on_its_model(brief: Path) -> None:
    async with results(brief) as user:
        pane = user.screen.query_one(MethodsPane)
        pane.point("prefix")
        await user.press("s")
        await user.choose("size")
        sizes = [method.numbers["bytes"] for method in pane.rows]
        assert sizes == sorted(sizes)
        assert pane.pointed is not None and pane.pointed.name == "prefix"
        await user.press("less_than_sign")
        assert pane.sorted_by == "trained"
        await user.press("greater_than_sign", "greater_than_sign")
        assert pane.sorted_by.startswith("task: ")


@pytest.mark.parametrize("project", ["brief", "empty"])
@pytest.mark.slow
async def test_the_panes_follow_the_size_of_the_terminal(
    request: pytest.FixtureRequest, project: str
) -> None:
    """Also where it changes while another screen is shown. They fill the rows between the views and
    the keys.
    """
    small, large = (100, 14), (140, 45)
    async with results(request.getfixturevalue(project), small) as user:
        heights = list[dict[str, int]]()
        for size, away in ((small, False), (large, False), (small, True)):
            if away:
                await user.press("1")
            await user.pilot.resize_terminal(*size)
            await user.press("3")
            panes = [pane for pane in user.screen.query("#methods Pane").results(Pane) if pane.size]
            assert max(pane.region.bottom for pane in panes) == size[1] - 1
            assert max(pane.region.right for pane in panes) == size[0]
            heights.append({type(pane).__name__: pane.region.height for pane in panes})
        assert heights[0] == heights[2]
        assert all(heights[1][name] > height for name, height in heights[0].items())


@pytest.mark.slow
async def test_the_filter_narrows_the_models(brief: Path) -> None:
    async with results(brief) as user:
        await user.press("slash", *"lora", "enter")
        assert [method.name for method in user.screen.query_one(MethodsPane).rows] == [
            "lora",
            "merged",
        ]
        await user.press("slash", "escape")
        assert len(user.screen.query_one(MethodsPane).rows) == 9


@pytest.mark.slow
async def test_any_two_quantities_can_be_compared(brief: Path) -> None:
    async with results(brief) as user:
        await user.press("shift+tab")
        user.screen.set_focus(user.screen.query_one(ScatterPane))
        await user.press("v")
        await user.choose("new sentences")
        assert "↑ new sentences" in user.drawn(ScatterPane)
        await user.press("h")
        await user.choose("KL from the base")
        assert "KL from the base ─▶" in user.drawn(ScatterPane)


@pytest.mark.slow
async def test_a_broken_limit_is_named(project: Path) -> None:
    path = project / "artifacts/evaluation/metrics.json"
    metrics = read_json(path)
    broken = [{"variant": "lora", "limit": "answers_kept", "wanted": 0.99, "value": 0.5}]
    metrics["gate"] = {"passed": False, "variants": ["lora", "full"], "broken": broken}
    write_json(path, metrics)
    async with results(project) as user:
        assert "✗ 1 limit broken" in user.title(MethodsPane)
        user.screen.query_one(MethodsPane).point("lora")
        await until(
            user.pilot,
            lambda: "✗ breaks answers_kept 0.5, wanted at least 0.99" in user.drawn(DetailPane),
        )
        assert "retention_data" in user.drawn(DetailPane)
        user.screen.query_one(MethodsPane).point("full")
        await until(user.pilot, lambda: "✓ keeps evaluate.limits" in user.drawn(DetailPane))


async def test_without_old_texts_models_are_compared_by_their_tasks(empty: Path) -> None:
    def numbers(loss: float, score: float) -> dict[str, Any]:
        scores = {"score": score, "low": score - 0.1, "high": score + 0.1, "n": 9}
        return {"parameters": 100, "bytes": 40_000, "new_loss": loss, "tasks": {"capitals": scores}}

    path = empty / "artifacts/evaluation/metrics.json"
    path.parent.mkdir(parents=True)
    write_json(path, {"base": numbers(2, 0.5), "lora": numbers(1, 0.7)})
    async with results(empty) as user:
        drawn = user.drawn(ScatterPane)
        assert "↑ capitals" in drawn and "loss on new sentences ─▶" in drawn
        assert "forgot least" not in user.title(MethodsPane)
        await until(user.pilot, lambda: "capitals" in user.drawn(DetailPane))


async def test_one_quantity_alone_is_not_drawn(empty: Path) -> None:
    path = empty / "artifacts/evaluation/metrics.json"
    path.parent.mkdir(parents=True)
    numbers = {"parameters": 100, "bytes": 40_000, "new_loss": 1.0}
    write_json(path, {"base": numbers, "lora": numbers})
    async with results(empty) as user:
        assert "Set evaluate.old_data" in user.drawn(ScatterPane)


@pytest.mark.slow
async def test_nothing_evaluated_says_what_to_press(empty: Path) -> None:
    async with results(empty) as user:
        pane = user.screen.query_one(MethodsPane)
        assert text_of(pane.query_one(".empty", Static)).startswith(
            "Nothing is evaluated yet. Press R"
        )
        assert not user.screen.query_one(ScatterPane).size
        await user.press("r")
        assert "No report yet. Press R" in text_after(user)
        await user.press("f")
        assert "No figures yet. Press R" in text_of(user.screen.query_one("#caption", Static))
        await user.press("c", "o", "i", "s", "p")  # nothing to act on
        assert user.asked == []


def titles(view: PagesView) -> list[str]:
    """Of the pages that are listed."""
    return [str(option.prompt) for option in view.query_one(ListPane).list.options]


def text_after(user: Session) -> str:
    return user.screen.query_one("#report", PagesView).query_one(PagePane).page.plain


async def test_other_metrics_are_said_in_one_sentence(project: Path) -> None:
    (project / "artifacts/evaluation/metrics.json").write_text("{}[", encoding="utf-8")
    async with results(project) as user:
        text = text_of(user.screen.query_one(MethodsPane).query_one(".empty", Static))
        assert text.endswith("metrics.json is not a JSON object. Run `lora evaluate` again.")


async def test_a_broken_params_file_is_said(empty: Path) -> None:
    (empty / "params.yaml").write_text("pretrain: [", encoding="utf-8")
    async with results(empty, read=False) as user:
        text = text_of(user.screen.query_one(MethodsPane).query_one(".empty", Static))
        assert "params.yaml" in text


@pytest.mark.slow
async def test_a_new_evaluation_is_shown_without_a_key(project: Path) -> None:
    folder = project / "artifacts/evaluation"
    shutil.move(folder, project / "later")
    async with results(project) as user:
        await user.press("a")  # it began with the sweep
        assert user.screen.query_one(MethodsPane).has_class("-empty")
        shutil.move(project / "later", folder)
        await until(user.pilot, lambda: "forgot least" in user.title(MethodsPane))


@pytest.mark.slow
async def test_a_project_that_only_sweeps_begins_with_its_sweep(project: Path) -> None:
    shutil.rmtree(project / "artifacts/evaluation")
    async with results(project) as user:
        assert user.view == "sweep"
        pane = user.screen.query_one(SweepPane)
        assert {trial.name for trial in pane.rows} == {"rank-1", "rank-2"}
        assert pane.pointed is not None and pane.pointed.best
        assert "rank ─▶" in user.drawn(PlotsPane)
        pane.point("rank-2")
        await user.press("c", "o")
        assert user.asked == [
            (
                "chat",
                {"models": [project / "artifacts/expanded", project / "artifacts/sweep/rank-2"]},
            ),
            ("curves", {"run": "finetune_sweep/rank-2"}),
        ]


@pytest.mark.slow
async def test_an_adapter_of_a_sweep_is_evaluated(project: Path) -> None:
    async with results(project) as user:
        await user.press("w")
        pane = user.screen.query_one(SweepPane)
        pane.point("rank-2")
        assert all(trial.kept is None for trial in pane.rows)
        await user.press("E")
        await until(user.pilot, lambda: any(trial.kept is not None for trial in pane.rows), 120)
        assert [trial.name for trial in pane.rows if trial.kept is not None] == ["rank-2"]
        assert "kept" in [column.title for column in pane.columns]


async def test_a_sweep_of_several_keys_has_a_plot_for_each(empty: Path) -> None:
    rows = {
        f"a{n}": {
            "values": {"rank": rank, "target_modules": [target]},
            **{
                "state": "done",
                "trainable": 1,
                "steps": 1,
                "final_loss": 1.0 + n,
                "eval_loss": 1.0 + n,
            },
            "divergence": 0.1 / (n + 1),
        }
        for n, (rank, target) in enumerate([(1, "attention"), (4, "attention"), (4, "all-linear")])
    }
    save(empty / "params.yaml", {"finetune_sweep.grid": {"rank": [1, 4]}})
    (empty / "artifacts/sweep").mkdir(parents=True)
    write_json(empty / "artifacts/sweep/sweep.json", rows)
    async with results(empty) as user:
        drawn = user.drawn(PlotsPane)
        assert [
            title in drawn
            for title in ("divergence from the base ─▶", "rank ─▶", "target_modules ─▶")
        ] == [True] * 3
        assert "attention" in drawn
        assert [trial.front for trial in user.screen.query_one(SweepPane).rows] == [
            True,
            True,
            True,
        ]


@pytest.mark.slow
async def test_the_report_is_read_and_searched(brief: Path) -> None:
    async with results(brief) as user:
        await user.press("r")
        page = user.screen.query_one("#report", PagesView).query_one(PagePane).page
        await until(user.pilot, lambda: "What was learned, what was forgotten" in page.plain)
        assert "▣ Loss curves and trainable parameters (f shows it)" in page.plain
        await user.press("enter", "slash", *"tasks", "enter", "n")
        assert "Tasks" in page.plain.splitlines()[page.matches[0]]
        assert page.scroll_offset.y in page.matches
        await user.press("f")
        assert user.view == "figures"


@pytest.mark.slow
async def test_what_an_extension_measured_is_read_with_its_pictures_and_numbers(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_probes(project, monkeypatch)
    make(project, PROBES)
    async with results(project) as user:
        await user.press("r")
        view = user.screen.query_one(PagesView)
        assert titles(view) == [
            "Comparison",
            "All probes",
            "Probe of norm",
            "Probe of size",
        ]
        view.point("probe_size")
        page = view.query_one(PagePane).page
        await until(user.pilot, lambda: "The size is 0.12." in page.plain)
        await user.press("f")
        pane = user.screen.query_one(PicturePane)
        await until(
            user.pilot,
            lambda: pane.picture is not None and pane.picture.key == "probes/size/picture",
        )
        await until(user.pilot, lambda: len(pane.query("HalfcellImage")) == 1)
        await user.press("o")
        numbers = (await screen_opens(user.pilot, PageReader)).query_one("MarkdownPage")
        await until(user.pilot, lambda: "Shares of words" in numbers.plain)  # type: ignore[attr-defined]


async def test_a_stage_of_a_group_that_did_not_run_says_so(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_probes(empty, monkeypatch)
    async with results(empty) as user:
        await user.press("r")
        view = user.screen.query_one(PagesView)
        assert titles(view) == ["Probe of norm", "Probe of size"]
        await until(user.pilot, lambda: "not measured yet. Press R" in text_after(user))


async def test_another_screen_can_ask_for_a_report_a_figure_or_a_method(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_probes(project, monkeypatch)
    make(project, PROBES)
    async with results(project) as user:
        user.screen.open_with(report="probe_size")
        assert user.view == "report"
        await until(user.pilot, lambda: "The size is 0.12." in text_after(user))
        user.screen.open_with(figure="overview/shares")
        assert user.view == "figures"
        pane = user.screen.query_one(PicturePane)
        await until(user.pilot, lambda: pane.picture is not None and pane.picture.title == "Shares")
        user.screen.open_with(method="full")
        methods = user.screen.query_one(MethodsPane)
        await until(
            user.pilot, lambda: methods.pointed is not None and methods.pointed.name == "full"
        )


@pytest.mark.slow
async def test_a_damaged_picture_is_said(project: Path) -> None:
    (project / "artifacts/evaluation/finetuning_comparison.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    async with results(project) as user:
        await user.press("f")
        caption = user.screen.query_one("#caption", Static)
        await until(
            user.pilot, lambda: "finetuning_comparison.png cannot be shown" in text_of(caption)
        )


@pytest.mark.slow
async def test_pictures_can_be_drawn_in_other_ways(brief: Path) -> None:
    async with results(brief) as user:
        await user.press("f")
        pane = user.screen.query_one(PicturePane)
        await until(user.pilot, lambda: len(pane.query("#picture > *")) == 1)
        before = pane.kind
        await user.press("p", "p", "p")
        await until(user.pilot, lambda: len(pane.query("HalfcellImage")) == 1)
        assert pane.kind == before


@pytest.mark.parametrize(
    "size", [(60, 16), (30, 8), (80, 24), (200, 60)], ids=lambda size: f"{size[0]}x{size[1]}"
)
@pytest.mark.sampled(4)
async def test_every_view_at_every_size(brief: Path, size: tuple[int, int]) -> None:
    async with results(brief, size) as user:
        for key in "wrfa":
            await user.press(key, "plus", "plus")
        assert user.view == "methods"


@pytest.mark.slow
async def test_a_click_on_a_view_shows_it(brief: Path) -> None:
    async with results(brief) as user:
        await user.pilot.click(Views, offset=(20, 0))
        await user.pilot.pause()
        assert user.view == "sweep"
        assert user.screen.query_one("#report", PagesView).query_one(ListPane) is not None
