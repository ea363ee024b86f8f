# ruff: noqa: ARG002 (most methods need only some of what a hook gets)
"""The fine-tuning methods, each one object. A class needs nothing of the others: it can be a file of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.calc.method import (
    FinetuningMethod,
    Projection,
    TrainedBase,
    TrainedParts,
    group_projections,
    matching_linears,
    projections,
)
from pipeline.calc.settings import QLORA, option
from pipeline.calc.target_modules import ALL_LINEAR, GROUPS
from pipeline.errors import UserError
from pipeline.files.patterns import end_match, end_pattern, problem

if TYPE_CHECKING:
    from pipeline.calc.architecture import Architecture, Linear
    from pipeline.calc.ops import Ops
    from pipeline.calc.tape import Value


class Full(FinetuningMethod):
    """Every weight of the base trains."""

    name = "full"
    adapter = False
    title = "full fine-tuning"

    def trained_parts(self, model: Architecture) -> TrainedParts:
        return TrainedParts(base={"all": model.total})

    def trained_base(self, model: Architecture) -> TrainedBase:
        return TrainedBase(0, ends=True, rest=True)


@dataclass(frozen=True)
class Freeze(FinetuningMethod):
    """The last blocks train, and with `train_embeddings` the embedding and the head."""

    name = "freeze"
    adapter = False

    last_blocks: int = option(1, "Number of last blocks to train (freeze).", least=0)
    train_embeddings: bool = option(
        True,
        "Train embedding and head too (freeze).",
        flags=("--train-embeddings/--freeze-embeddings",),
    )

    @property
    def title(self) -> str:
        blocks = f"freeze, last {self.last_blocks} blocks"
        return f"{blocks}, embeddings and head" if self.train_embeddings else blocks

    def refuse(self, model: Architecture) -> None:
        if not (self.last_blocks or self.train_embeddings):
            raise UserError("freeze leaves nothing to train. Raise last-blocks, or train the embeddings.")

    def fitted(self, model: Architecture) -> Freeze:
        return replace(self, last_blocks=min(self.last_blocks, len(model.blocks)))

    def trained_parts(self, model: Architecture) -> TrainedParts:
        if self.last_blocks > len(model.blocks):
            raise UserError(
                f"last-blocks must be at most {len(model.blocks)}, the model's blocks, got {self.last_blocks}."
            )
        blocks = sum(block.parameters for block in model.blocks[len(model.blocks) - self.last_blocks :])
        ends = {"embeddings": model.embedding, "head": model.head} if self.train_embeddings else {}
        return TrainedParts(base={"blocks": blocks, **ends})

    def trained_base(self, model: Architecture) -> TrainedBase:
        return TrainedBase(len(model.blocks) - self.last_blocks, ends=self.train_embeddings)


def _parse_targets(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _parse_rank_patterns(texts: list[str]) -> tuple[tuple[str, int], ...]:
    """(pattern, rank) of each PATTERN=RANK. Raises UserError."""
    parsed = []
    for text in texts:
        pattern, _, rank = text.rpartition("=")
        if not pattern or not re.fullmatch(r"[0-9]{1,9}", rank) or not int(rank):
            raise UserError(f"rank-pattern takes PATTERN=RANK, such as q_proj=16, got {text[:60]!r}.")
        if reason := problem(end_pattern(pattern)):
            raise UserError(f"rank-pattern {pattern[:60]!r} is not a valid regular expression: {reason}.")
        parsed.append((pattern, int(rank)))
    return tuple(parsed)


NEW_ROWS = "new rows"
FOLD_BELOW = 2**16  # elements; our layers first add the LoRA update of smaller linears to W


@dataclass(frozen=True)
class Lora(FinetuningMethod):
    """W + s·BA at chosen linears (Hu et al. 2021), with A (R, I), B (O, R) and s = α/r.

    `embeddings` and `new_rows`: what trains of embedding and head. `rank_pattern`: (pattern, rank), matched as PEFT
    does.
    """

    name = "lora"
    aliases = {"qlora": {"precision": QLORA}}  # noqa: RUF012
    columns = ("LoRA", "QLoRA")

    rank: int = option(8, "LoRA rank.", flags=("--rank", "--r"), least=1)
    alpha: float | None = option(None, "LoRA alpha; default: the rank.", kind=float, automatic=True)
    targets: tuple[str, ...] = option(
        ("attention",),
        "attention, feed_forward, all-linear, or module names: q_proj,v_proj.",
        parse=_parse_targets,
    )
    rank_pattern: tuple[tuple[str, int], ...] = option(
        (), "Rank for modules that match PATTERN, as in PEFT.", metavar="PATTERN=RANK", parse=_parse_rank_patterns
    )
    rslora: bool = option(False, "Scale by alpha / √rank.")
    dora: bool = option(False, "DoRA: train magnitudes too.")
    embeddings: str = option(
        "none", "Train embedding and head with LoRA: none, all or new_rows.", choices=("none", "all", "new_rows")
    )
    new_rows: int = option(0, "Number of embedding rows to train; sets --embeddings new_rows.", least=0)
    pissa: bool = False  # our trainer keeps the initial A and B; PEFT changes the base instead

    @property
    def effective_alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def scale(self) -> float:
        """α/r, or α/√r with rsLoRA (Kalajdzievski 2023)."""
        return self.effective_alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def trained_rows(self) -> int:
        """Rows of the embedding, and of a head of its own, that train: none if all of them do."""
        return 0 if self.embeddings == "all" else self.new_rows

    @property
    def title(self) -> str:
        name = "DoRA" if self.dora else "rsLoRA" if self.rslora else "LoRA"
        rows = f", {self.trained_rows} new rows" if self.trained_rows else ""
        ends = ", embeddings and head" if self.embeddings == "all" else rows
        return f"{name} r={self.rank} on {', '.join(self.targets)}{ends}"

    def check(self) -> None:
        super().check()
        if self.embeddings == "new_rows" and not self.new_rows:
            raise UserError("embeddings new_rows needs --new-rows, the number of trainable rows.")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise UserError(f"alpha must be more than 0, got {self.alpha:g}.")

    def without_base(self) -> Lora:
        return replace(self, embeddings="none", new_rows=0) if self.embeddings == "all" else self

    def with_rank(self, rank: int) -> Lora:
        return replace(self, rank=rank, rank_pattern=())

    # what it trains

    def adapted(self, model: Architecture) -> Mapping[str, int]:
        return {name: self._rank_of(name, model) for name in matching_linears(model, self.targets)}

    def _rank_of(self, name: str, model: Architecture) -> int:
        """Rank by the first matching pattern, `(.*\\.)?(pattern)$` as in PEFT."""
        for key, rank in self.rank_pattern:
            if end_match(key, name, "rank_pattern"):
                return rank
        # an expert's gate and up are one tensor, but get a rank each
        fused = model.style.split_experts and name.endswith("experts.gate_up_proj")
        return 2 * self.rank if fused else self.rank

    def linear_parameters(self, linear: Linear, rank: int) -> int:
        """Parameters of A and B, and DoRA's magnitude, one per output (Liu et al. 2024)."""
        return linear.lora(rank) + (linear.outputs * linear.experts if self.dora else 0)

    def projections(self, model: Architecture) -> tuple[Projection, ...]:
        return group_projections(model, self)

    def trained_parts(self, model: Architecture) -> TrainedParts:
        matrices = {"matrices": sum(p.parameters for p in projections(model, self))}
        if self.embeddings == "all":  # PEFT's modules_to_save, without a tied head's bias
            return TrainedParts(matrices, {"embeddings": model.embedding, "head": model.head - model.head_bias})
        rows = {NEW_ROWS: self.trained_rows * model.embedding_width * (1 if model.tied else 2)}
        return TrainedParts(matrices | rows)

    def trained_base(self, model: Architecture) -> TrainedBase:
        return TrainedBase(len(model.blocks), ends=self.embeddings == "all")

    def fp32_parameters(self, model: Architecture) -> int:
        """DoRA's magnitudes."""
        return sum(p.count * p.experts * p.magnitudes for p in projections(model, self))

    def buffer_bytes(self, model: Architecture, width: int) -> int:
        """DoRA's ‖W‖² in fp32, and PiSSA's initial A and B, which are subtracted from the trained ones."""
        magnitudes = self.fp32_parameters(model)
        matrices = sum(p.parameters for p in projections(model, self)) - magnitudes
        return 4 * magnitudes + (matrices * width if self.pissa else 0)

    def document_count(self, model: Architecture) -> int | None:
        """Every projection d_model × d_model, 2·r·d_model each, for plain LoRA on separate attention projections."""
        if self.dora or self.rank_pattern or self.embeddings != "none" or self.new_rows:
            return None
        adapted = projections(model, self)
        if not all(p.name in GROUPS["attention"][:5] and p.experts == 1 for p in adapted):
            return None
        return sum(p.count * 2 * self.rank * model.hidden for p in adapted)

    def notes(self, model: Architecture) -> list[str]:
        adapted, texts = projections(model, self), []
        wide = [p for p in adapted if p.rank > min(p.inputs, p.outputs)]
        if wide:
            p = min(wide, key=lambda p: min(p.inputs, p.outputs))
            texts.append(f"rank {p.rank} is more than {p.name} can use: its rank is at most {min(p.inputs, p.outputs)}")
        with_experts = any(p.experts > 1 for p in adapted)
        if with_experts and model.style.split_experts:
            texts.append("experts' gate and up are one tensor: it gets a rank for each, twice the rank, as in PEFT")
        elif with_experts:
            texts.append("experts are one tensor a layer: PEFT adapts them by target_parameters, not target_modules")
        elif ALL_LINEAR in self.targets and any(linear.experts > 1 for linear in model.blocks[-1].linears):
            texts.append("all-linear leaves these experts out, as PEFT does; feed_forward adapts them")
        return texts

    # what it does to the step

    def embed(self, ops: Ops, x: Value, ids: Value) -> Value:
        """New rows are looked up in their own table (rows, D), then selected by id."""
        if not self.trained_rows:
            return x
        table = ops.adapter_weight(self.trained_rows * ops.model.embedding_width, NEW_ROWS)
        looked_up = ops.tape.op(elements=x.elements, width=ops.w, saves=[ids], weights=[table])
        return ops.tape.op(x, looked_up, saves=[ids])

    def new_logits(self, ops: Ops, x: Value, rows: int) -> Value | None:
        if not self.trained_rows:
            return None
        # a tied head reads the embedding's table, whose two gradients are then added
        name = NEW_ROWS if ops.model.tied else f"{NEW_ROWS} of the head"
        table = ops.adapter_weight(self.trained_rows * ops.model.embedding_width, name)
        return ops.tape.op(x, elements=rows * self.trained_rows, saves=[x], weights=[table])

    def fold(self, ops: Ops, x: Value, linear: Linear, rank: int) -> Value | None:
        """(W + s·BA)x, as our layers compute small linears: the matrix costs less than another (N, O)."""
        if linear.weights >= FOLD_BELOW or (self.dora and not ops.flat):
            return None
        t, sizes = ops.tape, (rank * linear.inputs, rank * linear.outputs)
        factors = [t.leaf(2 * size, ops.w) for size in sizes] if self.pissa else []
        weights = [ops.adapter_weight(size) for size in sizes]
        w = t.op(elements=linear.weights, width=ops.w, weights=weights, saves=factors)
        if self.dora:
            w = self._scale_rows(ops, w, linear)
        return t.op(x, w, elements=ops.n * linear.outputs, saves=[x, w] if x.node else [x])

    def adapt(self, ops: Ops, y: Value, x: Value, linear: Linear, rank: int, rows: int) -> Value:
        """y + s·BAx, with A and B of every expert in one tensor."""
        t = ops.tape
        if self.dora and ops.flat:
            return self._scale_rows(ops, self._add_in_place(ops, y, x, linear, rank, rows), linear)
        if ops.run.trainer and not self.dora:
            return self._add_in_place(ops, y, x, linear, rank, rows)
        b = self._low_rank(ops, x, linear, rank, rows)
        if self.dora:
            b = self._scale_as_peft(ops, y, b, linear)
        if b.width != y.width:  # 16-bit y + 32-bit update is 32-bit
            return ops.cast(t.op(y, b, width=b.width), y.width)
        return t.op(y, b, alias=True)

    # Functions of their own, though called once: what they do not save is freed when they return.

    def _add_in_place(self, ops: Ops, y: Value, x: Value, linear: Linear, rank: int, rows: int) -> Value:
        """y += s·BAx, in our layers; PiSSA's factors are stacked with their initial values."""
        t, sizes = ops.tape, (linear.experts * rank * linear.inputs, linear.experts * rank * linear.outputs)
        copied, twice = ops.adapter != ops.w or self.pissa, 2 if self.pissa else 1
        A, B = ([t.leaf(twice * size, ops.w)] if copied else [] for size in sizes)
        a = t.op(x, elements=rows * twice * rank, saves=[x, *A], weights=[ops.adapter_weight(sizes[0])])
        return t.op(y, a, view=True, alias=True, saves=[a, *B], weights=[ops.adapter_weight(sizes[1])])

    def _low_rank(self, ops: Ops, x: Value, linear: Linear, rank: int, rows: int) -> Value:
        """s·BAx (rows, O). Casts A and B to the dtype of x; or x to theirs, once per linear, as PEFT does."""
        t, of_inputs = ops.tape, ops.run.casts == "inputs"
        sizes = linear.experts * rank * linear.inputs, linear.experts * rank * linear.outputs
        copied = ops.adapter != ops.w and not of_inputs
        A, B = ([t.leaf(size, ops.w)] if copied else [] for size in sizes)
        x = ops.cast(x, ops.adapter) if of_inputs else x
        a = t.op(x, elements=rows * rank, saves=[x, *A], weights=[ops.adapter_weight(sizes[0])])
        a = a if of_inputs else t.op(a)  # · s
        b = t.op(a, elements=rows * linear.outputs, saves=[a, *B], weights=[ops.adapter_weight(sizes[1])])
        return t.op(b) if of_inputs else b  # · s

    def _scale_rows(self, ops: Ops, y: Value, linear: Linear) -> Value:
        """Our DoRA: m/norm · y in fp32, rounded once. Saves y, m/norm and the norm, one number per output each."""
        t, fp32 = ops.tape, 4 * y.elements
        saved = [y, *(t.leaf(linear.outputs, 4) for _ in range(2))]
        y = t.op(y, width=4, saves=saved, weights=[ops.fp32_weight(linear.outputs)], back=fp32)
        return ops.cast(y, ops.w)

    def _scale_as_peft(self, ops: Ops, y: Value, b: Value, linear: Linear) -> Value:
        """(m/norm − 1)·Wx + m/norm·s·BAx; for the norm of W + s·BA PEFT computes that matrix."""
        t = ops.tape
        norm = (3 if ops.quantized else 2) * linear.weights * ops.w
        base = t.op(y, saves=[y], weights=[ops.adapter_weight(linear.outputs)], temp=norm)
        return t.op(base, t.op(b, saves=[b]), alias=True)


