"""The formats of `lora export`, one file each, found by its name. Reading them imports no torch."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.extensions import Registry
from pipeline.files import artifact
from pipeline.project.runner import Event, Note


class Export(NamedTuple):
    """An adapter to export, and the options of the command."""

    adapter: Path
    base: Path | None = None  # default: the one that the adapter names
    base_name: str | None = None  # in the files; default: the hub id that it was imported from
    precision: str | None = None  # of merged weights; default: the base's
    prompts: Path | None = None  # to compare the merged model with base + adapter on
    trust_remote_code: bool = False
    quantize: str | None = None  # comma-separated kinds of GGUF files, such as f16,q8_0

    def find_base(self) -> Path:
        """The base's folder. Raises UserError if there is none."""
        from pipeline.adapters.folder import base_of

        return self.base or base_of(self.adapter)


class Format(NamedTuple):
    """A format that an adapter can be exported to."""

    order: int
    about: str  # its line in `lora export --help`
    options: tuple[str, ...]  # the fields of `Export` that it reads beside the adapter
    # (export, out) → lines that say what was written and how it is used; raises UserError
    write: Callable[[Export, Path], Generator[Event, None, list[str]]]
    relation: str = "finetune"  # to its base, on the hub: adapter or finetune


def write(name: str, export: Export, out: Path) -> Generator[Event, None, list[str]]:
    """Export as the format `name`.

    Raises UserError, also for an option that the format does not read, and if `out` holds an export
    of another adapter.
    """
    from pipeline.export.model_card import title

    for option, default in Export._field_defaults.items():
        if getattr(export, option) != default and option not in FORMATS[name].options:
            readers = " or ".join(
                other for other, format in FORMATS.items() if option in format.options
            )
            raise UserError(f"--{option.replace('_', '-')} needs --format {readers}, got {name}.")
    yield from note_on_verdict(export.adapter)
    earlier, adapter = title(out), export.adapter.resolve().name
    if earlier and earlier != adapter and out.resolve() != export.adapter.resolve():
        raise UserError(
            f"{out} holds an export of {earlier}. Name another folder with --out, or remove it."
        )
    lines = yield from FORMATS[name].write(export, out)
    if earlier:
        yield Note(f"{out}: the earlier export of {earlier} was replaced.")
    return lines


@contextmanager
def adapter_folder(
    export: Export, out: Path, library: str | None = None, commands: Sequence[str] = ()
) -> Iterator[Path]:
    """A folder for the files of an adapter, to which a tokenizer and a card are added at the end.

    It appears at `out` whole or not at all, and replaces nothing but an earlier export. `library`:
    the one that reads it, default PEFT; `commands`: how it is used there. Raises UserError.
    """
    from pipeline.adapters.config import CONFIG, read_config
    from pipeline.adapters.folder import origin_of
    from pipeline.export.model_card import card, has_card, write_card
    from pipeline.models.save import copy_tokenizer

    artifact.refuse_other(out, has_card(out) and (out / CONFIG).exists(), (export.adapter,))
    with artifact.writing(out) as folder:
        yield folder
        # The config names the base by a path of this machine. A hub id works everywhere, unless
        # tokens were added: the hub's model is then not the base.
        origin = origin_of(export.adapter, export.base)
        names: dict[str, str | None] = {}
        if export.base_name:
            names = {"base_model_name_or_path": export.base_name, "revision": None}
        elif origin and origin.hub_id and not origin.added:
            names = {"base_model_name_or_path": origin.hub_id, "revision": origin.revision}
        if names:
            artifact.write_json(folder / CONFIG, {**read_config(folder), **names})
        copy_tokenizer(export.adapter, folder)
        if not (folder / "tokenizer.json").exists():  # trained elsewhere: PEFT saves none
            with suppress(UserError):
                copy_tokenizer(export.find_base(), folder)
        text = card(
            export.adapter, None, export.base, export.base_name, out.name, library, commands
        )
        write_card(folder, text)


def note_on_verdict(adapter: Path) -> Iterator[Note]:
    """A note if the adapter breaks evaluate.limits, by an evaluation of exactly its files."""
    from pipeline.inference.catalog import VERDICT, measured_of

    verdict = measured_of(adapter).get(VERDICT)
    if verdict and verdict.broken:
        yield Note(verdict.warning(str(adapter)))


def note_on_quantization(export: Export) -> Iterator[Note]:
    """A note if the adapter fits only a quantized base, which PEFT and vLLM cannot know."""
    from pipeline.adapters.config import read_config
    from pipeline.adapters.folder import origin_of, quantization_of
    from pipeline.export.model_card import BITSANDBYTES, quantization_note

    origin = origin_of(export.adapter, export.base)
    named = export.base or read_config(export.adapter).get("base_model_name_or_path") or "its base"
    base = export.base_name or (origin and origin.hub_id) or str(named)
    if (kind := quantization_of(export.adapter)) != "none":
        advice = f"Load {base} in {kind} ({BITSANDBYTES[kind]}), or export with --format merged."
        yield Note(f"{export.adapter} was {quantization_note(kind, base)}. {advice}")
    if origin and origin.dequantized and export.base_name:
        yield Note(
            f"{export.adapter} was trained on weights that an import dequantized from "
            f"{origin.dequantized}; on {base} in 16 bits it answers slightly differently."
        )


def note_on_base(export: Export) -> Iterator[Note]:
    """A note if the files name the base by a folder of this machine."""
    from pipeline.adapters.config import CONFIG, read_config

    if reason := unnamed_base(export):
        named = read_config(export.adapter).get("base_model_name_or_path")
        yield Note(
            f"{CONFIG} names the base by a folder of this machine, {named}: {reason}. Name the "
            "base on the hub with --base-name org/name, or export with --format merged."
        )


def unnamed_base(export: Export) -> str:
    """Why others cannot find the adapter's base by its name; empty if they can."""
    from pipeline.adapters.folder import origin_of
    from pipeline.export.model_card import hub_name

    origin = origin_of(export.adapter, export.base)
    if export.base_name or (origin and origin.hub_id and not origin.added):
        return ""
    if not (export.adapter / artifact.MANIFEST).exists() and hub_name(export.adapter, None, {}):
        return ""  # trained elsewhere, and its config names a model of the hub
    if origin and origin.added:
        return (
            f"its base has {origin.added} tokens more than "
            f"{origin.hub_id or 'the model it was imported from'}"
        )
    if origin and origin.dequantized:
        return "its base was imported from a GGUF file, not from the hub"
    return "its base was not imported from the hub"


FORMATS = Registry[Format](
    "export_format",
    order=lambda form: form.order,
    spell=lambda name: name.replace("_", "-"),
)
