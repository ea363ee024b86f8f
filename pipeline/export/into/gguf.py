"""A merge into a quantized GGUF file: llama.cpp chooses the scales, and GPTQ the codes."""

import shutil
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.export import llama_cpp
from pipeline.export.formats import Export
from pipeline.export.formats import gguf as gguf_format
from pipeline.export.into import ENTRY, Into
from pipeline.export.into.models import Job, Logits, Opens, measure
from pipeline.export.into.update import Stored, survival
from pipeline.project.runner import Event, Note
from pipeline.weights.blocks import stored_name

if TYPE_CHECKING:
    from pipeline.export.gguf.writer import Model, Source


def write(export: Export, into: Into, out: Path) -> Generator[Event, None, None]:
    """Write `out` as `lora export --format gguf` does, with what rounding cost.

    Raises UserError.
    """
    if not llama_cpp.is_installed():
        raise UserError(
            f"--into {into.kind} quantizes and measures with llama.cpp. Run `{llama_cpp.INSTALL}`."
        )
    finish = partial(_finish, export, into)
    yield from gguf_format.write(export._replace(quantize=into.kind), out, finish)


def _finish(
    export: Export, into: Into, files: gguf_format.Files
) -> Generator[Event, None, dict[str, Any]]:
    """Round the file anew where that is asked for; measure it beside the base's and the adapter."""
    from pipeline.export.gguf.writer import describe_model

    merge, written = files.model.merge, files.paths[into.kind]
    unchanged = replace(merge, edits={}, copies={}, unties=False)
    plain = describe_model(unchanged, export.trust_remote_code, own_head=merge.unties)
    with TemporaryDirectory(dir=written.parent) as folder:
        base, nearest = Path(folder, "base.gguf"), written
        yield from _write_base(base, plain, files, into.kind)
        tensors = dict[str, Any]()
        if into.rounding == "gptq":
            nearest = Path(folder, "nearest.gguf")
            shutil.copyfile(written, nearest)
            tensors = _tensors(written, "r+")
        by_rounding = {"nearest": nearest, into.rounding: written}
        models = {"base": _opens(base)}
        models |= {rounding: _opens(path) for rounding, path in by_rounding.items()}
        adapter = Path(folder, "adapter.gguf")
        try:
            _write_adapter(adapter, export, files)
            models["apart"] = _opens(base, adapter)
        except UserError as error:
            yield Note(f"The adapter beside a quantized base was not measured. {error}")
        job = Job(export, into, files.base, files.reading)
        measured = yield from measure(job, models, partial(_round_matrix, tensors, files.model))
        updates = {
            rounding: dict(survivals(files.model, plain, base, path))
            for rounding, path in by_rounding.items()
        }
    how = {"kind": into.kind, "rounding": into.rounding}
    return {ENTRY: {**how, "update": updates, **measured}}


def _write_base(
    path: Path, plain: "Model", files: gguf_format.Files, kind: str
) -> Generator[Event, None, None]:
    """The base in `kind`, made as the merged file was."""
    from pipeline.export.gguf.writer import write_files

    if kind in gguf_format.KINDS:
        yield from write_files({path: kind}, plain, files.metadata)
        return
    wide = path.with_name("wide.gguf")
    yield from write_files({wide: files.widest}, plain, files.metadata)
    yield from llama_cpp.quantize(wide, path, kind)
    wide.unlink()


def _write_adapter(path: Path, export: Export, files: gguf_format.Files) -> None:
    """Raises UserError for what llama.cpp's --lora cannot hold."""
    from pipeline.export.gguf.adapter import write_adapter
    from pipeline.models.load import skeleton
    from pipeline.weights.combine import low_rank_updates

    trust = export.trust_remote_code
    updates = low_rank_updates(files.base, export.adapter, trust, reading=files.reading)
    write_adapter(path, updates, skeleton(files.base, trust), {"general.name": "adapter"})


def _opens(model: Path, adapter: Path | None = None) -> Opens:
    @contextmanager
    def opened() -> Iterator[Logits]:
        with llama_cpp.LlamaCpp(model, adapter) as runner:
            yield runner.logits

    return opened


def _tensors(path: Path, mode: Literal["r", "r+"] = "r") -> dict[str, Any]:
    """The file's tensors by name; in the mode r+, what is written to their data is in the file."""
    import gguf

    return {tensor.name: tensor for tensor in gguf.GGUFReader(path, mode).tensors}


def _round_matrix(tensors: Mapping[str, Any], model: "Model", name: str, gram: Tensor) -> None:
    """Give a matrix of the file the codes that GPTQ chooses, where its type's are known."""
    from pipeline.export.into.codes import CODINGS, rounded_for_inputs

    stored = stored_name(f"{name}.weight", model.merge.locations)
    for source in model.sources:
        tensor = tensors[source.name]
        if source.stored == (stored,) and tensor.tensor_type in CODINGS:
            data = torch.from_numpy(tensor.data.copy())
            weight = _in_file(model, source)
            rounded = rounded_for_inputs(data, tensor.tensor_type, weight, gram.cpu())
            tensor.data[:] = rounded.numpy()


def _in_file(model: "Model", source: "Source") -> Tensor:
    """(O, I) in fp32: a matrix as the file orders it, before it is rounded."""
    blocks = model.merge.merged_blocks(source.stored[0], torch.float32)
    return torch.cat([*source.layout.of(block.float() for block in blocks)])


def survivals(
    merged: "Model", plain: "Model", before: Path, after: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What of each update is in the file `after`; `before` is the base's."""
    files = [_tensors(path) for path in (before, after)]
    originals = {source.name: source for source in plain.sources}
    for source in merged.sources:
        # of stacked experts there may be a tensor for each: those are not measured
        name, *others = source.stored
        if others or name not in merged.merge.edits or len(source.shape) != 2:
            continue
        stored = [_stored(tensors[source.name]) for tensors in files]
        weight, changed = _in_file(plain, originals[source.name]), _in_file(merged, source)
        yield name.removesuffix(".weight"), survival(weight, changed, *stored)


def _stored(tensor: Any) -> Stored:
    from pipeline.export.into.codes import CODINGS, codes_of, values_of

    data, kind = torch.from_numpy(tensor.data.copy()), tensor.tensor_type
    return Stored(codes_of(data, kind) if kind in CODINGS else None, values_of(data, kind))
