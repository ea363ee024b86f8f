"""The details of a model: its files' contents, why it is refused, and the spectra of an adapter's weight changes."""

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
from tui.widgets.text import levels

HASH_LENGTH = 12  # characters of a sha256
STYLES = {REFUSED: "red"}


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
    text = Text(f"{entry.label}  ", "bold")
    text.append(f"{entry.model.kind} · {entry.model.method} · ", "not bold")
    text.append(f"{state(entry)}\n", f"not bold {STYLES.get(state(entry), '')}")
    if entry.verdict and entry.verdict.reason:
        text.append(f"{entry.verdict.reason}\n", f"not bold {STYLES.get(state(entry), '')}")
    text.append(f"{entry.shown_path}\n", "not bold dim")
    if entry.model.scales:
        text.append_text(_spectrum(details.spectrum))
    if entry.model.kind == "adapter":
        text.append_text(_section("adapter", _set_options(details.config)))
    facts = {"commit": _short_hash(manifest.get("commit")), **_flatten(manifest.get("parameters"), "parameters ")}
    text.append_text(_section("manifest", {key: value for key, value in facts.items() if value}))
    text.append_text(_section("params", _flatten(manifest.get("params"))))
    for name in ("inputs", "base", "fingerprint"):
        text.append_text(
            _section(name, {key: _short_hash(value) for key, value in _flatten(manifest.get(name)).items()})
        )
    return text.append_text(_section("versions", _flatten(manifest.get("versions"))))


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    return {f"{prefix}{key}": _format_value(item) for key, item in value.items()} if isinstance(value, dict) else {}


def _format_value(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _set_options(config: Mapping[str, Any]) -> dict[str, str]:
    """The adapter's options that are set: neither empty nor off."""
    return {key: _format_value(value) for key, value in config.items() if value not in (None, False, {}, [], "none")}


def _short_hash(value: Any) -> str:
    return str(value or "")[:HASH_LENGTH]


def _section(title: str, pairs: Mapping[str, str]) -> Text:
    if not pairs:
        return Text()
    width = max(map(len, pairs)) + 1
    lines = [f"  {key.ljust(width)}{value}\n" for key, value in pairs.items()]
    return Text.assemble((f"{title}\n", "bold"), *lines)


def _spectrum(spectrum: Sequence[Mapping[str, Any]] | str | None) -> Text:
    """A line per module: sparkline of the singular values, the largest, and its share of ‖ΔW‖²."""
    text = Text("spectrum of ΔW", "bold")
    if spectrum is None or isinstance(spectrum, str):
        return text.append(f"  {spectrum or 'm measures it'}\n", "not bold dim")
    text.append("  singular values, largest first\n", "not bold dim")
    names = [short_module(module["name"]) for module in spectrum]
    width = max(map(len, names), default=0) + 1
    for name, module in zip(names, spectrum, strict=True):
        values = list(map(float, module["values"]))
        largest = f"{values[0]:.3g}" if values else "–"
        text.append(f"  {name.ljust(width)}{levels(values)} {largest}  first {_first_share(values)}\n", "not bold")
    return text


def _first_share(values: Sequence[float]) -> str:
    """The first value's share of the sum of squares, which is the squared Frobenius norm of ΔW."""
    total = sum(value * value for value in values)
    return f"{100 * values[0] ** 2 / total:.0f}%" if total else "–"


def short_module(name: str) -> str:
    """model.decoder.layers.0.self_attn.q_proj → 0.q_proj"""
    parts = name.split(".")
    return ".".join([*(part for part in parts[:-1] if part.isdigit()), parts[-1]])
