"""The pane of the line under the cursor: the spectrum of ΔW, then facts; all fields of a model's
files on a key.
"""

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textual import work
from textual.content import Content

from pipeline.adapters.config import CONFIG
from pipeline.files.artifact import MANIFEST
from pipeline.files.text import in_units
from pipeline.views.model_library import Entry, read_documents
from pipeline.views.models import REFUSED
from tui.app import Workbench
from tui.dialogs import Reader
from tui.panes.lines import MUTED
from tui.panes.pane import Pane
from tui.panes.text import Text
from tui.screens.conversation.session import sign_of
from tui.screens.models.about import DETAILS
from tui.screens.models.columns import SIGNS, Folder, Line, made, measured
from tui.services.loaded_models import LoadedModels
from tui.widgets.cells import levels

SPECTRUM = "spectrum"  # what the engine is asked, and what it is kept as
MAX_VALUES = 12  # singular values in a sparkline
MEASURE = "m measures how much each matrix changes, and in how many directions"
NOTE = "singular values, the largest, its share of ‖ΔW‖²"
FOLDER = "Enter unfolds and folds, E evaluates them, Space chooses them for a prompt."
MEASURED = {  # of an evaluation
    "kept": "keeps {:.0%} of the base's answers",
    "forgetting": "loss on old sentences {:+.3f}",
    "answered": "{:.0%} of its answers to new prompts are as expected",
    "similar": "ROUGE-L with expected answers {:.2f}",
    "learned": "completes {:.0%} of the new sentences",
    "preferred": "prefers {:.0%} of the chosen answers",
    "new_loss": "loss on new sentences {:.3f}",
}


@dataclass(frozen=True)
class Details:
    """A model's manifest and config, and its spectra if they were measured."""

    entry: Entry
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    spectrum: Sequence[Mapping[str, Any]] | None


class DetailsPane(Pane):
    """`details` are None on a folder, and until they are read."""

    def __init__(self, workbench: Workbench, models: LoadedModels) -> None:
        self.text = Text()
        super().__init__(DETAILS, self.text, id="model")
        self._workbench, self._models = workbench, models
        self.details: Details | None = None

    @work(exclusive=True, group="details")
    async def show_line(self, line: Line) -> None:
        if isinstance(line, Folder):
            self.details = None
            self.show_title(title=line.label)
            self.text.show(Content.styled(FOLDER, MUTED))
            return
        details = self.details = await asyncio.to_thread(self._read, line)
        self.show_title(title=f"{sign_of(details.entry)[0]} {line.label}")
        self.text.show(lambda _: detail_lines(details), again=True)

    def _read(self, entry: Entry) -> Details:
        library = self._models.library
        known = library.read(entry)
        path = known.model.path
        found = library.cache.get(library.key(SPECTRUM, path), library.stamp(known.model))
        return Details(known, *read_documents(path), found["modules"] if found else None)

    def show_fields(self) -> None:
        """All fields of its files."""
        if details := self.details:
            files = {MANIFEST: details.manifest, CONFIG: details.config}
            pages = []
            for name, values in files.items():
                text = json.dumps(values, indent=2, ensure_ascii=False)
                pages.append(f"## {name}\n\n```json\n{text}\n```")
            self.app.push_screen(Reader("\n\n".join(pages), details.entry.label))

    @work(exclusive=True, group="spectrum")
    async def measure(self) -> None:
        """Measure the spectrum, once for these files."""
        details, library = self.details, self._models.library
        if not details or not details.entry.model.scales:
            only = "Only an adapter that changes weights has a spectrum. Move to a LoRA."
            self._workbench.log_message(only, "warning")
            return
        model = details.entry.model
        self._workbench.log_message(f"Measuring the spectrum of {details.entry.label}.")
        with self._workbench.errors_shown():
            stamp = await asyncio.to_thread(library.stamp, model)
            found = await self._models.inference.ask(SPECTRUM, adapter=str(model.path))
            library.cache.put(library.key(SPECTRUM, model.path), stamp, found, ())
            await asyncio.to_thread(library.cache.save)
            if self.details:
                self.show_line(self.details.entry)


def detail_lines(details: Details) -> Iterator[Content]:
    """ΔW first, then facts, each line about one thing."""
    entry, verdict = details.entry, details.entry.verdict
    if entry.model.scales:
        yield from _spectrum(details.spectrum)
    state = (verdict.reason or "intact") if verdict else entry.state
    style = "bold" if entry.state == REFUSED else ""
    yield Content.styled(f"{SIGNS[entry.state][0]} {state}", style)
    if entry.apart:
        yield Content(f"● not as params.yaml says: {', '.join(entry.apart)}")
    yield Content(" · ".join(_kind(details)))
    if facts := list(_measured(entry)):
        yield Content(" · ".join(facts))
    if verdict and verdict.gate:
        yield Content(" · ".join([f"evaluate.limits {verdict.gate}", *verdict.broken]))
    yield Content(" · ".join(_numbers(entry)))
    yield Content.styled(entry.shown_path, MUTED)


def _spectrum(spectrum: Sequence[Mapping[str, Any]] | None) -> Iterator[Content]:
    """ΔW of each module: its singular values as columns, the largest in numbers, and its share of
    ‖ΔW‖².
    """
    note = MEASURE if spectrum is None else NOTE
    yield Content.assemble(("ΔW  ", "bold"), (note, MUTED))
    for module in spectrum or ():
        values, share = module["values"], module["share_of_first"]
        shape = levels(values[:MAX_VALUES]).ljust(MAX_VALUES)
        largest = max(values, default=0.0)
        yield Content(f"    {_short(module['name']):8} {shape} {largest:.2g} {share:.0%}")


def _short(name: str) -> str:
    """model.decoder.layers.0.self_attn.q_proj is 0.q."""
    *path, last = name.split(".")
    layers = [part for part in path if part.isdigit()]
    return ".".join([*layers, last.removesuffix("_proj")])


def _kind(details: Details) -> Iterator[str]:
    """The method, and what an adapter changes in which base."""
    model, config = details.entry.model, details.config
    yield model.method
    if model.rank is not None:
        yield f"rank {model.rank}"
    if "lora_alpha" in config:
        yield f"α {config['lora_alpha']}"
    if isinstance(also := config.get("modules_to_save"), list):
        yield f"trained in full: {' '.join(map(str, also))}"
    if model.targets:
        yield " ".join(target.removesuffix("_proj") for target in model.targets)
    if model.base:
        yield f"on {Path(model.base).name}"


def _measured(entry: Entry) -> Iterator[str]:
    for name, words in MEASURED.items():
        value = measured(entry, name)
        if value is not None:
            yield words.format(value)


def _numbers(entry: Entry) -> Iterator[str]:
    model = entry.model
    if model.parameters is not None:
        yield f"{model.parameters:,} parameters"
    yield in_units(model.size)
    if model.final_loss is not None:
        yield f"training ended at loss {model.final_loss:.3f}"
    if model.weights_of:
        yield f"weights of {model.weights_of}"
    yield f"made {made(entry)}"
