"""`lora-tui`: four screens on one project."""

import argparse
import asyncio
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rich.segment import Segment
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.color import Color
from textual.dom import DOMNode
from textual.events import Event, Key, Paste
from textual.filter import LineFilter
from textual.screen import Screen
from textual.theme import Theme

from pipeline.errors import UserError, explain
from pipeline.files.text import OBEYED
from tui.config import Config, State, config_path, load_config, state_path
from tui.dialogs import HelpScreen, Message, MessagesScreen, Severity
from tui.registry import SCREENS
from tui.services.pipeline_process import Runner

if TYPE_CHECKING:
    from tui.services.engine_client import Inference
    from tui.services.loaded_models import LoadedModels


class _ControlCharacterFilter(LineFilter):
    """Removes control characters from everything drawn: folder names, logs and model answers are untrusted.

    Control characters have no width, so removing them keeps the layout. The command line shows each as a symbol.
    """

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:  # noqa: ARG002 (name given by Textual)
        return [
            segment
            if segment.control or segment.text.isprintable()
            else Segment("".join(c for c in segment.text if ord(c) not in OBEYED), segment.style)
            for segment in segments
        ]


CONTROL_CHARACTER_FILTER = _ControlCharacterFilter()
# A key bubbles to the app, where its action runs; its message (Input.Submitted) bubbles to the form, whose reply
# (Form.Submitted) bubbles to the screen; or a dialog that it opened gets its first focus.
KEY_ROUNDS = 3
KEY_PATIENCE = 5.0  # seconds per widget: one that hangs must not block the keyboard


