"""Paths that are typed in the app."""

from pathlib import Path

from tests.helpers.pilot import until
from tui.app import Workbench


async def test_a_loop_of_links_in_a_worker_is_a_message(empty: Path) -> None:
    (empty / "a").symlink_to("a")

    async def work() -> None:
        (empty / "a").resolve()  # up to Python 3.12 a RuntimeError
        raise RuntimeError(f"Symlink loop from {str(empty / 'a')!r}")

    app = Workbench(empty / "params.yaml")
    async with app.run_test() as pilot:
        app.run_worker(work())
        await until(
            pilot,
            lambda: any("a loop of symbolic links" in text for _, _, text in app.message_history),
        )
        assert app.is_running
