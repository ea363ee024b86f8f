# ruff: noqa: ARG002 (most methods need only some of what a hook gets)
"""What the calculator asks of a fine-tuning method, and exact parameter counts, linear by linear.

A method is one subclass of FinetuningMethod: a frozen dataclass whose fields are its options and
whose functions say what it trains and what it adds to the simulated step. Nothing else in the
calculator knows its name: callers pass the methods as a mapping from names to instances with
default options.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from msgspec import Struct

from pipeline.calc.settings import CONTEXT, TrainingConfig, check_options, chunk_rows, options_of
from pipeline.calc.target_modules import ALL_LINEAR, select_linears
from pipeline.errors import UserError
from pipeline.files.patterns import one_budget

if TYPE_CHECKING:
    from pipeline.calc.architecture import Architecture, Block, Linear
    from pipeline.calc.tape import Ops, Value


class TrainedBase(NamedTuple):
    """Weights of the base that get gradients: blocks from `first_block`, the ends, the rest.

    The ends are embedding and head.
    """

    first_block: int
    ends: bool = False
    rest: bool = False  # last norm, positions, linears outside the blocks


class TrainedParts(NamedTuple):
    """Trainable parameters by part: those added, which the adapter stores, and the base's own."""

    added: Mapping[str, int] = {}
    base: Mapping[str, int] = {}


class Projection(Struct, frozen=True):  # a tuple's `count` is a method
    """`count` equal linears with LoRA: A (rank, inputs) and B (outputs, rank) per expert."""

    name: str
    inputs: int
    outputs: int
    rank: int
    experts: int
    count: int
    parameters_each: int

    @property
    def parameters(self) -> int:
        return self.count * self.parameters_each

    @property
    def magnitudes(self) -> int:
        """DoRA's magnitudes for one expert: its parameters without A and B."""
        return self.parameters_each // self.experts - self.rank * (self.inputs + self.outputs)


@dataclass(frozen=True)
class FinetuningMethod:
    """A method with its options; by default the base is frozen and nothing is added to it.

    The functions that take `ops`, the simulated step, model what the method allocates in it: each
    returns a value made by `ops.tape.op`. Instances are hashable, so that counts can be cached.
    """

    name: ClassVar[str]
    # other name → defaults of the step that it implies
    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    # headings beside other methods: as given, and with the base in NF4
    columns: ClassVar[tuple[str, str]] = ("", "")
    adapter: ClassVar[bool] = True  # trains no linear of the base, so the base may be quantized
    low_rank: ClassVar[bool] = False  # the linears that it adapts get A and B
    step: ClassVar[Mapping[str, Any]] = {}  # defaults of the step that it implies
    answers: ClassVar[int] = 1  # sequences of an example: 2 for a pair of answers
    short_attention: ClassVar[bool] = (
        True  # whether the kernel for short sequences runs: not with more keys than queries
    )

    @property
    def title(self) -> str:
        """The method and its options in words."""
        return self.name

    def params(self) -> Mapping[str, Any]:
        """Its options as keys of the method's section of params.yaml."""
        return {key: getattr(self, key) for key in options_of(self)}

    def with_params(self, settings: Any) -> Self:
        """The method with the options that its section of params.yaml has."""
        return replace(
            self,
            **{key: getattr(settings, key) for key in options_of(self) if hasattr(settings, key)},
        )

    def check(self) -> None:
        """Raises UserError for an invalid option."""
        check_options(self)

    def refuse(self, model: Architecture) -> None:
        """Raises UserError if this model cannot be trained with these options."""

    def fitted(self, model: Architecture) -> Self:
        """The method with options that fit this model: for a column that users did not ask for."""
        return self

    def without_base(self) -> Self:
        """The method without training weights of the base, which costs less memory."""
        return self

    def with_rank(self, rank: int) -> Self | None:
        """The method with another rank everywhere; None if it has no rank."""

    # what it trains

    def trained_parts(self, model: Architecture) -> TrainedParts:
        """Trainable parameters. Raises UserError if the model lacks a target or block."""
        return TrainedParts()

    def trained_base(self, model: Architecture) -> TrainedBase:
        """Which weights of the base get gradients in the step."""
        return TrainedBase(len(model.blocks))

    def adapted(self, model: Architecture) -> Mapping[str, int]:
        """Full name → rank of every adapted linear; 1 without ranks. Raises UserError."""
        return {}

    def linear_parameters(self, linear: Linear, rank: int) -> int:
        """Parameters that it adds to an adapted linear."""
        return 0

    def block_parameters(self, model: Architecture) -> int:
        """Parameters that it adds to every block beside those of its linears."""
        return 0

    def matrices(self, model: Architecture) -> list[tuple[int, int]]:
        """The shape of each trained matrix that muon updates as one."""
        shapes: list[tuple[int, int]] = []
        for p in projections(model, self):
            if p.experts == 1:
                shapes += [(p.rank, p.inputs), (p.outputs, p.rank)] * p.count
        return shapes

    def fp32_parameters(self, model: Architecture) -> int:
        """Added parameters that our trainer keeps in fp32, whatever the adapter's precision."""
        return 0

    def factor_parameters(self, model: Architecture) -> int:
        """Trainable parameters of low-rank factors."""
        return 0

    def buffer_bytes(self, model: Architecture, width: int) -> int:
        """Bytes beside the parameters in our layers; `width`: bytes of an adapter's parameter."""
        return 0

    def simple_count(self, model: Architecture) -> int | None:
        """A rule of thumb: 2·r·d per projection, as if all were d × d; None if not valid here."""
        return None

    def notes(self, model: Architecture) -> list[str]:
        """Remarks for the reader of these counts."""
        return []

    # what it does to the step; B sequences of T tokens, N = B·T

    @property
    def positions(self) -> int:
        """Virtual tokens before each sequence, which the blocks compute like any token."""
        return 0

    def embed(self, ops: Ops, x: Value, ids: Value) -> Value:
        """The embeddings that the blocks read, from the base's (N, D); more with `positions`."""
        return x

    def extend_keys(self, ops: Ops, x: Value) -> Value:
        """The keys, or the values, of attention, from the block's (N, kv_heads · head_size)."""
        return x

    def fuse(self, ops: Ops, x: Value, block: Block, ranks: Sequence[int]) -> Value | None:
        """The output (N, D) of a block that is one operation, or None. `ranks`: of its linears."""

    def fold(self, ops: Ops, x: Value, linear: Linear, rank: int) -> Value | None:
        """The output (N, O) if the weight changes first; None if `adapt` changes the output."""

    def adapt(self, ops: Ops, y: Value, x: Value, linear: Linear, rank: int, rows: int) -> Value:
        """The output of an adapted linear, from the base's y (rows, O) and x (rows, I)."""
        return y

    def new_logits(self, ops: Ops, x: Value, rows: int) -> Value | None:
        """Logits of added rows of the head, from hidden states x (rows, D); None without them."""


