"""The calculator: a form, and the result of `pipeline.calc`, updated at every key press."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

from textual import on, work
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widget import Widget

from pipeline.calc.architecture import Architecture
from pipeline.calc.sources.open_model import hub_ids, open_model
from pipeline.errors import UserError
from pipeline.files.base_model import Source, parse_source
from pipeline.stages.registry import open_project
from pipeline.views.calculation import (
    Result,
    advise,
    differences,
    params_of,
    trained_model,
)
from tui.dialogs import Ask
from tui.panes.fields import format_value
from tui.panes.form import Form
from tui.panes.pane import Pane
from tui.panes.text import Text
from tui.screens.base import WorkbenchScreen
from tui.screens.calculator import about
from tui.screens.calculator.fields import DEFAULTS, FIELDS, Texts, answer, relevant, texts_of
from tui.screens.calculator.result import answers, details, memory, verdict
from tui.screens.calculator.units import short_count

PAUSE = 0.15  # seconds without a key press before the slow search starts
PINS = 2


class CalculatorScreen(WorkbenchScreen):
    """Holds the last valid result, up to PINS pinned ones, and the last model that was opened."""

    NAME = "calculator"
    PANES = about.PANES
    HELP = """\
Does a training run fit on a GPU, and what does it train? The answer takes no download: parameters
are exact, the predicted peak is within 3% of the step as it is traced. No letter is a command
here, as most of the screen is text fields; Ctrl+S writes the configuration into the project's
params file, after it has said what is written.
"""
    CSS_PATH = "calculator.tcss"
    AUTO_FOCUS = "Form, ValueInput"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "write", "write params", id="calculator.write"),
        Binding("ctrl+l", "look", "next answer", id="calculator.look"),
        Binding("ctrl+t", "pin", "pin", id="calculator.pin"),
        Binding("ctrl+o", "load", "the project's own", id="calculator.load"),
        Binding("ctrl+g", "next_gpu", "next GPU", id="calculator.gpu"),
        Binding("ctrl+n", "renew", "begin anew", id="calculator.renew"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.result: Result | None = None  # the last valid one
        self.problems: Mapping[str, str] = {}  # the errors in the form, by field
        self.pins: list[Result] = []
        self.asked: Texts = {}  # what all fields hold, also those that do not matter now
        # what they hold at first: on a pretrained base what the project trains
        self._start: Texts = DEFAULTS
        self._models: dict[str, Architecture | UserError] = {}
        self._fields = {
            key: replace(field, problem=self._why(key)) for key, field in FIELDS.items()
        }
        self.form = Form(always=True)
        self.texts = {name: Text() for name in ("verdict", "answers", "memory", "details")}
        self.problem = Text(id="problem")
        self.problem.can_focus = False

    def body(self) -> Iterable[Widget]:
        panes = {name: self.pane(name, text) for name, text in self.texts.items()}
        with Horizontal(id="columns"):
            yield self.pane("question", self.form)
            with Vertical(id="answer"):
                yield self.problem
                yield panes["verdict"]
                with VerticalScroll(id="below", can_focus=False):
                    yield Vertical(panes["answers"], panes["memory"], id="main")
                    yield panes["details"]

    def on_mount(self) -> None:
        with suppress(UserError):  # of a params file that another screen shows
            project = open_project(self.workbench.params_path)
            if project.params.origin.imports:
                self._start = texts_of(project)
        self.fill(self._start)
        self.form.point("method")

    def _why(self, key: str) -> Callable[[object], str]:
        return lambda _: self.problems.get(key, "")

    def fill(self, texts: Texts) -> None:
        """Ask another question."""
        self.asked, key = texts, self.form.key
        self._show_fields(again=False)
        self.form.point(key)
        self.calculate()

    def _show_fields(self, again: bool) -> None:
        fields = [self._fields[key] for key in relevant(self.asked)]
        self.form.show(fields, self.asked, again=again)

    @on(Form.Changed)
    def calculate(self) -> None:
        """Show the result for the form, or its errors and the last valid result."""
        self.asked = texts = {**self.asked, **self.form.texts}
        try:
            result = answer(texts, self._model(texts["model"].strip()))
        except UserError as error:
            self.problems = getattr(error, "problems", {"model": str(error)})
            self.problem.show("\n".join(f"✗ {text}" for text in self.problems.values()))
        else:
            self.result, self.problems = result, {}
            self.query("#answers, #details").add_class("-old")
            self._show(result)
            self._search(result)
            run = result.run
            # what an empty one stands for
            meant = {"sequence": str(run.sequence), "precision": run.precision}
            for key, text in {**meant, "alpha": texts["rank"]}.items():
                self._fields[key] = replace(self._fields[key], placeholder=text)
        self._show_fields(again=True)
        self.set_class(bool(self.problems), "-wrong")

    def _show(self, result: Result) -> None:
        """Show what takes no search."""
        size, pins = short_count(result.model.total), [*self.pins]
        name = result.model.name.removeprefix(f"{self.workbench.root}/")
        self.query_one("#verdict", Pane).show_title(f"{name}, {size}")
        self.texts["verdict"].show(partial(verdict, result, pins), again=True)
        self.texts["memory"].show(partial(memory, result, pins), again=True)

    @work(exclusive=True, group="search")
    async def _search(self, result: Result) -> None:
        """Search for the largest values that fit, or for changes: slow, so not at every key. What
        was found for another configuration is dim until then.
        """
        await asyncio.sleep(PAUSE)
        advice = await asyncio.to_thread(advise, result)
        self.texts["answers"].show(partial(answers, result, advice), again=True)
        # not at each key: their height changes with the numbers, and all is laid out again
        self.texts["details"].show(partial(details, result), again=True)
        self.query("#answers, #details").remove_class("-old")

    # The model

    def _model(self, name: str) -> Architecture:
        """The shapes of a built-in or loaded model. Starts to read any other path, and raises
        UserError meanwhile.
        """
        if name.lower() in {key.lower() for pair in hub_ids().items() for key in pair}:
            return open_model(name).shapes
        model = self._models.get(name)
        if isinstance(model, Architecture):
            return model
        source = _source(name, self.workbench.root)
        if model is None and source and source.is_local:
            self._load_model(name, str(source.path))
            raise UserError(f"model: {name} is being read …")
        raise model or UserError(
            f"model must be a built-in name, a path or a hub id, got {name[:60]!r}. Enter fetches a "
            "hub id."
        )

    @on(Form.Submitted)
    def fetch(self) -> None:
        """Read or fetch the model if it is not built in, and calculate again."""
        name = self.asked["model"].strip()
        source = _source(name, self.workbench.root)
        if source and not isinstance(self._models.get(name), Architecture):
            self._load_model(name, source.hub_id or str(source.path))
        self.calculate()

    @work(exclusive=True, group="model")
    async def _load_model(self, name: str, source: str) -> None:
        """Open a model in a thread, so that a slow disk or network does not block the keys."""
        model: Architecture | UserError
        try:
            model = (await asyncio.to_thread(open_model, source)).shapes
        except (UserError, OSError) as error:
            model = UserError(str(error))
        self._models = {name: model}  # only the last: a file may change later
        if self.asked["model"].strip() == name:
            self.calculate()

    # Keys

    def action_pin(self) -> None:
        """Pin the configuration, or unpin it if it is pinned; the oldest makes room."""
        result = self._current("pinned")
        if result is None:
            return
        if result in self.pins:
            self.pins.remove(result)
        else:
            self.pins = [*self.pins, result][-PINS:]
        self._show(result)

    def action_renew(self) -> None:
        """All fields as they were at the start, nothing pinned."""
        self.pins = []
        self.fill(self._start)

    def action_look(self) -> None:
        """Go to the next pane of answers, and from the last back to the form."""
        self.focus_next("#answer Text, Form, ValueInput")

    def action_next_gpu(self) -> None:
        self.form.put("gpu", FIELDS["gpu"].stepped(self.asked["gpu"], 1))

    def action_load(self) -> None:
        with self.workbench.errors_shown():
            self.fill(texts_of(open_project(self.workbench.params_path)))
            self.fetch()

    @work
    async def action_write(self) -> None:
        """Write the configuration to the params file after the user has seen what is written and
        what is not.
        """
        result = self._current("written")
        if result is None:
            return
        with self.workbench.errors_shown():
            project = open_project(self.workbench.params_path)
            name, model = await asyncio.to_thread(trained_model, project)
            values = params_of(result, project.params, (name, model))
            path = project.home(next(iter(values)).partition(".")[0]).params_path
            changed = differences(project.params, values)
            if not changed:
                self.workbench.log_message(f"{path.name} already has these values.")
                return
            lines = [
                f"{key}: {format_value(old)} → {format_value(new)}"
                for key, (old, new) in changed.items()
            ]
            others = f"the model (this project trains {name}), the sequence length and the GPU"
            question = Ask(
                "\n".join([*lines, "", f"Not written: {others}."]),
                {"y": "write it (z takes it back)"},
                f"Write to {path.name}",
            )
            if await self.app.push_screen_wait(question):
                self.workbench.write_params(path, {key: new for key, (_, new) in changed.items()})

    def _current(self, action: str) -> Result | None:
        """The result for the form. None, with a warning, if a field is invalid: the last result is
        of other values.
        """
        if not self.problems and self.result:
            return self.result
        self.warn(f"Nothing was {action}: a field is invalid. {' '.join(self.problems.values())}")
        return None


def _source(name: str, root: Path) -> Source | None:
    """The file, the folder or the model of the hub that a name refers to, as in params.yaml."""
    with suppress(UserError):
        source = parse_source(name, root)
        return source if source.hub_id or source.is_local else None
    return None
