"""The Results screen: which adapter to ship, and all that the stages wrote, as a user meets
them.
"""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import OptionList

from pipeline.views.evaluations import Method
from pipeline.views.sweeps import Trial
from tests.helpers.extension import PROBES, add_probes
from tests.helpers.json_files import read_json, write_json
from tests.helpers.pilot import AppSession, screen_opens, screen_text, until
from tests.helpers.projects import make, save
from tui.app import Workbench
from tui.dialogs import Reader
from tui.panes.menu import Menu
from tui.panes.pane import Pane
from tui.panes.plot.plot import Plot
from tui.panes.table import Table
from tui.screens.results.screen import ResultsScreen


class Session(AppSession[ResultsScreen]):
    """The app on its results, with what was asked of other screens."""

    kind = ResultsScreen

    def __init__(self, pilot: Pilot[None], asked: list[tuple[str, dict[str, Any]]]) -> None:
        super().__init__(pilot)
        self.asked = asked

    @property
    def view(self) -> str:
        return self.screen.view

    @property
    def models(self) -> Table[Method]:
        return self.screen.views["methods"].table

    @property
    def trials(self) -> Table[Trial]:
        return self.screen.views["sweep"].table

    def pane(self, name: str) -> Pane:
        return self.screen.query_one(f"#{name}", Pane)

    def title(self, name: str) -> str:
        return str(self.pane(name).border_title)

    @property
    def scatter(self) -> str:
        return plotted(self.screen.methods.scatter)

    @property
    def details(self) -> str:
        """The model in words, as if the pane were wide."""
        return self.screen.methods.details.plain.replace("\n", " ")

    @property
    def page(self) -> str:
        """The report that is shown."""
        return self.screen.reports.page.plain

    @property
    def caption(self) -> str:
        return str(self.screen.figures.caption.content)

    async def choose(self, key: str) -> None:
        """Choose a line of the menu that is open."""
        menu = self.app.screen
        assert isinstance(menu, Menu)
        options = menu.query_one(OptionList)
        options.highlighted = options.get_option_index(key)
        await self.press("enter")


def plotted(plot: Plot) -> str:
    return plot.plain


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
        await until(pilot, lambda: not read or session.screen.seen is not None)
        yield session


@pytest.mark.slow
async def test_the_model_that_forgot_least_is_marked_at_once(brief: Path) -> None:
    async with results(brief) as user:
        least: Method = user.screen.methods.found.forgot_least
        assert least is not None and user.models.pointed is least
        assert f"forgot least: {least.name}" in user.title("methods")
        assert user.models.has_focus
        assert least.stage.title in user.title("model")
        assert least.name in user.scatter


@pytest.mark.parametrize("key", ["c", "enter"])
async def test_a_model_is_prompted_beside_its_base(brief: Path, key: str) -> None:
    async with results(brief) as user:
        user.models.point("lora")
        await user.press(key)
        artifacts = brief / "artifacts"
        assert user.asked == [
            ("chat", {"models": [artifacts / "expanded", artifacts / "lora_adapter"]})
        ]


@pytest.mark.slow
async def test_a_base_is_prompted_alone(brief: Path) -> None:
    async with results(brief) as user:
        user.models.point("base")
        await user.press("c")
        assert user.asked == [("chat", {"models": [brief / "artifacts/base"]})]


@pytest.mark.slow
async def test_a_model_whose_weights_are_gone_is_not_prompted(project: Path) -> None:
    shutil.rmtree(project / "artifacts/lora_adapter")
    async with results(project) as user:
        user.models.point("lora")
        await user.press("c")
        assert user.asked == []
        assert "lora has no weights here" in user.app.message_history[-1].text


@pytest.mark.slow
async def test_o_shows_the_curve_and_i_all_numbers(brief: Path) -> None:
    async with results(brief) as user:
        user.models.point("full")
        await user.press("o", "i")
        assert user.asked == [("curves", {"run": "finetune_full"})]
        assert isinstance(user.app.screen, Reader)
        await until(
            user.pilot,
            lambda: "KL from base" in reader_text(user),
        )


@pytest.mark.slow
async def test_sorting_keeps_the_cursor_on_its_model(brief: Path) -> None:
    async with results(brief) as user:
        table = user.models
        table.point("prefix")
        await user.press("s")
        await user.choose("size")
        sizes = [method.numbers["bytes"] for method in table.shown]
        assert sizes == sorted(sizes)
        assert table.pointed is not None and table.pointed.name == "prefix"
        await user.press("less_than_sign")
        assert table.sorted_by == "trained"
        await user.press("greater_than_sign", "greater_than_sign")
        assert table.sorted_by.startswith("task: ")


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
            panes = [pane for pane in user.screen.methods.query(Pane) if pane.region]
            assert max(pane.region.bottom for pane in panes) == size[1] - 1
            assert max(pane.region.right for pane in panes) == size[0]
            heights.append({str(pane.id): pane.region.height for pane in panes})
        assert heights[0] == heights[2]
        assert all(heights[1][name] > height for name, height in heights[0].items())


