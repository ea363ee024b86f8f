"""Merge base + adapter into one checkpoint, with a certificate of the result (the document's §4.4).

The plan is made on the meta device, where the adapter is checked against the model's modules
without loading weights; `streaming.py` then carries it out file to file.
"""

from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
from pipeline.adapters.peft import load_lora, other_embedding
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.base_model import TensorLocation, tensor_locations
from pipeline.models.base import CausalLM, is_conv1d
from pipeline.models.load import skeleton
from pipeline.models.quantized_linear import dequantized, quantizable
from pipeline.project.runner import Event, Note, Progress
from pipeline.weights.streaming import (
    AddLowRank,
    AddToExperts,
    Edit,
    Merge,
    Replace,
    RescaleRows,
    SetRows,
    Written,
    read_blocks,
    same_edit,
    single_torch_thread,
    update_ratios,
    written_matrices,
)

CERTIFICATE = "certificate.json"
NOTE_BELOW = 0.9  # share of an update that must survive rounding; below it a note is shown
# The names of an expert's own tensors in files, in the order in which transformers stacks them.
SEPARATE = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
STORED = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}  # safetensors' names
RATIO_TOLERANCE = 1e-3  # on top of rounding; an update merged twice has ratio 2


@dataclass(frozen=True)
class Merging:
    """The base and adapter to merge; `precision`: fp32, bf16 or fp16, None: the base's dtype."""

    base: Path
    adapter: Path
    precision: str | None = None
    trust_remote_code: bool = False


# merged checkpoint → entries for its certificate; raises UserError
Verify = Callable[[Path], dict[str, Any]]
# adds files to the checkpoint, given its certificate
Finish = Callable[[Path, dict[str, Any]], None]


def merge_to(
    out: Path, merging: Merging, verify: Verify | None = None, finish: Finish | None = None
) -> Generator[Event, None, dict[str, Any]]:
    """`merge_into` a folder that is written atomically.

    Raises UserError if `out` holds anything but an earlier merge.
    """
    # a stage's result has a manifest too, and is not replaced
    replaceable = (out / CERTIFICATE).exists() and not (out / artifact.MANIFEST).exists()
    artifact.refuse_other(out, replaceable, (merging.base, merging.adapter))
    # A killed merge leaves the earlier result as it was; the next one removes what it left and
    # begins again. Resuming is not worth it: a merge takes less than twice as long as a copy of its
    # files, which `make bench` measures.
    with artifact.writing(out) as folder:
        certificate = yield from merge_into(folder, merging, verify)
        if finish:
            finish(folder, certificate)
    return certificate


def describe(certificate: Mapping[str, Any]) -> Iterator[str]:
    """What a certificate proves, in words."""
    if ratios := [
        ratio for ratio in certificate.get("delta_ratios", {}).values() if ratio is not None
    ]:
        yield (
            f"{len(ratios)} matrices hold their update {min(ratios):.4f} to {max(ratios):.4f} times"
        )
    if "max_logit_difference" in certificate:
        yield f"largest logit difference {certificate['max_logit_difference']:.1e}"


def merge_into(
    out: Path, merging: Merging, verify: Verify | None = None
) -> Generator[Event, None, dict[str, Any]]:
    """Write the merged checkpoint and its certificate to `out`; returns the certificate.

    Weights pass through memory a block of rows at a time. Raises UserError if a matrix did not
    receive its update exactly once, or if `verify` does.
    """
    dtype = STORED[merging.precision] if merging.precision else None
    with single_torch_thread():
        merge = plan_merge(merging.base, merging.adapter, merging.trust_remote_code, dtype)
    for number, name in enumerate(merge.write(out), start=1):
        yield Progress(number, len(merge.files), name)
    certificate: dict[str, Any] = yield from certify(
        merge, written_matrices(out), "--precision fp32"
    )
    if verify:
        certificate |= verify(out)
    artifact.write_json(out / CERTIFICATE, certificate)
    return certificate


def certify(
    merge: Merge, written: Callable[[str], Written], fp32: str
) -> Generator[Event, None, dict[str, Any]]:
    """The certificate of a merge, from what was `written`; `fp32`: the option that writes it in
    fp32.

    Raises UserError if a matrix did not receive its update exactly once.
    """
    # on the written files, not on the way there: a block at a wrong place, or one written twice,
    # shows too
    measured = update_ratios(merge, written)
    for name, (ratio, rounding) in measured.items():
        if ratio is not None and not abs(ratio - 1) <= RATIO_TOLERANCE + rounding:
            raise UserError(
                f"merge rejected: {name} received {ratio:.4f} times its update, not once. Please "
                "report this."
            )
    # less than half the distance of two 16-bit numbers rounds to nothing
    retained = [ratio.value for ratio in measured.values() if ratio.value is not None]
    if retained and min(retained) < NOTE_BELOW:
        yield Note(
            f"merge: the update is so small that rounding leaves {min(retained):.0%} to "
            f"{max(retained):.0%} of it in "
            f"the merged weights. Write them in fp32 ({fp32}), or serve the adapter without "
            "merging."
        )
    return {"delta_ratios": {name: ratio.value for name, ratio in measured.items()}}


