"""`lora-tui`: the screens on one project, and the keys of all of them, such as `R` to run."""

import asyncio
import gc
import os
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from shutil import disk_usage
from threading import Thread
from typing import TYPE_CHECKING, Any, ClassVar

from rich.segment import Segment
from textual import work
from textual.app import App
from textual.binding import Binding, BindingType
from textual.color import Color
from textual.css.query import NoMatches
from textual.dom import DOMNode
from textual.events import Event, Key, Paste
from textual.filter import LineFilter
from textual.keys import format_key
from textual.reactive import reactive
from textual.screen import ModalScreen
from textual.worker import WorkerFailed

from pipeline.errors import UserError, explain, path_problem
from pipeline.files.home import from_home
from pipeline.files.text import OBEYED
from pipeline.views.stages import StageState
from tui.config import Config, State, config_path, state_path
from tui.dialogs import Ask, Message, Reader, Severity, draw_messages
from tui.panes.fields import format_value
from tui.registry import FIRST_LOOK, SCREENS, WELCOME
from tui.services.machine.readings import Machine
from tui.services.param_edits import ParamEdits
from tui.services.pipeline_process import Runner, Running
from tui.services.project_watch import ProjectWatch
from tui.services.watch import FileWatch
from tui.themes import DARK, LIGHT, THEMES, ParsedOnce
from tui.widgets.colors import look_variables
from tui.widgets.header import Header, describe_state

if TYPE_CHECKING:
    from textual.command import Provider

    from tui.services.engine_client import Inference
    from tui.services.loaded_models import LoadedModels

PARAMS, DVC = "params.yaml", "dvc.yaml"  # what makes a folder a project
TICK = 1.0  # seconds between two calls of what only the clock changes
MIN_FREE_BYTES = 2**20  # with fewer, the disk counts as full
REMOVED = dict.fromkeys(OBEYED)  # from everything drawn
INTERRUPT_TWICE = 3.0  # seconds within which a second Ctrl+C quits


class _ControlCharacterFilter(LineFilter):
    """Removes control characters from everything drawn: folder names, logs and model answers are
    untrusted.

    Control characters have no width, so removing them keeps the layout. The command line shows each
    as a symbol.
    """

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:  # noqa: ARG002 (name given by Textual)
        return [
            segment
            if segment.control or segment.text.isprintable()
            else Segment(segment.text.translate(REMOVED), segment.style)
            for segment in segments
        ]


CONTROL_CHARACTER_FILTER = _ControlCharacterFilter()
# A key bubbles to the app, where its action runs; its message (Input.Submitted) bubbles to the
# form, whose reply (Form.Submitted) bubbles to the screen; or a dialog that it opened gets its
# first focus.
KEY_ROUNDS = 3
KEY_PATIENCE = 5.0  # seconds per widget: one that hangs must not block the keyboard


def _palette() -> "type[Provider]":
    from tui.palette import Everything  # 15 ms, which the first paint should not wait for

    return Everything