@pytest.mark.slow
async def test_the_filter_narrows_the_models(brief: Path) -> None:
    async with results(brief) as user:
        await user.press("slash", *"lora", "enter")
        assert [method.name for method in user.models.shown] == ["lora", "merged"]
        await user.press("slash", "escape")
        assert len(user.models.shown) == 9


@pytest.mark.slow
async def test_any_two_quantities_can_be_compared(brief: Path) -> None:
    async with results(brief) as user:
        await user.press("shift+tab")
        assert user.screen.methods.scatter.has_focus
        await user.press("v")
        await user.choose("new sentences")
        assert "↑ new sentences" in user.scatter
        await user.press("h")
        await user.choose("KL from the base")
        assert "KL from the base →" in user.scatter
        await user.press("h", "escape")
        assert "KL from the base →" in user.scatter, "nothing was chosen"


@pytest.mark.slow
async def test_a_broken_limit_is_named(project: Path) -> None:
    path = project / "artifacts/evaluation/metrics.json"
    metrics = read_json(path)
    broken = [{"variant": "lora", "limit": "answers_kept", "wanted": 0.99, "value": 0.5}]
    metrics["gate"] = {"passed": False, "variants": ["lora", "full"], "broken": broken}
    write_json(path, metrics)
    async with results(project) as user:
        assert "✗ 1 limit broken" in user.title("methods")
        user.models.point("lora")
        await until(
            user.pilot,
            lambda: "✗ breaks answers_kept 0.5, wanted at least 0.99" in user.details,
        )
        assert "retention_data" in user.details
        user.models.point("full")
        await until(user.pilot, lambda: "✓ keeps evaluate.limits" in user.details)


async def test_without_old_texts_models_are_compared_by_their_tasks(empty: Path) -> None:
    def numbers(loss: float, score: float) -> dict[str, Any]:
        scores = {"score": score, "low": score - 0.1, "high": score + 0.1, "n": 9}
        return {"parameters": 100, "bytes": 40_000, "new_loss": loss, "tasks": {"capitals": scores}}

    path = empty / "artifacts/evaluation/metrics.json"
    path.parent.mkdir(parents=True)
    write_json(path, {"base": numbers(2, 0.5), "lora": numbers(1, 0.7)})
    async with results(empty) as user:
        drawn = user.scatter
        assert "↑ capitals" in drawn and "loss on new sentences →" in drawn
        assert "forgot least" not in user.title("methods")
        await until(user.pilot, lambda: "capitals" in user.details)


async def test_one_quantity_alone_is_not_drawn(empty: Path) -> None:
    path = empty / "artifacts/evaluation/metrics.json"
    path.parent.mkdir(parents=True)
    numbers = {"parameters": 100, "bytes": 40_000, "new_loss": 1.0}
    write_json(path, {"base": numbers, "lora": numbers})
    async with results(empty) as user:
        assert "Set evaluate.old_data" in user.scatter.replace("\n", " ")


@pytest.mark.slow
async def test_nothing_evaluated_says_what_to_press(empty: Path) -> None:
    async with results(empty) as user:
        assert str(user.models.nothing).startswith("Nothing is evaluated yet. Press R")
        assert "Nothing is evaluated yet" in screen_text(user.app)
        assert not user.pane("scatter").region
        await user.press("r")
        await until(user.pilot, lambda: "No report yet. Press R" in screen_text(user.app))
        await user.press("f")
        await until(user.pilot, lambda: "No figures yet. Press R" in screen_text(user.app))
        await user.press("c", "o", "i", "s", "p")  # nothing to act on
        assert user.asked == []


def titles(user: Session) -> list[str]:
    """Of the pages that are listed."""
    return user.screen.reports.table.texts()


def reader_text(user: Session) -> str:
    """The page over the screen."""
    reader = user.app.screen
    assert isinstance(reader, Reader)
    return reader.page.plain


async def test_other_metrics_are_said_in_one_sentence(project: Path) -> None:
    (project / "artifacts/evaluation/metrics.json").write_text("{}[", encoding="utf-8")
    async with results(project) as user:
        text = str(user.models.nothing)
        assert text.endswith("metrics.json is not a JSON object. Run `lora evaluate` again.")


@pytest.mark.parametrize(
    "tasks",
    [{"x": {"score": 0.5}}, {"x": {"score": 0.5, "low": "a", "high": None}}, {"x": 3}, [1]],
    ids=["no interval", "no numbers", "no scores", "a list"],
)
async def test_numbers_of_another_shape_leave_the_screen_alone(empty: Path, tasks: Any) -> None:
    path = empty / "artifacts/evaluation/metrics.json"
    path.parent.mkdir(parents=True)
    numbers = {"parameters": 100, "bytes": 40_000, "new_loss": 1.0, "tasks": tasks}
    write_json(path, {"base": numbers, "lora": {**numbers, "forgetting": {"answers_kept": "?"}}})
    async with results(empty) as user:
        await user.press("down", "i", "escape")
        assert user.view == "methods"


