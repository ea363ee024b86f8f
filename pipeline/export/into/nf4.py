"""A merge into NF4: a checkpoint that transformers opens with bitsandbytes."""

import shutil
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.adapters.peft import Reading
from pipeline.calc.settings import NF4_BLOCK
from pipeline.errors import UserError
from pipeline.export.formats import Export
from pipeline.export.into import ENTRY, Into
from pipeline.export.into.gptq import round_for_inputs
from pipeline.export.into.models import Job, Logits, Opens, in_torch, measure
from pipeline.export.into.update import Stored, survival
from pipeline.files import artifact
from pipeline.files.artifact import read_json, write_json
from pipeline.files.base_model import INDEX, TensorLocation, parse_source, tensor_locations
from pipeline.files.safetensors_file import in_file_order, write_at
from pipeline.inference.engine import load
from pipeline.models import nf4
from pipeline.models.base import is_conv1d, is_linear
from pipeline.models.import_base import import_base
from pipeline.models.load import skeleton
from pipeline.models.quantized_linear import (
    dequantize_weight,
    quantizable,
    quantize_weight,
    require_bitsandbytes,
)
from pipeline.models.save import read_rows, save_tensors
from pipeline.project.runner import Event, Progress
from pipeline.weights.blocks import DTYPES, read_matrix, stored_name
from pipeline.weights.merge import CERTIFICATE, CONFIG, copy_other_files, weight_files
from pipeline.weights.merge_plan import MergePlan, plan_merge

KIND: Literal["nf4"] = "nf4"
Locations = Mapping[str, TensorLocation]  # of a checkpoint's tensors, by name


def write(export: Export, into: Into, out: Path) -> Generator[Event, None, None]:
    """Write a checkpoint of bitsandbytes to `out`, with what rounding cost. Raises UserError."""
    require_bitsandbytes("--into nf4")
    base, trust, reading = export.find_base(), export.trust_remote_code, Reading.once()
    replaceable = (out / CERTIFICATE).exists() and not (out / artifact.MANIFEST).exists()
    artifact.refuse_other(out, replaceable, (base, export.adapter))
    plan = plan_merge(base, export.adapter, trust, reading=reading)
    linears = _linears(plan, trust)
    job = Job(export, into, base, reading)
    with artifact.writing(out) as folder:
        files = weight_files(plan)
        for number, file in enumerate(files, start=1):
            save_tensors(folder / file.name, _tensors(plan, file, linears.values()))
            yield Progress(number, len(files), file.name)
        _write_config(plan, folder, trust, linears)
        with TemporaryDirectory(dir=folder) as scratch:
            measured = yield from _measured(job, plan, folder, linears, Path(scratch))
        write_json(folder / CERTIFICATE, {ENTRY: measured})


def _measured(
    job: Job, plan: MergePlan, folder: Path, linears: Mapping[str, str], scratch: Path
) -> Generator[Event, None, dict[str, Any]]:
    nearest, into = folder, job.into
    if into.rounding == "gptq":
        nearest = scratch / "nearest"
        shutil.copytree(folder, nearest, ignore=shutil.ignore_patterns(scratch.name))
    by_rounding = {"nearest": nearest, into.rounding: folder}
    models: dict[str, Opens] = {"base": lambda: in_torch(job.load(None, KIND))}
    for rounding, path in by_rounding.items():
        models[rounding] = partial(_opened, path, scratch / "opened", job)
    models["apart"] = lambda: in_torch(job.load(job.export.adapter, KIND))

    locations = tensor_locations(folder)

    def round_matrix(name: str, gram: Tensor) -> None:
        if name in linears:
            _round_matrix(plan, locations, linears[name], gram)

    measured = yield from measure(job, models, round_matrix)
    changed = [name for name in linears.values() if name in plan.edits]
    updates = {
        rounding: _survivals(plan, tensor_locations(path), changed)
        for rounding, path in by_rounding.items()
    }
    return {"kind": KIND, "rounding": into.rounding, "update": updates, **measured}


def _linears(plan: MergePlan, trust_remote_code: bool) -> dict[str, str]:
    """The stored weight of each linear of the blocks, by its full name. Raises UserError."""
    model = skeleton(plan.base, trust_remote_code)
    linears = {}
    for name in quantizable(model):
        if is_conv1d(model.get_submodule(name)):
            raise UserError(
                f"--into nf4 does not store {name}, whose weight is transposed as GPT-2's. Use "
                "--into q4_k_m."
            )
        stored = stored_name(f"{name}.weight", plan.locations)
        if stored is not None:  # else an expert's: a part of a stack, which bitsandbytes leaves
            linears[name] = stored
    return linears


