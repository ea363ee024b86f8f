"""What is known of the model under the cursor: the spectrum of ΔW, then sentences; all fields of
its files on a key.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text
from textual.containers import VerticalScroll

from pipeline.project.runner import MOST
from pipeline.views.model_library import Entry
from pipeline.views.models import REFUSED, UNBOUND, VERIFIED, WITHOUT_WEIGHTS
from tui.screens.models.columns import format_size, format_time, short_targets
from tui.widgets.text import Lines, levels

HASH_LENGTH = 12  # characters of a sha256
MAX_VALUES = 12  # singular values in a sparkline
Modules = Sequence[Mapping[str, Any]]


@dataclass
class Details:
    """A model's manifest and config, and its spectra: None until measured, a string if that is not
    possible.
    """

    entry: Entry
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    spectrum: Modules | str | None = None


class ModelDetails(VerticalScroll):
    """Shows the details of a model; empty without one."""

    DEFAULT_CSS = "ModelDetails { height: 1fr; scrollbar-size-vertical: 1; }"

    def __init__(self) -> None:
        super().__init__()
        self._text = Lines()

    def compose(self) -> Iterator[Lines]:
        yield self._text

    def show(self, details: Details) -> None:
        self._text.show(lambda width: format_details(details, width))

    def show_folder(self, entries: Sequence[Entry]) -> None:
        """A folder's models in sentences; nothing if there are none."""
        self._text.show(lambda _: list(format_folder(entries).split("\n")) if entries else [])


def format_folder(entries: Sequence[Entry]) -> Text:
    kept = {
        entry: entry.verdict.kept
        for entry in entries
        if entry.verdict and entry.verdict.kept is not None
    }
    text = Text(f"{len(entries)} models, {len(kept)} of them evaluated.")
    if kept:
        best = max(kept, key=lambda entry: kept[entry] or 0.0)
        text.append(f" {best.label} keeps the most: {kept[best]:.0%}.")
    refused = sum(entry.state == REFUSED for entry in entries)
    text.append(f" {refused} refused: ✗ in the list; Enter on one says why." if refused else "")
    keys = "E evaluates the others, " if len(kept) < len(entries) else ""
    return text.append(f"\nEnter unfolds and folds, {keys}Space chooses them for a prompt.", "dim")


def format_details(details: Details, width: int) -> list[Text]:
    """ΔW first, then sentences."""
    return [*format_spectrum(details, width), *format_sentences(details).split("\n")]


