"""The calculator: a form, and what `pipeline.calc` says of it at every key press."""

import asyncio
import time
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from textual import on, work
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widget import Widget
from textual.widgets import Static
from textual.worker import get_current_worker

from pipeline.calc.architecture import Architecture
from pipeline.calc.fit import changes, largest
from pipeline.calc.sources.open_model import hub_ids, open_model
from pipeline.errors import UserError
from pipeline.project.params import edit
from pipeline.workbench import GRAPH, open_project
from tui.screens.base import WorkbenchScreen
from tui.screens.calculator.apply_to_params import asked_for, differences, settings_of, trained_model
from tui.screens.calculator.form import CalcForm
from tui.screens.calculator.memory_bars import MemoryBars
from tui.screens.calculator.model import CalculatorQuery, FieldError, Result, calculate
from tui.screens.calculator.result import Advice, Parameters, Pinned, Verdict

PAUSE = 0.15  # seconds without a key press before the longer search begins
PINS = 2


class CalculatorScreen(WorkbenchScreen):
    """Holds the last good answer, two pinned ones, and the models that were opened from files."""

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
        self.result: Result | None = None  # the last good one
        self.problem = ""  # what is wrong with what the form holds now
        self.pins: list[Result] = []
        self._opened: dict[str, Architecture | UserError] = {}

    def body(self) -> Iterable[Widget]:
        with Horizontal(id="columns"):
            with VerticalScroll(id="asked", can_focus=False):
                yield CalcForm(CalculatorQuery())
                yield Pinned()
            with VerticalScroll(id="answer"):
                yield Static(id="problem", markup=False)
                with Vertical(id="results"):
                    yield Verdict()
                    yield MemoryBars()
                    yield Parameters()

    def on_mount(self) -> None:
        self.query_one(Pinned).display = False
        self._calculate()

    @property
    def form(self) -> CalcForm:
        return self.query_one(CalcForm)

    @on(CalcForm.Changed)
    def _calculate(self) -> None:
        """The form's answer; or what is wrong, beside the last good one."""
        asked = self.form.asked
        try:
            result = calculate(asked, self._model(asked.model.strip()))
        except UserError as error:
            self._refuse(error)
        else:
            self._show(result)

    def _show(self, result: Result) -> None:
        self.result, self.problem = result, ""
        self.form.mark(None)
        run = result.run
        self.form.hint(sequence=str(run.sequence), precision=run.precision, alpha=f"{result.method.rank}")
        self.query_one("#problem").remove_class("-shown")
        self.query_one("#results").remove_class("-stale")
        self.query_one(Verdict).tell(result, None)
        memories = {name: memory for name, (_, _, memory) in result.columns.items()}
        self.query_one(MemoryBars).compare(memories, result.chosen, result.device)
        self.query_one(Parameters).tell(result)
        if self.pins:
            self.query_one(Pinned).compare(self.pins, result)
        self._advise(result)

    def _refuse(self, error: UserError) -> None:
        self.problem = str(error)
        self.form.mark(error.field if isinstance(error, FieldError) else "model")
        last = f"\nBelow, dim: {self.result.title}." if self.result else ""
        problem = self.query_one("#problem", Static)
        problem.update(f"✗ {error}{last}")
        problem.add_class("-shown")
        self.query_one("#results").add_class("-stale")

    @work(thread=True, exclusive=True, group="advice")
    def _advise(self, result: Result) -> None:
        """The most that fits, or what to change: many questions, so not at every key press."""
        worker = get_current_worker()
        time.sleep(PAUSE)
        if worker.is_cancelled:
            return
        asked = (result.model, result.method, result.run, result.device.bytes)
        found = [] if result.spare >= 0 else [(words, peak) for words, _, _, peak in changes(*asked)]
        advice = Advice(largest(*asked), found)
        if not worker.is_cancelled:
            self.app.call_from_thread(self._advised, result, advice)

    def _advised(self, result: Result, advice: Advice) -> None:
        if result is self.result:
            for verdict in self.query(Verdict):  # none: the screen is being closed
                verdict.tell(result, advice)

    def _model(self, name: str) -> Architecture:
        """A built-in model at once; a path's when it has been read. Raises UserError until then."""
        if name.lower() in hub_ids() or name.lower() in (hub_id.lower() for hub_id in hub_ids().values() if hub_id):
            return open_model(name).shapes
        found = self._opened.pop(name, None)
        if isinstance(found, UserError):
            raise found
        if found is not None:
            self._opened[name] = found
            return found
        path = _path(name)
        if path is not None:
            self._open(name, str(path))
            raise FieldError("model", f"model: {name} is being read …")
        hub = " Enter fetches it from the hub." if name.count("/") == 1 and name[:1] not in "./~" else ""
        raise FieldError("model", f"model must be a built-in name, a hub id or a path, got {name[:60]!r}.{hub}")

    @on(CalcForm.Fetch)
    def _fetch(self) -> None:
        name = self.form.asked.model.strip()
        if name.count("/") == 1 and name[:1] not in "./~" and _path(name) is None and name not in self._opened:
            self._open(name, name)
        self._calculate()

    @work(thread=True, exclusive=True, group="model")
    def _open(self, name: str, where: str) -> None:
        """Read or fetch a model: a slow disk or network does not hold up the keys."""
        worker = get_current_worker()
        found: Architecture | UserError
        try:
            found = open_model(where).shapes
        except UserError as error:
            found = error
        except OSError as error:
            found = UserError(f"{where}: {error.strerror or error}.")
        if not worker.is_cancelled:
            self.app.call_from_thread(self._open_done, name, found)

    def _open_done(self, name: str, found: Architecture | UserError) -> None:
        self._opened = {name: found}  # one at a time: a file may be another one later
        if self.form.asked.model.strip() == name:
            self._calculate()

    def action_pin(self) -> None:
        if self._answered("pinned"):
            assert self.result is not None
            self.pins = [*self.pins, self.result][-PINS:]
            self.query_one(Pinned).compare(self.pins, self.result)

    def action_unpin(self) -> None:
        self.pins = self.pins[:-1]
        self.query_one(Pinned).compare(self.pins, self.result)

    def action_document(self) -> None:
        from tui.screens.calculator.dialogs import document_table

        self.app.push_screen(document_table())

    def action_explain(self) -> None:
        if self._answered("explained"):
            from tui.screens.calculator.dialogs import formulas

            assert self.result is not None
            self.app.push_screen(formulas(self.result))

    def action_search(self) -> None:
        self.give_focus(self.query_one("#model"))

    def action_next_gpu(self) -> None:
        self.form.step("gpu")

    def action_load(self) -> None:
        try:
            self.form.fill(asked_for(open_project(self.workbench.params_path)))
            self._fetch()
        except (UserError, OSError) as error:
            self.workbench.fail(error)

    @work
    async def action_use(self) -> None:
        """Write the configuration to params.yaml, once the user has seen what changes."""
        if not self._answered("written"):
            return
        from tui.screens.calculator.dialogs import Confirm

        try:
            asked, result, project = self.form.asked, self.result, open_project(self.workbench.params_path)
            assert result is not None
            model = await asyncio.to_thread(trained_model, project)
            values = settings_of(asked, result, project.params, model)
            path = project.home(next(iter(values)).partition(".")[0]).params_path
            changed = differences(project.params, values)
            if not changed:
                self.workbench.log_message(f"{path.name} says so already.")
            elif await self.app.push_screen_wait(Confirm(path.name, changed)):
                edit.save(path, {key: new for key, (_, new) in changed.items()}, GRAPH.sections)
                self.workbench.log_message(f"{path.name}: {', '.join(changed)} written.")
        except (UserError, OSError) as error:
            self.workbench.fail(error)

    def _answered(self, what: str) -> bool:
        """Whether the form's own answer is on screen, not the last good one; says so if not."""
        if self.problem or self.result is None:
            self.workbench.log_message(f"Nothing is {what} while a field is wrong. {self.problem}", "warning")
            return False
        return True


def _path(name: str) -> Path | None:
    """The file or folder that `name` is, if there is one; no pipe or device, which would hold up a reader."""
    try:
        path = Path(name).expanduser()
        return path if name and (path.is_file() or path.is_dir()) else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, no such home
        return None