class Workbench(App[None]):
    """The app: its project, saved state and message history. The screens do the rest."""

    CSS_PATH = "app.tcss"
    TITLE = "lora"
    ENABLE_COMMAND_PALETTE = True
    MODES = {name: entry.load for name, entry in SCREENS.items()}  # noqa: RUF012  # as Textual declares it
    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(f"{number},f{number + 1}", f"switch_mode('{name}')", entry.label, id=f"app.{name}", show=False)
            for number, (name, entry) in enumerate(SCREENS.items(), 1)
        ),
        Binding("question_mark", "help", "Help", id="app.help", key_display="?"),
        Binding("f8", "messages", "Messages", id="app.messages", show=False),
        Binding("f9", "toggle_dark", "Dark or light", id="app.dark", show=False),
        Binding("q", "quit", "Quit", id="app.quit"),
    ]

    def __init__(self, params: Path = Path("params.yaml"), config: Config | None = None) -> None:
        self.params_path = params.absolute()
        self.root = self.params_path.parent
        self.config = config or Config()
        self.folder_label = _abbreviate_home(self.root)
        self.runner = Runner(self.root)
        self.state = State.load(state_path())
        self.inference: Inference | None = None  # created by the first screen that prompts models, as `models` is
        self.models: LoadedModels | None = None
        self.first_screen = "pipeline"
        self.message_history: deque[Message] = deque(maxlen=1000)
        self._typed: deque[Key | Paste] = deque()  # not delivered yet
        self._delivering = False
        super().__init__()

    def on_mount(self) -> None:
        self.theme = self._initial_theme()
        self.theme_changed_signal.subscribe(self, self._remember_theme)
        self.set_keymap(self.config.keys)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._handle_hangup)
        self.switch_mode(self.first_screen)

    async def on_event(self, event: Event) -> None:
        """Queue keys and pastes, so that each is handled before the next; pass on everything else.

        Textual gives a key to the focused widget immediately. A key with a binding (Ctrl+U, Tab, Enter) then bubbles
        through the message queues of all parents to the app, where its action runs. By then the letters typed after it
        are already in the field: `abc`, Ctrl+U, `def` in one burst empties the line, and what follows a Tab lands in
        the previous field.
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
                                await asyncio.wait_for(done.wait(), KEY_PATIENCE)
        finally:
            self._delivering = False

    async def on_unmount(self) -> None:
        if self.inference:
            await self.inference.stop()

    def _handle_hangup(self) -> None:
        """The terminal was closed: stop the pipeline or let it run (`on_hangup`), then exit."""
        if self.config.on_hangup == "stop" and self.runner.groups():
            self.runner.stop()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGHUP)

    def get_line_filters(self) -> Sequence[LineFilter]:
        """Textual's filters, and one that removes control characters."""
        return [*super().get_line_filters(), CONTROL_CHARACTER_FILTER]

    def _initial_theme(self) -> str:
        """The theme of the config, else the one last chosen, else one that suits the terminal's background."""
        light = os.environ.get("COLORFGBG", "").rpartition(";")[2] in ("7", "15")
        fallback = "textual-light" if light else "textual-dark"
        wanted = self.config.theme or self.state.theme or fallback
        if wanted not in self.available_themes:
            self.log_message(f"Unknown theme {wanted!r}; using {fallback}.", "warning")
            return fallback
        return wanted

    def _remember_theme(self, theme: Theme) -> None:
        self.state.theme = theme.name
        self.remember()

    def remember(self) -> None:
        """Save the state for the next start."""
        try:
            self.state.save(state_path())
        except OSError as error:
            self.log_message(f"{state_path()}: {error.strerror}. Theme, folders and prompts were not saved.", "warning")

    def log_message(self, text: str, severity: Severity = "information") -> None:
        """Show a toast and add a line to the messages screen."""
        self.message_history.append(Message(datetime.now(), severity, text))
        self.notify(text, severity=severity, markup=False, timeout=8 if severity == "error" else 4)

    def fail(self, error: UserError | OSError) -> None:
        """Show an error to the user."""
        text = f"{explain(error)} Nothing was changed." if isinstance(error, OSError) else str(error)
        self.log_message(text, "error")

    @contextmanager
    def errors_shown(self) -> Iterator[None]:
        """Show an error that ends the block to the user, and continue after the block."""
        try:
            yield
        except (UserError, OSError) as error:
            self.fail(error)

    def action_help(self) -> None:
        if not isinstance(self.screen, HelpScreen):
            self.push_screen(HelpScreen(self.keys_of(self.screen)))

    def action_messages(self) -> None:
        if not isinstance(self.screen, MessagesScreen):
            self.push_screen(MessagesScreen(self.message_history))

    def action_toggle_dark(self) -> None:
        self.theme = "textual-light" if self.current_theme.dark else "textual-dark"

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """Textual's commands, and every key binding of the screen by its description."""
        yield from super().get_system_commands(screen)
        for keys, binding in self.keys_of(screen):
            if not binding.system:
                action = binding.action

                async def run(action: str = action) -> None:
                    await screen.run_action(action)

                yield SystemCommand(binding.description, f"key {keys}", run)

    def keys_of(self, screen: Screen[object]) -> list[tuple[str, Binding]]:
        """Keys and binding of every action of a screen: the screen's own first, then the app's, then others."""
        by_action: dict[str, tuple[list[str], Binding]] = {}
        for active in screen.active_bindings.values():
            if active.binding.description:
                keys, _ = by_action.setdefault(active.binding.action, ([], active.binding))
                keys.append(self.get_key_display(active.binding))
        rows = [(" ".join(dict.fromkeys(keys)), binding) for keys, binding in by_action.values()]
        return sorted(rows, key=lambda row: (row[1].id is None, (row[1].id or "").startswith("app.")))

    def handle_bindings_clash(self, clashed_bindings: set[Binding], node: DOMNode) -> None:
        """Warn that a key of the config was already taken: its former action has no key now."""
        lost = ", ".join(sorted(binding.id or binding.description for binding in clashed_bindings))
        self.log_message(f"{config_path().name}: conflicting keys on {node}; no key is left for {lost}.", "warning")


def _abbreviate_home(path: Path) -> str:
    """The path with ~ for the home folder."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) and path != home else str(path)


def main() -> None:
    """`lora-tui`. Exit codes as for `lora`: 0 success, 1 UserError, 2 wrong usage."""

    def port(text: str) -> int:
        if not (text.isdecimal() and 1 <= int(text) <= 65535):
            raise argparse.ArgumentTypeError(f"must be a number from 1 to 65535, got {text!r}")
        return int(text)

    parser = argparse.ArgumentParser("lora-tui", description="Watch, calculate, prompt: the LoRA workbench.")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="params file of the project")
    parser.add_argument("--web", action="store_true", help="serve the app to a browser on this machine")
    parser.add_argument("--port", type=port, default=8000, help="port of --web")
    parser.add_argument("--version", action="version", version=f"lora-tui {version('lora-workbench')}")
    arguments = parser.parse_args()
    try:
        if not arguments.params.parent.is_dir():
            raise UserError(f"{arguments.params.parent} is not a folder. Name a params file with --params.")
        config = load_config(config_path())
        if arguments.web:
            try:
                from tui.services.web import serve
            except ImportError:
                sys.exit("error: --web needs textual-serve: pip install 'lora-workbench[web]'")
            serve(arguments.params, arguments.port)
            return
    except UserError as error:
        sys.exit(f"error: {error}")
    app = Workbench(arguments.params, config)
    app.run()
    sys.exit(app.return_code or 0)