def format_spectrum(details: Details, width: int) -> list[Text]:
    """ΔW of each module: its singular values as columns, the largest in numbers, and its share of
    ‖ΔW‖².
    """
    spectrum, head = details.spectrum, Text("ΔW  ", "bold")
    if not details.entry.model.scales:
        return []
    if spectrum is None or isinstance(spectrum, str):
        return [
            head.append(
                spectrum or "m measures how much each matrix changes, and in how many directions",
                "not bold dim",
            )
        ]
    cells = [_spectrum_cell(module) for module in spectrum]
    if not cells:
        return [head.append("no matrix is changed", "not bold dim")]
    names = max(len(name) for name, *_ in cells)
    marks = max(len(values) for _, values, _ in cells)
    size = names + marks + 15
    columns = max((width - 4) // size, 1)
    lines: list[Text] = []
    for start in range(0, len(cells), columns):
        line = head if start == 0 else Text("    ")
        for name, values, numbers in cells[start : start + columns]:
            line.append(f"{name:<{names}} {values:<{marks}} {numbers}".ljust(size), "not bold")
        lines.append(line)
    return [*lines, Text("    singular values, the largest, its share of ‖ΔW‖²", "dim")]


def _spectrum_cell(module: Mapping[str, Any]) -> tuple[str, str, str]:
    values = list(map(float, module["values"]))
    total = sum(value * value for value in values)  # the squared Frobenius norm of ΔW
    numbers = f"{values[0]:.2g} {values[0] ** 2 / total:.0%}" if total else "0"
    return short_module(module["name"]), levels(values[:MAX_VALUES]), numbers


def short_module(name: str) -> str:
    """model.decoder.layers.0.self_attn.q_proj → 0.q"""
    parts = name.split(".")
    return ".".join(
        [*(part for part in parts[:-1] if part.isdigit()), parts[-1].removesuffix("_proj")]
    )


def format_sentences(details: Details) -> Text:
    """What it is, what it kept and learned, whether its files are intact, where they are."""
    entry, verdict = details.entry, details.entry.verdict
    text = Text()
    if entry.state == REFUSED and verdict:
        text.append(f"✗ Refused: {verdict.reason}\n", "bold")
    if entry.apart:
        replaced = any("→" in reason for reason in entry.apart)
        then = (
            " R trains it again, as params.yaml says; `lora runs apply` brings this one back."
            * replaced
        )
        more = f" and {len(entry.apart) - MOST} more" * (len(entry.apart) > MOST)
        text.append(f"● {', '.join(entry.apart[:MOST])}{more}.{then}\n")
    text.append(f"{_kind(details)}\n")
    if measured := _measured(entry):
        text.append(f"{measured}\n")
    elif verdict and entry.model.kind == "adapter" and entry.state != REFUSED:
        text.append("Not evaluated: E measures what it keeps and what it learned.\n")
    if verdict and verdict.gate:
        reasons = f", {'; '.join(verdict.broken)}" if verdict.broken else ""
        text.append(
            f"evaluate.limits: {verdict.gate}{reasons}.\n", "bold" if verdict.broken else ""
        )
    if sentence := {
        VERIFIED: "Intact: its files, and an adapter's base, are those of its manifest.",
        WITHOUT_WEIGHTS: "A demo's model: its weights are not shipped, and its answers are recorded.",
        UNBOUND: "No manifest: its base is compared by names and shapes only, when it is loaded.",
    }.get(entry.state):
        text.append(f"{sentence}\n")
    text.append(f"{_numbers(details)}\n")
    return text.append(entry.shown_path, "dim")


def _kind(details: Details) -> str:
    model, config, manifest = details.entry.model, details.config, details.manifest
    base = f" on {Path(model.base).name}" if model.base else ""
    if not details.entry.is_read:
        return "Its files are being read."
    if model.kind == "adapter" and model.rank is not None:
        alpha = config.get("lora_alpha")
        other = (
            f"LoRA by {model.method.upper()}" if config.get("peft_type") == "LORA" else model.method
        )
        name = {"dora": "DoRA", "lora": "LoRA"}.get(model.method, other)
        also = config.get("modules_to_save")
        whole = (
            f"; {' and '.join(map(str, also))} trained in full"
            if isinstance(also, list) and also
            else ""
        )
        scale = f", α {alpha:g}" if isinstance(alpha, int | float) else ""
        return (
            f"{name} of rank {model.rank}{scale} on {short_targets(model.targets)}{whole}; "
            f"trained{base}."
        )
    if model.kind == "adapter":
        virtual = ", ".join(model.targets)
        return (
            f"{model.method.replace('_', ' ').capitalize()}: {virtual}{base}; changes no weights."
        )
    trained = _count(manifest, "trainable")
    how = {
        "base": "A base model",
        "merged": "Base and adapter merged into one model",
        "checkpoint": f"All weights are its own: trained by {model.method}",
    }.get(model.kind, model.kind)
    return f"{how}; {trained:,} parameters trained." if trained else f"{how}."


def _measured(entry: Entry) -> str:
    verdict = entry.verdict
    if verdict is None:
        return ""
    parts = []
    if verdict.kept is not None:
        rise = (
            ""
            if verdict.forgetting is None
            else f" (loss on them {verdict.forgetting:+.3f} nats per token)"
        )
        parts.append(f"Keeps {verdict.kept:.0%} of the base's answers to old sentences{rise}.")
    loss = "" if verdict.new_loss is None else f" (loss {verdict.new_loss:.3f})"
    if verdict.answered is not None:
        parts.append(f"Of its answers to new prompts {verdict.answered:.0%} are as expected{loss}.")
    elif verdict.similar is not None:
        parts.append(
            "Its answers to new prompts are long; ROUGE-L with the expected ones "
            f"{verdict.similar:.2f}{loss}."
        )
    elif verdict.learned is not None:
        parts.append(f"Completes {verdict.learned:.0%} of the new sentences{loss}.")
    elif verdict.preferred is not None:
        parts.append(f"Prefers {verdict.preferred:.0%} of the chosen answers.")
    elif verdict.new_loss is not None:
        parts.append(f"Loss on the new sentences {verdict.new_loss:.3f} nats per token.")
    return " ".join(parts)


def _numbers(details: Details) -> str:
    model = details.entry.model
    parts = [f"{model.parameters:,} parameters"] if model.parameters is not None else []
    where = "of weights" if details.entry.state == WITHOUT_WEIGHTS else "on disk"
    parts += [f"{format_size(model.size)} {where}"] if model.size else []
    parts += (
        [f"training ended at loss {model.final_loss:.3f}"] if model.final_loss is not None else []
    )
    parts += [f"made {format_time(model.when)}"] if model.when is not None else []
    return ", ".join(parts) + "." if parts else ""


def _count(manifest: Mapping[str, Any], key: str) -> int:
    counts = manifest.get("parameters")
    value = counts.get(key) if isinstance(counts, dict) else None
    return value if isinstance(value, int) else 0


def format_fields(details: Details) -> Text:
    """All fields of its files, as lines of `key value` in sections."""
    entry, manifest = details.entry, details.manifest
    sections: dict[str, dict[str, str]] = {
        "model": {"path": entry.shown_path, "state": entry.state + entry.gate}
    }
    if entry.model.kind == "adapter":
        unset: Sequence[Any] = (None, False, {}, [], "none")
        sections["adapter"] = _flatten(
            {key: value for key, value in details.config.items() if value not in unset}
        )
    commit = (
        {"code of commit": str(manifest["commit"])[:HASH_LENGTH]} if manifest.get("commit") else {}
    )
    sections["manifest"] = commit | _flatten(manifest.get("parameters"), "parameters ")
    sections["params"] = _flatten(manifest.get("params"))
    for name in ("inputs", "base", "fingerprint"):
        sections[name] = {
            key: value[:HASH_LENGTH] for key, value in _flatten(manifest.get(name)).items()
        }
    sections["versions"] = _flatten(manifest.get("versions"))
    text = Text()
    for title, pairs in sections.items():
        if pairs:
            width = max(map(len, pairs)) + 1
            lines = [f"  {key.ljust(width)}{value}\n" for key, value in pairs.items()]
            text.append_text(Text.assemble((f"{title}\n", "bold"), *lines))
    return text


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """The items of a mapping as texts; of anything else, which a file of another tool may have
    there, none.
    """
    items = value.items() if isinstance(value, dict) else ()
    return {f"{prefix}{key}": _text(each) for key, each in items}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
