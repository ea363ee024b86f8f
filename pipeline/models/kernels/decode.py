"""Fast generation of one token at a time on the CPU.

Weights are packed beforehand, and blocks of Llama's shape take fewer calls.

A CPU multiplies a single row by weights in torch's layout at less than half of its memory's
bandwidth, and then spends its time on calls. SmolLM2-135M in bf16, 128 tokens, CPU seconds of one
thread in turns with transformers' `generate`: 2.0 × the tokens a second; before the body, the norms
and the cache had fewer calls, 1.7 ×. The packed products take two thirds of the time, at 25 to 29
GB of weights a second, where torch.sum reads 18 to 21.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import chain
from types import MethodType
from typing import Any, NamedTuple, TypeGuard
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.base import CausalLM, PackedCache, UpdatedLinear
from pipeline.models.kernels import random_tensors, uses_cpu_kernels
from pipeline.project.probes import attempt

Forwards = dict[nn.Module, Callable[..., Any]]
SHORT = 1024  # inputs up to which oneDNN sums a lone row as it sums it beside others
AGREEMENT = 0.05  # of the hidden states' norm: bf16 sums in another order round differently
NORMS = {"input_layernorm", "post_attention_layernorm"}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
BODY = {"embed_tokens", "layers", "norm", "rotary_emb"}
FEED_FORWARD = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class PackedLinear:
    """y = Wx + b of a linear, or of several with the same x, concatenated.

    W is a copy in oneDNN's own layout.

    A row's numbers do not depend on the rows beside it: oneDNN sums a lone row in another order
    where it has more than SHORT inputs, so it is computed as two rows, which takes 1.1 × the time.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.versions = _weight_versions(linears)
        self.inputs = linears[0].in_features
        weight = torch.cat([linear.weight.detach() for linear in linears])  # (ΣO, I)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        self.bias: Tensor | None = None
        if linears[0].bias is not None:
            self.bias = torch.cat([linear.bias.detach() for linear in linears])
        self.multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        is_lone = self.inputs > SHORT and x.numel() == self.inputs
        rows = x.view(1, -1).expand(2, -1) if is_lone else x
        out: Tensor = self.multiply(rows, self.weight, self.bias, "none", [], "")
        return out[:1].view(*x.shape[:-1], -1) if is_lone else out