class Workbench(App[None]):
    """The app: its project, services, saved state and message history. The screens do the rest."""

    CSS_PATH = Path(__file__).with_name("app.tcss")
    TITLE = "lora"
    COMMANDS = {_palette}  # noqa: RUF012  # as Textual declares it
    ALLOW_IN_MAXIMIZED_VIEW = ".-textual-system,Header,KeyBar"
    MODES = {name: entry.load for name, entry in {**SCREENS, WELCOME: FIRST_LOOK}.items()}  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(
                f"{number},f{number + 1}",
                f"switch_mode('{name}')",
                f"Go to {entry.label}",
                id=f"app.{name}",
                show=False,
            )
            for number, (name, entry) in enumerate(SCREENS.items(), 1)
        ),
        Binding("R", "run", "Run", id="app.run"),
        Binding("X", "stop", "Stop", id="app.stop"),
        Binding(
            "z", "undo", "Take back the last write to a params file", id="app.undo", show=False
        ),
        Binding("T", "next_theme", "Next theme", id="app.theme", show=False),
        Binding("f12", "messages", "Messages", id="app.messages", show=False),
        Binding("question_mark,f1", "help", "Help", id="app.help"),
        Binding(
            "ctrl+p,colon",
            "command_palette",
            "Palette",
            id="app.palette",
            priority=False,
            tooltip="palette of commands, stages, models, params, docs",
        ),
        Binding("q", "quit", "Quit", id="app.quit"),
        Binding("ctrl+c", "interrupted", "Quit (twice)", show=False, system=True),
    ]

    is_busy: reactive[bool] = reactive(False, bindings=True)  # whether something runs

    def __init__(
        self, params: Path = Path(PARAMS), config: Config | None = None, greeting: str = ""
    ) -> None:
        self.config = config or Config()
        self.machine = Machine(self._followed_processes)
        self.state = State.load(state_path())
        self.message_history: deque[Message] = deque(maxlen=1000)
        self._typed: deque[Key | Paste] = deque()  # not delivered yet
        self._delivering = False
        self._interrupted = -INTERRUPT_TWICE  # when Ctrl+C was last pressed
        self._greeting = greeting
        self._take_project(params.absolute())
        super().__init__()
        for theme in THEMES.values():
            self.register_theme(theme)
        # set after the start, it would style everything twice
        self.set_reactive(App.theme, self._initial_theme())
        self.stylesheet = ParsedOnce(self.get_css_variables())

    def _take_project(self, params: Path) -> None:
        """Everything that belongs to one project, begun anew."""
        self.params_path, self.root = params, params.parent
        self.folder_label = from_home(self.root)
        self.runner = Runner(self.root)
        self.file_watch = FileWatch(lambda text: self.call_later(self.log_message, text))
        self.project_watch = ProjectWatch(
            self.params_path,
            self.runner,
            self.file_watch,
            self._project_changed,
            self._pipeline_ended,
        )
        self.edits = ParamEdits()
        # created by the first screen that prompts, as `models` is
        self.inference: Inference | None = None
        self.models: LoadedModels | None = None
        self.first_screen = next(iter(SCREENS))

    def on_mount(self) -> None:
        wanted = self.config.theme or self.state.theme
        if wanted not in (None, self.theme):
            self.log_message(f"Unknown theme {wanted!r}; using {self.theme}.", "warning")
        self.set_keymap(self.config.keys)
        terminal = sys.__stdin__
        if self.config.on_hangup == "stop" and terminal and terminal.isatty():
            signal.signal(signal.SIGHUP, lambda *_: None)  # the thread ends the program
            Thread(target=self._end_with, args=(terminal.fileno(),), daemon=True).start()
        # A project that lost its params file says so on its screens; a folder without any part of
        # one offers some.
        is_project = self.params_path.exists() or (
            (self.root / DVC).exists() and self.params_path.name == PARAMS
        )
        self.switch_mode(self.first_screen if is_project else WELCOME)
        self.set_interval(TICK, self._tick)
        # their threads would share the time of the first paint
        self.call_after_refresh(self._start_services)

    def _start_services(self) -> None:
        if not gc.isenabled():  # see tui/start.py
            gc.freeze()  # what was imported stays, and need not be looked through again
            gc.enable()
        if not self.is_running:  # it was closed before its first frame
            return
        if self._greeting:
            self.log_message(self._greeting)
        self._start_watches()
        self.machine.start()

    def _start_watches(self) -> None:
        for watch in (self.project_watch, self.file_watch):
            self.run_worker(watch.run(), group="watch")

    async def open_project(self, params: Path, greeting: str = "") -> None:
        """Show another project in this terminal or browser: screens and services begin anew."""
        # the others are removed, and the one that is shown cannot be
        await self.switch_mode(WELCOME)
        self.workers.cancel_group(self, "watch")
        if self.inference:
            await self.inference.stop()
        self._take_project(params.absolute())
        for name in SCREENS:
            await self.remove_mode(name)
            self.add_mode(name, SCREENS[name].load)
        await self.switch_mode(self.first_screen)
        self._start_watches()
        if greeting:
            self.log_message(greeting)

    # The screens

    @property
    def base_screen(self) -> Any:
        """The `WorkbenchScreen` that is shown, perhaps below a dialog."""
        return self.screen_stack[0]

    async def shown(self, name: str) -> Any:
        """Switch to a screen, and return it once it is mounted."""
        await self.switch_mode(name)
        screen = self.base_screen
        while not screen.is_mounted:
            await asyncio.sleep(0.01)
        return screen

    @work(group="go")
    async def go(self, name: str, **request: Any) -> None:
        """Show a screen, and there what `request` asks for; each screen names its own keywords."""
        (await self.shown(name)).open_with(**request)

    def _followed_processes(self) -> dict[str, int]:
        """Processes that the monitor follows: the stage that runs, the engine, this one. Called in
        another thread.
        """
        pids = {"engine": self.inference and self.inference.pid, "lora-tui": os.getpid()}
        running = self.project_watch.running
        if running and running.run and running.run.process.is_here:
            pids = {running.stage.name: running.run.pid, **pids}
        return {name: pid for name, pid in pids.items() if pid}

    def _handle_exception(self, error: Exception) -> None:
        """While the workbench closes its screens have lost their widgets: what then looks for one
        is no error.

        What a worker says of a path that leads nowhere is a message.
        """
        cause = error.error if isinstance(error, WorkerFailed) else error
        problem = path_problem(cause)
        # else the widget whose handler failed takes no messages any more
        if problem and cause is not error:
            self.fail(problem)
        elif self.is_running or not isinstance(cause, NoMatches):
            super()._handle_exception(error)

    def _project_changed(self) -> None:
        self._tell("notice")
        watch = self.project_watch
        self.is_busy = watch.pipeline is not None or watch.running is not None

    def _tick(self) -> None:
        """The one clock: screens set no interval."""
        self._tell("tick")

    def _tell(self, method: str) -> None:
        """Update the top line of the screen that is shown, and call one of its methods."""
        for screen in self.screen_stack[:1]:  # none between two screens
            # at the start it is Textual's own; at the end it has lost its widgets
            if self.is_running and screen.is_mounted and hasattr(screen, method):
                self.refresh_header()
                screen.call_later(getattr(screen, method))

    def refresh_header(self) -> None:
        """Update the top line of the screen that is shown; it is drawn only if it changed."""
        watch = self.project_watch
        states, is_started = [*watch.states.values()], watch.pipeline is not None
        run = watch.running.run if watch.running else None
        is_stopping = run is not None and self.runner.is_stopping(run.pid)
        for header in self.base_screen.query(Header):
            header.state = describe_state(states, is_started, watch.problem, is_stopping)
            header.facts = (watch.branch, self.machine.summary(), self.folder_label)

    async def on_event(self, event: Event) -> None:
        """Queue keys and pastes, so that each is handled before the next; pass on everything else.

        Textual gives a key to the focused widget immediately. A key with a binding (Ctrl+U, Tab,
        Enter) then bubbles through the message queues of all parents to the app, where its action
        runs. By then the letters typed after it are already in the field: `abc`, Ctrl+U, `def` in
        one burst empties the line, and what follows a Tab lands in the previous field.
        """
        if not isinstance(event, Key | Paste) or event.is_forwarded:
            await super().on_event(event)
            return
        self._typed.append(event)
        if not self._delivering:
            self._delivering = True
            self.run_worker(self._deliver_typed(), group="typed")

    async def _deliver_typed(self) -> None:
        try:
            while self._typed:
                self.call_later(super().on_event, self._typed.popleft())
                for _ in range(KEY_ROUNDS):
                    # Wait for all messages queued now between the focused widget and the app.
                    for node in (self.focused or self.screen).ancestors_with_self:
                        done = asyncio.Event()
                        if node.call_later(done.set):  # False for a widget that is being removed
                            with suppress(TimeoutError):
                                async with asyncio.timeout(KEY_PATIENCE):
                                    await done.wait()
        finally:
            self._delivering = False

    # Run, stop, undo, quit

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:  # noqa: ARG002  # Textual's name
        """Without a project there is nothing to run or to stop."""
        return action not in ("run", "stop") or self._current_mode != WELCOME

    @property
    def hidden_key(self) -> str:
        """Which of `R` and `X` is not offered now. It is answered all the same: the watch learns
        later what ended.
        """
        return "app.run" if self.is_busy else "app.stop"

    def action_run(self) -> None:
        """Run `dvc repro`, in a process group of its own (services/pipeline_process.py)."""
        self.start_pipeline("repro")

    @work(group="start", exclusive=True)
    async def start_pipeline(self, *arguments: str) -> None:
        """Run `dvc ARGUMENTS`, or say why that cannot be."""
        with self.errors_shown():
            if self.project_watch.problem:
                raise UserError(f"Nothing was started: {self.project_watch.problem}")
            if self.params_path.name != PARAMS:
                raise UserError(
                    "The pipeline reads params.yaml. Start lora-tui with --params params.yaml to "
                    "run it."
                )
            # not before the first paint
            from pipeline.project.dvc_yaml import renew_code_yaml

            project = self.project_watch.project
            assert project is not None  # else there is a problem
            await asyncio.to_thread(renew_code_yaml, project)
            running = self.runner.start(arguments)
            self.log_message(f"Started: {running.command}. It continues if you quit.")
            self.project_watch.started(running)

    @work(group="ask")
    async def action_stop(self) -> None:
        if not self.runner.groups():
            self.log_message("Nothing is running.", "warning")
            return
        running = self.project_watch.running
        what = running.stage.name if running else "the run"
        question = (
            f"Stop {what}? It keeps a checkpoint, and goes on from there when it is run again."
        )
        if await self.push_screen_wait(Ask(question, {"y": "stop it"}, "Stop")):
            with self.errors_shown():
                self.log_message(self.runner.stop(), "warning")
                self.project_watch.look_now()

    def write_params(self, path: Path, values: Mapping[str, Any]) -> None:
        """Set `section.key` → value in a params file, and say so. Raises UserError, OSError."""
        self.edits.save(path, values)
        texts = [f"{key}: {format_value(value) or '(empty)'}" for key, value in values.items()]
        self.log_message(f"{', '.join(texts)} written to {path.name}. z takes it back.")
        self.project_watch.look_now()

    def action_undo(self) -> None:
        with self.errors_shown():
            self.log_message(self.edits.undo())
            self.project_watch.look_now()

    @work(group="ask", exclusive=True)
    async def action_quit(self) -> None:  # type: ignore[override]  # the worker waits for an answer
        """Quit; ask first if something would be lost."""
        screens = [stack[0] for stack in self._screen_stacks.values() if stack]
        unsaved = [getattr(screen, "unsaved", str)() for screen in screens]
        lost = [f"Quitting loses {text}." for text in unsaved if text]
        running = self.project_watch.running
        answers = {"y": "quit"}
        if running:
            lost.append(f"{running.stage.name} is running, and goes on after you quit.")
            answers = {"y": "quit, the run goes on", "s": "stop the run, then quit"}
        answer = "y"
        if lost:
            answer = await self.push_screen_wait(Ask("\n".join(lost), answers, "Quit"))
        if answer == "s":
            with self.errors_shown():
                self.runner.stop()
        if answer:
            self.exit()

    def action_interrupted(self) -> None:
        """Quit if Ctrl+C is pressed twice; a stage that runs goes on."""
        now = time.monotonic()
        if now - self._interrupted < INTERRUPT_TWICE:
            self.exit()
        self._interrupted = now
        self.log_message("Press Ctrl+C again to quit.")

    def _pipeline_ended(self, ended: Running) -> None:
        text, severity = _describe_end([*self.project_watch.states.values()], ended, self.root)
        self.log_message(text, severity)

    async def on_unmount(self) -> None:
        self.machine.stop()
        if self.inference:
            await self.inference.stop()

    def _end_with(self, terminal: int) -> None:
        """Wait for the terminal to be closed, then stop the pipeline and end the program. A thread:
        a terminal that takes no more output, as over a line that broke, blocks the event loop.
        """
        poll = select.poll()
        poll.register(terminal, 0)  # reports a hang-up alone, so this costs nothing
        poll.poll()
        if self.runner.groups():
            self.runner.stop()
        os._exit(128 + signal.SIGHUP)

    def get_line_filters(self) -> Sequence[LineFilter]:
        """Textual's filters, and one that removes control characters."""
        return [*super().get_line_filters(), CONTROL_CHARACTER_FILTER]

    def get_css_variables(self) -> dict[str, str]:
        """Textual's, and the colours of methods and runs on the theme's background."""
        variables = super().get_css_variables()
        variables |= look_variables(Color.parse(variables["background"]))
        return variables

    def _initial_theme(self) -> str:
        """The theme of the config, else the one last chosen, else one that suits the terminal's
        background.
        """
        light = os.environ.get("COLORFGBG", "").rpartition(";")[2] in ("7", "15")
        fallback = LIGHT.name if light else DARK.name
        wanted = self.config.theme or self.state.theme or fallback
        return wanted if wanted in self.available_themes else fallback

    def choose_theme(self, name: str) -> None:
        """Show a theme, now and after the next start."""
        self.theme = self.state.theme = name
        self.remember()

    def remember(self) -> None:
        """Save the state for the next start."""
        try:
            self.state.save(state_path())
        except OSError as error:
            self.log_message(
                f"{state_path()}: {error.strerror}. Theme, folders and prompts were not saved.",
                "warning",
            )

    def log_message(self, text: str, severity: Severity = "information") -> None:
        """Show a toast and add a line to the messages screen."""
        self.message_history.append(Message(datetime.now(), severity, text))
        self.notify(text, severity=severity, markup=False, timeout=8 if severity == "error" else 4)

    def fail(self, error: UserError | OSError) -> None:
        """Show an error to the user."""
        text = (
            f"{explain(error)} Nothing was changed." if isinstance(error, OSError) else str(error)
        )
        self.log_message(text, "error")

    @contextmanager
    def errors_shown(self) -> Iterator[None]:
        """Show an error that ends the block to the user, and continue after the block."""
        try:
            yield
        except (UserError, OSError) as error:
            self.fail(error)

    def action_help(self) -> None:
        if isinstance(self.screen, ModalScreen):
            return
        from tui.help import page

        self.push_screen(Reader(page(self.base_screen), "Help"))

    def action_messages(self) -> None:
        self.push_screen(Reader(partial(draw_messages, [*self.message_history]), "Messages"))

    def action_next_theme(self) -> None:
        names = list(THEMES)
        after = names.index(self.theme) + 1 if self.theme in names else 0
        self.choose_theme(names[after % len(names)])

    def get_key_display(self, binding: Binding) -> str:
        """The keys as they are written on a keyboard: Enter, Esc, Ctrl+P, F1."""
        return binding.key_display or " ".join(map(_key_name, binding.key.split(",")))

    def handle_bindings_clash(self, clashed_bindings: set[Binding], node: DOMNode) -> None:
        """Warn that a key of the config was already taken: its former action has no key now."""
        lost = ", ".join(sorted(binding.id or binding.description for binding in clashed_bindings))
        self.log_message(
            f"{config_path().name}: conflicting keys on {node}; no key is left for {lost}.",
            "warning",
        )


