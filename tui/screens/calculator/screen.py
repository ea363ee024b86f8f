"""The calculator: a form, and the result of `pipeline.calc`, updated at every key press."""

import asyncio
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import ClassVar

from textual import on, work
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widget import Widget
from textual.widgets import Input, Static
from textual.worker import get_current_worker

from pipeline.calc.architecture import Architecture
from pipeline.calc.fit import changes, largest
from pipeline.calc.sources.open_model import hub_ids, open_model
from pipeline.errors import UserError
from pipeline.project.params import edit
from pipeline.workbench import GRAPH, open_project
from tui.screens.base import WorkbenchScreen
from tui.screens.calculator.form import CalcForm, ModelSearch
from tui.screens.calculator.query import (
    FieldError,
    Result,
    calculate,
    differences,
    params_from_result,
    query_from_project,
    trained_model,
)
from tui.screens.calculator.result import Advice, Confirm, document_table, formulas, memory, parameters, pinned, verdict
from tui.widgets.text import Lines

PAUSE = 0.15  # seconds without a key press before the slow search starts
PINS = 2


class CalculatorScreen(WorkbenchScreen):
    """Holds the last valid result, up to PINS pinned ones, and the last model that was opened."""

    NAME: ClassVar[str] = "calculator"
    CSS_PATH = "calculator.tcss"
    AUTO_FOCUS = "#method"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("p", "pin", "Pin", id="calculator.pin"),
        Binding("P", "unpin", "Unpin", id="calculator.unpin", show=False),
        Binding("u", "use", "Use", id="calculator.use", tooltip="Write this to params.yaml"),
        Binding("d", "document", "Document", id="calculator.document"),
        Binding("e", "explain", "Explain", id="calculator.explain"),
        Binding("l", "load", "Load", id="calculator.load", tooltip="What params.yaml trains"),
        Binding("slash", "search", "Model", id="calculator.search", key_display="/"),
        Binding("g", "next_gpu", "GPU", id="calculator.gpu"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.result: Result | None = None  # the last valid one
        self.problem = ""  # the error in the form, if any
        self.pins: list[Result] = []
        self._models: dict[str, Architecture | UserError] = {}

    def body(self) -> Iterable[Widget]:
        with Horizontal(id="columns"):
            with VerticalScroll(id="form", can_focus=False):
                yield CalcForm()
                yield Lines(id="pinned")
            with VerticalScroll(id="answer"):
                yield Static(id="problem", markup=False)
                with Vertical(id="results"):
                    yield Lines(id="verdict")
                    yield Lines(id="memory")
                    yield Lines(id="parameters")

    def on_mount(self) -> None:
        self._calculate()

    @property
    def form(self) -> CalcForm:
        return self.query_one(CalcForm)

    @on(CalcForm.Changed)
    def _calculate(self) -> None:
        """Show the result for the form, or its error and the last valid result."""
        query = self.form.values
        try:
            result = calculate(query, self._get_model(query["model"].strip()))
        except UserError as error:
            self.problem = str(error)
            self.form.mark_invalid(error.field if isinstance(error, FieldError) else "model")
            last = f"\nLast valid: {self.result.title}." if self.result else ""
            self.query_one("#problem", Static).update(f"✗ {error}{last}")
        else:
            self.result, self.problem = result, ""
            self.form.mark_invalid("")
            self._show(result)
        self.query_one("#problem").set_class(bool(self.problem), "-shown")
        self.query_one("#results").set_class(bool(self.problem), "-stale")

    def _show(self, result: Result) -> None:
        # Empty fields show what they stand for.
        meant = {"sequence": result.run.sequence, "precision": result.run.precision, "alpha": self.form.values["rank"]}
        for key, value in meant.items():
            self.form.query_one(f"#{key}", Input).placeholder = str(value)
        self.query_one("#verdict", Lines).show(partial(verdict, result, None))
        self.query_one("#memory", Lines).show(partial(memory, result))
        self.query_one("#parameters", Lines).show(partial(parameters, result))
        self._show_pins()
        self._find_advice(result)

    def _show_pins(self) -> None:
        lines = self.query_one("#pinned", Lines)
        lines.display = bool(self.pins)
        if self.pins and self.result:
            lines.show(partial(pinned, self.pins, self.result))

    @work(thread=True, exclusive=True, group="advice")
    def _find_advice(self, result: Result) -> None:
        """Search for the largest values that fit, or for changes. Slow, so not at every key press."""
        worker = get_current_worker()
        time.sleep(PAUSE)
        if worker.is_cancelled:
            return
        configuration = (result.model, result.method, result.run, result.device.bytes)
        ways = [] if result.spare >= 0 else changes(*configuration, result.methods)
        fixes = [(change, peak) for change, _, _, peak in ways]
        advice = Advice(largest(*configuration), fixes)
        if not worker.is_cancelled:
            self.app.call_from_thread(self._show_advice, result, advice)

    def _show_advice(self, result: Result, advice: Advice) -> None:
        if result is self.result:
            for widget in self.query("#verdict").results(Lines):  # none while the screen closes
                widget.show(partial(verdict, result, advice))

    def _get_model(self, name: str) -> Architecture:
        """The shapes of a built-in or loaded model. Starts to load any other path, and raises FieldError meanwhile."""
        if name.lower() in hub_ids() or name.lower() in (hub_id.lower() for hub_id in hub_ids().values() if hub_id):
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
        raise FieldError("model", f"model must be a built-in name, a hub id or a path, got {name[:60]!r}.{hub}")

    @on(ModelSearch.Selected)
    def fetch(self) -> None:
        """Fetch the model from the hub if it is neither built in nor a path, and calculate again."""
        name = self.form.values["model"].strip()
        if _is_hub_id(name) and _existing_path(name) is None and name not in self._models:
            self._load_model(name, name)
        self._calculate()

    @work(thread=True, exclusive=True, group="model")
    def _load_model(self, name: str, source: str) -> None:
        """Read or fetch a model in a thread, so that a slow disk or network does not block the keys."""
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
        if result := self._current_result("pinned"):
            self.pins = [*self.pins, result][-PINS:]
            self._show_pins()

    def action_unpin(self) -> None:
        self.pins = self.pins[:-1]
        self._show_pins()

    def action_document(self) -> None:
        self.app.push_screen(document_table())

    def action_explain(self) -> None:
        if result := self._current_result("explained"):
            self.app.push_screen(formulas(result))

    def action_search(self) -> None:
        self.give_focus(self.query_one("#model"))

    def action_next_gpu(self) -> None:
        self.form.editors["gpu"].action_step(1)

    def action_load(self) -> None:
        with self.workbench.errors_shown():
            self.form.fill(query_from_project(open_project(self.workbench.params_path)))
            self.fetch()

    @work
    async def action_use(self) -> None:
        """Write the configuration to params.yaml after the user has confirmed the changes."""
        result = self._current_result("written")
        if result is None:
            return
        with self.workbench.errors_shown():
            project = open_project(self.workbench.params_path)
            model = await asyncio.to_thread(trained_model, project)
            values = params_from_result(result, project.params, model)
            path = project.home(next(iter(values)).partition(".")[0]).params_path
            changed = differences(project.params, values)
            if not changed:
                self.workbench.log_message(f"{path.name} already has these values.")
            elif await self.app.push_screen_wait(Confirm(path.name, changed)):
                edit.save(path, {key: new for key, (_, new) in changed.items()}, GRAPH.sections)
                self.workbench.log_message(f"{path.name}: {', '.join(changed)} saved.")

    def _current_result(self, action: str) -> Result | None:
        """The result for the form. None, with a warning, if a field is invalid: the last result is of other values."""
        if not self.problem and self.result:
            return self.result
        self.warn(f"Nothing was {action}: a field is invalid. {self.problem}")
        return None


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and name[:1] not in "./~"


def _existing_path(name: str) -> Path | None:
    """The path of the file or folder `name`, if it exists. Not of pipes and devices, which would block a reader."""
    try:
        path = Path(name).expanduser()
        return path if name and (path.is_file() or path.is_dir()) else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, no such home
        return None
