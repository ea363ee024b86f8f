"""Fast generation on the CPU: Llama's blocks in one call per token, linears without their calls.

One token of each of several sequences goes through all blocks in native.c, which reads the weights
as torch has them and the keys where their pages are. SmolLM2-135M in bf16, CPU seconds of one
thread in turns with transformers' `generate`: 2.6 × the tokens a second for one sequence and 2.0 ×
for eight; before, with a call of torch for each operation, 1.6 × and 1.0 ×. With AMX, products read
weights in torch's layout at 13 to 14 GB a second for one row and for eight, where oneDNN reads its
own layout at 10 to 11, and torch's at 6 to 9. So there is no copy of the weights. A CPU without AMX
gets one for its prompts.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.base import CausalLM, LowBitLinear, LowRankLinear, RowUpdate, tensor_version
from pipeline.models.kernels import random_tensors, uses_cpu_kernels
from pipeline.models.kernels.native import (
    COLUMNS,
    LANES,
    SCRATCH,
    LlamaBlock,
    LlamaStep,
    LowRank,
    call,
    linear_forward,
    native,
    room_of,
    uses_tiles,
)
from pipeline.models.pages import PackedCache, PagePool, SequenceCache
from pipeline.project.probes import attempt

Forwards = dict[nn.Module, Callable[..., Any]]
SHORT = 1024  # inputs up to which oneDNN sums a lone row as it sums it beside others
AGREEMENT = 0.05  # of the hidden states' norm: bf16 sums in another order round differently
NORMS = {"input_layernorm", "post_attention_layernorm"}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
BODY = {"embed_tokens", "layers", "norm", "rotary_emb"}
FEED_FORWARD = {"gate_proj", "up_proj", "down_proj", "act_fn"}
NO_WINDOW = 2**62
RANKS = 4  # native.c computes so many at once
# of a block's seven linears: the number of the step after that which computes its product
STEP_AFTER = (1, 1, 1, 2, 3, 3, 4)


class NativeLinear:
    """y = Wx + b, W as torch has it. A row's numbers do not depend on the rows beside it."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.linear.weight, self.linear.bias
        if x.dtype != weight.dtype or not x.numel():
            return F.linear(x, weight, bias)
        return linear_forward(x, len(weight), bias, weight)


class PackedLinear:
    """y = Wx + b. W is a copy in oneDNN's own layout.

    A row's numbers do not depend on the few rows beside it: oneDNN sums a lone row in another order
    where it has more than SHORT inputs, so it is computed as two rows, which takes 1.1 × the time.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self.version = _weight_version(linear)
        self.inputs = linear.in_features
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        is_lone = self.inputs > SHORT and x.numel() == self.inputs
        rows = x.view(1, -1).expand(2, -1) if is_lone else x
        out: Tensor = self.multiply(rows, self.weight, self.bias, "none", [], "")
        return out[:1].view(*x.shape[:-1], -1) if is_lone else out


class Sizes(NamedTuple):
    """What all blocks of a body have in common: widths, and G groups of R heads of K numbers."""

    D: int
    F: int
    G: int
    R: int
    K: int


class Factors(NamedTuple):
    """A layer's A and B in bf16, as native.c reads them."""

    version: list[tuple[int, int]]
    # kept, so that no other tensor gets their addresses
    sources: list[Tensor]
    A: Tensor
    B: Tensor


