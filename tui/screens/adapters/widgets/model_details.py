"""All that the files of one model say, why it is refused, and the spectrum of each change of an adapter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.widgets import Static

from pipeline.inference.catalog import REFUSED
from tui.screens.adapters.session.catalog import Entry
from tui.screens.adapters.widgets.model_table import state
from tui.widgets.bars import levels

SHORT = 12  # characters of a sha256
STYLES = {REFUSED: "red"}


@dataclass
class Details:
    """A model's documents, and its spectrum: None until it was measured, a text if it cannot be."""

    entry: Entry
    manifest: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    spectrum: Sequence[Mapping[str, Any]] | str | None = None


class ModelDetails(VerticalScroll):
    """Scrolls; empty where there is no model."""

    DEFAULT_CSS = "ModelDetails { padding: 0 1; } ModelDetails:focus { background: $boost; }"

    def compose(self) -> ComposeResult:
        yield Static()

    def show(self, details: Details | None) -> None:
        self.query_one(Static).update(described(details) if details else "")


def described(details: Details) -> Text:
    """As lines of `key value`, lists indented."""
    entry, manifest = details.entry, details.manifest
    text = Text(f"{entry.label}  ", "bold")
    text.append(f"{entry.model.kind} · {entry.model.method} · ", "not bold")
    text.append(f"{state(entry)}\n", f"not bold {STYLES.get(state(entry), '')}")
    if entry.verdict and entry.verdict.reason:
        text.append(f"{entry.verdict.reason}\n", f"not bold {STYLES.get(state(entry), '')}")
    text.append(f"{entry.shown}\n", "not bold dim")
    if entry.model.scales:
        text.append_text(_spectrum(details.spectrum))
    if entry.model.kind == "adapter":
        text.append_text(_section("adapter", _told(details.config)))
    facts = {"commit": _short(manifest.get("commit")), **_flat(manifest.get("parameters"), "parameters ")}
    text.append_text(_section("manifest", {key: value for key, value in facts.items() if value}))
    text.append_text(_section("params", _flat(manifest.get("params"))))
    for name in ("inputs", "base", "fingerprint"):
        text.append_text(_section(name, {key: _short(value) for key, value in _flat(manifest.get(name)).items()}))
    return text.append_text(_section("versions", _flat(manifest.get("versions"))))


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    return {f"{prefix}{key}": _words(item) for key, item in value.items()} if isinstance(value, dict) else {}


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _told(config: Mapping[str, Any]) -> dict[str, str]:
    """The options of an adapter that say something: neither empty nor off."""
    return {key: _words(value) for key, value in config.items() if value not in (None, False, {}, [], "none")}


def _short(value: Any) -> str:
    return str(value or "")[:SHORT]


def _section(title: str, pairs: Mapping[str, str]) -> Text:
    if not pairs:
        return Text()
    width = max(map(len, pairs)) + 1
    lines = [f"  {key.ljust(width)}{value}\n" for key, value in pairs.items()]
    return Text.assemble((f"{title}\n", "bold"), *lines)


def _spectrum(spectrum: Sequence[Mapping[str, Any]] | str | None) -> Text:
    """A line a module: bars of the singular values, the largest, and what share of the whole it is."""
    text = Text("spectrum of ΔW", "bold")
    if spectrum is None or isinstance(spectrum, str):
        return text.append(f"  {spectrum or 'm measures it'}\n", "not bold dim")
    text.append("  singular values, largest first\n", "not bold dim")
    names = [short_module(module["name"]) for module in spectrum]
    width = max(map(len, names), default=0) + 1
    for name, module in zip(names, spectrum, strict=True):
        values = list(map(float, module["values"]))
        largest = f"{values[0]:.3g}" if values else "–"
        text.append(f"  {name.ljust(width)}{levels(values)} {largest}  first {_share(values)}\n", "not bold")
    return text


def _share(values: Sequence[float]) -> str:
    """Of the sum of squares, which is the change's squared size."""
    total = sum(value * value for value in values)
    return f"{100 * values[0] ** 2 / total:.0f}%" if total else "–"


def short_module(name: str) -> str:
    """model.decoder.layers.0.self_attn.q_proj → 0.q_proj"""
    parts = name.split(".")
    return ".".join([*(part for part in parts[:-1] if part.isdigit()), parts[-1]])
