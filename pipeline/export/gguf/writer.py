"""Writes GGUF files tensor by tensor, a block of rows at a time: memory does not grow with the
model.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from pipeline.errors import UserError
from pipeline.export.gguf.families import Layout, family_of
from pipeline.files.safetensors_file import allocate, write_at
from pipeline.models.load import skeleton
from pipeline.project.runner import Event, Progress
from pipeline.weights.blocks import Rows, blocks, map_in_threads, stored_name, tied_names
from pipeline.weights.merge import refuse_full_disk
from pipeline.weights.merge_check import SAMPLES, Written
from pipeline.weights.merge_plan import SEPARATE, MergePlan, expert_tensors

# relative rounding of each type; of all others 2^-3
EPS = {Type.F32: 2.0**-23, Type.F16: 2.0**-10, Type.BF16: 2.0**-7, Type.Q8_0: 2.0**-7}
DTYPES = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
OVERFLOW = 65520.0  # from here on a number rounds to infinity in fp16
# what llama.cpp adds or convolves in fp32, and the gates of experts, whose choice rounding changes
EXACT = (
    "position_embd.weight",
    "ssm_conv1d.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_inp_shexp.weight",
)
EMBEDDING_AND_HEAD = ("token_embd.weight", "output.weight")


class Source(NamedTuple):
    """A tensor to write."""

    name: str  # in llama.cpp
    shape: tuple[int, ...]  # in the file
    # its names in the checkpoint: of stacked experts there may be a tensor for each
    stored: tuple[str, ...]
    part: tuple[int, ...]  # the shape of each of these
    layout: Layout  # of each


class Model(NamedTuple):
    """The model that a merge writes, as llama.cpp stores it."""

    merge: MergePlan
    sources: list[Source]
    extra: Mapping[str, Tensor]  # small tensors that are no parameters
    metadata: dict[str, Any]  # without the vocabulary's
    rows: int  # of the embedding
    notes: list[str]  # what llama.cpp does differently


def describe_model(
    merge: MergePlan, trust_remote_code: bool = False, own_head: bool = False
) -> Model:
    """How llama.cpp stores and configures the model that `merge` writes.

    `own_head`: write the head as a tensor of its own even if it is tied. Raises UserError if
    llama.cpp does not compute such a model.
    """
    model = skeleton(merge.base, trust_remote_code)
    config = model.describe()
    family = family_of(config)
    tied = tied_names(model)
    own_head = own_head or merge.unties or not tied
    if own_head and not family.own_head:
        raise UserError(
            "llama.cpp reads the head of this model from its embedding, but here it is another "
            "matrix. Use --format merged."
        )
    architecture = family.architecture(config)
    names = tensor_names(architecture, model.shape.layers)
    sources = list[Source]()
    for name, parameter in model.state_dict().items():  # with buffers that are stored
        if name in tied[1:] and not own_head:
            continue
        shape = tuple(parameter.shape)
        layouts = family.layouts(config, name)
        if separate := expert_tensors(name, len(parameter), merge.locations):
            sources += _stacked(shape, layouts, separate, names)
            continue
        stored = name if name in merge.copies else stored_name(name, merge.locations, tied)
        if stored is None:
            raise UserError(
                f"{merge.base} has no tensor {name}. Save it again with transformers' "
                "save_pretrained."
            )
        if len(shape) > 2 and name.rpartition(".")[2] not in SEPARATE:
            shape = shape[0], prod(shape[1:])  # a convolution
        for target, layout in layouts.items():
            in_file = layout.shape_of(shape)
            sources.append(Source(names(target), in_file, (stored,), shape, layout))
    settings = family.settings(config)
    notes = []
    if (context := settings["context_length"]) < model.shape.positions:
        notes.append(
            "llama.cpp computes longer texts otherwise, as it has no sliding windows or other "
            f"positions for them. The file names a context of {context} tokens, up to which it "
            "makes no difference."
        )
    metadata = {f"{architecture}.{key}": value for key, value in settings.items()}
    metadata = {"general.architecture": architecture, **metadata}
    return Model(merge, sources, family.extra(config), metadata, model.shape.rows, notes)


def _stacked(
    shape: tuple[int, ...],
    layouts: Mapping[str, Layout],
    separate: Sequence[Sequence[str]],
    names: Callable[[str], str],
) -> Iterator[Source]:
    """Stacks of the experts' tensors `separate`, such as gate and up, which are (O, I) each.

    If llama.cpp has them in one tensor, an expert's stand there one after another.
    """
    parts = [tuple(tensors) for tensors in separate]
    if len(layouts) < len(parts):
        parts = [tuple(chain.from_iterable(zip(*parts, strict=True)))]
    for (target, layout), stored in zip(layouts.items(), parts, strict=True):
        in_file = layout.shape_of(shape)
        part = prod(in_file[:-1]) // len(stored), in_file[-1]
        yield Source(names(target), in_file, stored, part, Layout())


def tensor_names(architecture: str, layers: int) -> Callable[[str], str]:
    """Full name of a parameter → its name in llama.cpp, which raises UserError if it has none."""
    (kind,) = (kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, layers)

    def name_of(parameter: str) -> str:
        name: str | None = table.get_name(parameter, (".weight", ".bias", ".scale"))
        if name is None:
            raise UserError(
                f"llama.cpp's {architecture} has no tensor for {parameter}. Use --format merged."
            )
        return name

    return name_of


def write_files(
    files: Mapping[Path, str], model: Model, metadata: Mapping[str, Any]
) -> Generator[Event, None, None]:
    """Write the merged model to every file, in its kind, such as q8_0; each tensor is merged once.

    Values are summed in fp32 and rounded once, of several tensors at a time. Raises UserError for
    values that overflow fp16, and if the disk is full.
    """
    with ExitStack() as stack:
        outputs = []
        for path, kind in files.items():
            types = {source.name: type_of(source, kind) for source in model.sources}
            facts = {**model.metadata, **metadata, "general.file_type": file_type(kind)}
            facts["general.quantization_version"] = gguf.GGML_QUANT_VERSION
            shapes = [(source.name, source.shape, types[source.name]) for source in model.sources]
            for name, tensor in model.extra.items():
                shapes.append((name, tuple(tensor.shape), Type.F32))
            outputs.append(stack.enter_context(closing(Output(path, facts, shapes))))
        refuse_full_disk(next(iter(files)).parent, sum(output.size for output in outputs))
        for output in outputs:
            output.begin()

        def fill(source: Source) -> str:
            for stored in source.stored:
                merged = model.merge.merged_blocks(stored, torch.float32)
                shaped = (block.float().view(-1, *source.part[1:]) for block in merged)
                for block in source.layout.of(shaped):
                    for output in outputs:
                        output.write(source.name, block)
            return source.name

        for number, name in enumerate(map_in_threads(fill, model.sources), start=1):
            yield Progress(number, len(model.sources), name)
        for name, tensor in model.extra.items():
            for output in outputs:
                output.write(name, tensor)


class Output:
    """A GGUF file of the tensors `shapes`: name, shape, type.

    They are written in any order, several at a time, each from its first row to its last.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, Any],
        shapes: Iterable[tuple[str, tuple[int, ...], Type]],
    ) -> None:
        self._writer = gguf.GGUFWriter(path, metadata["general.architecture"])
        add: dict[type, Callable[[str, Any], None]] = {
            bool: self._writer.add_bool,
            int: self._writer.add_uint32,
            float: self._writer.add_float32,
            str: self._writer.add_string,
            list: self._writer.add_array,
        }
        for key, value in metadata.items():
            if key != "general.architecture":
                add[type(value)](key, value)
        self._types = {name: kind for name, _, kind in shapes}
        self._sizes, self._offsets = dict[str, int](), dict[str, int]()
        for name, shape, kind in shapes:
            block, width = gguf.GGML_QUANT_SIZES[kind]
            self._sizes[name] = prod(shape) // block * width
            self._writer.add_tensor_info(name, shape, np.dtype(np.float32), self._sizes[name], kind)

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(self._sizes.values())

    def begin(self) -> None:
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()
        assert self._writer.fout is not None
        (self._file,) = self._writer.fout
        self._writer.write_padding(self._file, self._file.tell())
        self._file.flush()
        offset = self._file.tell()
        for name, size in self._sizes.items():
            self._offsets[name] = offset
            offset += gguf.GGUFWriter.ggml_pad(size, self._writer.data_alignment)
        allocate(self._file.fileno(), offset)

    def write(self, name: str, rows: Tensor) -> None:
        """The next rows in fp32 of the tensor `name`."""
        kind = self._types[name]
        if kind == Type.F16 and not rows.abs().max() < OVERFLOW:  # refuses NaN too
            raise UserError(
                f"{name} has the value {rows.abs().max():.3g}, which overflows fp16. Use "
                "--quantize bf16."
            )
        data = quantized(rows.contiguous(), kind).reshape(-1).data
        self._offsets[name] = write_at(self._file.fileno(), data, self._offsets[name])

    def close(self) -> None:
        self._writer.close()


