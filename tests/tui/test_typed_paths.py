"""Paths that are typed in the app."""

from pathlib import Path

import pytest
from textual.widgets import Input, Static

from pipeline.errors import UserError
from tests.helpers.pilot import until
from tui.app import Workbench
from tui.config import config_path, load_config
from tui.dialogs import PathScreen


async def test_a_path_that_cannot_be_is_refused_where_it_is_typed(empty: Path) -> None:
    app = Workbench(empty / "params.yaml")
    answers: list[str | None] = []
    async with app.run_test() as pilot:
        await app.push_screen(PathScreen("Which file?"), answers.append)
        await until(pilot, lambda: isinstance(app.screen, PathScreen))
        for name, reason in ("~nobody-x/y", "~ must be followed by /"), ("x" * 300, "File name too long"):
            app.screen.query_one(Input).value = name
            await pilot.press("enter")
            await until(pilot, lambda: reason in str(app.screen.query_one(".wrong", Static).render()))  # noqa: B023
        app.screen.query_one(Input).value = " ~/y "
        await pilot.press("enter")
        await until(pilot, lambda: answers)
    assert answers == [str(Path.home() / "y")]


async def test_a_loop_of_links_in_a_worker_is_a_message(empty: Path) -> None:
    (empty / "a").symlink_to("a")

    async def work() -> None:
        (empty / "a").resolve()  # up to Python 3.12 a RuntimeError
        raise RuntimeError(f"Symlink loop from {str(empty / 'a')!r}")

    app = Workbench(empty / "params.yaml")
    async with app.run_test() as pilot:
        app.run_worker(work())
        await until(pilot, lambda: any("a loop of symbolic links" in text for _, _, text in app.message_history))
        assert app.is_running


def test_a_folder_of_a_user_who_does_not_exist_is_no_folder() -> None:
    config_path().parent.mkdir(parents=True)
    config_path().write_text("folders: [~/a, ~nobody-x/b]\n", encoding="utf-8")
    with pytest.raises(UserError, match="folders must be a list of paths, with ~ for a home folder that there is"):
        load_config(config_path())
