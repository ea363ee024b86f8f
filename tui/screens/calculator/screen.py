"""The calculator: a form, and the result of `pipeline.calc`, updated at every key press."""

import asyncio
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import ClassVar

from textual import on, work
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widget import Widget
from textual.widgets import Static
from textual.worker import get_current_worker

from pipeline.calc.architecture import Architecture
from pipeline.calc.sources.open_model import hub_ids, open_model
from pipeline.errors import UserError
from pipeline.files.base_model import Source, parse_source
from pipeline.stages.registry import open_project
from pipeline.views.calculation import (
    Advice,
    Result,
    advise,
    differences,
    params_of,
    trained_model,
)
from tui.dialogs import Ask
from tui.panes.fields import format_value
from tui.panes.form import Form
from tui.panes.text import Text
from tui.screens.base import WorkbenchScreen
from tui.screens.calculator import about
from tui.screens.calculator.fields import (
    DEFAULTS,
    FIELDS,
    FieldError,
    Texts,
    answer,
    problems,
    relevant,
    texts_of,
)
from tui.screens.calculator.result import answers, details, memory, pinned, verdict
from tui.widgets.units import short_count

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
    HORIZONTAL_BREAKPOINTS = [(0, "-tiny"), (72, "-narrow"), (110, "-wide"), (170, "-huge")]  # noqa: RUF012  # Textual's
    VERTICAL_BREAKPOINTS = [(0, "-short"), (36, "-high")]  # noqa: RUF012
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
        self.advice: Advice | None = None  # of that result
        self.problems: Mapping[str, str] = {}  # the errors in the form, by field
        self.pins: list[Result] = []
        # what the fields hold at first: on a pretrained base what the project trains
        self._start: Texts = DEFAULTS
        self._models: dict[str, Architecture | UserError] = {}
        self.form = Form(FIELDS.values(), always=True)
        self.form.key = "method"
        self.texts = {name: Text() for name in ("verdict", "answers", "memory", "details")}
        self.pinned, self.problem = Text(id="pinned"), Static(id="problem", markup=False)
        # attributes, as messages can arrive while the screen closes
        self.panes = {name: self.pane(name, text) for name, text in self.texts.items()}

    def body(self) -> Iterable[Widget]:
        panes = self.panes
        with Horizontal(id="columns"):
            yield self.pane("question", self.form, self.pinned)
            with Vertical(id="answer"):
                yield self.problem
                with Vertical(id="results"):
                    yield panes["verdict"]
                    with VerticalScroll(id="below", can_focus=False):
                        yield Vertical(panes["answers"], panes["memory"], id="main")
                        yield panes["details"]

    def on_mount(self) -> None:
        with suppress(UserError):  # of a params file that another screen shows
            project = open_project(self.workbench.params_path)
            if project.params.origin.imports:
                self._start = texts_of(project)
        self.form.fill(self._start)

    @on(Form.Changed)
    def calculate(self) -> None:
        """Show the result for the form, or its errors and the last valid result."""
        texts, model, last, meant = dict(self.form.texts), None, self.result, dict[str, str]()
        self.form.limit(relevant(texts))
        try:
            model = self._model(texts["model"].strip())
            self.result, self.advice, self.problems = answer(texts, model), None, {}
            meant = self._show(texts["rank"])
        except UserError as error:
            first = error.field if isinstance(error, FieldError) else "model"
            self.problems = {first: str(error)} | problems(texts, model)
            lines = [f"✗ {text}" for text in self.problems.values()]
            self.problem.update(
                "\n".join([*lines, *([f"Last valid: {last.title}."] if last else [])])
            )
        self.form.annotate(self.problems, meant)
        self.set_class(bool(self.problems), "-wrong")

    def _show(self, rank: str) -> dict[str, str]:
        """Show everything that follows from the result; returns what empty fields stand for."""
        result = self.result
        assert result
        words = " parameters" if self.size.width >= 100 else ""
        title = f"{result.model.name}, {short_count(result.model.total)}{words}"
        self.panes["verdict"].show_title(title)
        self.texts["verdict"].show(partial(verdict, result), again=True)
        self.texts["memory"].show(partial(memory, result), again=True)
        self.texts["answers"].show(partial(answers, result, None), again=True)
        self._show_pins()
        self._find_advice(result)
        run = result.run
        return {"sequence": str(run.sequence), "precision": run.precision, "alpha": rank}

    def _show_pins(self) -> None:
        self.pinned.display = bool(self.pins)
        if self.pins and self.result:
            lines = pinned(self.pins, self.result)
            self.pinned.show(lambda _: lines, again=True)

    @work(thread=True, exclusive=True, group="advice")
    def _find_advice(self, result: Result) -> None:
        """Search for the largest values that fit, or for changes: slow, so not at every key."""
        worker = get_current_worker()
        time.sleep(PAUSE)
        if worker.is_cancelled:
            return
        advice = advise(result)
        if not worker.is_cancelled:
            self.app.call_from_thread(self._take_advice, result, advice)

    def _take_advice(self, result: Result, advice: Advice) -> None:
        # else another key was pressed, or the screen closes
        if result is self.result and self.is_attached:
            self.advice = advice
            self.texts["answers"].show(partial(answers, result, advice), again=True)
            # not at each key: their height changes with the numbers, and all is laid out again
            self.texts["details"].show(partial(details, result), again=True)

    # The model

    def _model(self, name: str) -> Architecture:
        """The shapes of a built-in or loaded model. Starts to load any other path, and raises
        UserError meanwhile.
        """
        if name.lower() in {key.lower() for pair in hub_ids().items() for key in pair if key}:
            return open_model(name).shapes
        model = self._models.get(name)
        if isinstance(model, UserError):
            raise model
        if model is not None:
            return model
        hub = ""
        if source := _source(name):
            if source.is_local:
                self._load_model(name, str(source.path))
                raise UserError(f"model: {name} is being read …")
            hub = " Enter fetches it from the hub."
        raise UserError(
            f"model must be a built-in name, a hub id or a path, got {name[:60]!r}.{hub}"
        )

    @on(Form.Submitted)
    def fetch(self) -> None:
        """Fetch the model from the hub if it is neither built in nor a path, and calculate
        again.
        """
        name = self.form.texts["model"].strip()
        source = _source(name)
        if isinstance(self._models.get(name), UserError):
            del self._models[name]
        if source and source.hub_id and name not in self._models:
            self._load_model(name, source.hub_id)
        self.calculate()

    @work(thread=True, exclusive=True, group="model")
    def _load_model(self, name: str, source: str) -> None:
        """Read or fetch a model in a thread, so that a slow disk or network does not block the
        keys.
        """
        worker = get_current_worker()
        model: Architecture | UserError
        try:
            model = open_model(source).shapes
        except UserError as error:
            model = error
        except OSError as error:
            model = UserError(f"{source}: {error.strerror or error}.")
        if not worker.is_cancelled:
            self.app.call_from_thread(self._take_model, name, model)

    def _take_model(self, name: str, model: Architecture | UserError) -> None:
        self._models = {name: model}  # only the last: a file may change later
        if self.form.texts["model"].strip() == name:
            self.calculate()

    # Keys

    def action_pin(self) -> None:
        """Pin the configuration, or unpin it if it is pinned; the oldest makes room."""
        if result := self._current("pinned"):
            same = [(pin.title, pin.device) == (result.title, result.device) for pin in self.pins]
            others = [pin for pin, is_same in zip(self.pins, same, strict=True) if not is_same]
            self.pins = others if any(same) else [*self.pins, result][-PINS:]
            self._show_pins()

    def action_renew(self) -> None:
        """All fields as they were at the start, nothing pinned."""
        self.pins = []
        self.form.fill(self._start)

    def action_look(self) -> None:
        """Go to the next pane of answers, and from the last back to the form."""
        panes = list(self.texts.values())
        following = panes.index(self.focused) + 1 if self.focused in panes else 0
        if following < len(panes):
            self.set_focus(panes[following])
        else:
            self.form.point("method")
            self.form.take_focus()

    def action_next_gpu(self) -> None:
        self.form.step("gpu", 1)

    def action_load(self) -> None:
        with self.workbench.errors_shown():
            self.form.fill(texts_of(open_project(self.workbench.params_path)))
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
            pairs = changed.items()
            lines = [
                f"{key}: {format_value(old)} → {format_value(new)}" for key, (old, new) in pairs
            ]
            lines += ["", f"Not written: {_not_written(result, name, model)}."]
            which = "it" if len(changed) == 1 else f"these {len(changed)}"
            question = Ask(
                "\n".join(lines), {"y": f"write {which} (z takes it back)"}, f"Write to {path.name}"
            )
            if await self.app.push_screen_wait(question):
                self.workbench.edits.save(path, {key: new for key, (_, new) in pairs})
                keys = ", ".join(changed)
                self.workbench.log_message(f"{path.name}: {keys} saved. z takes it back.")
                self.workbench.project_watch.look_now()

    def _current(self, action: str) -> Result | None:
        """The result for the form. None, with a warning, if a field is invalid: the last result is
        of other values.
        """
        if not self.problems and self.result:
            return self.result
        self.warn(f"Nothing was {action}: a field is invalid. {' '.join(self.problems.values())}")
        return None


def _not_written(result: Result, name: str, model: Architecture) -> str:
    """What the params file does not have, and where the project differs from the question."""
    same = model.name == result.model.name or model.total == result.model.total
    other = "" if same else f", not {result.model.name}"
    return f"the model (this project trains {name}{other}), the sequence length and the GPU"


def _source(name: str) -> Source | None:
    """What a name refers to: a file, a folder, a model of the hub."""
    with suppress(UserError):
        return parse_source(name, Path())
    return None