# counts


@lru_cache(maxsize=32)
@one_budget()
def ranks(model: Architecture, method: FinetuningMethod) -> Mapping[str, int]:
    """Full name → rank of every adapted linear. Raises UserError for an unmatched target."""
    return method.adapted(model)


@lru_cache(maxsize=32)
def projections(model: Architecture, method: FinetuningMethod) -> tuple[Projection, ...]:
    """The linears that get A and B, with their shapes, equal ones grouped, in the model's order."""
    rank_by_name = ranks(model, method) if method.low_rank else {}
    kinds = Counter(
        (linear, rank_by_name[name]) for name, linear in model.linears() if name in rank_by_name
    )
    return tuple(
        Projection(
            # GPT-2's attention and feed-forward both have a c_proj
            linear.name if "c_proj" in linear.name else linear.name.rsplit(".", 1)[-1],
            linear.inputs,
            linear.outputs,
            rank,
            linear.experts,
            count,
            method.linear_parameters(linear, rank),
        )
        for (linear, rank), count in kinds.items()
    )


def trained_split(model: Architecture, method: FinetuningMethod) -> tuple[int, int]:
    """Trainable parameters as (added to the base and stored in the adapter, of the base itself)."""
    added, base = method.trained_parts(model)
    return sum(added.values()), sum(base.values())


def trainable(model: Architecture, method: FinetuningMethod) -> int:
    """Number of trainable parameters."""
    return sum(trained_split(model, method))


def why_they_differ(model: Architecture, method: FinetuningMethod) -> str:
    """Why the exact count differs from the simple one, in one line; empty if they agree."""
    if method.simple_count(model) in (None, trainable(model, method)):
        return ""
    wrong = [
        p
        for p in projections(model, method)
        if (p.inputs, p.outputs) != (model.hidden, model.hidden)
    ]
    shapes = ", ".join(f"{p.name} {p.inputs:,} → {p.outputs:,}" for p in wrong)
    square = f"{model.hidden:,} × {model.hidden:,}"
    return f"the rule of thumb takes every projection as {square}; here {shapes}"


# for methods that adapt linears

# PEFT maps the experts' names in older checkpoints to those of today's tensors in the same way
_FUSED_NAMES = dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), "gate_up_proj") | {
    "w2": "down_proj",
    "gate": "mlp.gate",
}


