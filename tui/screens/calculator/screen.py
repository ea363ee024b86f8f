"""The calculator: a form, and the result of `pipeline.calc`, updated at every key press."""

import asyncio
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text
from textual import on, work
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.events import DescendantFocus, Resize
from textual.widget import Widget
from textual.widgets import Input, Static
from textual.worker import get_current_worker

from pipeline.calc.architecture import Architecture
from pipeline.calc.sources.open_model import hub_ids, open_model
from pipeline.errors import UserError
from pipeline.files.home import expand
from pipeline.stages.registry import open_project
from tui.dialogs import Ask
from tui.screens.base import WorkbenchScreen
from tui.screens.calculator.answers import Advice, advise, answers
from tui.screens.calculator.form import CalcForm, ModelSearch
from tui.screens.calculator.panes import (
    AnswerPane,
    AnswersPane,
    DetailsPane,
    MemoryPane,
    QuestionPane,
    VerdictPane,
)
from tui.screens.calculator.query import (
    DEFAULTS,
    FieldError,
    Query,
    Result,
    calculate,
    describe,
    differences,
    params_from_result,
    problems,
    query_from_project,
    trained_model,
)
from tui.screens.calculator.result import details, memory, pinned, verdict
from tui.widgets.colors import method_look, method_style
from tui.widgets.drawing import Drawing
from tui.widgets.form import format_value
from tui.widgets.units import short_count

PAUSE = 0.15  # seconds without a key press before the slow search starts
PINS = 2
HIGH = 36  # rows from which on bars and the verdict are drawn large