def plan_merge(
    base: Path, adapter: Path, trust_remote_code: bool = False, dtype: str | None = None
) -> Merge:
    """The merge of `adapter` into the checkpoint `base`; `dtype` to write: F32, BF16, F16, None:
    each tensor's own.

    Raises UserError as `load_adapter` does.
    """
    stored = tensor_locations(base)
    model = skeleton(base, trust_remote_code)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    tied = tied_names(model)
    quantizers: dict[str, Callable[[Tensor], Tensor]] = {}
    if (kind := quantization_of(adapter)) != "none":
        # the adapter learned to correct quantized weights, so the merge folds into what they
        # dequantize to
        for name in quantizable(model):
            transposed = is_conv1d(model.get_submodule(name))
            quantizers[f"{name}.weight"] = partial(dequantized, kind=kind, transposed=transposed)
    edits: dict[str, Edit] = {}
    for name, edit in merge_edits(
        model, attach_to_meta_model(model, base, stored, adapter)
    ).items():
        separate = separate_edits(name, edit, stored) if isinstance(edit, AddToExperts) else {}
        shapes |= {tensor: (len(one.left), one.right.shape[1]) for tensor, one in separate.items()}
        edits.update(separate)
        if not separate:
            edits[name] = edit
    names = {name: stored_name(name, stored) or name for name in {*edits, *tied, *quantizers}}
    absent = [name for name in tied if names[name] not in stored]
    for name in edits.keys() | quantizers:
        location = stored.get(names[name])
        # one of a tied pair may be stored for both
        if location is None and not (name in tied and len(absent) < 2):
            raise UserError(
                f"{base} has no tensor {names[name]}, which the adapter changes: it names or "
                "splits weights "
                "differently from transformers. Save the model again with transformers' "
                "save_pretrained."
            )
        if location is not None and location.info.shape != shapes[name]:
            raise UserError(
                f"{base}: {names[name]} has shape {list(location.info.shape)}, but config.json "
                "says "
                f"{list(shapes[name])}. Copy the model again."
            )
    # An edit of only one of a tied pair, or two different ones, untie it: the other becomes a
    # tensor of its own.
    copies: dict[str, str] = {}
    unties = not same_edit(*(edits.get(name) for name in tied)) if tied else False
    if unties:
        source = next(name for name in tied if name not in absent)
        copies = {names[name]: names[source] for name in tied if name != source}
    else:
        edits = {name: edit for name, edit in edits.items() if name not in absent}
    return Merge(
        base,
        stored,
        {names[name]: edit for name, edit in edits.items()},
        copies,
        unties,
        {names[name]: quantizer for name, quantizer in quantizers.items()},
        dtype,
    )


def attach_to_meta_model(
    model: CausalLM, base: Path, stored: Mapping[str, TensorLocation], adapter: Path
) -> AdapterSpec:
    """Attach the adapter to `model`, which is `base` on the meta device; `stored` are the base's
    tensors.

    Raises UserError as `load_adapter` does, for virtual tokens, which change no weight, and for an
    embedding saved with the adapter that differs from the base's.
    """
    config = AdapterConfig.read(adapter)
    config.refuse_other_kinds()
    refuse_foreign(base, adapter)
    lora = load_lora(model, base, config)
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
            short_name = name.rsplit(".", 1)[-1]
            # a tied head has the embedding's rows
            ids = spec.rows[short_name if short_name in spec.rows else model.embedding_and_head[0]]
            edits[f"{name}.weight"] = SetRows(torch.tensor(ids), module.rows.detach())
    plain = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for key, parameter in tensors(model, spec).items():
        if (name := key.removeprefix(PREFIX)) in plain:  # trained in full
            edits[name] = Replace(parameter.detach())
    return edits


def separate_edits(name: str, edit: AddToExperts, stored: Collection[str]) -> dict[str, AddLowRank]:
    """The edit of a stacked parameter as edits of the tensors that files hold for each expert, by
    stored name.

    Empty if they hold the stack itself, or neither. transformers stacks Mixtral's w1 on w3, others'
    gate on up.
    """
    if stored_name(name, stored):
        return {}
    module, _, projection = name.rpartition(".")
    for folder in (module, module.replace(".mlp.", ".block_sparse_moe.")):
        for parts in SEPARATE[projection]:
            first = stored_name(f"{folder}.0.{parts[0]}.weight", stored)
            if first is None:
                continue
            place = first.removesuffix(f"0.{parts[0]}.weight")
            size = edit.left.shape[1] // len(parts)  # rows of the stack that each of the parts has
            return {
                f"{place}{expert}.{part}.weight": edit.of(
                    expert, slice(number * size, (number + 1) * size)
                )
                for expert in range(len(edit.left))
                for number, part in enumerate(parts)
            }
    return {}


def layer_edit(layer: LoRALinear | LoRAEmbedding) -> Edit:
    """The edit of the layer's stored weight."""
    if isinstance(layer, DoRALinear):
        return RescaleRows(
            *factors(layer), layer.scale, layer.magnitude.detach(), fan_in_fan_out(layer.base)
        )
    return AddLowRank(*factors(layer), layer.scale)


def tied_names(model: CausalLM) -> tuple[str, ...]:
    """Full names of the weights of embedding and head if they are tied, else ()."""
    return (
        (f"{model.embedding_name}.weight", f"{model.head_name}.weight") if model.shape.tied else ()
    )


def stored_name(name: str, stored: Collection[str], tied: Collection[str] = ()) -> str | None:
    """The name of a parameter in the files: with or without the prefix of the model's body; None if
    missing.

    Of the parameters `tied`, one may be stored for both.
    """
    for parameter in (name, *tied) if name in tied else (name,):
        if parameter in stored:
            return parameter
        candidates = [
            other
            for other in stored
            if parameter.endswith(f".{other}") or other.endswith(f".{parameter}")
        ]
        if len(candidates) == 1:  # of several none is sure, as two stacks of blocks may end alike
            return candidates[0]
    return None


def find_location(
    name: str, stored: Mapping[str, TensorLocation], tied: Collection[str] = ()
) -> TensorLocation | None:
    """Where the files store a parameter, as `stored_name` finds it."""
    stored_as = stored_name(name, stored, tied)
    return stored[stored_as] if stored_as else None
