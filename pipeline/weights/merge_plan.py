"""Which edit of a merge each stored tensor gets.

The adapter is checked against the model's modules on the meta device, without loading weights.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pipeline.adapters.attach import adapter_layers, tensors
from pipeline.adapters.config import PREFIX, AdapterConfig, AdapterSpec
from pipeline.adapters.experts import expert_layers
from pipeline.adapters.folder import quantization_of, refuse_foreign
from pipeline.adapters.lora import (
    DoRALinear,
    LoRAEmbedding,
    LoRALinear,
    TokenRows,
    factors,
    fan_in_fan_out,
)
from pipeline.adapters.peft import Reading, load_lora, other_embedding
from pipeline.errors import UserError
from pipeline.files.base_model import TensorLocation, tensor_locations
from pipeline.models.base import CausalLM, is_conv1d
from pipeline.models.load import skeleton
from pipeline.models.quantized_linear import dequantized, quantizable
from pipeline.weights.blocks import (
    Rows,
    blocks,
    find_location,
    read_blocks,
    read_matrix,
    single_torch_thread,
    stored_name,
    tied_names,
)
from pipeline.weights.edits import (
    AddLowRank,
    AddToExperts,
    Edit,
    Replace,
    RescaleRows,
    SetRows,
    Update,
    same_edit,
)

# The names of an expert's own tensors in files, in the order in which transformers stacks them.
SEPARATE = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
Quantizer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MergePlan:
    """A base's tensors and the edits to apply to them, by stored name."""

    base: Path
    locations: Mapping[str, TensorLocation]
    edits: Mapping[str, Edit] = field(default_factory=dict)
    # name → source, for tensors that start as a copy of another; the base need not store them
    copies: Mapping[str, str] = field(default_factory=dict)
    unties: bool = False  # whether tied embedding and head become different weights
    # for tensors that were quantized while the adapter trained: a function that quantizes and
    # dequantizes them, so that the edit applies to the same weights
    quantizers: Mapping[str, Quantizer] = field(default_factory=dict)
    dtype: str | None = None  # of all written weights: F32, BF16 or F16; None: each tensor's own

    @property
    def added(self) -> list[str]:
        """Written tensors that the base does not store."""
        return [name for name in self.copies if name not in self.locations]

    def source(self, name: str) -> TensorLocation:
        """The base's tensor that a tensor of the merged checkpoint starts from."""
        return self.locations[self.copies.get(name, name)]

    def changes(self, name: str) -> bool:
        """Whether its values change, or it is a copy of another tensor."""
        return name in self.edits or name in self.copies or name in self.quantizers

    def blocks(self, name: str, samples: int | None = None) -> Iterator[Rows]:
        """A tensor before its edit, a block of rows at a time; `samples` as in `blocks`."""
        if name not in self.quantizers:
            yield from read_blocks(self.source(name), samples)
            return
        weight = self.quantizers[name](read_matrix(read_blocks(self.source(name))).float())
        rows, columns = weight.shape
        for span in blocks(rows, columns, samples):
            yield span, weight[span]

    def merged_blocks(self, name: str, target: torch.dtype | None) -> Iterator[Tensor]:
        """A tensor after its edit, in the wider of its dtype and `target`."""
        edit = self.edits.get(name)
        if isinstance(edit, Update):
            edit = edit.with_norms(self.blocks(name))
        for rows, block in self.blocks(name):
            wide = block if target is None else block.to(torch.promote_types(block.dtype, target))
            yield edit(wide, rows) if edit else wide


@single_torch_thread()
def plan_merge(
    base: Path,
    adapter: Path,
    trust_remote_code: bool = False,
    dtype: str | None = None,
    reading: Reading | None = None,
) -> MergePlan:
    """The merge of `adapter` into the checkpoint `base`; `dtype` as in `MergePlan`.

    Raises UserError as `load_adapter` does.
    """
    stored = tensor_locations(base)
    model = skeleton(base, trust_remote_code)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    tied = tied_names(model)
    quantizers = _quantizers(model, adapter)

    edits: dict[str, Edit] = {}
    spec = attach_to_meta_model(model, base, stored, adapter, reading)
    for name, edit in merge_edits(model, spec).items():
        separate = separate_edits(name, edit, stored) if isinstance(edit, AddToExperts) else {}
        for tensor, part in separate.items():
            shapes[tensor] = len(part.left), part.right.shape[1]
        edits.update(separate)
        if not separate:
            edits[name] = edit

    names = {name: stored_name(name, stored) or name for name in {*edits, *tied, *quantizers}}
    absent = [name for name in tied if names[name] not in stored]
    for name in {*edits, *quantizers}:
        location = stored.get(names[name])
        stored_for_both = name in tied and len(absent) < 2
        if location is None and not stored_for_both:
            raise UserError(
                f"{base} has no tensor {names[name]}, which the adapter changes: it names or "
                "splits weights differently from transformers. Save the model again with "
                "transformers' save_pretrained."
            )
        if location is not None and location.info.shape != shapes[name]:
            raise UserError(
                f"{base}: {names[name]} has shape {list(location.info.shape)}, but config.json "
                f"says {list(shapes[name])}. Copy the model again."
            )

    # An edit of only one of a tied pair, or two different ones, untie it: the other becomes a
    # tensor of its own.
    copies: dict[str, str] = {}
    unties = bool(tied) and not same_edit(*(edits.get(name) for name in tied))
    if unties:
        source = next(name for name in tied if name not in absent)
        copies = {names[name]: names[source] for name in tied if name != source}
    else:
        edits = {name: edit for name, edit in edits.items() if name not in absent}
    return MergePlan(
        base,
        stored,
        {names[name]: edit for name, edit in edits.items()},
        copies,
        unties,
        {names[name]: quantizer for name, quantizer in quantizers.items()},
        dtype,
    )


