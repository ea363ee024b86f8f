"""The three panes of the screen: the models, the one under the cursor, and the prompt with its answers."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.widget import Widget
from textual.widgets import Input, Static

from tui.screens.models.answers import Answers
from tui.screens.models.columns import look_name
from tui.screens.models.details import Details, ModelDetails
from tui.screens.models.table import ModelTable
from tui.services.model_library import Entry
from tui.services.vocabulary import unknown_words
from tui.widgets.colors import method_look, method_style
from tui.widgets.pane import Pane
from tui.widgets.prompting import EngineBar, PromptInput, Slider

SEARCHING = "looking for models…"
NO_MODELS = "No models yet. R runs the pipeline, which makes some; f searches another folder."


class ModelsPane(Pane):
    TITLE = "Models"
    HELP = (
        "The pipeline's models, then a line for each folder of others. `●` is chosen, the sign and colour before the "
        "name are those of the method's curve.\n\n"
        "* **learned**: share of the new sentences that the model completes.\n"
        "* **kept**: share of the base's answers to old sentences that are still the same; **forgot**: how much the "
        "loss on them rose, in nats per token.\n"
        "* **loss**: mean loss of the last epoch of training.\n"
        "* **state**: `✓` the files are those that training wrote, `✗` they are not, `?` there is no manifest.\n\n"
        "Sorted or filtered, all models are in one list, whatever folder they are in."
    )
    FILTER = True
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("s", "screen.sort", "sort", id="models.sort"),
        Binding("less_than_sign", "screen.sort_beside(-1)", "sort, column before", id="models.before", show=False),
        Binding("greater_than_sign", "screen.sort_beside(1)", "sort, next column", id="models.next", show=False),
        Binding("E", "screen.evaluate", "evaluate", id="models.evaluate"),
        Binding("p", "screen.pipeline", "pipeline's", id="models.pipeline"),
        Binding("f", "screen.folder", "folder", id="models.folder"),
        Binding("m", "screen.spectrum", "spectrum", id="models.spectrum", show=False),
        Binding("i", "screen.fields", "all fields", id="models.fields", show=False),
    ]

    def __init__(self) -> None:
        super().__init__(id="list")
        self.table = ModelTable()
        self._nothing = Static(SEARCHING, id="none", markup=False)

    def contents(self) -> Iterable[Widget]:
        yield self._nothing
        yield self.table

    def show(
        self, entries: Sequence[Entry], chosen: Collection[Path] | None = None, busy: Collection[Path] | None = None
    ) -> None:
        self._nothing.update(NO_MODELS)
        self.set_class(not entries, "-none")
        self.table.show(entries, chosen, busy)
        unchecked = sum(entry.verdict is None for entry in entries)
        self.show_title(f"{len(entries):,}", *[f"checking {unchecked:,}"] * bool(unchecked))

    def filtered(self, text: str) -> None:
        self.table.filter(text)


class DetailsPane(Pane):
    TITLE = "Model"
    HELP = (
        "**ΔW** is what an adapter adds to each weight matrix: the columns are its singular values, the largest first. "
        "One high column means a change in one direction; the percentage is that direction's share.\n\n"
        "`m` measures it, which takes a moment, once per adapter; `i` shows all fields of its files."
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

    def show(self, details: Details | None) -> None:
        title = Text("Model")
        if details:
            name = look_name(details.entry)
            sign = method_look(name).sign
            title = Text.assemble((f"{sign} ", method_style(name, self.background_colors[1])), details.entry.label)
        self.border_title = title
        self._details.show(details)


class PromptPane(Pane):
    TITLE = "Prompt"
    HELP = (
        "Enter asks all chosen models, or the one under the cursor. The table has the most likely next tokens of each, "
        "in percent, and how that differs from the first; below are the answers.\n\n"
        "`[` and `]` weaken and strengthen an adapter: ×0 is its base, ×1 the adapter as trained. The table follows at "
        "once; answers from another strength are marked until Ctrl+R asks again. Underlined words are not in the "
        "vocabulary. `a` shows where the model looks."
    )

    def __init__(self) -> None:
        super().__init__(id="prompt")
        self.prompt, self.slider, self.answers, self.bar = PromptInput(), Slider(), Answers(), EngineBar()
        self.sampling = Static(id="sampling", markup=False)
        self._unknown = Static(id="unknown", markup=False)
        self._vocabularies: Mapping[str, Collection[str]] = {}  # by the name of the model, if it knows words only

    def contents(self) -> Iterable[Widget]:
        yield self.prompt
        yield self._unknown
        yield Horizontal(self.slider, self.sampling, id="settings")
        yield self.answers
        yield self.bar

    def show_models(self, names: Sequence[str]) -> None:
        """The models that a prompt goes to."""
        self.show_title(", ".join(names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4))

    def know(self, vocabularies: Mapping[str, Collection[str]]) -> None:
        """Mark words from now on that one of these does not have."""
        self._vocabularies = vocabularies
        self.prompt.mark(lambda text: [span for words in vocabularies.values() for span in unknown_words(text, words)])
        self._show_unknown(self.prompt.value)

    @on(Input.Changed, "PromptInput")
    def _check_words(self, event: Input.Changed) -> None:
        self._show_unknown(event.value)

    def _show_unknown(self, text: str) -> None:
        """Say once which words are unknown, and to which of several models."""
        missing: dict[str, list[str]] = {}
        for name, words in self._vocabularies.items():
            for start, stop in unknown_words(text, words):
                missing.setdefault(text[start:stop], []).append(name)
        parts = [
            word if len(names) == len(self._vocabularies) else f"{word} ({', '.join(names[:3])})"
            for word, names in missing.items()
        ]
        self._unknown.update(f"not in the vocabulary: {', '.join(parts)}")
        self._unknown.display = bool(parts)
