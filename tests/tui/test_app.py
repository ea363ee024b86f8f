"""The app: screens, keys, themes, messages, config, start and hang-up."""

import asyncio
import inspect
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyte
import pytest
from textual.css.query import NoMatches
from textual.pilot import Pilot
from textual.worker import WorkerFailed

from pipeline.errors import UserError
from tests.helpers.json_files import read_json
from tests.helpers.pilot import until
from tests.helpers.projects import ROOT
from tui.app import Workbench
from tui.config import Config, State, config_path, load_config, state_path
from tui.dialogs import Reader
from tui.panes.key_bar import KeyBar
from tui.registry import SCREENS
from tui.widgets.header import Header

LORA_TUI = str(Path(sys.executable).parent / "lora-tui")


def name_of(app: Workbench) -> str:
    return str(getattr(app.screen, "NAME", ""))


async def test_screens_by_digit_by_function_key_and_by_mouse(empty: Path) -> None:
    app = Workbench(empty / "params.yaml")
    async with app.run_test(size=(80, 24)) as pilot:
        for number, name in enumerate(SCREENS, 1):
            await pilot.press("escape", str(number))  # in Chat, a digit is a text
            await until(pilot, lambda name=name: name_of(app) == name)  # type: ignore[misc]
        for number, name in enumerate(SCREENS, 1):
            await pilot.press(f"f{number + 1}")
            await until(pilot, lambda name=name: name_of(app) == name)  # type: ignore[misc]
        await pilot.click(app.screen.query_one(Header), offset=(15, 0))
        await until(pilot, lambda: name_of(app) == "curves")


@pytest.mark.parametrize("name", SCREENS)
@pytest.mark.sampled(3)
async def test_the_keys_that_are_the_same_everywhere_are_within_80_columns(
    empty: Path, name: str
) -> None:
    app = Workbench(empty / "params.yaml")
    async with app.run_test(size=(80, 24)) as pilot:
        app.switch_mode(name)
        await until(pilot, lambda: name_of(app) == name)
        app.screen.set_focus(None)
        await until(pilot, lambda: str(app.screen.query_one(KeyBar).render()).endswith("q quit"))
        line = str(app.screen.query_one(KeyBar).render())
        assert len(line) <= 80 and "? help" in line and "Ctrl+P palette" in line