class Rotation:
    """cos and signed sin (N, GR + 2G, K) that rotate the queries and keys of all heads.

    They leave the values as they are. All blocks of a forward share them.
    """

    def __init__(self) -> None:
        self.source: Any = None

    def of(self, embeddings: Any, values: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """cos and sin for heads of `shape` (N, GR + 2G, K), the last `values` of them of values.

        `embeddings`: cos and sin (1, N, K) of positions.
        """
        if self.source is not embeddings:
            cos, sin = (part[0, :, None] for part in embeddings)  # (N, 1, K) each
            half = shape[-1] // 2
            self.source, self.cos, self.sin = embeddings, cos.new_ones(shape), sin.new_zeros(shape)
            self.cos[:, :-values] = cos
            self.sin[:, :-values] = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        return self.cos, self.sin


class OneTokenBlock:
    """Replaces the forward of `block` for one token of each of N sequences, (1, N, D).

    Without a PackedCache N is 1. Other inputs go to the block's own forward.

    `packed` are the linears that it has packed. K is the head size; G groups of R query heads share
    a key and a value head.
    """

    def __init__(self, block: Any, rotation: Rotation) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.layer, self.scale, self.K = attention.layer_idx, attention.scaling, attention.head_dim
        self.R = attention.num_key_value_groups
        self.window = window_of(attention)
        self.rotation, self.act = rotation, mlp.act_fn
        self.norm = fewer_calls(block.input_layernorm)
        self.feed_norm = fewer_calls(block.post_attention_layernorm)
        self.head_norms = None
        if hasattr(attention, "q_norm"):
            self.head_norms = attention.q_norm, attention.k_norm
        self.packed = list[nn.Module]()
        self.qkv = self._concatenate(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out, self.down = self._concatenate(attention.o_proj), self._concatenate(mlp.down_proj)
        self.gate_up = self._concatenate(mlp.gate_proj, mlp.up_proj)

    def _concatenate(self, *modules: nn.Module) -> Callable[[Tensor], Tensor]:
        """The outputs (N, ΣO) of modules with the same x (N, I), side by side.

        One packed product computes them, unless a module has an adapter that cannot be added to it.
        """
        bases = [module.base if isinstance(module, UpdatedLinear) else module for module in modules]
        linears = [base for base in bases if _can_pack(base)]
        biased = {linear.bias is not None for linear in linears}
        if len(linears) < len(modules) or len(biased) > 1:
            return lambda x: torch.cat([module(x[None])[0] for module in modules], -1)
        self.packed += linears
        product, sizes = _packed_linear(linears), [linear.out_features for linear in linears]
        if not any(isinstance(module, UpdatedLinear) for module in modules):
            return product

        def updated(x: Tensor) -> Tensor:
            out = product(x)
            for module, part in zip(modules, out.split_with_sizes(sizes, -1), strict=True):
                if isinstance(module, UpdatedLinear):
                    module.add_updates(x, part)
            return out

        return updated

    def __call__(
        self, block: nn.Module, x: Tensor, *others: Any, cache: Any = None, **options: Any
    ) -> Tensor:
        past: PackedCache | None = options.get("past")
        N = x.shape[1]
        if not fits(x, cache, past):
            out: Tensor = type(block).forward(block, x, *others, cache=cache, **options)
            return out
        x = x[0]  # (N, D)
        heads = self.qkv(self.norm(x)).view(N, -1, self.K)  # (N, (GR + 2G)·K) → (N, GR + 2G, K)
        G = heads.shape[1] // (self.R + 2)
        if self.head_norms is not None:
            q, k, v = heads.split_with_sizes([G * self.R, G, G], 1)
            heads = torch.cat([self.head_norms[0](q), self.head_norms[1](k), v], 1)
        cos, sin = self.rotation.of(options["position_embeddings"], G, heads.shape)
        # Su et al. 2021, section 3.4.2, with pairs (i, i + K/2)
        heads = heads * cos + heads.roll(self.K // 2, -1) * sin
        q = heads[:, : -2 * G].view(N, G, self.R, self.K)  # a group's R heads stand where tokens do
        if past is None:
            # (1, G, R, K)
            attended = self._attend(q, *_append(cache, self.layer, heads[:, -2 * G :]))
        else:
            # (1, G, N, K) each
            keys, values = (part.transpose(0, 1)[None] for part in heads[:, -2 * G :].chunk(2, 1))
            pairs = past.update(self.layer, keys, values, [1] * N)
            attended = torch.cat([self._attend(q[n : n + 1], *pairs[n]) for n in range(N)])
        x = x + self.out(attended.view(N, -1))  # (N, D)
        gate, up = self.gate_up(self.feed_norm(x)).chunk(2, -1)  # (N, F) each
        return (x + self.down(self.act(gate) * up))[None]

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if self.window is not None:
            keys, values = keys[:, :, -self.window :], values[:, :, -self.window :]
        return F.scaled_dot_product_attention(q, keys, values, scale=self.scale)  # (1, G, R, K)


class OneTokenBody:
    """Replaces the forward of a body of Llama's parts where all `blocks` take a token.

    It makes no masks, which they do not read, and calls no module per block.
    """

    def __init__(self, blocks: Mapping[nn.Module, OneTokenBlock]) -> None:
        self.blocks = blocks

    def __call__(
        self, body: Any, input_ids: Tensor | None = None, cache: Any = None, **options: Any
    ) -> Any:
        if input_ids is None or not fits(input_ids, cache, options.get("past")):
            return type(body).forward(body, input_ids=input_ids, cache=cache, **options)
        past = options.get("past")
        # Calls cost 5% less in inference mode. Caches of several sequences outlive it, and may then
        # not be written to.
        with torch.inference_mode() if past is None else nullcontext():
            x = body.embed_tokens(input_ids)  # (1, N, D)
            rotation = body.rotary_emb(x, position_ids=options["position_ids"])
            for block, forward in self.blocks.items():
                x = forward(block, x, cache=cache, past=past, position_embeddings=rotation)
            return BodyOutput(body.norm(x))


class BodyOutput(NamedTuple):
    """What `TransformersModel` reads of a body's output."""

    last_hidden_state: Tensor


def fits(x: Tensor, cache: Any, past: PackedCache | None) -> bool:
    """Whether x (1, N, …) is one token after a cache, or one for each sequence of `past`."""
    if past is not None:
        return x.shape[1] == len(past.sequences)
    return cache is not None and x.shape[:2] == (1, 1)


def _append(cache: Any, block: int, new: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (1, G, S, K) of a transformers cache, after appending `new` (1, 2G, K).

    A DynamicLayer copies all that it has for each token. Its tensors become views of a buffer with
    room for more, which its other methods read as any tensors.
    """
    layer = cache.layers[block]
    if type(layer).__name__ != "DynamicLayer" or not layer.get_seq_length():
        pair: tuple[Tensor, Tensor] = cache.update(*new[:, :, None].chunk(2, 1), block)
        return pair
    _, G, S, K = layer.keys.shape
    buffer = getattr(layer, "buffer", None)  # (1, 2G, capacity, K)
    if buffer is None or buffer.shape[2] == S or buffer.data_ptr() != layer.keys.data_ptr():
        buffer = layer.buffer = new.new_empty(1, 2 * G, max(64, 2 * S), K)
        buffer[:, :G, :S], buffer[:, G:, :S] = layer.keys, layer.values
    buffer[:, :, S] = new
    seen = buffer[:, :, : S + 1]
    layer.keys, layer.values = seen[:, :G], seen[:, G:]
    return layer.keys, layer.values


def fewer_calls(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """The norm by torch's own RMS norm, if that gives the same bits; else `norm` itself."""
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if not isinstance(weight, nn.Parameter) or not isinstance(eps, float):
        return norm

    def short(x: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, None, eps) * weight

    probe = random_tensors((16, *weight.shape))[0].to(weight)
    return short if torch.equal(short(probe), norm(probe)) else norm


_packed: WeakKeyDictionary[nn.Module, PackedLinear] = WeakKeyDictionary()  # by the first linear
# how many forwards of a model passed _check_agreement together
_agrees: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@contextmanager
def fast_decoding(model: nn.Module) -> Iterator[int]:
    """Inside the block `model` is faster where one token follows a cache.

    Yields the number of replaced forwards.

    Only bf16 on the CPU, and only inference. The packed weights are kept for the next time, as long
    as the model lives.
    """
    forwards: Forwards = {}
    if _is_available():
        packed = set[nn.Module]()
        if isinstance(model, CausalLM) and _is_bf16_on_cpu(next(model.blocks.parameters())):
            forwards, packed = _fused_forwards(model)
        for module in model.modules():
            if _can_pack(module) and module not in packed:
                forwards[module] = _packed_linear([module])
    with _replaced_forwards(forwards):
        yield len(forwards)


def _fused_forwards(model: CausalLM) -> tuple[Forwards, set[nn.Module]]:
    """Forwards of body and blocks of Llama's shape that agree, and the linears that they pack."""
    if not _agrees.get(model, True):  # joined weights would be packed for nothing
        return {}, set()
    rotation = Rotation()
    blocks = {
        block: OneTokenBlock(block, rotation) for block in model.blocks if has_llama_parts(block)
    }
    of_blocks: Forwards = {block: MethodType(fast, block) for block, fast in blocks.items()}
    choices = [of_blocks] if blocks else []
    parts = {name for name, _ in model.body.named_children()}
    if len(blocks) == len(model.blocks) and parts == BODY:
        of_body = MethodType(OneTokenBody(blocks), model.body)
        choices.insert(0, {**of_blocks, model.body: of_body})
    if model not in _agrees:  # once a model: a few short forwards
        agreeing = (len(choice) for choice in choices if _check_agreement(model, choice))
        _agrees[model] = next(agreeing, 0)
    for choice in choices:
        if len(choice) == _agrees[model]:
            return choice, {*chain.from_iterable(fast.packed for fast in blocks.values())}
    return {}, set()


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
    """Whether the model gives the same hidden states with these forwards."""

    def probe() -> Tensor:
        cache = model.new_cache()
        model.hidden_states(torch.arange(4)[None], cache=cache)
        return model.hidden_states(torch.tensor([[4]]), cache=cache).float()

    expected = probe()
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


def _can_pack(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear and _is_bf16_on_cpu(module.weight)


def _is_bf16_on_cpu(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and uses_cpu_kernels(weight.device)


def _packed_linear(linears: Sequence[nn.Linear]) -> PackedLinear:
    """The linears as one, from the cache unless a weight has changed."""
    packed = _packed.get(linears[0])
    if packed is None or packed.versions != _weight_versions(linears):
        packed = _packed[linears[0]] = PackedLinear(linears)
    return packed


def _weight_versions(linears: Sequence[nn.Linear]) -> list[tuple[int, int]]:
    """Differs as soon as a weight is replaced or written to."""
    parameters = chain.from_iterable(linear.parameters() for linear in linears)
    return [(p.data_ptr(), p._version) for p in parameters]


@cache
def _is_available() -> bool:
    """Whether this build of torch packs weights, and multiplies by packed ones as by plain ones."""
    linear = nn.Linear(32, 32, bias=False, dtype=torch.bfloat16)
    x = torch.ones(1, 32, dtype=torch.bfloat16)
    try:
        with torch.no_grad():
            return torch.allclose(PackedLinear([linear])(x), F.linear(x, linear.weight), 0.02, 0.02)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
