"""How a training step runs (TrainingConfig), and what an option of it or of a method is."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, NamedTuple

from pipeline.errors import UserError


class Precision(NamedTuple):
    """How numbers are stored: `bytes` per weight, `scales` of them for scales.

    Activations have `compute` bytes.

    A 16- or 32-bit precision applies to every tensor, a quantized one only to the linears of the
    blocks: each other parameter (embeddings, head, norms, biases) has `compute` bytes.
    """

    name: str
    bits: float  # without scales
    bytes: float
    scales: float
    compute: int

    @property
    def quantized(self) -> bool:
        return self.bits < 16

    def weights(self, quantizable: int, total: int) -> int:
        """Bytes of `total` parameters, `quantizable` of them in linears of the blocks."""
        return round(quantizable * self.bytes) + (total - quantizable) * self.compute


GROUP = 128  # weights per scale, the usual group size of GPTQ and AWQ checkpoints
NF4_BLOCK, NF4_BLOCK_2 = 64, 256  # QLoRA's blocks (Dettmers et al. 2023, section 3)


def _quantized(name: str, bits: float, scales: float, packed: float | None = None) -> Precision:
    """Weights of `bits`, stored in `packed`, with so many bytes of scales each."""
    return Precision(name, bits, (packed or bits) / 8 + scales, scales, 2)


def _grouped(name: str, bits: int, group: int = GROUP) -> Precision:
    """A scale of 16 bit and a zero point of `bits` per group of weights."""
    return _quantized(name, bits, (2 + bits / 8) / group)


PRECISIONS: dict[str, Precision] = {
    p.name: p
    for p in (
        Precision("fp32", 32, 4, 0, 4),
        Precision("tf32", 32, 4, 0, 4),  # fp32 storage, 19-bit products on Ampere and later
        Precision("fp16", 16, 2, 0, 2),
        Precision("bf16", 16, 2, 0, 2),
        _quantized("fp8", 8, 0),  # E4M3, one scale per tensor
        # LLM.int8(): one fp32 scale per row, of 4,096 weights by assumption
        _quantized("int8", 8, 4 / 4096),
        _quantized("nf4", 4, 4 / NF4_BLOCK),  # one fp32 scale per block
        # double quantization: scales of 8 bit, with an fp32 scale per block of them
        _quantized("nf4-dq", 4, 1 / NF4_BLOCK + 4 / (NF4_BLOCK * NF4_BLOCK_2)),
        _grouped("gptq", 4),
        _grouped("awq", 4),
        _grouped("3bit", 3),
        _grouped("2bit", 2),
        _quantized("1.58bit", 1.58, 0, packed=1.6),  # BitNet b1.58: ternary, five weights per byte
    )
}


@cache
def precision(name: str) -> Precision:
    """The precision called `name`; `gptq-g64` has groups of 64. Raises UserError."""
    match = re.fullmatch(r"(gptq|awq|3bit|2bit)-g(\d{1,6})", name)
    if match and int(match[2]):
        return _grouped(name, int(PRECISIONS[match[1]].bits), int(match[2]))
    if name not in PRECISIONS:
        raise UserError(
            f"precision {name!r} is not known. Known: {', '.join(PRECISIONS)}; gptq-g64 has "
            "groups of 64."
        )
    return PRECISIONS[name]


CONTEXT = 512 * 2**20  # bytes of CUDA context and kernels, assumed
# bytes of logits in fp32 that a GPU computes at once: fewer rows do not fill it
LOGITS = 256 * 2**20


def chunk_rows(vocabulary: int) -> int:
    """Labels whose logits a GPU computes at once, in whole 64s."""
    return max(64, LOGITS // (4 * vocabulary) // 64 * 64)


QLORA = "nf4-dq"  # precision of its base: NF4 with double quantization (Dettmers et al. 2023)
LARGEST_INT = 2**31 - 1

# Tokens of MiniGPT's packed row whose attention is one product under a mask: a training step then
# takes 1/1.2 to 1/1.35 of the time of a product for each sequence (measured for 30 to 120 tokens).
# In a longer row masked scores cost more.
PACK_UP_TO = 128
STATE_BLOCK = 256  # weights that share a scale in adamw-8bit's state
# Weights whose state is in fp32 at once while adamw-8bit updates them. On a card a chunk costs 30
# launches, whatever its size, and the memory of activations is free by then.
STATE_CHUNK, STATE_CHUNK_ON_CARD = 2**20, 2**24
OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw-8bit", "sgd", "muon")  # those of params.yaml
TRAINERS = ("ours", "torch", "torch-fp32", "torch-foreach")


class Option(NamedTuple):
    """A setting's help and the rule for its values. (A dataclass would start more slowly.)"""

    default: Any
    help: str
    flags: tuple[str, ...] = ()  # on the command line, if not --the-name
    choices: tuple[str, ...] = ()
    least: int | None = None  # of a whole number
    unit: int = 1  # users give multiples of it
    kind: type | None = None  # of its values, if not the default's
    automatic: bool = False  # the default depends on the model or on other options
    metavar: str | None = None
    parse: Callable[[Any], Any] | None = None  # text (with a metavar: several) → value