class OneTokenBody:
    """Replaces the forward of a body of Llama's parts for one token of each sequence of a cache.

    Other inputs go to the body's own forward.
    """

    def __init__(self, body: Any, sizes: Sizes) -> None:
        self.sizes, self.layers = sizes, len(body.layers)
        self.linears = [linear for block in body.layers for linear in linears_of(block)]
        self._adapted = [x for x in self.linears if isinstance(x, LowRankLinear)]
        self._factors: WeakKeyDictionary[nn.Module, Factors] = WeakKeyDictionary()
        # linears of which layers compute rows: before which step, which of their block, itself
        self._replaced, self._key = list[tuple[int, int, Any]](), list[object]()
        self.blocks = (LlamaBlock * (self.layers + 1))()
        for number, block in enumerate(body.layers):
            self._describe(self.blocks[number], block)
        last = self.blocks[self.layers]
        last.norm, last.eps = body.norm.weight.data_ptr(), body.norm.variance_epsilon
        # whose pages the blocks point to
        self._pool, self._version = PagePool(), -1

    def _describe(self, to: LlamaBlock, block: Any) -> None:
        attention = block.self_attn
        first, second = block.input_layernorm, block.post_attention_layernorm
        to.norm, to.eps = first.weight.data_ptr(), first.variance_epsilon
        to.feed_norm, to.feed_eps = second.weight.data_ptr(), second.variance_epsilon
        if hasattr(attention, "q_norm"):
            to.q_norm, to.k_norm = (
                norm.weight.data_ptr() for norm in (attention.q_norm, attention.k_norm)
            )
            to.head_eps = attention.q_norm.variance_epsilon
        to.scale, to.window = attention.scaling, window_of(attention) or NO_WINDOW

    def __call__(
        self, body: Any, input_ids: Tensor | None = None, past: Any = None, **options: Any
    ) -> Any:
        if input_ids is None or past is None or input_ids.shape[1] != len(past.sequences):
            if past is not None:
                options["past"] = past
            return type(body).forward(body, input_ids=input_ids, **options)
        x = body.embed_tokens(input_ids)  # (1, N, D)
        cos, sin = body.rotary_emb(x, position_ids=options["position_ids"])  # (1, N, K) each
        x, cos, sin = (part[0].contiguous() for part in (x, cos, sin))
        normed = torch.empty_like(x)
        self._point_to(past.pool, x)
        self._read_updates(len(x))
        D, width, G, R, K = self.sizes
        heads = G * R * K
        widths = [heads + 2 * G * K, heads, D, 2 * width, width, D]
        buffers = [x.new_empty(len(x), size) for size in widths]
        threads = torch.get_num_threads()
        packed = x.new_empty(room_of(len(x), max(D, heads, width)))
        longest = max(past.spans) + LANES
        room = x.new_empty(threads, SCRATCH + R * longest, dtype=torch.float32)
        low = room.new_empty(3, len(x), self._rank)
        tables = torch.tensor(past.tables, dtype=torch.int32)
        lengths = torch.tensor(past.past)
        tensors = (tables, lengths, cos, sin, x, normed, *buffers, packed, room, low)
        step = LlamaStep(
            *(len(x), *self.sizes, past.pool.size, tables.shape[1], room.shape[1], threads),
            ctypes.addressof(self.blocks),
            *(tensor.data_ptr() for tensor in tensors),
            self._rank,
        )
        qkv, attended, projected, gate_up, hidden, down = buffers
        inputs = (normed, attended, normed, hidden)
        q, *k_and_v = qkv.split([heads, G * K, G * K], 1)
        outputs = (q, *k_and_v, projected, *gate_up.chunk(2, 1), down)
        done = 0
        for stop, index, linear in self._replaced:
            if stop > done:
                call("llama_steps", ctypes.addressof(step), done, stop)
                done = stop
            # asked again: an unloaded adapter's layers would stay in memory here
            for rows, layer, scale in _product(linear)[1]:
                if scale is None:
                    outputs[index][rows] = layer(inputs[(stop - 1) % 4][None, rows])[0]
        call("llama_steps", ctypes.addressof(step), done, 4 * self.layers + 1)
        return BodyOutput(normed[None])

    def _read_updates(self, rows: int) -> None:
        """Point to what `rows` rows get beyond the products, unless nothing has changed."""
        key = [rows, *(module.updates_version() for module in self._adapted)]
        if key == self._key:
            return
        self._key = []  # until all is read
        self._table = (LowRank * (len(self.linears) * rows))()
        self._replaced, self._rank = [], 0
        for number, module in enumerate(self.linears):
            block, index = divmod(number, len(STEP_AFTER))
            part = self.blocks[block].parts[index]
            part.outputs = _innermost(module).out_features
            (part.weight, part.bias, part.codes, part.scales), updates = _product(module)
            first = number * rows
            part.updates = ctypes.addressof(self._table[first]) if updates else None
            if any(update.scale is None for update in updates):
                self._replaced.append((4 * block + STEP_AFTER[index], index, module))
            for update in updates:
                if update.scale is not None:
                    low_rank = self._low_rank(update.layer, update.scale)
                    self._rank = max(self._rank, low_rank.rank)
                    for row in range(rows)[update.rows]:
                        self._table[first + row] = low_rank
        self._key = key

    def _low_rank(self, layer: Any, scale: float) -> LowRank:
        """Of the layer's factors, which are packed again if they have changed."""
        pair = layer.pair()
        version = [*map(tensor_version, pair)]
        factors = self._factors.get(layer)
        if factors is None or factors.version != version:
            sources = [factor.detach() for factor in pair]
            factors = self._factors[layer] = Factors(version, sources, *_packed_factors(*sources))
        return LowRank(factors.A.data_ptr(), factors.B.data_ptr(), factors.A.shape[0], scale)

    def _point_to(self, pool: PagePool, like: Tensor) -> None:
        if pool is self._pool and pool.version == self._version:
            return
        heads = like.new_empty(self.sizes.G, self.sizes.K)
        for number, block in enumerate(self.blocks[: self.layers]):
            keys, values = pool.block(number, heads, self.sizes.K, self.sizes.K)
            block.keys, block.values = keys.data_ptr(), values.data_ptr()
        self._pool, self._version = pool, pool.version


