"""The interface of every model: MiniGPT, and any causal language model that transformers opens.

Dimensions are those of `minigpt.py`. Module names are checkpoint names in both, so that targets,
adapters and certificates need no table of renamings.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.files.base_model import TensorLocation
from pipeline.models.device import device_limits, to_device
from pipeline.project import probes

ADAPTER_PARAMETER = r"\.(lora_|magnitude)"
Checkpointing = Literal["none", "selective", "full"]
# Puts a prefix's keys and values before those of each packed sequence: number of a block, keys and
# values (B, G, T, K), lengths of the sequences → keys and values (B, G, T + n · sequences, K).
Prefix = Callable[[int, Tensor, Tensor, Sequence[int]], list[Tensor]]


@dataclass(frozen=True)
class Shape:
    """A model's sizes, and whether its head is tied to its embedding."""

    rows: int  # of the embedding
    positions: int
    layers: int
    heads: int
    tied: bool


class CausalLM(nn.Module):
    """ids (B, T) → logits (B, T, V): `hidden_states` of ids, then `logits` of hidden states."""

    embedding_name: str  # full module names
    head_name: str
    virtual: "VirtualTokens | None"  # read before every sequence
    compiles = False  # whether `torch.compile` of its blocks may pay
    takes_packed_cache = False  # whether `cache` may be a PackedCache
    # turns the lengths of packed sequences into what its blocks get
    wrap_lengths: Callable[[Sequence[int]], Sequence[int]] = tuple
    logit_cap: float | None = None  # the head's logits are cap·tanh(logits / cap)

    def __init__(self) -> None:
        super().__init__()
        self.register_module("virtual", None)
        # in a run of several processes: weight → its place in a file, if it was loaded unchanged
        self.stored: dict[Tensor, TensorLocation] = {}

    @cached_property
    @torch.no_grad()
    def supports_packing(self) -> bool:
        """Whether sequences packed end to end give what each gives alone: tried once."""
        # a CPU would take minutes for more
        row = 64 if self.device.type == "cpu" else device_limits(self.device).row_tokens
        most = min(self.max_length - 4, row)
        if most < 0:
            return False  # too few positions to try it
        reach = max((size for size in self.local_reach if size <= most), default=0)
        lengths = [reach + 3, reach + 4]
        ids = torch.arange(1, sum(lengths) + 1, device=self.device)[None] % self.shape.rows
        alone = ids.split_with_sizes(lengths, 1)
        starts = [torch.arange(length, device=self.device) for length in lengths]
        positions = torch.cat(starts)[None]
        return probes.computes(
            "sequences packed end to end",
            "one sequence is read at a time",
            lambda: self.hidden_states(ids, positions, lengths),
            right=lambda: torch.cat([self.hidden_states(row) for row in alone], 1),
            again=lambda: torch.cat(
                [self.hidden_states(row.expand(2, -1))[:1] for row in alone], 1
            ),
            wrong=lambda: self.hidden_states(ids, positions),
        )

    @property
    def local_reach(self) -> Sequence[int]:
        """Tokens over which each of its windows, convolutions and chunks reaches."""
        return ()

    @cached_property
    @torch.no_grad()
    def supports_prefix(self) -> bool:
        """Whether attention takes a prefix's keys without a cache: tried once.

        Two tokens after the keys and values of two others are compared with one sequence of all
        four.
        """
        ids = torch.arange(1, 5, device=self.device)[None]
        positions = torch.tensor([[2, 3]], device=self.device)

        def with_prefix() -> Tensor:
            read = self.keys_and_values(ids[:, :2])

            def prefix(block: int, keys: Tensor, values: Tensor, _: Sequence[int]) -> list[Tensor]:
                before = read[block]
                return [torch.cat((before[0], keys), 2), torch.cat((before[1], values), 2)]

            return self.run_body(ids[:, 2:], positions, prefix=prefix)

        return probes.computes(
            "keys and values before a sequence's own",
            "a prefix is read by way of a cache",
            with_prefix,
            right=lambda: self.run_body(ids)[:, 2:],
            again=lambda: self.run_body(ids.expand(2, -1))[:1, 2:],
            wrong=lambda: self.run_body(ids[:, 2:], positions),
        )

    def set_virtual_tokens(self, virtual: "VirtualTokens") -> None:
        """Read these virtual tokens before every sequence from now on."""
        self.virtual = virtual
        self.__dict__.pop("supports_packing", None)  # cached without them

    @property
    def max_length(self) -> int:
        """Most tokens of a sequence: the positions that no virtual token takes."""
        return self.shape.positions - (self.virtual.count if self.virtual is not None else 0)

    @property
    def shape(self) -> Shape:
        raise NotImplementedError

    @property
    def body(self) -> nn.Module:
        """The part that computes hidden states: embedding, blocks and last norm."""
        raise NotImplementedError

    @property
    def blocks(self) -> nn.ModuleList:
        """The Transformer's blocks, in order."""
        raise NotImplementedError

    def hidden_states(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        segments: Sequence[int] | None = None,
        cache: Any = None,
    ) -> Tensor:
        """(B, T, D). `positions` (B, T) default to those after the cache.

        `segments`: lengths of the sequences packed end to end in one row (1, T); none attends to
        another. `cache`: of `new_cache`, or a PackedCache of the sequences of `segments`. Virtual
        tokens are read before each sequence; `ids`, `positions` and the result do not contain them.
        """
        if self.virtual is None:
            return self.run_body(ids, positions, segments, cache)
        return self.virtual.read(self, ids, positions, segments, cache)

    def labelled_states(
        self, ids: Tensor, positions: Tensor, segments: Sequence[int] | None, index: Tensor | None
    ) -> Tensor:
        """(n, D): rows `index` of the flattened `hidden_states`, all of them for None."""
        rows = self.hidden_states(ids, positions, segments).flatten(0, 1)
        return rows if index is None else rows.index_select(0, index)

    def run_body(
        self,
        inputs: Tensor,
        positions: Tensor | None = None,
        segments: Sequence[int] | None = None,
        cache: Any = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """`hidden_states` without virtual tokens. `inputs`: ids (B, T), or embeddings (B, T, D).

        `prefix` adds keys and values before those of every sequence; not together with a cache.
        """
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) → (..., V)."""
        raise NotImplementedError

    @property
    def mixes_lengths(self) -> bool:
        """Whether a sequence is read the same whatever the length of those packed beside it."""
        return True

    @property
    def pack_up_to(self) -> int:
        """Tokens up to which sequences of one length are packed; above, rows are faster."""
        return 0

    def prepare_cpu_training(self) -> None:
        """Replace parts by faster ones that compute the same, in place."""

    def prepare_for_accelerator(self, device: torch.device) -> None:
        """The same for training and answers on another `device`. The model may not be there yet."""

    @property
    def trains_natively(self) -> bool:
        """Whether the kernels of native.c train it."""
        return False

    def kept_attention_weights(self, lengths: Sequence[int]) -> int | None:  # noqa: ARG002
        """Attention weights per head that a step keeps for a row of sequences, if any."""
        return None

    def new_cache(self) -> Any:
        """An empty KV cache with the methods of transformers' caches."""
        raise NotImplementedError

    def keys_and_values(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values, (B, G, T, K) each, of ids (B, T) in each block.

        No sliding window drops any.
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """config.json as transformers reads it."""
        raise NotImplementedError

    def set_rows(self, rows: int, tied: bool) -> None:
        """Update the config after embedding and head were resized or untied."""
        raise NotImplementedError

    def checkpoint_blocks(self, how: Checkpointing) -> None:
        """Gradient checkpointing of all blocks, of every second block, or of none."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """config.json and model.safetensors."""
        raise NotImplementedError

    def forward(self, ids: Tensor, positions: Tensor | None = None, cache: Any = None) -> Tensor:
        return self.logits(self.hidden_states(ids, positions, cache=cache))

    @property
    def embeddings(self) -> nn.Module:
        return self.get_submodule(self.embedding_name)

    @property
    def head(self) -> nn.Module:
        return self.get_submodule(self.head_name)

    @property
    def embedding_and_head(self) -> tuple[str, str]:
        """Last parts of the names of embedding and head, which adapters use."""
        return self.embedding_name.rpartition(".")[2], self.head_name.rpartition(".")[2]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's weights: an adapter may have another."""
        parameters = self.blocks.named_parameters()
        return next(p.dtype for name, p in parameters if not re.search(ADAPTER_PARAMETER, name))


class VirtualTokens(nn.Module):
    """n virtual tokens before every sequence, `prompt_embeddings` (n, …) as PEFT stores them.

    They take the positions 0 to n-1, a sequence's own tokens those from n on.
    """

    kind: ClassVar[str]

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.prompt_embeddings = nn.Parameter(values)

    @property
    def count(self) -> int:
        """n."""
        return self.prompt_embeddings.shape[0]

    def read(
        self,
        model: CausalLM,
        ids: Tensor,
        positions: Tensor | None,
        segments: Sequence[int] | None,
        cache: Any,
    ) -> Tensor:
        """`CausalLM.hidden_states`, (B, T, D), of the tokens after the virtual ones."""
        shifted = None if positions is None else positions + self.count
        if cache is not None and cache.get_seq_length():  # it already holds the virtual tokens
            return model.run_body(ids, shifted, segments, cache)
        if shifted is None:
            shifted = next_positions(ids, None) + self.count
        return self.begin(model, ids, shifted, segments, cache)

    def begin(
        self,
        model: CausalLM,
        ids: Tensor,
        positions: Tensor,
        segments: Sequence[int] | None,
        cache: Any,
    ) -> Tensor:
        """`read` with an empty cache or none; `positions` count the virtual tokens."""
        raise NotImplementedError


class LinearUpdate(NamedTuple):
    """A frozen linear and its update s·BA: of one adapter, or stacked of L adapters."""

    base: "nn.Linear | LowBitLinear"
    A: Tensor  # (R, I), or (L, R, I) of L adapters with as many rows each
    B: Tensor  # (O, R), or (L, O, R)
    scale: float


class RowScale(NamedTuple):
    """What DoRA multiplies outputs by, but not the bias; (O,) each."""

    magnitude: Tensor
    norms: Tensor  # ‖W + s·BA‖
    ratio: Tensor  # magnitude / norms


class RowUpdate(NamedTuple):
    """What some rows of a linear's inputs get beyond its outputs."""

    rows: slice
    layer: Any
    scale: float | None  # of the update s·BA, `layer`'s `pair`; None: `layer` computes the outputs


class LowRankLinear(nn.Module):
    """A linear with an update of low rank: what kernels know of an adapter's."""

    def linear_update(self) -> LinearUpdate | None:
        """What the layer computes, if it now is Wx + b + s·BAx and no more."""
        raise NotImplementedError

    def row_scale(self) -> tuple[LinearUpdate, RowScale] | None:
        """Of a layer that computes this and no more: its update, and what scales its outputs."""
        return None

    def row_updates(self) -> Sequence[RowUpdate] | None:
        """What rows get beyond the base's outputs; None if only the layer's forward tells."""
        update = self.linear_update()
        if update is None or update.A.dim() > 2:
            return None
        return [RowUpdate(slice(None), self, update.scale)]

    def updates_version(self) -> object:
        """Differs after each change of `row_updates` or their factors."""
        update = self.linear_update()
        if update is None:
            return None
        return update.scale, tensor_version(update.A), tensor_version(update.B)


class LowBitLinear(nn.Module):
    """A linear whose weight is stored in 4 or 8 bits: what adapters know of quantization."""

    bias: nn.Parameter | None
    dtype: torch.dtype  # of the rest of the model
    out_features: int
    in_features: int
    q8_0: tuple[Tensor, Tensor] | None = None  # codes and scales, if native.c multiplies by them

    @property
    def weight(self) -> Tensor:
        """(O, I), dequantized, in the precision of the rest of the model."""
        return self.weight_in(self.dtype)

    @property
    def weight_like(self) -> Tensor:
        """A tensor of the weight's shape, dtype and device without its numbers, or memory."""
        stored = next(chain(self.buffers(), self.parameters()))
        scalar = torch.empty((), dtype=self.dtype, device=stored.device)
        return scalar.expand(self.out_features, self.in_features)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """(O, I), dequantized in `dtype`."""
        raise NotImplementedError


def tensor_version(tensor: Tensor) -> tuple[int, int]:
    """Differs as soon as the tensor is replaced or written to, as long as the old one is kept."""
    return tensor.data_ptr(), tensor._version


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear, whose weight is (I, O)."""
    return type(module).__name__ == "Conv1D"


def is_linear(module: nn.Module) -> bool:
    # a router that inherits from a linear, as Llama 4's, returns the choice of experts too
    is_router = type(module).__name__.endswith("Router")
    return (isinstance(module, nn.Linear) and not is_router) or is_conv1d(module)


def next_positions(inputs: Tensor, cache: Any) -> Tensor:
    """(B, T): the positions of inputs (B, T, …) after the tokens in the cache, if there is one."""
    past = cache.get_seq_length() if cache is not None else 0
    return torch.arange(past, past + inputs.shape[1], device=inputs.device).expand(inputs.shape[:2])


def checkpointed(how: Checkpointing, block: int) -> bool:
    """Whether block number `block` is recomputed in backward, as in the calculator."""
    return how == "full" or (how == "selective" and block % 2 == 0)


@torch.no_grad()
def packed_hidden_states(model: CausalLM, sequences: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """Hidden states (T, D) of each sequence of ids, in order.

    Up to `Limits.row_tokens` are packed into one row, so that a large model's weights are read once
    for many short texts.
    """
    start = 0
    while start < len(sequences):
        stop, tokens = start + 1, len(sequences[start])
        while model.supports_packing and stop < len(sequences):
            tokens += len(sequences[stop])
            if tokens > device_limits(model.device).row_tokens:
                break
            stop += 1
        row = sequences[start:stop]
        lengths = [len(sequence) for sequence in row]
        ids = [*chain.from_iterable(row)]
        positions = [*chain.from_iterable(map(range, lengths))]
        table = to_device(torch.tensor([[ids], [positions]]), model.device)  # (2, 1, T): one copy
        segments = lengths if len(row) > 1 else None
        hidden = model.hidden_states(table[0], table[1], segments)[0]
        yield from hidden.split(lengths)  # type: ignore[no-untyped-call]
        start = stop


@torch.no_grad()
def set_row_count(model: CausalLM, rows: int) -> None:
    """Resize embedding and head to `rows` rows, in place; new rows are zero."""
    tied = model.shape.tied
    parts = [(model.embeddings, "weight"), (model.head, "bias")]
    if not tied:
        parts.append((model.head, "weight"))
    for module, name in parts:
        old = getattr(module, name, None)
        if old is not None:
            new = old.new_zeros(rows, *old.shape[1:])
            new[: old.shape[0]].copy_(old)
            setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
    if tied:  # a new parameter took the embedding's place: the head still has the old one
        model.head.weight = model.embeddings.weight
    model.set_rows(rows, tied)


@contextmanager
def compute_in_fp32(model: nn.Module) -> Iterator[None]:
    """Inside the block each part of `model` is in fp32 while it runs.

    The others stay narrow, which saves memory. In 16 bits, two correct computations of the same
    logits differ by up to a tenth of the largest.
    """
    parameters_of, narrow = {}, {}
    for module in model.modules():
        # a forward may read its leaf children's parameters, whose own forward then never runs
        leaves = [child for child in module.children() if not [*child.children()]]
        by_part = (part.parameters(recurse=False) for part in (module, *leaves))
        parameters = [*chain.from_iterable(by_part)]
        in_16_bits = {p: p.dtype for p in parameters if p.dtype.itemsize == 2}
        narrow.update(in_16_bits)
        if in_16_bits:
            parameters_of[module] = parameters

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        for p in parameters_of[module]:
            p.data = p.data.float()
        return tuple(
            x.float() if isinstance(x, Tensor) and x.dtype.itemsize == 2 else x for x in inputs
        )

    def after(module: nn.Module, *_: object) -> None:
        for p in parameters_of[module]:
            p.data = p.data.to(narrow.get(p, p.dtype))

    hooks = [module.register_forward_pre_hook(before) for module in parameters_of]
    hooks += [module.register_forward_hook(after, always_call=True) for module in parameters_of]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