def option(default: Any, help: str, **rule: Any) -> Any:
    """A dataclass field that users can set. Fields without `option` are set by code only."""
    return field(default=default, metadata={"option": Option(default, help, **rule)})


def options_of(settings: Any) -> dict[str, Option]:
    """The options of a dataclass or an instance of one, by name."""
    return {f.name: f.metadata["option"] for f in fields(settings) if "option" in f.metadata}


def check_options(settings: Any) -> None:
    """Raises UserError for a value that breaks the rule of its option."""
    for name, rule in options_of(settings).items():
        value, shown = getattr(settings, name), name.replace("_", "-")
        if rule.choices and value not in rule.choices:
            raise UserError(f"{shown} must be one of {', '.join(rule.choices)}, got {value!r}.")
        if rule.least is not None and not rule.least <= value // rule.unit <= LARGEST_INT:
            raise UserError(
                f"{shown} must be a whole number from {rule.least} to {LARGEST_INT:,}, got "
                f"{value // rule.unit:,}."
            )


@dataclass(frozen=True)
class TrainingConfig:
    """How a training step runs. `batch` sequences of `sequence` tokens; precisions by name."""

    batch: int = option(1, "Batch size, in sequences.", least=1)
    sequence: int = option(
        2048,
        "Sequence length, in tokens; default: 2,048 or the model's maximum.",
        flags=("--sequence", "--seq"),
        least=1,
        automatic=True,
    )
    precision: str = option(
        "bf16",
        "Precision of the base: fp32, bf16, int8, nf4, nf4-dq, gptq-g64 ...; default: bf16.",
        automatic=True,
    )
    adapter_precision: str = option(
        "fp32", "Precision of the adapter: fp32 or bf16.", choices=("fp32", "bf16")
    )  # as in training: the calculator's form writes params.yaml
    optimizer: str = option(
        "adamw",
        f"Optimizer: {', '.join(OPTIMIZERS)}.",
        choices=OPTIMIZERS,
    )
    trainer: str = option(
        "ours",
        "Step of ours, or of torch, transformers and PEFT: torch; torch-fp32 with fp32 moments; "
        "torch-foreach.",
        choices=TRAINERS,
    )
    neftune_alpha: float = option(0.0, "NEFTune's noise on the embeddings; 0: none.")
    checkpointing: str = option(
        "full",
        "Gradient checkpointing: none, selective (every second block) or full; default: full.",
        choices=("none", "selective", "full"),
        automatic=True,
    )
    attention: str = option(
        "sdpa", "Attention: sdpa (flash and similar) or eager.", choices=("sdpa", "eager", "short")
    )
    loss: str = option(
        "full",
        "Logits in memory at once: full, labels, chunked, fused (on a GPU); default: full, for "
        "pairs chunked.",
        choices=("full", "labels", "chunked", "fused", "divergence"),
        automatic=True,
    )
    label_share: float = option(1.0, "Fraction of tokens with a label (labels, chunked).")
    chunk: int = option(
        1024,
        "Labels per chunk (chunked); default: those of 256 MiB of logits.",
        least=1,
        automatic=True,
    )
    tokens_per_batch: int = option(
        0,
        "Tokens of a batch that is packed with sequences, whatever --batch is; 0: none is packed.",
        least=0,
    )
    casts: str = option(
        "weights",
        "What an fp32 adapter on a 16-bit base casts: weights (ours) or inputs (PEFT).",
        choices=("weights", "inputs"),
    )
    # bytes of CUDA context and kernels, outside the allocator
    context: int = option(
        0,
        "CUDA context outside the allocator, in MiB; default: 512.",
        least=0,
        unit=2**20,
        automatic=True,
    )
    # our kernels for CPUs run, not those for GPUs: gated feed-forwards that save their inputs alone
    cpu: bool = False
    # and those of native.c: no copies in fp32, SwiGLU and a rotation are one operation each
    native: bool = False
    # sequences of an example: 2 for a pair of answers, each of up to `sequence` tokens
    answers: int = 1
    sequences: int = 0  # packed into the rows; 0: one per row
    span: int = 0  # of packed sequences: length of a token's own sequence, averaged over tokens
    scores: int = 0  # kept by "short" attention per head and layer; 0: S² per sequence

    @property
    def rows(self) -> int:
        return 1 if self.tokens_per_batch else self.batch * self.answers

    @property
    def size(self) -> str:
        """The batch in words."""
        if self.tokens_per_batch:
            return f"{self.tokens:,} tokens, packed with {self.sequence:,} each"
        pairs = f" pairs × {self.answers}" if self.answers > 1 else ""
        return f"{self.batch}{pairs} × {self.sequence:,} tokens"

    @property
    def tokens(self) -> int:
        if self.tokens_per_batch:  # a longer example stands alone
            return max(self.tokens_per_batch, self.answers * self.sequence)
        return self.rows * self.sequence

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.tokens // self.rows

    @property
    def attended(self) -> int:
        """Tokens of a token's own sequence, which it may attend to."""
        return self.span or self.sequence

    @property
    def virtual_places(self) -> int:
        """Number of sequences, each of which begins with the virtual tokens."""
        return self.sequences or -(-self.tokens // self.sequence)

    @property
    def labels(self) -> int:
        """Tokens whose logits are computed."""
        return self.tokens if self.loss == "full" else max(1, round(self.tokens * self.label_share))

    @property
    def width(self) -> int:
        """Bytes of an activation: the compute dtype of the precision."""
        return precision(self.precision).compute

    @property
    def ours(self) -> bool:
        """Whether our trainer runs the step: a flat gradient, fp32 state, few saved tensors."""
        return self.trainer == "ours"

    @property
    def keeps_copies(self) -> bool:
        """Whether low-rank factors in fp32 have a copy in 16 bits, which the products read."""
        in_fp32 = precision(self.adapter_precision).compute == 4
        return self.ours and not self.cpu and self.width == 2 and in_fp32

    def moment_bytes(self, width: int) -> int:
        """Bytes of one of AdamW's two moments per trained parameter of `width` bytes."""
        # torch has moments in the precision of the parameters
        return 4 if self.trainer in ("ours", "torch-fp32") else width

    def state_bytes(self, width: int) -> float:
        """Bytes of optimizer state on the device per trained parameter of `width` bytes."""
        both = 2 * self.moment_bytes(width)
        moments = {"adamw": both, "muon": both, "adamw-8bit": 2 * (1 + 4 / STATE_BLOCK)}.get(
            self.optimizer, 0
        )
        # of 16-bit parameters ours has weights and gradient in fp32 too
        return moments + (8 if self.ours and width < 4 else 0)

    def checkpointed(self, block: int) -> bool:
        """Whether block `block` saves only its input: all, or with `selective` every second."""
        return self.checkpointing == "full" or (
            self.checkpointing == "selective" and block % 2 == 0
        )

    def check(self) -> None:
        """Raises UserError for an invalid value."""
        check_options(self)
        precision(self.precision)
        if not 0 < self.label_share <= 1:
            raise UserError(
                f"label-share must be more than 0 and at most 1, got {self.label_share:g}."
            )
        if not 0 <= self.neftune_alpha <= LARGEST_INT:
            raise UserError(
                f"neftune-alpha must be from 0 to {LARGEST_INT:,}, got {self.neftune_alpha:g}."
            )