def matching_linears(model: Architecture, targets: tuple[str, ...]) -> list[str]:
    """Full names of the linears that match a target, in the model's order.

    Raises UserError for a target that matches nothing, or only one of an expert's gate and up,
    which are one tensor.
    """
    if model.style.split_experts:
        for pair in (("gate_proj", "up_proj"), ("w1", "w3")):
            if len(set(pair) & set(targets)) == 1:
                raise UserError(
                    f"targets: {' and '.join(pair)} are one tensor in this model's experts; name "
                    "both."
                )
        experts = (
            ("experts.gate_up_proj", "experts.down_proj", "mlp.gate")
            if ALL_LINEAR in targets
            else ()
        )
        targets = (*(_FUSED_NAMES.get(want, want) for want in targets), *experts)
    if any(re.search(r"\.\d+\.", f".{want}.") for want in targets):  # names a certain block
        return select_linears((name for name, _ in model.linears()), targets)
    # the same in every block, so match each name only once: 80 blocks have 560 linears, but 7 names
    matches = set(
        select_linears(dict.fromkeys(linear.name for _, linear in model.linears()), targets)
    )
    if model.style.split_experts and ALL_LINEAR in targets:
        # PEFT takes gate, up and down as the experts', so that others of these names get nothing
        matches -= {
            name
            for name in matches
            if name.endswith(("gate_proj", "up_proj", "down_proj")) and ".experts." not in name
        }
    return [name for name, linear in model.linears() if linear.name in matches]


# from a user's values


class Configuration(NamedTuple):
    """A method and a step; `methods`: all methods with the user's options, to compare with."""

    methods: Mapping[str, FinetuningMethod]
    method: FinetuningMethod
    run: TrainingConfig


def configure(
    model: Architecture, methods: Mapping[str, FinetuningMethod], name: str, **values: Any
) -> Configuration:
    """The method called `name` or by its alias, and the step, from the command line's options.

    `values`: options of any method and of TrainingConfig by name; None is the default. Defaults
    that depend on the model: the longest sequence up to 2,048 that leaves room for virtual tokens;
    the labels of a chunk; for MiniGPT fp32, no checkpointing and no CUDA context. Raises UserError
    for an unknown option or an invalid value.
    """
    given = {key: value for key, value in values.items() if value is not None}
    step = {key: given.pop(key) for key in TrainingConfig.__dataclass_fields__ if key in given}
    methods = with_options(methods, **given)
    method, implied = find_method(methods, name)
    ours = model.style.ours
    run = TrainingConfig(
        **{
            "sequence": max(1, min(2048, model.context - method.positions)),
            "precision": "fp32" if ours else "bf16",
            "checkpointing": "none" if ours else "full",
            "context": 0 if ours else CONTEXT,
            "answers": method.answers,
            "chunk": chunk_rows(model.vocabulary),
            **method.step,
            **implied,
            **step,
        }
    )
    run.check()
    return Configuration(methods, method, run)


def with_options(
    methods: Mapping[str, FinetuningMethod], **values: Any
) -> dict[str, FinetuningMethod]:
    """All methods with the options that each takes. Raises UserError for an invalid one."""
    known = set[str]().union(*(method.__dataclass_fields__ for method in methods.values()))
    if unknown := values.keys() - known:
        raise UserError(f"calc has no option {', '.join(sorted(unknown))}")
    changed = {}
    for name, method in methods.items():
        taken = {key: value for key, value in values.items() if key in method.__dataclass_fields__}
        for key, rule in options_of(method).items():
            if rule.parse and key in taken and not isinstance(taken[key], tuple):
                taken[key] = rule.parse(taken[key])
        changed[name] = replace(method, **taken)
        changed[name].check()
    return changed


def find_method(
    methods: Mapping[str, FinetuningMethod], name: str
) -> tuple[FinetuningMethod, Mapping[str, Any]]:
    """The method of this name or alias, and the alias's defaults of the step. Raises UserError."""
    for method in methods.values():
        if name in (method.name, *method.aliases):
            return method, method.aliases.get(name, {})
    raise UserError(f"method must be one of {', '.join(methods)}, got {name!r}.")


def first_adapter(methods: Mapping[str, FinetuningMethod]) -> FinetuningMethod:
    """The first that trains an adapter: compared with full training, and advised instead of it."""
    return next(method for method in methods.values() if method.adapter)


def names_of(methods: Iterable[FinetuningMethod]) -> list[str]:
    """The names that users give: of the methods, each followed by its aliases."""
    return list(chain.from_iterable((method.name, *method.aliases) for method in methods))
