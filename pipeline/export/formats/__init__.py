"""What `lora export` writes. A format is one file here, found and not listed; reading them imports no torch."""

import pkgutil
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.project.runner import Event, Note


class Export(NamedTuple):
    """An adapter to export.

    `base`: default the one that the adapter names. `base_name`: what the files call it, default the hub id that it was
    imported from. `precision`: of merged weights, default the base's. `prompts`: a file of prompts on which the merged
    model is compared with base + adapter. `quantize`: comma-separated kinds of GGUF files, such as f16,q8_0.
    """

    adapter: Path
    base: Path | None = None
    base_name: str | None = None
    precision: str | None = None
    prompts: Path | None = None
    trust_remote_code: bool = False
    quantize: str | None = None


class Format(NamedTuple):
    """`about`: its line in `lora export --help`. `options`: the fields of `Export` that it reads beside the adapter.

    `write(export, out)` returns lines that say what was written and how it is used. Raises UserError.
    """

    order: int
    about: str
    options: tuple[str, ...]
    write: Callable[[Export, Path], Generator[Event, None, list[str]]]


def write(name: str, export: Export, out: Path) -> Generator[Event, None, list[str]]:
    """Export as the format `name`. Raises UserError, also for an option that the format does not read."""
    for option, default in Export._field_defaults.items():
        if getattr(export, option) != default and option not in FORMATS[name].options:
            readers = " or ".join(other for other, format in FORMATS.items() if option in format.options)
            raise UserError(f"--{option.replace('_', '-')} needs --format {readers}, got {name}.")
    return (yield from FORMATS[name].write(export, out))


@contextmanager
def adapter_folder(export: Export, out: Path, library: str = "peft") -> Iterator[Path]:
    """A folder for the files of an adapter that is not merged; at the end it gets a tokenizer and a card.

    `library`: the one that reads it.

    It appears at `out` whole or not at all, and replaces nothing but an earlier export. Raises UserError.
    """
    from pipeline.adapters.config import CONFIG, read_config
    from pipeline.adapters.folder import origin_of
    from pipeline.export.model_card import CARD, card, has_card
    from pipeline.weights.import_adapter import copy_tokenizer

    artifact.refuse_other(out, has_card(out) and (out / CONFIG).exists(), (export.adapter,))
    with artifact.writing(out) as folder:
        yield folder
        # The config names the base by a path of this machine. A hub id works everywhere, but not if tokens were added:
        # then the hub's model is not the base.
        origin = origin_of(export.adapter, export.base)
        names: dict[str, str | None] = {}
        if export.base_name:
            names = {"base_model_name_or_path": export.base_name, "revision": None}
        elif origin and not origin.added:
            names = {"base_model_name_or_path": origin.hub_id, "revision": origin.revision}
        if names:
            artifact.write_json(folder / CONFIG, {**read_config(folder), **names})
        copy_tokenizer(export.adapter, folder)
        (folder / CARD).write_text(card(export.adapter, None, export.base, export.base_name, library), encoding="utf-8")


def note_on_quantization(adapter: Path) -> Iterator[Note]:
    """A note if the adapter fits only a quantized base, which its files cannot say to PEFT or vLLM."""
    from pipeline.adapters.folder import quantization_of
    from pipeline.export.model_card import quantization_note

    if (kind := quantization_of(adapter)) != "none":
        advice = f"Load the base in {kind}, or export it with --format merged."
        yield Note(f"{adapter} was {quantization_note(kind)}. {advice}")


_FOUND = {
    module.name.replace("_", "-"): import_module(f"{__name__}.{module.name}").FORMAT
    for module in pkgutil.iter_modules(__path__)
}
FORMATS: Mapping[str, Format] = dict(sorted(_FOUND.items(), key=lambda item: item[1].order))
