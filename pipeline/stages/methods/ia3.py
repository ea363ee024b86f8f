# ruff: noqa: ARG002 (most methods need only some of what a hook gets)
"""(IA)³ (Liu et al. 2022): vectors train, which scale keys, values and feed-forward inputs."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pipeline.calc.method import FinetuningMethod, TrainedParts, matching_linears
from pipeline.calc.target_modules import matches_suffix
from pipeline.errors import UserError
from pipeline.project.params.schema import ALLOW_EMPTY, Rate
from pipeline.project.params.sections import AdapterTraining
from pipeline.project.stage_graph import Look
from pipeline.stages.methods import method

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from pipeline.adapters.lora import AdapterLayer
    from pipeline.calc.architecture import Architecture, Linear
    from pipeline.calc.tape import Ops, Value
    from pipeline.models.base import CausalLM
    from pipeline.models.load import Base
    from pipeline.project.runner import Event, Facts, Job
    from pipeline.stages.finetune import Attached

# The linears that PEFT scales, by their names in each family: keys and values, in some families in
# one matrix with the queries, and the last linear of the feed-forward network.
KEYS_VALUES = ("k_proj", "v_proj", "c_attn", "qkv_proj", "query_key_value")
FEED_FORWARD = ("fc2", "down_proj", "mlp.c_proj", "dense_4h_to_h")
SUFFIX = ".ia3_l"  # PEFT's name of a vector, after its module's
PEFT_OPTIONS = {  # those that are read, or without effect once the vectors are trained
    "target_modules",
    "feedforward_modules",
    "exclude_modules",
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "init_ia3_weights",
    "fan_in_fan_out",  # for GPT-2's layers; PEFT corrects it itself, whatever the file says
}


class FinetuneIA3(AdapterTraining, frozen=True, kw_only=True):
    """A vector for each scaled linear trains: l ⊙ Wx, or W(l ⊙ x) in feed-forward layers (Liu et
    al. 2022).
    """

    PRETRAINED: ClassVar[Mapping[str, Any]] = {"feedforward_modules": ("down_proj",)}

    learning_rate: Annotated[Rate, "of the optimizer, after warm-up"] = 1e-2
    target_modules: Annotated[
        tuple[str, ...], "linears whose outputs are scaled, by the end of their names"
    ] = ("k_proj", "v_proj")
    feedforward_modules: Annotated[
        tuple[str, ...], ALLOW_EMPTY, "linears whose inputs are scaled, by the end of their names"
    ] = ("fc2",)


STAGE = method(
    "ia3",
    __name__,
    FinetuneIA3,
    output="ia3_adapter",
    kind="adapter",
    summary="Train scaling vectors",
    title="(IA)³",
    look=Look("#000000", "◀", (0, (3, 1)), "++"),
    order=3.8,
    peft_type="IA3",
)


@cache
def _layer() -> type[AdapterLayer]:
    """The class of a scaled linear. Made here, because reading this file must not import torch."""
    import torch
    from torch import nn

    from pipeline.adapters.lora import AdapterLayer, weight_out_in

    class IA3Linear(AdapterLayer):
        """l ⊙ (Wx + b), or W(l ⊙ x) + b for a feed-forward linear; l starts as ones."""

        def __init__(
            self, base: nn.Module, feed_forward: bool, dtype: torch.dtype | None = None
        ) -> None:
            super().__init__(base)
            self.feed_forward = feed_forward
            outputs, inputs = weight_out_in(base).shape
            shape = (1, inputs) if feed_forward else (outputs, 1)  # PEFT's
            weight = next(base.parameters(), next(base.buffers(), torch.empty(0)))
            dtype = dtype or (weight.dtype if weight.is_floating_point() else torch.float32)
            self.ia3_l = nn.Parameter(torch.ones(shape, dtype=dtype, device=weight.device))

        def adapted(self, x: Tensor) -> Tensor:
            scale = self.ia3_l.flatten().to(x.dtype)
            out: Tensor = self.base(x * scale) if self.feed_forward else self.base(x) * scale
            return out

        def adapter_parameters(self) -> dict[str, nn.Parameter]:
            return {SUFFIX: self.ia3_l}

    return IA3Linear


def wrap(
    model: CausalLM, outputs: Sequence[str], inputs: Sequence[str], dtype: torch.dtype | None = None
) -> dict[str, AdapterLayer]:
    """Freeze `model` and scale outputs or inputs of these linears: full name → new layer."""
    model.requires_grad_(False)
    layers: dict[str, Any] = {}
    for name in [*outputs, *inputs]:
        layers[name] = _layer()(model.get_submodule(name), name in inputs, dtype)  # type: ignore[call-arg]
        model.set_submodule(name, layers[name])
    return layers


def attach(_job: Job, settings: FinetuneIA3, base: Base) -> Generator[Event, None, Attached]:
    from pipeline.adapters.attach import resolve, short_targets
    from pipeline.models.load import DTYPES
    from pipeline.stages.finetune import Attached

    yield from ()
    model, dtype = base.model, DTYPES[settings.adapter_precision]
    outputs = resolve(model, settings.target_modules)
    inputs = resolve(model, settings.feedforward_modules) if settings.feedforward_modules else []
    if both := sorted({*inputs} & {*outputs}):
        raise UserError(
            f"finetune_ia3.target_modules and feedforward_modules both match {both[0]}. Name it "
            "in one of them."
        )

    # PEFT knows no groups or aliases, so it gets the names of the modules
    scaled_inputs = short_targets(model, inputs)
    # PEFT compares plain ends of names: short names must match no other linear
    if any(name.endswith(scaled_inputs) for name in outputs):
        scaled_inputs = tuple(inputs)
    named = {
        "target_modules": [*short_targets(model, outputs), *scaled_inputs],
        "feedforward_modules": [*scaled_inputs],
    }
    layers = wrap(model, outputs, inputs, dtype)
    return Attached(COUNTED, lambda out: save(out, layers, named))


def save(
    out: Path, layers: Mapping[str, AdapterLayer], named: Mapping[str, Sequence[str]]
) -> Facts:
    """Write vectors and config as PEFT does; `named`: PEFT's settings with the modules' names."""
    from pipeline.adapters.config import CONFIG, PREFIX, WEIGHTS
    from pipeline.files.artifact import write_json
    from pipeline.models.base import is_conv1d
    from pipeline.models.save import save_tensors

    vectors = {
        f"{PREFIX}{name}{SUFFIX}": layer.adapter_parameters()[SUFFIX]
        for name, layer in layers.items()
    }
    save_tensors(out / WEIGHTS, vectors)
    config = {
        "peft_type": STAGE.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "artifacts/expanded",
        **named,
        "fan_in_fan_out": any(is_conv1d(layer.base) for layer in layers.values()),
        "inference_mode": True,
    }
    write_json(out / CONFIG, config)
    return {}


def load(model: CausalLM, _base_folder: Path, folder: Path) -> list[str]:
    """Scale `model`, or its skeleton, by the vectors in `folder`, ours or PEFT's.

    Returns the names of the scaled linears. Raises UserError for options that are not supported,
    and for tensors that do not fit the config.
    """
    import torch

    from pipeline.adapters.attach import read_tensors
    from pipeline.adapters.config import PREFIX, WEIGHTS
    from pipeline.files.safetensors_file import refuse_difference

    outputs, inputs = _scaled(model, folder)
    values, layers = read_tensors(folder), wrap(model, outputs, inputs)
    vectors = {
        f"{PREFIX}{name}{SUFFIX}": layer.adapter_parameters()[SUFFIX]
        for name, layer in layers.items()
    }
    expected = {key: tuple(vector.shape) for key, vector in vectors.items()}
    actual = {key: tuple(value.shape) for key, value in values.items()}
    refuse_difference(expected, actual, str(folder / WEIGHTS))
    for (key, vector), layer in zip(vectors.items(), layers.values(), strict=True):
        value = values[key].to("cpu" if vector.is_meta else vector.device, copy=True)
        trained = torch.nn.Parameter(value, requires_grad=False)
        layer.register_parameter(SUFFIX.removeprefix("."), trained)
    return list(layers)


def _scaled(model: CausalLM, folder: Path) -> tuple[list[str], list[str]]:
    """Full names of the linears whose outputs, and whose inputs, are scaled. Raises UserError."""
    from pipeline.adapters.attach import adaptable, targeted
    from pipeline.adapters.config import AdapterConfig, AdapterSpec, refuse_options
    from pipeline.files.patterns import full_match, one_budget

    config = AdapterConfig.read(folder)
    if saved := config.get("modules_to_save"):
        raise UserError(
            f"{config.path}: modules_to_save is {saved!r}; it is not supported with IA3. Train "
            "without it."
        )
    refuse_options(config.values, config.path, {}, PEFT_OPTIONS)
    targets = config.names("target_modules", needed=True, may_be_pattern=True)
    feed_forward = config.names("feedforward_modules", may_be_pattern=True)
    if not isinstance(targets, str):  # PEFT skips names that the model does not have
        linears = [name for name, module in model.named_modules() if adaptable(module)]
        targets = _matching(targets, linears) or targets

    def scales_inputs(name: str) -> bool:
        if isinstance(feed_forward, str):
            return full_match(feed_forward, name, "feedforward_modules")
        # a plain end, as in PEFT, where target_modules needs a whole part of a name
        return name.endswith(feed_forward)

    with one_budget():
        excluded = config.names("exclude_modules", may_be_pattern=True)
        names = targeted(model, AdapterSpec(1, 1.0, targets, excluded=excluded))
        inputs = [name for name in names if scales_inputs(name)]
    return [name for name in names if name not in inputs], inputs


def _matching(ends: Sequence[str], names: Collection[str]) -> tuple[str, ...]:
    """The `ends` with which at least one of the names ends."""
    return tuple(end for end in ends if any(matches_suffix(name, end) for name in names))


# What the calculator counts, and what it adds to a simulated step.


class IA3(FinetuningMethod):
    """Vectors scale the keys, the values and the inputs of each block's last feed-forward linear.

    Experts are left out, as in PEFT: they are no modules.
    """

    name = "ia3"
    title = "(IA)³"

    def adapted(self, model: Architecture) -> Mapping[str, int]:
        names = {name for name, linear in model.linears() if linear.experts == 1}
        ends = _matching((*KEYS_VALUES, *FEED_FORWARD), names) or KEYS_VALUES[:2]
        matching = matching_linears(model, ends)
        return {name: 1 for name in matching if name in names}

    def linear_parameters(self, linear: Linear, rank: int) -> int:
        return linear.inputs if self._scales_inputs(linear) else linear.outputs

    def _scales_inputs(self, linear: Linear) -> bool:
        return any(matches_suffix(linear.name, end) for end in FEED_FORWARD)

    def trained_parts(self, model: Architecture) -> TrainedParts:
        names = self.adapted(model)
        scaled = (linear for name, linear in model.linears() if name in names)
        return TrainedParts(
            {"vectors": sum(self.linear_parameters(linear, 1) for linear in scaled)}
        )

    def fold(self, ops: Ops, x: Value, linear: Linear, rank: int) -> Value | None:
        """W(l ⊙ x), whose x is kept for the gradient of l; None for keys and values."""
        if not self._scales_inputs(linear):
            return None
        return ops.matmul(self._scale(ops, x, linear), linear, ops.n)

    def adapt(self, ops: Ops, y: Value, x: Value, linear: Linear, rank: int, rows: int) -> Value:
        """l ⊙ Wx."""
        return self._scale(ops, y, linear)

    def _scale(self, ops: Ops, x: Value, linear: Linear) -> Value:
        """l ⊙ x; backward forms products of the size of x, whose sum is the gradient of l."""
        weight = ops.adapter_weight(self.linear_parameters(linear, 1))
        return ops.tape.op(x, saves=[x], weights=[weight], back=x.elements * x.width)


COUNTED = IA3()