@pytest.mark.parametrize("name", SCREENS)
@pytest.mark.sampled(3)
async def test_a_change_of_the_project_is_not_shown_on_a_screen_that_closes(
    empty: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Workbench(empty / "params.yaml")
    closed = []
    async with app.run_test() as pilot:
        app.switch_mode(name)
        await until(pilot, lambda: name_of(app) == name)
        kind = type(app.screen)
        stop = getattr(kind, "on_unmount", lambda _: None)

        # a screen is told that it closes when its widgets are gone
        async def change(closing: Any) -> None:
            closed.append(name)
            app.project_watch._changed()
            if inspect.isawaitable(stopped := stop(closing)):
                await stopped

        monkeypatch.setattr(kind, "on_unmount", change, raising=False)
    assert closed == [name]


async def look_for_a_widget_that_is_gone(screen: Any) -> None:
    screen.query_one("#gone")


async def test_a_worker_that_finds_no_widget_because_the_workbench_closes_is_no_error(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Workbench(empty / "params.yaml")
    workers = []

    async def close(screen: Any, _: object) -> None:
        workers.append(screen.run_worker(look_for_a_widget_that_is_gone(screen)))
        await asyncio.sleep(0)  # it begins

    async with app.run_test() as pilot:
        app.switch_mode("curves")
        await until(pilot, lambda: name_of(app) == "curves")
        monkeypatch.setattr(type(app.screen), "on_unmount", close, raising=False)
    assert isinstance(workers[0].error, NoMatches) and app.return_code is None


async def test_a_worker_that_finds_no_widget_otherwise_is_one(empty: Path) -> None:
    app = Workbench(empty / "params.yaml")
    with pytest.raises(WorkerFailed, match="#gone"):
        async with app.run_test() as pilot:
            app.screen.run_worker(look_for_a_widget_that_is_gone(app.screen))
            await until(pilot, lambda: app.return_code)
    assert app.return_code == 1


@pytest.mark.parametrize("name", SCREENS)
@pytest.mark.sampled(3)
@pytest.mark.slow
async def test_help_lists_every_key_of_the_screen(empty: Path, name: str) -> None:
    app = Workbench(empty / "params.yaml")
    async with app.run_test(size=(120, 50)) as pilot:
        app.switch_mode(name)
        await until(pilot, lambda: name_of(app) == name)
        app.screen.set_focus(None)
        bindings = [active.binding for active in app.screen.active_bindings.values()]
        ours = [binding for binding in bindings if binding.id and binding.id.startswith(name)]
        assert all(binding.description for binding in ours)
        await pilot.press("question_mark")
        await until(pilot, lambda: type(app.screen).__name__ == "Reader")
        text = await page_of(app, pilot)
        assert all(binding.description in text for binding in ours)
        assert "up to date" in text and "palette" in text
        await pilot.press("escape")
        await until(pilot, lambda: name_of(app) == name)


async def page_of(app: Workbench, pilot: Pilot[None]) -> str:
    """The text of the page that is open, once it is laid out."""
    reader = app.screen
    assert isinstance(reader, Reader)
    await until(pilot, lambda: reader.page.plain)
    return reader.page.plain


@pytest.mark.slow
async def test_keys_are_those_of_the_config(empty: Path) -> None:
    app = Workbench(empty / "params.yaml", Config(keys={"app.curves": "b", "app.quit": "ctrl+x"}))
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("2")
        await pilot.pause()
        assert name_of(app) == "pipeline"
        await pilot.press("b")
        await until(pilot, lambda: name_of(app) == "curves")


@pytest.mark.slow
async def test_the_theme_is_remembered_and_suits_the_terminal(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLORFGBG", "0;15")
    app = Workbench(empty / "params.yaml")
    async with app.run_test() as pilot:
        assert app.theme == "lora-light"
        await pilot.press("T")
        await until(pilot, lambda: app.theme == "lora-contrast")
    again = Workbench(empty / "params.yaml")
    async with again.run_test():
        assert again.theme == "lora-contrast"
    wanted = Workbench(empty / "params.yaml", Config(theme="nord"))
    async with wanted.run_test():
        assert wanted.theme == "nord"
    unknown = Workbench(empty / "params.yaml", Config(theme="no-such"))
    async with unknown.run_test():
        assert unknown.theme == "lora-light"
        assert "Unknown theme 'no-such'" in unknown.message_history[0][2]


async def test_messages_can_be_read_again(empty: Path) -> None:
    app = Workbench(empty / "params.yaml")
    async with app.run_test(size=(80, 24)) as pilot:
        app.fail(UserError("rank must be at least 1, got [0]."))
        app.fail(OSError(28, "No space left on device", "/x/y"))
        await pilot.press("f12")
        await until(pilot, lambda: type(app.screen).__name__ == "Reader")
        text = await page_of(app, pilot)
        assert "rank must be at least 1, got [0]." in text
        assert "No space left on device: /x/y." in text


async def test_a_state_that_cannot_be_written_is_reported(empty: Path, home: Path) -> None:
    (home / "state").write_text("a file where the folder should be")
    app = Workbench(empty / "params.yaml")
    async with app.run_test() as pilot:
        await pilot.press("T")
        await until(
            pilot, lambda: any("were not saved" in text for _, _, text in app.message_history)
        )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("themes: x", "unknown field `themes`. It holds theme, keys"),
        ("[1]", "Expected `object`, got `array`"),
        ("keys: [a]", "Expected `object`, got `array` - at `$.keys`"),
        ("keys: {app.quit: 3}", "Expected `str`, got `int` - at `$.keys"),
        ("folders: x", "Expected `array`, got `str` - at `$.folders`"),
        ("theme: 3", "Expected `str | null`, got `int` - at `$.theme`"),
        ("on_hangup: die", "Invalid enum value 'die' - at `$.on_hangup`"),
        ("a: [", "cannot be read"),
    ],
)
def test_an_invalid_config_is_one_message(home: Path, text: str, reason: str) -> None:
    config_path().parent.mkdir(parents=True)
    config_path().write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(reason)):
        load_config(config_path())
    done = subprocess.run([LORA_TUI], capture_output=True, text=True, check=False, cwd=home)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_config_is_read_and_a_missing_one_is_the_defaults() -> None:
    assert load_config(config_path()) == Config()
    config_path().parent.mkdir(parents=True)
    config_path().write_text(
        "theme: nord\nfolders: [~/a]\nkeys: {app.quit: ctrl+x}\non_hangup: stop\n", encoding="utf-8"
    )
    assert load_config(config_path()) == Config("nord", {"app.quit": "ctrl+x"}, ("~/a",), "stop")