def _describe_end(states: Sequence[StageState], ended: Running, root: Path) -> tuple[str, Severity]:
    """How a pipeline ended, judged by the stages that it ran: older failures are not its own."""
    subject = "All stages are"
    if "--single-item" in ended.command:  # that others are out of date is no early end
        name = ended.command.split()[-1]
        states, subject = [state for state in states if state.stage.name == name], f"{name} is"
    ran = [state for state in states if state.run and state.run.started >= ended.started]
    for state in ran:
        if state.state in ("failed", "died"):
            return f"{state.stage.name} {state.state}: {', '.join(state.reasons)}", "error"
    if any(state.state == "stopped" for state in ran):
        return "Stopped. Run again to resume from the checkpoint.", "information"
    for state in ran:
        if state.broken:  # the run ended with 1 then
            return state.broken.error, "error"
    if all(state.state == "current" for state in states):
        gates = [f" {state.stage.name}: {reason}." for state in ran for reason in state.reasons]
        return f"{subject} up to date.{''.join(gates)}", "information"
    if disk_usage(root).free < MIN_FREE_BYTES:  # the log may be cut off, so say it here
        what = "The pipeline ended, and the disk is full. Free some space, then run it again."
        return what, "error"
    return "The pipeline ended early. Its log is on the screen Pipeline.", "warning"


def _key_name(key: str) -> str:
    *modifiers, last = key.split("+")
    name = last if last == "enter" else format_key(last)
    if modifiers or len(name) > 1:
        name = name.capitalize()
    return "+".join([*map(str.capitalize, modifiers), name])