def quantized(rows: Tensor, kind: Type) -> np.ndarray[Any, Any]:
    """The bytes of rows in fp32 as the gguf package makes them; what is usual, sooner."""
    if kind in DTYPES:
        return rows.to(DTYPES[kind]).view(torch.uint8).numpy()
    if kind != Type.Q8_0:
        made: np.ndarray[Any, Any] = gguf.quants.quantize(rows.numpy(), kind)
        return made.view(np.uint8)
    # blocks of 32 numbers: d = max|x| / 127 in fp16, then x / d, rounded with halves away from 0
    x = rows.view(-1, 32)
    d = x.abs().amax(1, keepdim=True) / 127
    scaled = x * torch.where(d == 0, 0, 1 / d)
    whole = scaled.trunc()
    q = scaled.sub_(whole).mul_(2).trunc_().add_(whole).to(torch.int8)
    return torch.cat([d.half().view(torch.uint8), q.view(torch.uint8)], 1).numpy()


def type_of(source: Source, kind: str) -> Type:
    """The type of a tensor in a file of `kind`.

    Vectors, and what is EXACT, stay in fp32, which llama.cpp computes with. Embedding and head,
    where 4 or 5 bits cost most, get 8; rows that no block of the type divides get fp16.
    """
    quantized = Type[kind.upper()]
    if len(source.shape) == 1 or source.name.endswith(EXACT):
        return Type.F32
    if source.name in EMBEDDING_AND_HEAD and kind.startswith(("q4", "q5")):
        quantized = Type.Q8_0
    return quantized if source.shape[-1] % gguf.GGML_QUANT_SIZES[quantized][0] == 0 else Type.F16


