"""The calculator's input: what is trained (FinetuningMethod), and how a step runs (TrainingConfig)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pipeline.calc.architecture import Architecture
from pipeline.calc.precision import precision
from pipeline.errors import UserError

METHODS = ("full", "freeze", "lora", "qlora", "prefix", "prompt")  # names that users give
CONTEXT = 512 * 2**20  # bytes of CUDA context and kernels, assumed
CHOICES = {
    "method": ("full", "freeze", "lora", "prefix", "prompt"),
    "embeddings": ("none", "all", "new_rows"),
    "checkpointing": ("none", "selective", "full"),
    "attention": ("sdpa", "eager", "short"),
    "loss": ("full", "labels", "chunked", "divergence"),
    "casts": ("weights", "inputs"),
    "adapter-precision": ("fp32", "bf16"),  # as in training: the calculator's form writes params.yaml
}

OPTIMIZERS: dict[str, Callable[[int], float]] = {  # width of a trained parameter → bytes of its state
    "adamw": lambda width: 2 * width,  # torch's fused: both moments in the parameter's precision
    "adam-flat": lambda width: (
        8 if width == 4 else 16
    ),  # our trainer's: fp32 moments; for 16 bits fp32 master weights too
    "adamw-foreach": lambda width: 2 * width,  # torch's default: copies all parameters during the update
    "adamw-fp32": lambda _: 8,
    "adamw-bf16": lambda _: 4,
    "adamw-8bit": lambda _: 2 * (1 + 4 / 256),  # one byte each, one fp32 scale per 256 (Dettmers et al. 2022)
    "paged-adamw": lambda _: 0,  # moves to CPU memory when the GPU is full
    "paged-adamw-8bit": lambda _: 0,
    "sgd": lambda _: 0,
}


@dataclass(frozen=True)
class FinetuningMethod:
    """What is trained. `embeddings` (embedding and head) and `new_rows` apply to LoRA, `last_blocks` to freezing."""

    kind: str = "lora"
    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] = ("attention",)
    rank_pattern: tuple[tuple[str, int], ...] = ()  # (pattern, rank), matched as PEFT does
    rslora: bool = False
    dora: bool = False
    embeddings: str = "none"
    new_rows: int = 0
    last_blocks: int = 1
    train_embeddings: bool = True  # with freezing
    virtual_tokens: int = 20
    pissa: bool = False  # our trainer keeps the initial A and B; PEFT changes the base instead

    @property
    def scale(self) -> float:
        """α/r, or α/√r with rsLoRA (Kalajdzievski 2023)."""
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))


@dataclass(frozen=True)
class TrainingConfig:
    """How a training step runs. `batch` sequences of `sequence` tokens; precisions by name."""

    batch: int = 1
    sequence: int = 2048
    precision: str = "bf16"  # of the base's weights
    adapter_precision: str = "fp32"
    optimizer: str = "adamw"
    checkpointing: str = "full"
    attention: str = "sdpa"
    loss: str = "full"
    label_share: float = 1.0  # share of tokens with a label; used by "labels" and "chunked"
    chunk: int = 1024  # labels per chunk of the chunked loss
    casts: str = "weights"  # for a 16-bit x and a 32-bit A: our trainer casts A, PEFT casts x
    context: int = 0  # bytes of CUDA context and kernels, outside the allocator
    sequences: int = 0  # packed into the rows; 0: one per row
    span: int = 0  # of packed sequences: length of a token's own sequence, averaged over tokens
    scores: int = 0  # kept by "short" attention per head and layer; 0: S² per sequence

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    @property
    def virtual_places(self) -> int:
        """Number of sequences, each of which begins with the virtual tokens."""
        return self.sequences or self.batch

    @property
    def labels(self) -> int:
        """Tokens whose logits are computed."""
        return self.tokens if self.loss == "full" else max(1, round(self.tokens * self.label_share))

    @property
    def width(self) -> int:
        """Bytes of an activation: the compute dtype of the precision."""
        return precision(self.precision).compute

    @property
    def trainer(self) -> bool:
        """Whether our trainer runs the step: a persistent flat gradient, and norms and LoRA that save few tensors."""
        return self.optimizer == "adam-flat"

    def checkpointed(self, block: int) -> bool:
        """Whether block number `block` saves only its input: every block, or with `selective` every second."""
        return self.checkpointing == "full" or (self.checkpointing == "selective" and block % 2 == 0)


def validate(method: FinetuningMethod, run: TrainingConfig) -> None:
    """Raises UserError for an invalid value."""
    for name, choices in {**CHOICES, "optimizer": tuple(OPTIMIZERS)}.items():
        field = {"method": "kind"}.get(name, name.replace("-", "_"))
        value = getattr(method if hasattr(method, field) else run, field)
        if value not in choices:
            raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
    precision(run.precision)
    for value, name, least in (
        (method.rank, "rank", 1),
        (method.new_rows, "new-rows", 0),
        (method.last_blocks, "last-blocks", 0),
        (method.virtual_tokens, "virtual-tokens", 1),
        (run.batch, "batch", 1),
        (run.sequence, "sequence", 1),
        (run.chunk, "chunk", 1),
        (run.context // 2**20, "context", 0),
    ):
        if not least <= value < 2**31:
            raise UserError(f"{name} must be a whole number from {least} to {2**31 - 1:,}, got {value:,}.")
    if method.embeddings == "new_rows" and not method.new_rows:
        raise UserError("embeddings new_rows needs --new-rows, the number of trainable rows.")
    if not 0 < run.label_share <= 1:
        raise UserError(f"label-share must be more than 0 and at most 1, got {run.label_share:g}.")
    if not 0 < method.alpha < float("inf"):
        raise UserError(f"alpha must be more than 0, got {method.alpha:g}.")


FULL, FREEZE, LORA = FinetuningMethod("full"), FinetuningMethod("freeze"), FinetuningMethod("lora")


QLORA = "nf4-dq"  # the precision of its base


def qlora(run: TrainingConfig) -> TrainingConfig:
    """The same step on a base in NF4 with double quantization (Dettmers et al. 2023)."""
    return replace(run, precision=QLORA)


def parse_method(kind: str, rank: int, alpha: float | None, targets: str, **more: Any) -> FinetuningMethod:
    """A method from command-line values: `qlora` is LoRA, alpha defaults to the rank, `targets` are comma-separated."""
    if more.get("new_rows") and more.get("embeddings") == "none":
        more["embeddings"] = "new_rows"
    return FinetuningMethod(
        kind="lora" if kind == "qlora" else kind,
        rank=rank,
        alpha=float(rank) if alpha is None else alpha,
        targets=tuple(name.strip() for name in targets.split(",")),
        **more,
    )


def parse_training_config(
    model: Architecture,
    kind: str,
    *,
    sequence: int | None = None,
    precision: str | None = None,
    checkpointing: str | None = None,
    context: int | None = None,
    virtual_tokens: int = 0,
    **more: Any,
) -> TrainingConfig:
    """A step of this model; `context` in bytes. Defaults of MiniGPT: fp32, no checkpointing, no CUDA context.

    The default sequence is the longest up to 2,048, less the positions of prompt tuning's `virtual_tokens`.
    """
    ours, positions_left = model.style.ours, model.context - (virtual_tokens if kind == "prompt" else 0)
    fallback = QLORA if kind == "qlora" else "fp32" if ours else "bf16"
    return TrainingConfig(
        sequence=max(1, min(2048, positions_left)) if sequence is None else sequence,
        precision=precision or fallback,
        checkpointing=checkpointing or ("none" if ours else "full"),
        context=(0 if ours else CONTEXT) if context is None else context,
        **more,
    )