@dataclass(frozen=True)
class Prefix(FinetuningMethod):
    """Trained keys and values before those of every sequence, in every block (Li and Liang 2021)."""

    name = "prefix"
    short_attention = False

    virtual_tokens: int = option(20, "Number of virtual tokens (prefix, prompt).", least=1)

    @property
    def title(self) -> str:
        return f"prefix tuning, {self.virtual_tokens} virtual tokens"

    def trained_parts(self, model: Architecture) -> TrainedParts:
        return TrainedParts({"prefix": len(model.blocks) * self.block_parameters(model)})

    def block_parameters(self, model: Architecture) -> int:
        return 2 * self.virtual_tokens * model.kv_heads * model.head_size

    def extend_keys(self, ops: Ops, x: Value) -> Value:
        """A copy of x and the virtual tokens' keys for each sequence: (B, T + virtual, kv_heads · head_size)."""
        size = self.virtual_tokens * ops.model.kv_heads * ops.model.head_size
        added = [ops.adapter_weight(size)]
        return ops.tape.op(x, elements=x.elements + ops.run.virtual_places * size, weights=added)


@dataclass(frozen=True)
class Prompt(FinetuningMethod):
    """Trained embeddings before every sequence (Lester et al. 2021)."""

    name = "prompt"

    virtual_tokens: int = option(20, "Number of virtual tokens (prefix, prompt).", least=1)

    @property
    def title(self) -> str:
        return f"prompt tuning, {self.virtual_tokens} virtual tokens"

    @property
    def positions(self) -> int:
        return self.virtual_tokens

    def trained_parts(self, model: Architecture) -> TrainedParts:
        return TrainedParts({"prompt": self.virtual_tokens * model.embedding_width})

    def embed(self, ops: Ops, x: Value, ids: Value) -> Value:
        """(B, virtual + T, D): the same virtual tokens before every sequence."""
        width = ops.model.embedding_width
        return ops.tape.op(x, elements=ops.n * width, weights=[ops.adapter_weight(self.virtual_tokens * width)])


FULL, FREEZE, LORA = Full(), Freeze(), Lora()
METHODS: Mapping[str, FinetuningMethod] = {method.name: method for method in (FULL, FREEZE, LORA, Prefix(), Prompt())}
