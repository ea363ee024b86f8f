"""What is known of the model under the cursor: the spectrum of ΔW, then sentences; all fields of
its files on a key.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textual.content import Content

from pipeline.project.runner import MOST
from pipeline.views.model_library import Entry
from pipeline.views.models import REFUSED, UNBOUND, VERIFIED, WITHOUT_WEIGHTS
from tui.screens.models.columns import Folder, format_size, format_time, kept, short_targets
from tui.widgets.cells import levels

HASH_LENGTH = 12  # characters of a sha256
MAX_VALUES = 12  # singular values in a sparkline
MEASURE = "m measures how much each matrix changes, and in how many directions"
Modules = Sequence[Mapping[str, Any]]
INTACT = {
    VERIFIED: "Intact: its files, and an adapter's base, are those of its manifest.",
    WITHOUT_WEIGHTS: "A demo's model: its weights are not shipped, and its answers are recorded.",
    UNBOUND: "No manifest: its base is compared by names and shapes only, when it is loaded.",
}


@dataclass(frozen=True)
class Details:
    """A model's manifest and config, and its spectra: None until measured, a string if that is not
    possible.
    """

    entry: Entry
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    spectrum: Modules | str | None = None


def folder_lines(folder: Folder) -> Iterator[Content]:
    """A folder's models in sentences."""
    count, rest = len(folder.entries), folder.unmeasured
    text = f"{count} models, {count - rest} of them evaluated."
    if best := folder.best:
        text += f" {best.label} keeps the most: {kept(best):.0%}."
    if refused := sum(entry.state == REFUSED for entry in folder.entries):
        text += f" {refused} refused: ✗ in the list; Enter on one says why."
    yield Content(text)
    keys = "E evaluates the others, " if rest else ""
    hint = f"Enter unfolds and folds, {keys}Space chooses them for a prompt."
    yield Content.styled(hint, "$foreground-muted")


def detail_lines(details: Details, width: int) -> Iterator[Content]:
    """ΔW first, then sentences."""
    yield from _spectrum(details, width)
    entry, verdict = details.entry, details.entry.verdict
    if entry.state == REFUSED and verdict:
        yield Content.styled(f"✗ Refused: {verdict.reason}", "bold")
    if entry.apart:
        yield Content(f"● {_apart(entry)}")
    yield Content(_kind(details))
    if measured := _measured(entry):
        yield Content(measured)
    elif verdict and entry.model.kind == "adapter" and entry.state != REFUSED:
        yield Content("Not evaluated: E measures what it keeps and what it learned.")
    if verdict and verdict.gate:
        reasons = f", {'; '.join(verdict.broken)}" if verdict.broken else ""
        style = "bold" if verdict.broken else ""
        yield Content.styled(f"evaluate.limits: {verdict.gate}{reasons}.", style)
    if entry.state in INTACT:
        yield Content(INTACT[entry.state])
    yield Content(_numbers(entry))
    yield Content.styled(entry.shown_path, "$foreground-muted")


def _apart(entry: Entry) -> str:
    """How its settings differ from the params file's."""
    more = f" and {len(entry.apart) - MOST} more" if len(entry.apart) > MOST else ""
    text = f"{', '.join(entry.apart[:MOST])}{more}."
    if any("→" in reason for reason in entry.apart):
        text += " R trains it again, as params.yaml says; `lora runs apply` brings this one back."
    return text