def _quantizers(model: CausalLM, adapter: Path) -> dict[str, Quantizer]:
    """Full parameter name → what quantizes and dequantizes it.

    The adapter learned to correct quantized weights, so it is merged into these.
    """
    quantizers: dict[str, Quantizer] = {}
    if (kind := quantization_of(adapter)) == "none":
        return quantizers
    for name in quantizable(model):
        transposed = is_conv1d(model.get_submodule(name))
        quantizers[f"{name}.weight"] = partial(dequantized, kind=kind, transposed=transposed)
    return quantizers


def attach_to_meta_model(
    model: CausalLM,
    base: Path,
    stored: Mapping[str, TensorLocation],
    adapter: Path,
    reading: Reading | None = None,
) -> AdapterSpec:
    """Attach the adapter to `model`, which is `base` on the meta device.

    `stored` are the base's tensors. Raises UserError as `load_adapter` does, for virtual tokens,
    which change no weight, and for an embedding saved with the adapter that differs from the
    base's.
    """
    reading = reading or Reading.once()
    config = AdapterConfig.read(adapter)
    config.refuse_other_kinds()
    refuse_foreign(base, adapter, reading.fingerprint, reading.contents)
    lora = load_lora(model, base, config, reading)
    # PEFT saves a copy of an embedding with LoRA on it; only the base's files can tell whether it
    # is the base's
    for name, value in lora.copies.items():
        location = find_location(name, stored, tied_names(model))
        if location is None or value.shape != location.info.shape:
            raise other_embedding(lora.path, name)
        if not all(torch.equal(value[rows].to(old), old) for rows, old in read_blocks(location)):
            raise other_embedding(lora.path, name)
    return lora.spec


def merge_edits(model: CausalLM, spec: AdapterSpec) -> dict[str, Edit]:
    """Full parameter name in the model without adapter → edit."""
    edits: dict[str, Edit] = {}
    for name, layer in adapter_layers(model):
        edits[f"{name}.weight"] = layer_edit(layer)
    for name, experts in expert_layers(model):
        for projection, update in experts.by_parameter().items():
            A, B = (factor.detach() for factor in update.pairs())  # (E, R, I), (E, O, R)
            left, right = (A.mT, B.mT) if experts.transposed else (B, A)
            edits[f"{name}.{projection}"] = AddToExperts(left, right, update.scale)
    for name, module in model.named_modules():
        if isinstance(module, TokenRows):
            short_name = name.rpartition(".")[2]
            # a tied head has the embedding's rows
            ids = spec.rows[short_name if short_name in spec.rows else model.embedding_and_head[0]]
            edits[f"{name}.weight"] = SetRows(torch.tensor(ids), module.rows.detach())
    plain = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for key, parameter in tensors(model, spec).items():
        if (name := key.removeprefix(PREFIX)) in plain:  # trained in full
            edits[name] = Replace(parameter.detach())
    return edits


def separate_edits(name: str, edit: AddToExperts, stored: Collection[str]) -> dict[str, AddLowRank]:
    """The edit of a stacked parameter, split by the tensors of single experts that files hold.

    By stored name; empty if the files hold the stack itself, or neither.
    """
    edits = {}
    parts = expert_tensors(name, len(edit.left), stored)
    for number, tensors_of_part in enumerate(parts):
        size = edit.left.shape[1] // len(parts)  # rows of the stack that each of the parts has
        rows = slice(number * size, (number + 1) * size)
        for expert, tensor in enumerate(tensors_of_part):
            edits[tensor] = edit.of(expert, rows)
    return edits


def expert_tensors(name: str, experts: int, stored: Collection[str]) -> list[list[str]]:
    """The files' tensors of single experts whose stack is the parameter `name`.

    Of each part of the stack, such as gate and up, one tensor per expert. Empty if the files hold
    the stack itself, or neither. transformers stacks Mixtral's w1 on w3, others' gate on up.
    """
    module, _, projection = name.rpartition(".")
    for parts in SEPARATE.get(projection, ()):
        first = stored_name(f"{module}.0.{parts[0]}.weight", stored)
        if first is not None:
            prefix = first.removesuffix(f"0.{parts[0]}.weight")
            return [[f"{prefix}{e}.{part}.weight" for e in range(experts)] for part in parts]
    return []


def layer_edit(layer: LoRALinear | LoRAEmbedding) -> Edit:
    """The edit of the layer's stored weight."""
    left, right = factors(layer)
    if isinstance(layer, DoRALinear):
        magnitude = layer.magnitude.detach()
        return RescaleRows(left, right, layer.scale, magnitude, fan_in_fan_out(layer.base))
    return AddLowRank(left, right, layer.scale)
