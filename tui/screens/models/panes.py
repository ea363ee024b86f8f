"""The three panes of the screen: the models, the one under the cursor, and the prompt with its
answers.
"""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Static

from pipeline.views.model_library import Entry
from tui.screens.models.columns import look_name
from tui.screens.models.details import Details, ModelDetails
from tui.screens.models.table import ModelTable
from tui.widgets.colors import method_look, method_style
from tui.widgets.pane import Pane

SEARCHING = "looking for models…"
NO_MODELS = "No models yet. R runs the pipeline, which makes some; f searches another folder."


class ModelsPane(Pane):
    TITLE = "Models"
    HELP = (
        "The pipeline's models, then a line for each folder of others. `●` is chosen, the sign and "
        "colour before the name are those of the method's curve.\n"
        "\n"
        "* **learned**: share of the answers to new prompts that are as expected (of long ones "
        "their ROUGE-L), of the new sentences that it completes, or of the chosen answers that it "
        "prefers: the first of these that is known; else the loss on new sentences, in nats per "
        "token, as in Results.\n"
        "* **kept**: share of the base's answers to old sentences that are still the same; "
        "**forgot**: how much the loss on them rose, in nats per token.\n"
        "* **loss**: mean loss of the last epoch of training.\n"
        "* **state**: `✓` the files are those that training wrote, `✗` they are not, or the model "
        "breaks a limit of `evaluate.limits`; `?` there is no manifest.\n"
        "\n"
        "Sorted or filtered, all models are in one list, whatever folder they are in."
    )
    FILTER = True
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("s", "screen.sort", "sort", id="models.sort"),
        Binding(
            "less_than_sign",
            "screen.sort_beside(-1)",
            "sort, column before",
            id="models.before",
            show=False,
        ),
        Binding(
            "greater_than_sign",
            "screen.sort_beside(1)",
            "sort, next column",
            id="models.next",
            show=False,
        ),
        Binding("E", "screen.evaluate", "evaluate", id="models.evaluate"),
        Binding("x", "screen.ship", "ship", id="models.ship"),
        Binding("p", "screen.pipeline", "pipeline's", id="models.pipeline"),
        Binding("f", "screen.folder", "folder", id="models.folder"),
        Binding("m", "screen.spectrum", "spectrum", id="models.spectrum", show=False),
        Binding("i", "screen.fields", "all fields", id="models.fields", show=False),
    ]

    def __init__(self) -> None:
        super().__init__(id="list")
        self.table = ModelTable()
        self._nothing = Static(SEARCHING, id="none", markup=False)
        self._facts: Sequence[str] = ()

    def contents(self) -> Iterable[Widget]:
        yield self._nothing
        yield self.table

    def show(
        self,
        entries: Sequence[Entry],
        chosen: Collection[Path] | None = None,
        busy: Collection[Path] | None = None,
    ) -> None:
        self._nothing.update(NO_MODELS)
        self.set_class(not entries, "-none")
        self.table.show(entries, chosen, busy)
        unchecked = sum(entry.verdict is None for entry in entries)
        self._facts = [f"{len(entries):,}", *[f"checking {unchecked:,}"] * bool(unchecked)] * bool(
            entries
        )
        self.show_title()

    def show_title(self, *facts: Content | str | Text, title: str = "") -> None:
        super().show_title(*(facts or self._facts), title=title)

    def filtered(self, text: str) -> None:
        self.table.filter(text)


class DetailsPane(Pane):
    TITLE = "Model"
    HELP = (
        "**ΔW** is what an adapter adds to each weight matrix: the columns are its singular "
        "values, the largest first. "
        "One high column means a change in one direction; the percentage is that direction's "
        "share.\n\n"
        "`m` measures it, which takes a moment, once per adapter; `i` shows all fields of its "
        "files."
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("m", "screen.spectrum", "spectrum"),
        Binding("i", "screen.fields", "all fields"),
    ]

    def __init__(self) -> None:
        super().__init__(id="details")
        self._details = ModelDetails()

    def contents(self) -> Iterable[Widget]:
        yield self._details

    def show(self, details: Details) -> None:
        name = look_name(details.entry)
        sign = method_look(name).sign
        label = details.entry.label
        self.border_title = Text.assemble(
            (f"{sign} ", method_style(name, self.background_colors[1])), label
        )
        self._details.show(details)

    def show_folder(self, entries: Sequence[Entry]) -> None:
        """What is in the folder under the cursor; nothing without one."""
        self.border_title = Text(entries[0].group if entries else self.TITLE)
        self._details.show_folder(entries)
