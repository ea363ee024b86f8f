"""What is known of the model under the cursor: the spectrum of ΔW, then facts; all fields of its
files on a key.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textual.content import Content

from pipeline.adapters.config import CONFIG
from pipeline.files.artifact import MANIFEST
from pipeline.files.text import in_units
from pipeline.views.model_library import Entry, Library, read_documents
from pipeline.views.models import REFUSED, UNBOUND, VERIFIED, WITHOUT_WEIGHTS
from tui.panes.lines import MUTED
from tui.screens.models.columns import Folder, kept, made, measured
from tui.widgets.cells import levels

SPECTRUM = "spectrum"  # what the engine is asked, and what it is kept as
MAX_VALUES = 12  # singular values in a sparkline
MEASURE = "m measures how much each matrix changes, and in how many directions"
NOTE = "singular values, the largest, its share of ‖ΔW‖²"
INTACT = {
    VERIFIED: "Intact: its files, and an adapter's base, are those of its manifest.",
    WITHOUT_WEIGHTS: "A demo's model: its weights are not shipped, and its answers are recorded.",
    UNBOUND: "No manifest: its base is compared by names and shapes only, when it is loaded.",
}
KINDS = {
    "base": "a base model",
    "merged": "base and adapter merged into one model",
    "checkpoint": "all weights are its own",
}
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


def read_details(library: Library, entry: Entry) -> Details:
    known = library.read(entry)
    path = known.model.path
    found = library.cache.get(library.key(SPECTRUM, path), library.stamp(known.model))
    return Details(known, *read_documents(path), found["modules"] if found else None)


def folder_lines(folder: Folder) -> Iterator[Content]:
    """A folder's models in facts."""
    facts = [f"{len(folder.entries)} models", f"{folder.unmeasured} not evaluated"]
    if best := folder.best:
        facts.append(f"{best.label} keeps the most: {kept(best):.0%}")
    yield Content(" · ".join(facts))
    hint = "Enter unfolds and folds, E evaluates them, Space chooses them for a prompt."
    yield Content.styled(hint, MUTED)


def detail_lines(details: Details) -> Iterator[Content]:
    """ΔW first, then facts, each line about one thing."""
    entry, verdict = details.entry, details.entry.verdict
    if entry.model.scales:
        yield from _spectrum(details.spectrum)
    if entry.state == REFUSED and verdict:
        yield Content.styled(f"✗ Refused: {verdict.reason}", "bold")
    if entry.apart:
        yield Content(f"● not as params.yaml says: {', '.join(entry.apart)}")
    yield Content(" · ".join(_kind(details)))
    if facts := _measured(entry):
        yield Content(" · ".join(facts))
    elif verdict and entry.model.kind == "adapter" and entry.state != REFUSED:
        yield Content("Not evaluated: E measures what it keeps and what it learned.")
    if verdict and verdict.gate:
        limits = " · ".join([f"evaluate.limits {verdict.gate}", *verdict.broken])
        yield Content.styled(limits, "bold" if verdict.broken else "")
    if entry.state in INTACT:
        yield Content(INTACT[entry.state])
    yield Content(" · ".join(_numbers(entry)))
    yield Content.styled(entry.shown_path, MUTED)


def _spectrum(spectrum: Sequence[Mapping[str, Any]] | None) -> Iterator[Content]:
    """ΔW of each module: its singular values as columns, the largest in numbers, and its share of
    ‖ΔW‖².
    """
    note = MEASURE if spectrum is None else NOTE
    yield Content.assemble(("ΔW  ", "bold"), (note, MUTED))
    for module in spectrum or ():
        values = [float(value) for value in module["values"]]
        total = sum(value * value for value in values)  # the squared Frobenius norm of ΔW
        largest = max(values, default=0.0)
        share = largest**2 / total if total else 0.0
        shape = levels(values[:MAX_VALUES]).ljust(MAX_VALUES)
        yield Content(f"    {_short(module['name']):8} {shape} {largest:.2g} {share:.0%}")


def _short(name: str) -> str:
    """model.decoder.layers.0.self_attn.q_proj is 0.q."""
    *path, last = name.split(".")
    layers = [part for part in path if part.isdigit()]
    return ".".join([*layers, last.removesuffix("_proj")])


def _kind(details: Details) -> Iterator[str]:
    """The method, and what an adapter changes in which base."""
    model, config = details.entry.model, details.config
    yield model.method or "its files are being read"
    if model.kind in KINDS:
        yield KINDS[model.kind]
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


def _measured(entry: Entry) -> list[str]:
    values = {words: measured(entry, name) for name, words in MEASURED.items()}
    return [words.format(value) for words, value in values.items() if value is not None]


def _numbers(entry: Entry) -> Iterator[str]:
    model = entry.model
    if model.parameters is not None:
        yield f"{model.parameters:,} parameters"
    yield in_units(model.size)
    if model.final_loss is not None:
        yield f"training ended at loss {model.final_loss:.3f}"
    yield f"made {made(entry)}"


def fields(details: Details) -> str:
    """All fields of its files, as Markdown."""
    files = {MANIFEST: details.manifest, CONFIG: details.config}
    pages = []
    for name, values in files.items():
        text = json.dumps(values, indent=2, ensure_ascii=False)
        pages.append(f"## {name}\n\n```json\n{text}\n```")
    return "\n\n".join(pages)