def test_a_user_without_a_home_has_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container that runs under a number, or a service whose home is /dev/null."""
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", os.devnull)
    assert load_config(config_path()) == Config()

    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    assert load_config(config_path()) == Config()


@pytest.mark.parametrize("text", ["", "[", "[]", "{}", '{"theme": 1, "folders": 3, "prompts": []}'])
def test_a_damaged_state_is_a_fresh_start(text: str) -> None:
    state_path().parent.mkdir(parents=True)
    state_path().write_text(text, encoding="utf-8")
    assert State.load(state_path()) == State()
    State("nord", ["a"], ["b"]).save(state_path())
    assert State.load(state_path()) == State("nord", ["a"], ["b"])
    assert read_json(state_path())["prompts"] == ["b"]


def test_torch_numpy_and_matplotlib_are_never_imported_by_the_first_screen() -> None:
    code = (
        "import asyncio, sys; from pathlib import Path; from tui.app import Workbench\n"
        "async def go():\n"
        "    app = Workbench(Path('params.yaml'))\n"
        "    async with app.run_test() as pilot:\n"
        "        await pilot.pause()\n"
        "        print({'torch', 'numpy', 'matplotlib', 'transformers', 'dvc'} & "
        "set(sys.modules))\n"
        "        for key in '12345678':\n"
        "            await pilot.press(key)\n"
        "            await pilot.pause()\n"
        "        print({'torch', 'transformers', 'matplotlib', 'dvc'} & set(sys.modules))\n"
        "asyncio.run(go())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["set()", "set()"]


def test_a_params_file_in_no_folder_and_the_version(home: Path) -> None:
    done = subprocess.run(
        [LORA_TUI, "--params", "no/x.yaml"], capture_output=True, text=True, check=False, cwd=home
    )
    assert (done.returncode, done.stderr) == (
        1,
        "error: no is not a folder. Name a params file with --params.\n",
    )
    done = subprocess.run([LORA_TUI, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("lora-tui 0.")


def test_a_closed_terminal_stops_the_pipeline_and_ends_the_program(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Workbench(empty / "params.yaml", Config(on_hangup="stop"))
    done: list[object] = []
    monkeypatch.setattr(app.runner, "groups", lambda: [1])
    monkeypatch.setattr(app.runner, "stop", lambda: done.append("stopped"))
    monkeypatch.setattr(os, "_exit", done.append)
    terminal, side = pty.openpty()
    os.close(terminal)
    app._end_with(side)
    os.close(side)
    assert done == ["stopped", 128 + signal.SIGHUP]


def test_the_size_is_the_terminals_whatever_a_shell_exported(empty: Path) -> None:
    """A size in the environment stays as it is when the window is resized."""
    terminal, side = pty.openpty()
    termios.tcsetwinsize(side, (24, 100))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "20", "LINES": "5"}
    process = subprocess.Popen(
        [LORA_TUI], cwd=empty, stdin=side, stdout=side, stderr=side, env=environment
    )
    os.close(side)
    screen = pyte.Screen(100, 24)
    stream, end = pyte.ByteStream(screen), time.monotonic() + 60
    try:
        # its header, in which screens have short names once the device's memory is there, and its
        # panes up to the right edge
        while not ("8 Mon" in screen.display[0] and screen.display[1].endswith("╮")):
            drawn = "\n".join(["it is drawn in another size", *screen.display])
            assert time.monotonic() < end, drawn
            if select.select([terminal], [], [], 1)[0]:
                stream.feed(os.read(terminal, 65536))
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


@pytest.mark.slow
@pytest.mark.parametrize("on_hangup", ["continue", "stop"])
def test_a_terminal_that_takes_no_output_and_closes_ends_the_program(
    empty: Path, on_hangup: str
) -> None:
    """The event loop then waits for ever until something is drawn, and serves no signal itself."""
    config_path().parent.mkdir(parents=True)
    config_path().write_text(f"on_hangup: {on_hangup}\n", encoding="utf-8")
    code = (
        "import time; from textual.drivers._writer_thread import WriterThread\n"
        "WriterThread.run = lambda _: time.sleep(1000)\n"
        "from tui.start import main; main()"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(empty)
        os.execv(sys.executable, [sys.executable, "-c", code])
    try:
        time.sleep(3)
        for key in "jk" * 60:  # each key draws, and the queue to the terminal holds thirty drawings
            os.write(terminal, key.encode())
            time.sleep(0.02)
        end = time.monotonic() + 30
        os.close(terminal)
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            assert time.monotonic() < end, "it goes on without a terminal"
            time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