def file_type(kind: str) -> int:
    """The value of general.file_type for a file of `kind`."""
    return int(gguf.LlamaFileType[f"{'ALL' if kind == 'f32' else 'MOSTLY'}_{kind.upper()}"])


def written_matrices(path: Path, model: Model) -> Callable[[str], Written]:
    """Reads matrices of the file by their names in the checkpoint, sampled for `update_ratios`."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    places = dict[str, list[tuple[Source, int]]]()  # several if a parameter was split
    for source in model.sources:
        for number, stored in enumerate(source.stored):
            places.setdefault(stored, []).append((source, number))

    def restored(name: str, rows: slice) -> Tensor:
        """Some rows of the matrix, or all; of a stack, some experts."""
        part = places[name][0][0].part
        matrix = torch.empty(len(range(part[0])[rows]), *part[1:])
        for source, number in places[name]:
            data, kind = tensors[source.name].data, tensors[source.name].tensor_type
            if len(source.stored) > 1:
                data = data.reshape(len(source.stored), -1, data.shape[-1])[number]
            source.layout.restore(_dequantized(data[rows], kind), matrix)
        return matrix.flatten(1)

    def sampled(name: str, source: Source) -> Iterator[Rows]:
        spans = blocks(source.part[0], prod(source.part[1:]), SAMPLES)
        if source.layout.is_moved and len(source.part) == 2:
            whole = restored(name, slice(None))
            yield from ((rows, whole[rows]) for rows in spans)
        else:
            yield from ((rows, restored(name, rows)) for rows in spans)

    def read(name: str) -> Written:
        kinds = [tensors[source.name].tensor_type for source, _ in places[name]]
        eps = max(EPS.get(kind, 2.0**-3) for kind in kinds)
        return Written(eps, sampled(name, places[name][0][0]))

    return read


def _dequantized(data: np.ndarray[Any, Any], kind: Type) -> Tensor:
    # a copy: the file is mapped read-only
    return torch.from_numpy(np.array(gguf.quants.dequantize(data, kind)))