class BodyOutput(NamedTuple):
    """What `TransformersModel` reads of a body's output."""

    last_hidden_state: Tensor


_packed: WeakKeyDictionary[nn.Module, PackedLinear] = WeakKeyDictionary()
# what _is_llama_norm found, by class, shape and eps: a model has dozens alike
_norms = dict[tuple[Any, ...], bool]()
# whether a model's body passed _check_agreement
_agrees: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextmanager
def fast_decoding(model: nn.Module) -> Iterator[int]:
    """Inside the block `model` is faster, above all where one token follows a PackedCache.

    Yields the number of replaced forwards.

    Only bf16 on the CPU, and only inference. Packed weights are kept for the next time, as long as
    the model lives.
    """
    forwards: Forwards = {}
    for module in model.modules():
        linear = _fast_linear(module) if type(module) is nn.Linear else None
        if linear is not None:
            forwards[module] = linear
    if isinstance(model, CausalLM):
        forwards |= _fast_body(model)
    with _replaced_forwards(forwards):
        yield len(forwards)


def reads_pages(model: CausalLM) -> bool:
    """Whether its next token is fast from a PackedCache."""
    forward = model.body.__dict__.get("forward")
    return isinstance(getattr(forward, "__func__", None), OneTokenBody)


def _fast_linear(linear: nn.Linear) -> Callable[[Tensor], Tensor] | None:
    if not _is_bf16_linear(linear):
        return None
    rows = linear.weight.shape[0] % LANES == 0 and linear.weight.is_contiguous()
    if uses_tiles() and rows and linear.in_features % COLUMNS == 0:
        return NativeLinear(linear)
    return _packed_linear(linear) if _is_available() else None


def _fast_body(model: CausalLM) -> Forwards:
    """The forward of a body of Llama's shape, if it gives the same hidden states."""
    body: Any = model.body
    sizes = _sizes_of(body) if native() is not None and _agrees.get(model, True) else None
    if sizes is None:
        return {}
    forwards: Forwards = {body: MethodType(OneTokenBody(body, sizes), body)}
    if model not in _agrees:  # once a model: a few short forwards
        _agrees[model] = _check_agreement(model, forwards)
    return forwards if _agrees[model] else {}


def _sizes_of(body: Any) -> Sizes | None:
    """The sizes of a body whose blocks native.c computes; else None."""
    if {name for name, _ in body.named_children()} != BODY:
        return None
    sizes = {_block_sizes(block) for block in body.layers}
    size = sizes.pop()
    if sizes or size is None or not _is_llama_norm(body.norm):
        return None
    widths = (size.D, size.F, size.K, size.G * size.R * size.K)
    return None if any(width % COLUMNS for width in widths) or size.R > LANES else size


def _block_sizes(block: Any) -> Sizes | None:
    if not has_llama_parts(block):
        return None
    attention, mlp = block.self_attn, block.mlp
    norms = [block.input_layernorm, block.post_attention_layernorm]
    if hasattr(attention, "q_norm"):
        norms += [attention.q_norm, attention.k_norm]
    # norms of whole projections are wider than a head
    if not all(map(_is_llama_norm, norms)) or len({n.weight.numel() for n in norms[2:]}) > 1:
        return None
    (x,) = random_tensors((1, 64))
    if not torch.allclose(mlp.act_fn(x), F.silu(x), 1e-4, 1e-4):
        return None
    R, K = attention.num_key_value_groups, attention.head_dim
    if norms[2:] and norms[2].weight.numel() != K:
        return None
    G = _innermost(attention.k_proj).out_features // K
    D, width = norms[0].weight.numel(), _innermost(mlp.gate_proj).out_features
    return Sizes(D, width, G, R, K)


def linears_of(block: Any) -> list[Any]:
    """The seven linears of Llama's block, in the order in which native.c takes them."""
    attention, mlp = block.self_attn, block.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _product(module: Any) -> tuple[Sequence[int | None], Sequence[RowUpdate]]:
    """What native.c multiplies by, weight, bias, codes and scales, and what rows get beyond that."""
    is_adapted = isinstance(module, LowRankLinear)
    base: Any = module.base if is_adapted else module
    updates = module.row_updates() if is_adapted else []
    tensors: tuple[Tensor | None, ...] = ()
    if isinstance(base, LowBitLinear) and base.q8_0:
        tensors = (None, base.bias, *base.q8_0)
    elif _is_bf16_linear(base) and base.weight.is_contiguous():
        tensors = (base.weight, base.bias, None, None)
    else:
        updates = None
    if updates is None:
        return [None] * 4, [RowUpdate(slice(None), module, None)]
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors], updates