def _tensors(plan: MergePlan, file: Path, linears: Collection[str]) -> dict[str, Tensor]:
    """All tensors of a merged file, as bitsandbytes stores them."""
    added = [name for name in plan.added if plan.source(name).file == file]
    tensors = dict[str, Tensor]()
    for name in (*in_file_order(file), *added):
        info = plan.source(name).info
        if name in linears:
            matrix, dtype = _merged(plan, name), DTYPES[info.dtype]
            tensors |= {f"{name}{key}": value for key, value in _packed(matrix, dtype).items()}
        else:
            target = DTYPES.get(info.dtype)
            blocks = [*plan.merged_blocks(name, target)]
            tensors[name] = torch.cat(blocks).view(info.shape).to(target)
    return tensors


def _merged(plan: MergePlan, name: str) -> Tensor:
    """W + Δ (O, I) in fp32."""
    return torch.cat([block.float() for block in plan.merged_blocks(name, torch.float32)])


def _packed(matrix: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What follows the name of a weight that bitsandbytes has quantized, and the tensors.

    The numbers are rounded once, from fp32; `dtype` is what they are read in.
    """
    functional = require_bitsandbytes("--into nf4")
    codes, state = functional.quantize_4bit(matrix, blocksize=NF4_BLOCK, quant_type=KIND)
    state.dtype = dtype
    return {"": codes, **{f".{key}": value for key, value in state.as_dict(packed=True).items()}}


def _write_config(
    plan: MergePlan, folder: Path, trust_remote_code: bool, linears: Mapping[str, str]
) -> None:
    """config.json with what bitsandbytes reads, the index, and the base's other files."""
    from transformers import BitsAndBytesConfig

    copy_other_files(plan.base, folder)
    model = skeleton(plan.base, trust_remote_code)
    others = [
        name for name, module in model.named_modules() if is_linear(module) and name not in linears
    ]
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=KIND, llm_int8_skip_modules=others
    ).to_dict()
    config = read_json(folder / CONFIG, "Copy the base again")
    changes: dict[str, Any] = {"tie_word_embeddings": False} if plan.unties else {}
    write_json(folder / CONFIG, config | changes | {"quantization_config": settings})
    if (folder / INDEX).exists():
        places = {name: place.file.name for name, place in tensor_locations(folder).items()}
        write_json(folder / INDEX, {"metadata": {}, "weight_map": places})


def _round_matrix(plan: MergePlan, locations: Locations, name: str, gram: Tensor) -> None:
    """Write the codes that GPTQ chooses for a matrix over those of its nearest levels."""
    weight, codes, scales = _merged(plan, name), locations[name], locations[f"{name}.absmax"]
    step = (
        _read(scales, torch.float32).repeat_interleave(NF4_BLOCK)[: weight.numel()].view_as(weight)
    )
    levels, divisor = nf4.levels(), step.clamp(min=nf4.SMALLEST)

    def codes_of(values: Tensor, by: Tensor) -> Tensor:
        return nf4.nearest((values / by).clamp(-1, 1), levels)

    def round_column(column: Tensor, n: int) -> Tensor:
        return levels[codes_of(column, divisor[:, n]).int()] * step[:, n]

    rounded = round_for_inputs(weight, gram.cpu(), round_column)
    packed = nf4.pack(codes_of(rounded, divisor).flatten())
    with codes.file.open("r+b") as file:
        write_at(file.fileno(), packed.numpy().data, codes.info.start)


def _read(place: TensorLocation, dtype: torch.dtype) -> Tensor:
    return read_rows(place, 0, place.info.shape[0], dtype)


def _survivals(
    plan: MergePlan, locations: Locations, changed: Collection[str]
) -> dict[str, dict[str, Any]]:
    """What of each update is in the checkpoint."""
    found = {}
    for name in changed:
        codes, scales = locations[name], locations[f"{name}.absmax"]
        written = {"codes": _read(codes, torch.uint8), "scales": _read(scales, torch.float32)}
        weight = read_matrix(plan.blocks(name)).float()
        before = _stored(quantize_weight(weight, KIND), weight)
        after = _stored(written, weight)
        found[name.removesuffix(".weight")] = survival(weight, _merged(plan, name), before, after)
    return found


def _stored(quantized: dict[str, Tensor], weight: Tensor) -> Stored:
    rows, columns = weight.shape
    codes = nf4.unpack(quantized["codes"].flatten(), weight.numel()).view_as(weight)
    return Stored(codes, dequantize_weight(quantized, KIND, (rows, columns), torch.float32))


@contextmanager
def _opened(folder: Path, scratch: Path, job: Job) -> Iterator[Logits]:
    """The checkpoint as transformers and bitsandbytes read it, dequantized into `scratch`."""
    scratch.mkdir()
    trust = job.export.trust_remote_code
    import_base(parse_source(str(folder.resolve()), folder), scratch, "auto", trust)
    with in_torch(load(scratch, trust_remote_code=trust)) as logits:
        yield logits
    shutil.rmtree(scratch)