class CalculatorScreen(WorkbenchScreen):
    """Holds the last valid result, up to PINS pinned ones, and the last model that was opened."""

    NAME: ClassVar[str] = "calculator"
    HELP = """\
Does a training run fit on a GPU, and what does it train? The answer takes no download: parameters
are exact, the predicted peak is within 3% of the step as it is traced. No letter is a command
here, as most of the screen is text fields; Ctrl+S writes the configuration into the project's
params file, after it has said what is written.
"""
    CSS_PATH = "calculator.tcss"
    AUTO_FOCUS = "#method"
    HORIZONTAL_BREAKPOINTS = [(0, "-tiny"), (72, "-narrow"), (110, "-wide"), (170, "-huge")]  # noqa: RUF012  # Textual's
    VERTICAL_BREAKPOINTS = [(0, "-short"), (HIGH, "-high")]  # noqa: RUF012
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
        self.problems: dict[str, str] = {}  # the errors in the form, by field
        self.pins: list[Result] = []
        # what the fields hold at first: on a pretrained base what the project trains
        self._start: Query = DEFAULTS
        self._models: dict[str, Architecture | UserError] = {}
        self._drawn_for = (0, 0)  # size of the screen that the bars are drawn for

    def body(self) -> Iterable[Widget]:
        with Horizontal(id="columns"):
            yield QuestionPane(id="question")
            with Vertical(id="answer"):
                yield Static(id="problem", markup=False)
                with Vertical(id="results"):
                    yield VerdictPane(id="verdict")
                    with VerticalScroll(id="below", can_focus=False):
                        with Vertical(id="main"):
                            yield AnswersPane(id="answers")
                            yield MemoryPane(id="memory")
                        yield DetailsPane(id="details")

    def on_mount(self) -> None:
        with suppress(UserError):  # of a params file that another screen shows
            project = open_project(self.workbench.params_path)
            if project.params.origin.imports:
                self._start = query_from_project(project)
                self.form.fill(self._start)
        self._calculate()
        self.app.theme_changed_signal.subscribe(self, lambda _: self._show())

    def on_resize(self, event: Resize) -> None:
        if self.result and (event.size.width, event.size.height) != self._drawn_for:
            # Textual can lose a layout request made during a layout
            self.call_after_refresh(self._show)

    @property
    def form(self) -> CalcForm:
        return self.query_one(CalcForm)

    @on(CalcForm.Changed)
    def _calculate(self) -> None:
        """Show the result for the form, or its errors and the last valid result."""
        query, model = self.form.values, None
        try:
            model = self._get_model(query["model"].strip())
            result = calculate(query, model)
        except UserError as error:
            first = error.field if isinstance(error, FieldError) else "model"
            self.problems = {first: str(error)} | problems(query, model)
            lines = [f"✗ {text}" for text in self.problems.values()]
            last = [f"Last valid: {self.result.title}."] if self.result else []
            self.query_one("#problem", Static).update("\n".join([*lines, *last]))
        else:
            self.result, self.advice, self.problems = result, None, {}
            self._show()
            self._find_advice(result)
        self.form.mark_invalid(self.problems)
        self.query_one("#problem").set_class(bool(self.problems), "-shown")
        self.query_one("#results").set_class(bool(self.problems), "-stale")

    def _show(self) -> None:
        """Draw everything that follows from the result."""
        result = self.result
        if result is None:
            return
        # Empty fields show what they stand for.
        meant = {
            "sequence": result.run.sequence,
            "precision": result.run.precision,
            "alpha": self.form.values["rank"],
        }
        for key, value in meant.items():
            self.form.query_one(f"#{key}", Input).placeholder = str(value)
        self._drawn_for = width, height = self.size
        pane = self.query_one(VerdictPane)
        words = " parameters" if width >= 100 else ""
        pane.show_title(f"{result.model.name}, {short_count(result.model.total)}{words}")
        pane.drawing.show(partial(verdict, result, 3 if height >= HIGH and width >= 100 else 1))
        self.query_one(MemoryPane).drawing.show(
            partial(memory, result, self._look, 2 if height >= 50 else 1)
        )
        self._show_answers()
        self._show_pins()

    def _look(self, method: str) -> tuple[str, str]:
        """A method's sign and style."""
        return method_look(method).sign, method_style(
            method, self.query_one(MemoryPane).background_colors[1]
        )

    def _show_answers(self) -> None:
        if self.result:
            self.query_one(AnswersPane).drawing.show(partial(answers, self.result, self.advice))

    def _show_details(self) -> None:
        """Not at each key: their height changes with the numbers, and then everything is laid out
        again.
        """
        if self.result:
            self.query_one(DetailsPane).drawing.show(partial(details, self.result))

    def _show_pins(self) -> None:
        drawing = self.query_one("#pinned", Drawing)
        drawing.display = bool(self.pins)
        if self.pins and self.result:
            drawing.show(partial(pinned, self.pins, self.result))

    def on_descendant_focus(self, event: DescendantFocus) -> None:  # noqa: ARG002  # name given by Textual
        """Say what the focused field means."""
        if key := self.form.focused_key:
            self.query_one("#about", Static).update(describe(key))

    @work(thread=True, exclusive=True, group="advice")
    def _find_advice(self, result: Result) -> None:
        """Search for the largest values that fit, or for changes. Slow, so not at every key
        press.
        """
        worker = get_current_worker()
        time.sleep(PAUSE)
        if worker.is_cancelled:
            return
        advice = advise(result)
        if not worker.is_cancelled:
            self.app.call_from_thread(self._advice_found, result, advice)

    def _advice_found(self, result: Result, advice: Advice) -> None:
        # else another key was pressed, or the screen closes
        if result is self.result and self.is_attached:
            self.advice = advice
            self._show_answers()
            self._show_details()

    def _get_model(self, name: str) -> Architecture:
        """The shapes of a built-in or loaded model. Starts to load any other path, and raises
        FieldError meanwhile.
        """
        if name.lower() in hub_ids() or name.lower() in (
            hub_id.lower() for hub_id in hub_ids().values() if hub_id
        ):
            return open_model(name).shapes
        model = self._models.get(name)
        if isinstance(model, UserError):
            del self._models[name]  # so that the next key tries again
            raise model
        if model is not None:
            return model
        path = _existing_path(name)
        if path is not None:
            self._load_model(name, str(path))
            raise FieldError("model", f"model: {name} is being read …")
        hub = " Enter fetches it from the hub." if _is_hub_id(name) else ""
        raise FieldError(
            "model", f"model must be a built-in name, a hub id or a path, got {name[:60]!r}.{hub}"
        )

    @on(ModelSearch.Selected)
    def fetch(self) -> None:
        """Fetch the model from the hub if it is neither built in nor a path, and calculate
        again.
        """
        name = self.form.values["model"].strip()
        if _is_hub_id(name) and _existing_path(name) is None and name not in self._models:
            self._load_model(name, name)
        self._calculate()

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
            self.app.call_from_thread(self._model_loaded, name, model)

    def _model_loaded(self, name: str, model: Architecture | UserError) -> None:
        self._models = {name: model}  # only the last: a file may change later
        if self.form.values["model"].strip() == name:
            self._calculate()

    def action_pin(self) -> None:
        """Pin the configuration, or unpin it if it is pinned; the oldest makes room."""
        if result := self._current_result("pinned"):
            without = [
                pin for pin in self.pins if pin.title != result.title or pin.device != result.device
            ]
            self.pins = without if len(without) < len(self.pins) else [*self.pins, result][-PINS:]
            self._show_pins()

    def action_renew(self) -> None:
        """All fields as they were at the start, nothing pinned."""
        self.pins = []
        self.form.fill(self._start)

    def action_look(self) -> None:
        """Go to the next pane of answers, and from the last back to the form."""
        panes: list[Widget] = [*self.query(AnswerPane)]
        following = panes.index(self.focused) + 1 if self.focused in panes else 0
        self.set_focus(panes[following] if following < len(panes) else self.form.editors["method"])

    def action_next_gpu(self) -> None:
        self.form.editors["gpu"].action_step(1)

    def action_load(self) -> None:
        with self.workbench.errors_shown():
            self.form.fill(query_from_project(open_project(self.workbench.params_path)))
            self.fetch()

    @work
    async def action_write(self) -> None:
        """Write the configuration to the params file after the user has seen what is written and
        what is not.
        """
        result = self._current_result("written")
        if result is None:
            return
        with self.workbench.errors_shown():
            project = open_project(self.workbench.params_path)
            name, model = await asyncio.to_thread(trained_model, project)
            values = params_from_result(result, project.params, (name, model))
            path = project.home(next(iter(values)).partition(".")[0]).params_path
            changed = differences(project.params, values)
            if not changed:
                self.workbench.log_message(f"{path.name} already has these values.")
                return
            question = Text("\n").join(
                [
                    *(
                        Text(f"{key}: {_format_value(old)} → {_format_value(new)}")
                        for key, (old, new) in changed.items()
                    ),
                    Text(),
                    Text(f"Not written: {_not_written(result, name, model)}.", "dim"),
                ]
            )
            answers = {
                "y": (
                    f"write {'it' if len(changed) == 1 else f'these {len(changed)}'} (z takes it "
                    "back)"
                )
            }
            if await self.app.push_screen_wait(Ask(question, answers, f"Write to {path.name}")):
                self.workbench.edits.save(path, {key: new for key, (_, new) in changed.items()})
                self.workbench.log_message(
                    f"{path.name}: {', '.join(changed)} saved. z takes it back."
                )
                self.workbench.project_watch.look_now()

    def _current_result(self, action: str) -> Result | None:
        """The result for the form. None, with a warning, if a field is invalid: the last result is
        of other values.
        """
        if not self.problems and self.result:
            return self.result
        self.warn(f"Nothing was {action}: a field is invalid. {' '.join(self.problems.values())}")
        return None


def _not_written(result: Result, name: str, model: Architecture) -> str:
    """What the params file does not have, and where the project differs from the question."""
    differs = (
        ""
        if model.name == result.model.name or model.total == result.model.total
        else f", not {result.model.name}"
    )
    return f"the model (this project trains {name}{differs}), the sequence length and the GPU"


def _format_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"[{', '.join(value)}]" if isinstance(value, list) else format_value(value)


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and name[:1] not in "./~"


def _existing_path(name: str) -> Path | None:
    """The path of the file or folder `name`, if it exists. Not of pipes and devices, which would
    block a reader.
    """
    try:
        path = expand(name)
        return path if name and (path.is_file() or path.is_dir()) else None
    except (OSError, ValueError):  # too long, a NUL
        return None
