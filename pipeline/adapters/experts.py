"""LoRA on a mixture's experts, stacked in one parameter (E, O, I): `target_parameters`.

Each token's update is computed with the A and B of its own experts: no (E, O, I) update is ever
formed.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.adapters.config import CONFIG, LAYOUT, PREFIX, AdapterSpec
from pipeline.adapters.lora import LINEAR_KEYS, AdapterLayer, initialize
from pipeline.calc.target_modules import matches_suffix
from pipeline.errors import UserError
from pipeline.files.text import abbreviate_repr
from pipeline.models.experts.mixture import PROJECTIONS, StackedUpdate, mixed
from pipeline.project.params.sections import Init

_VERSION = re.compile(r"(\d{1,4})\.(\d{1,4})\.(\d{1,4})(.*)")


class ExpertUpdate(nn.Module):
    """s·BₑAₑ for each expert e of a parameter (E, O, I), or (E, I, O) if `transposed`.

    As in PEFT, lora_A is (E·R, I), expert after expert, and lora_B is (O, R·E), in which the
    experts alternate.
    """

    def __init__(
        self,
        weight: Tensor,
        transposed: bool,
        rank: int,
        scale: float,
        dtype: torch.dtype | None,
        init: Init,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.experts, outputs, inputs = weight.mT.shape if transposed else weight.shape
        rows = self.experts * rank
        self.lora_A = nn.Parameter(weight.new_empty((rows, inputs), dtype=dtype))
        self.lora_B = nn.Parameter(weight.new_empty((outputs, rows), dtype=dtype))
        with torch.no_grad():
            for a, b in zip(*self.pairs(), strict=True):
                initialize(a, b, init)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Views of A (E, R, I) and B (E, O, R)."""
        A = self.lora_A.view(self.experts, -1, self.lora_A.shape[1])
        # (O, R, E) → (E, O, R)
        B = self.lora_B.view(len(self.lora_B), -1, self.experts).permute(2, 0, 1)
        return A, B

    def stacked(self) -> StackedUpdate:
        return StackedUpdate(*self.pairs(), self.scale)


class LoRAExperts(AdapterLayer):
    """A mixture's frozen experts, with an update of one or both of their projections.

    `base` is a module of transformers' interface of experts: stacked projections, and `_apply_gate`
    between them.
    """

    def __init__(
        self,
        base: nn.Module,
        name: str,
        parameters: Sequence[str],
        spec: AdapterSpec,
        dtype: torch.dtype | None,
        init: Init,
    ) -> None:
        """`name`: the full name of `base`; `parameters`: those of its own that get LoRA."""
        super().__init__(base)
        self.transposed: bool = base.is_transposed  # type: ignore[assignment]
        self.updates = nn.ModuleDict()
        for parameter in parameters:
            full, weight = f"{name}.{parameter}", base.get_parameter(parameter)
            rank, scale = spec.rank_of(full), spec.scale_of(full)
            self.updates[parameter] = ExpertUpdate(
                weight, self.transposed, rank, scale, dtype, init
            )

    def by_parameter(self) -> dict[str, ExpertUpdate]:
        updates: Any = self.updates  # a ModuleDict's modules have no type of their own
        return dict(updates)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        by_key: dict[str, nn.Parameter] = {}
        updates = self.by_parameter().values()
        a_key, b_key = LINEAR_KEYS
        for nested, update in zip(nesting(len(updates)), updates, strict=True):
            by_key[nested + a_key], by_key[nested + b_key] = update.lora_A, update.lora_B
        return by_key

    def forward(self, x: Tensor, *routed: Tensor) -> Tensor:
        """x (N, D); `routed`: each token's experts and their weights, (N, K) each."""
        chosen, weights = routed
        if self.enabled:
            updates = {name: update.stacked() for name, update in self.by_parameter().items()}
            return mixed(self.base, x, chosen, weights, updates)
        out: Tensor = self.base(x, chosen, weights)
        return out