def _spectrum(details: Details, width: int) -> Iterator[Content]:
    """ΔW of each module: its singular values as columns, the largest in numbers, and its share of
    ‖ΔW‖².
    """
    if not details.entry.model.scales:
        return
    head, spectrum = Content.styled("ΔW  ", "bold"), details.spectrum
    if spectrum is None or isinstance(spectrum, str):
        yield head + Content.styled(spectrum or MEASURE, "$foreground-muted")
        return
    cells = [_module(module) for module in spectrum]
    size = max((len(cell) for cell in cells), default=0) + 2
    across = max((width - 4) // size, 1) if size > 2 else 1
    for start in range(0, len(cells), across):
        line = "".join(cell.ljust(size) for cell in cells[start : start + across])
        yield (Content("    ") if start else head) + Content(line)
    note = "singular values, the largest, its share of ‖ΔW‖²" if cells else "no matrix is changed"
    yield Content.styled(f"    {note}", "$foreground-muted")


def _module(module: Mapping[str, Any]) -> str:
    """`0.q ▇▂▁ 0.31 92%`; model.decoder.layers.0.self_attn.q_proj is 0.q."""
    values = [float(value) for value in module["values"]]
    total = sum(value * value for value in values)  # the squared Frobenius norm of ΔW
    numbers = f"{values[0]:.2g} {values[0] ** 2 / total:.0%}" if total else "0"
    *path, last = module["name"].split(".")
    name = ".".join([*(part for part in path if part.isdigit()), last.removesuffix("_proj")])
    return f"{name} {levels(values[:MAX_VALUES])} {numbers}"


def _kind(details: Details) -> str:
    model, config, manifest = details.entry.model, details.config, details.manifest
    base = f" on {Path(model.base).name}" if model.base else ""
    if not details.entry.is_read:
        return "Its files are being read."
    if model.kind == "adapter" and model.rank is not None:
        alpha, also = config.get("lora_alpha"), config.get("modules_to_save")
        scale = f", α {alpha:g}" if isinstance(alpha, int | float) else ""
        text = f"{_method(details)} of rank {model.rank}{scale} on {short_targets(model.targets)}"
        if isinstance(also, list) and also:
            text += f"; {' and '.join(map(str, also))} trained in full"
        return f"{text}; trained{base}."
    if model.kind == "adapter":
        method = model.method.replace("_", " ").capitalize()
        return f"{method}: {', '.join(model.targets)}{base}; changes no weights."
    how = {
        "base": "A base model",
        "merged": "Base and adapter merged into one model",
        "checkpoint": f"All weights are its own: trained by {model.method}",
    }.get(model.kind, model.kind)
    counts = manifest.get("parameters")
    trained = counts.get("trainable") if isinstance(counts, dict) else None
    if isinstance(trained, int) and trained:
        how += f"; {trained:,} parameters trained"
    return f"{how}."


def _method(details: Details) -> str:
    method = details.entry.model.method
    names = {"dora": "DoRA", "lora": "LoRA"}
    is_lora = details.config.get("peft_type") == "LORA"
    return names.get(method, f"LoRA by {method.upper()}" if is_lora else method)


def _measured(entry: Entry) -> str:
    verdict = entry.verdict
    if verdict is None:
        return ""
    parts = []
    if verdict.kept is not None:
        rise = ""
        if verdict.forgetting is not None:
            rise = f" (loss on them {verdict.forgetting:+.3f} nats per token)"
        parts.append(f"Keeps {verdict.kept:.0%} of the base's answers to old sentences{rise}.")
    loss = "" if verdict.new_loss is None else f" (loss {verdict.new_loss:.3f})"
    if verdict.answered is not None:
        parts.append(f"Of its answers to new prompts {verdict.answered:.0%} are as expected{loss}.")
    elif verdict.similar is not None:
        similar = f"ROUGE-L with the expected ones {verdict.similar:.2f}{loss}"
        parts.append(f"Its answers to new prompts are long; {similar}.")
    elif verdict.learned is not None:
        parts.append(f"Completes {verdict.learned:.0%} of the new sentences{loss}.")
    elif verdict.preferred is not None:
        parts.append(f"Prefers {verdict.preferred:.0%} of the chosen answers.")
    elif verdict.new_loss is not None:
        parts.append(f"Loss on the new sentences {verdict.new_loss:.3f} nats per token.")
    return " ".join(parts)


def _numbers(entry: Entry) -> str:
    model, parts = entry.model, []
    if model.parameters is not None:
        parts.append(f"{model.parameters:,} parameters")
    if model.size:
        where = "of weights" if entry.state == WITHOUT_WEIGHTS else "on disk"
        parts.append(f"{format_size(model.size)} {where}")
    if model.final_loss is not None:
        parts.append(f"training ended at loss {model.final_loss:.3f}")
    if model.when is not None:
        parts.append(f"made {format_time(model.when)}")
    return f"{', '.join(parts)}." if parts else ""


def fields(details: Details) -> str:
    """All fields of its files, as Markdown in sections."""
    entry, manifest = details.entry, details.manifest
    unset: Sequence[Any] = (None, False, {}, [], "none")
    config = {key: value for key, value in details.config.items() if value not in unset}
    commit = {"code of commit": manifest["commit"]} if manifest.get("commit") else {}
    sections = {
        "model": {"path": entry.shown_path, "state": entry.state + entry.gate},
        "adapter": config if entry.model.kind == "adapter" else {},
        "manifest": commit,
        **{name: manifest.get(name) for name in ("parameters", "params", "inputs", "base")},
        **{name: manifest.get(name) for name in ("fingerprint", "versions")},
    }
    lines = []
    for title, pairs in sections.items():
        if isinstance(pairs, dict) and pairs:  # a file of another tool may have anything there
            lines += [f"## {title}", "", "| | |", "|---|---|"]
            short = title in ("inputs", "base", "fingerprint")
            for key, value in pairs.items():
                text = _text(value)[: HASH_LENGTH if short else None].replace("|", "\\|")
                lines.append(f"| {key} | {text} |")
            lines.append("")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
