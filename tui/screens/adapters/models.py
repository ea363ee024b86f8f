"""The table of models, and the details of the one under the cursor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.widgets import Static

from pipeline.files.text import natural_sort_key
from pipeline.inference.catalog import REFUSED, UNBOUND, VERIFIED
from tui.screens.adapters.library import CHECKING, Entry
from tui.widgets.table import Column, Table
from tui.widgets.text import levels

SIGNS = {VERIFIED: "✓", UNBOUND: "?", REFUSED: "✗", CHECKING: " "}
HASH_LENGTH = 12  # characters of a sha256


def short_targets(targets: Sequence[str]) -> str:
    return " ".join(target.removesuffix("_proj").removesuffix(" tokens") for target in targets) or "–"


def _format_number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _format_size(size: int) -> str:
    """The size in decimal units."""
    for unit, name, form in ((1e9, "GB", ".2f"), (1e6, "MB", ".1f"), (1e3, "kB", ".0f")):
        if size >= unit:
            return f"{size / unit:{form}} {name}"
    return f"{size} B"


def _format_time(when: float | None) -> str:
    return "–" if when is None else f"{datetime.fromtimestamp(when):%d %b %H:%M}"


def _forgetting(entry: Entry) -> float | None:
    return entry.verdict.forgetting if entry.verdict else None


COLUMNS: Sequence[Column[Entry]] = (
    Column("name", lambda e: e.label, lambda e: natural_sort_key(e.label)),
    Column("kind", lambda e: e.model.kind, lambda e: e.model.kind, wide=True),
    Column("method", lambda e: e.model.method.removesuffix("_tuning"), lambda e: e.model.method),
    Column("rank", lambda e: _format_number(e.model.rank, "d"), lambda e: e.model.rank, right=True),
    Column("targets", lambda e: short_targets(e.model.targets), lambda e: e.model.targets or None, wide=True),
    Column("base", lambda e: Path(e.model.base or "–").name, lambda e: e.model.base, wide=True),
    Column("params", lambda e: _format_number(e.model.parameters, ",d"), lambda e: e.model.parameters, True, True),
    Column("size", lambda e: _format_size(e.model.size), lambda e: e.model.size, right=True, wide=True),
    Column("loss", lambda e: _format_number(e.model.final_loss, ".3f"), lambda e: e.model.final_loss, right=True),
    Column("forgot", lambda e: _format_number(_forgetting(e), "+.3f"), _forgetting, right=True),
    Column("when", lambda e: _format_time(e.model.when), lambda e: e.model.when, wide=True),
    Column("state", lambda e: f"{SIGNS[e.state]} {e.state}", lambda e: e.state),
)


class ModelTable(Table[Entry]):
    """The models in the order of the pipeline, or by any column; `key` is a model's path."""

    DEFAULT_CSS = "ModelTable { height: 1fr; }"

    def __init__(self) -> None:
        styles = {REFUSED: "red", CHECKING: "dim"}
        super().__init__(COLUMNS, lambda e: e.model.path, lambda e: e.sort_key, lambda e: styles.get(e.state, ""))

    @property
    def path(self) -> Path | None:
        """The model under the cursor."""
        return self.pointed.model.path if self.pointed else None


@dataclass
class Details:
    """A model's manifest and config, and its spectra: None until measured, a string if that is not possible."""

    entry: Entry
    manifest: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    spectrum: Sequence[Mapping[str, Any]] | str | None = None


class ModelDetails(VerticalScroll):
    """Shows the details of a model; empty without one."""

    DEFAULT_CSS = "ModelDetails { padding: 0 1; } ModelDetails:focus { background: $boost; }"

    def compose(self) -> ComposeResult:
        yield Static()

    def show(self, details: Details | None) -> None:
        self.query_one(Static).update(format_details(details) if details else "")


def format_details(details: Details) -> Text:
    """The details as lines of `key value` in sections."""
    entry, manifest = details.entry, details.manifest
    style = "not bold red" if entry.state == REFUSED else "not bold"
    text = Text(f"{entry.label}  ", "bold")
    text.append(f"{entry.model.kind} · {entry.model.method} · ", "not bold").append(f"{entry.state}\n", style)
    if entry.verdict and entry.verdict.reason:
        text.append(f"{entry.verdict.reason}\n", style)
    text.append(f"{entry.shown_path}\n", "not bold dim")
    if entry.model.scales:
        text.append_text(format_spectrum(details.spectrum))
    sections: dict[str, dict[str, str]] = {}
    if entry.model.kind == "adapter":
        unset: Sequence[Any] = (None, False, {}, [], "none")
        sections["adapter"] = _flatten({key: value for key, value in details.config.items() if value not in unset})
    commit = {"commit": str(manifest["commit"])[:HASH_LENGTH]} if manifest.get("commit") else {}
    sections["manifest"] = commit | _flatten(manifest.get("parameters"), "parameters ")
    sections["params"] = _flatten(manifest.get("params"))
    for name in ("inputs", "base", "fingerprint"):
        sections[name] = {key: value[:HASH_LENGTH] for key, value in _flatten(manifest.get(name)).items()}
    sections["versions"] = _flatten(manifest.get("versions"))
    for title, pairs in sections.items():
        if pairs:
            width = max(map(len, pairs)) + 1
            lines = [f"  {key.ljust(width)}{value}\n" for key, value in pairs.items()]
            text.append_text(Text.assemble((f"{title}\n", "bold"), *lines))
    return text


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """The items of a mapping as texts; of anything else, which a file of another tool may have there, none."""
    items = value.items() if isinstance(value, dict) else ()
    return {f"{prefix}{k}": " ".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in items}


def format_spectrum(spectrum: Sequence[Mapping[str, Any]] | str | None) -> Text:
    """A line per module: sparkline of the singular values, the largest, and its share of ‖ΔW‖²."""
    text = Text("spectrum of ΔW", "bold")
    if spectrum is None or isinstance(spectrum, str):
        return text.append(f"  {spectrum or 'm measures it'}\n", "not bold dim")
    text.append("  singular values, largest first\n", "not bold dim")
    names = [short_module(module["name"]) for module in spectrum]
    width = max(map(len, names), default=0) + 1
    for name, module in zip(names, spectrum, strict=True):
        values = list(map(float, module["values"]))
        total = sum(value * value for value in values)  # the squared Frobenius norm of ΔW
        largest = f"{values[0]:.3g}" if values else "–"
        share = f"{100 * values[0] ** 2 / total:.0f}%" if total else "–"
        text.append(f"  {name.ljust(width)}{levels(values)} {largest}  first {share}\n", "not bold")
    return text


def short_module(name: str) -> str:
    """model.decoder.layers.0.self_attn.q_proj → 0.q_proj"""
    parts = name.split(".")
    return ".".join([*(part for part in parts[:-1] if part.isdigit()), parts[-1]])