def nesting(count: int) -> list[str]:
    """What PEFT adds to a module's name in the keys of its `count` parameters.

    The first one's wrapper lies innermost.
    """
    return [".base_layer" * depth for depth in reversed(range(count))]


class Stack(NamedTuple):
    """A parameter (E, O, I) that gets LoRA of rank R."""

    key: str  # PEFT's, without its prefix and its end
    transposed: bool  # the parameter is (E, I, O)
    experts: int
    rank: int
    outputs: int
    inputs: int


def stacks(model: nn.Module, spec: AdapterSpec) -> Iterator[Stack]:
    """All that `spec` names. Raises UserError."""
    for name, parameters in resolve_parameters(model, spec.parameters).items():
        module = model.get_submodule(name)
        transposed = bool(module.is_transposed)
        for nested, parameter in zip(nesting(len(parameters)), parameters, strict=True):
            experts, *sides = module.get_parameter(parameter).shape
            outputs, inputs = reversed(sides) if transposed else sides
            rank = spec.rank_of(f"{name}.{parameter}")
            yield Stack(f"{name}{nested}", transposed, experts, rank, outputs, inputs)


def stacked_shapes(model: nn.Module, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
    """The shape (E·R, I) of every lora_A that experts get, by PEFT's key. Raises UserError."""
    return {
        f"{PREFIX}{stack.key}{LINEAR_KEYS[0]}": (stack.experts * stack.rank, stack.inputs)
        for stack in stacks(model, spec)
    }


def in_this_layout(
    model: nn.Module, spec: AdapterSpec, values: Mapping[str, Tensor], version: object, folder: Path
) -> dict[str, Tensor]:
    """The adapter's tensors with experts' A (E·R, I) and B (O, R·E), as since PEFT 0.19.1.

    Before, the two had changed sides: A was (E·R, O) and B (I, R·E), with ΔW = (BA)ᵀ. In a square
    stack the shapes do not tell: `version` does, the `peft_version` of the adapter in `folder`.
    Raises UserError if nothing does.
    """
    changed = dict(values)
    fitting = known = {False, True}  # whether A and B have changed sides, by shapes and version
    for stack in stacks(model, spec):
        known = known & _may_be_swapped(version, stack.transposed)
        fitting = {swapped for swapped in fitting if _fits(stack, swapped, values)}
    if not fitting:
        # the shapes fit no layout: the check against the model says which are expected
        return changed
    if len(fitting & known) != 1:
        raise UserError(
            f"{folder / CONFIG}: peft_version is {abbreviate_repr(version)}, which does not tell "
            f"how A and B of experts are stored here: PEFT changed it in {LAYOUT}. Set it to the "
            "version of PEFT that wrote the adapter; if that wrote none, to 0.17.1; if `lora` "
            f"wrote the adapter, to {LAYOUT}."
        )
    if fitting & known == {False}:
        return changed
    for stack in stacks(model, spec):
        E, R, O, I = stack.experts, stack.rank, stack.outputs, stack.inputs  # noqa: E741 (the letters of the shapes)
        a_key, b_key = (f"{PREFIX}{stack.key}{end}" for end in LINEAR_KEYS)
        A, B = values[a_key].view(E, R, O), values[b_key].view(I, R, E)
        changed[a_key] = B.permute(2, 1, 0).reshape(E * R, I)
        changed[b_key] = A.permute(2, 1, 0).reshape(O, R * E)
    return changed


def _fits(stack: Stack, swapped: bool, values: Mapping[str, Tensor]) -> bool:
    """Whether A and B of the stack have the shapes of this layout."""
    outputs, inputs, rows = stack.outputs, stack.inputs, stack.experts * stack.rank
    if swapped:
        outputs, inputs = inputs, outputs
    A, B = (values.get(f"{PREFIX}{stack.key}{end}") for end in LINEAR_KEYS)
    if A is None or B is None:
        return False
    return A.shape == (rows, inputs) and B.shape == (outputs, rows)


def _may_be_swapped(version: object, transposed: bool) -> set[bool]:
    """Whether A and B have changed sides in a file of this version; both if unknown.

    Up to 0.18 they have in a stack (E, O, I), in 0.19.0 in every stack. 0.17 writes no version, nor
    did this project.
    """
    match = _VERSION.fullmatch(version) if isinstance(version, str) else None
    if match is None:
        return {False} if version is None and transposed else {False, True}
    *numbers, rest = match.groups()
    number, latest = tuple(map(int, numbers)), tuple(map(int, LAYOUT.split(".")))
    if number > latest or (number == latest and not rest):
        return {False}
    if rest:  # a version in development, before or after the change
        return {False, True}
    return {number == (0, 19, 0) or not transposed}


def expert_layers(model: nn.Module) -> Iterator[tuple[str, LoRAExperts]]:
    """Every mixture whose experts have LoRA, with its full name."""
    return (
        (name, module) for name, module in model.named_modules() if isinstance(module, LoRAExperts)
    )


def adaptable_experts(module: nn.Module) -> bool:
    """Whether LoRA can reach its experts: stacked ones of transformers' interface, with a gate."""
    if not getattr(module, "has_gate", False) or getattr(module, "has_post_expert_norm", False):
        return False
    stacks = [module._parameters.get(name) for name in PROJECTIONS]
    return all(stack is not None and stack.ndim == 3 for stack in stacks)


def resolve_parameters(model: nn.Module, wanted: Sequence[str]) -> dict[str, list[str]]:
    """Full name of a mixture → its parameters that `wanted` names, in the mixture's order.

    `wanted`: ends of the parameters' full names. Raises UserError for a name that matches nothing,
    or a parameter that is not the stacked weights of experts.
    """
    matched: dict[str, list[str]] = {}
    missing = dict.fromkeys(wanted)
    for name, module in model.named_modules():
        for parameter in module._parameters:
            tensor = f"{name}.{parameter}"
            targets = [target for target in wanted if matches_suffix(tensor, target)]
            if not targets:
                continue
            if parameter not in PROJECTIONS or not adaptable_experts(module):
                raise UserError(
                    f"target_parameters: {targets[0]!r} matches {tensor}, which is no stack of "
                    f"experts' weights. {_known(model)}"
                )
            matched.setdefault(name, []).append(parameter)
            for target in targets:
                missing.pop(target, None)
    if missing:
        raise UserError(
            f"target_parameters: {next(iter(missing))!r} matches no parameter. {_known(model)}"
        )
    return matched


def expert_parameters(model: nn.Module) -> list[str]:
    """What target_parameters may name in `model`, such as mlp.experts.gate_up_proj."""
    names = dict[str, None]()  # in order; those of all blocks are alike
    for name, module in model.named_modules():
        if adaptable_experts(module):
            end = ".".join(name.split(".")[-2:])
            names |= {f"{end}.{projection}": None for projection in PROJECTIONS}
    return [*names]


def _known(model: nn.Module) -> str:
    if names := expert_parameters(model):
        return f"Name {' and '.join(names)}, or linears in target_modules."
    return "The base has no experts that are stacked. Name its linears in target_modules instead."


def add_experts(model: nn.Module, spec: AdapterSpec, dtype: torch.dtype | None, init: Init) -> None:
    """Wrap the experts that `spec` names in place; A and B in `dtype`, or each in its parameter's.

    Raises UserError for a wrong name, or an option that has no meaning for stacked experts, as in
    PEFT.
    """
    options = {
        "dora": spec.dora,
        f"lora_dropout {spec.dropout:g}": spec.dropout,
        f"init_lora_weights {init}": init == "pissa",
    }
    for option, is_set in options.items():
        if is_set:
            raise UserError(
                f"target_parameters: LoRA on experts does not work with {option}. Unset it, or "
                "leave the experts out."
            )
    for name, parameters in resolve_parameters(model, spec.parameters).items():
        base = model.get_submodule(name)
        model.set_submodule(name, LoRAExperts(base, name, parameters, spec, dtype, init))