def _packed_factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O / LANES, R, LANES) in bf16, with zeros up to a multiple of RANKS."""
    missing = -len(A) % RANKS
    A, B = F.pad(A, (0, 0, 0, missing)).bfloat16(), F.pad(B, (0, missing)).bfloat16()
    blocks = B.reshape(-1, LANES, len(A)).mT  # (O / LANES, R, LANES)
    return A.contiguous(), blocks.contiguous()


def _innermost(module: Any) -> Any:
    """The linear under adapters."""
    while hasattr(module, "base"):
        module = module.base
    return module


def _is_llama_norm(norm: nn.Module) -> bool:
    """Whether it is w·x/rms(x) in bf16, with w not counted from 1."""
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if not isinstance(weight, nn.Parameter) or not isinstance(eps, float):
        return False
    if not _is_bf16_on_cpu(weight):
        return False
    kind = type(norm), weight.shape, eps
    has_own_forward = "forward" in norm.__dict__
    if kind in _norms and not has_own_forward:
        return _norms[kind]
    probe = random_tensors((16, *weight.shape))[0].to(weight)
    found = torch.equal(F.rms_norm(probe, weight.shape, None, eps) * weight, norm(probe))
    if not has_own_forward:
        _norms[kind] = found
    return found


def has_llama_parts(block: Any) -> bool:
    """Whether the block has exactly Llama's parts, with or without norms of queries and keys.

    It may still combine them differently: compare the outputs.
    """
    if {name for name, _ in block.named_children()} != {"self_attn", "mlp"} | NORMS:
        return False
    attention, mlp = block.self_attn, block.mlp
    if [*attention.parameters(recurse=False)] or getattr(attention, "sliding_window", None):
        return False
    # Ministral 3's queries grow with their position, which no short input tells
    rope = getattr(getattr(attention, "config", None), "rope_parameters", None) or {}
    if "llama_4_scaling_beta" in rope:
        return False
    parts = {name for name, _ in attention.named_children()}
    has_attention = parts in (PROJECTIONS, PROJECTIONS | {"q_norm", "k_norm"})
    return has_attention and {name for name, _ in mlp.named_children()} == FEED_FORWARD


def window_of(attention: Any) -> int | None:
    """Keys that a token attends to, its own included; None: all.

    Mistral's attention, which has no attribute for it, reads the config's window in each forward:
    no short input tells it.
    """
    of_config = getattr(getattr(attention, "config", None), "sliding_window", None)
    window: int | None = getattr(attention, "sliding_window", of_config)
    return window


@torch.no_grad()
def _check_agreement(model: CausalLM, forwards: Forwards) -> bool:
    """Whether a token after a cache has the hidden state that it has in a row."""
    ids = torch.arange(5)[None]
    expected = model.run_body(ids)[0, -1].float()

    def probe() -> Tensor:
        sequence = SequenceCache(PagePool(LANES), 5)
        for start, stop in ((0, 4), (4, 5)):
            cache, part = PackedCache([sequence], [stop - start]), ids[:, start:stop]
            hidden = model.run_body(part, part, [stop - start], cache)
            cache.advance()
        return hidden[0, -1].float()

    with _replaced_forwards(forwards):
        actual = attempt("the fused forward of one token", "answers take longer", probe)
    return actual is not None and bool((actual - expected).norm() <= AGREEMENT * expected.norm())


@contextmanager
def _replaced_forwards(forwards: Forwards) -> Iterator[None]:
    """Modules have these forwards inside the block, unless another generation replaced theirs."""
    changed = [module for module in forwards if "forward" not in module.__dict__]
    for module in changed:
        module.forward = forwards[module]
    try:
        yield
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)


def _is_bf16_linear(module: Any) -> bool:
    return type(module) is nn.Linear and _is_bf16_on_cpu(module.weight)


def _is_bf16_on_cpu(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and uses_cpu_kernels(weight.device)


def _packed_linear(linear: nn.Linear) -> PackedLinear:
    """The packed linear, from the cache unless a weight has changed."""
    packed = _packed.get(linear)
    if packed is None or packed.version != _weight_version(linear):
        packed = _packed[linear] = PackedLinear(linear)
    return packed


def _weight_version(linear: nn.Linear) -> list[tuple[int, int]]:
    """Differs as soon as a weight is replaced or written to."""
    return [*map(tensor_version, linear.parameters())]


@cache
def _is_available() -> bool:
    """Whether this build of torch packs weights, and multiplies by packed ones as by plain ones."""
    linear = nn.Linear(32, 32, bias=False, dtype=torch.bfloat16)
    x = torch.ones(1, 32, dtype=torch.bfloat16)
    try:
        with torch.no_grad():
            return torch.allclose(PackedLinear(linear)(x), F.linear(x, linear.weight), 0.02, 0.02)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