async def test_a_broken_params_file_is_said(empty: Path) -> None:
    (empty / "params.yaml").write_text("pretrain: [", encoding="utf-8")
    async with results(empty, read=False) as user:
        await until(user.pilot, lambda: "params.yaml" in str(user.models.nothing))
        assert "params.yaml" in screen_text(user.app)


@pytest.mark.slow
async def test_a_new_evaluation_is_shown_without_a_key(project: Path) -> None:
    folder = project / "artifacts/evaluation"
    shutil.move(folder, project / "later")
    async with results(project) as user:
        await user.press("a")  # it began with the sweep
        assert not user.models.shown
        shutil.move(project / "later", folder)
        await until(user.pilot, lambda: "forgot least" in user.title("methods"))


@pytest.mark.slow
async def test_a_project_that_only_sweeps_begins_with_its_sweep(project: Path) -> None:
    shutil.rmtree(project / "artifacts/evaluation")
    async with results(project) as user:
        assert user.view == "sweep"
        assert {trial.name for trial in user.trials.rows} == {"rank-1", "rank-2"}
        assert user.trials.pointed is not None and user.trials.pointed.best
        await until(user.pilot, lambda: "rank →" in screen_text(user.app))
        user.trials.point("rank-2")
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
        table = user.trials
        table.point("rank-2")
        assert all(trial.kept is None for trial in table.rows)
        await user.press("E")
        await until(user.pilot, lambda: any(trial.kept is not None for trial in table.rows), 120)
        assert [trial.name for trial in table.rows if trial.kept is not None] == ["rank-2"]
        assert "kept" in [column.title for column in table.columns]


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
        await user.press("w")
        plots = [plotted(plot) for plot in user.pane("plots").query(Plot)]
        keys = ["divergence from the base", "rank", "target_modules"]
        assert [f"{key} →" in plot for key, plot in zip(keys, plots, strict=True)] == [True] * 3
        assert "attention" in plots[-1]
        assert [trial.front for trial in user.trials.rows] == [True] * 3


@pytest.mark.slow
async def test_the_report_is_read_and_searched(brief: Path) -> None:
    async with results(brief) as user:
        await user.press("r")
        page = user.screen.reports.page
        await until(user.pilot, lambda: "What was learned, what was forgotten" in page.plain)
        assert "▣ Loss curves and trainable parameters (f shows it)" in page.plain
        await user.press("enter", "slash", *"tasks", "enter", "n")
        assert "Tasks" in page.plain.splitlines()[page.matches[0]]
        assert page.found in page.matches and page.has_focus
        assert 0 <= page.found - page.scroll_offset.y < page.page_height
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
        assert titles(user) == ["Comparison", "All probes", "Probe of norm", "Probe of size"]
        user.screen.reports.table.point("probe_size")
        await until(user.pilot, lambda: "The size is 0.12." in user.page)
        await user.press("f")
        pointed = user.screen.figures.table.pointed
        assert pointed is not None and pointed.key == "probes/size/picture"
        await until(user.pilot, lambda: len(user.pane("figure").query("HalfcellImage")) == 1)
        await user.press("tab", "o")
        await screen_opens(user.pilot, Reader)
        await until(user.pilot, lambda: "Shares of words" in reader_text(user))


async def test_a_stage_of_a_group_that_did_not_run_says_so(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_probes(empty, monkeypatch)
    async with results(empty) as user:
        await user.press("r")
        assert titles(user) == ["Probe of norm", "Probe of size"]
        await until(user.pilot, lambda: "not measured yet. Press R" in user.page)


@pytest.mark.slow
async def test_a_damaged_picture_is_said(project: Path) -> None:
    (project / "artifacts/evaluation/finetuning_comparison.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    async with results(project) as user:
        await user.press("f")
        await until(user.pilot, lambda: "comparison.png cannot be shown" in user.caption)


@pytest.mark.slow
async def test_pictures_can_be_drawn_in_other_ways(brief: Path) -> None:
    async with results(brief) as user:
        await user.press("f")
        figures = user.screen.figures
        await until(user.pilot, lambda: len(figures.query("#picture > *")) == 1)
        before = figures.kind
        await user.press("tab", "p", "p", "p")
        await until(user.pilot, lambda: len(figures.query("HalfcellImage")) == 1)
        assert figures.kind == before


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
        await user.pilot.click("#views", offset=(20, 0))
        await user.pilot.pause()
        assert user.view == "sweep"
