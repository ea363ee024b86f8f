"""Attention on the tape: projections, rotary positions, scores or a fused kernel, the output.

Where functions begin and end, and each `del`, is part of the model: see `step/__init__.py`.
"""

from pipeline.calc.architecture import Architecture, Block, Heads, Linear
from pipeline.calc.step.layers import Layers
from pipeline.calc.tape import Value

CHUNK = 64  # tokens that a gated delta net's kernel takes at once


def attention(ops: Layers, x: Value, block: Block) -> Value:
    op, leaf = ops.tape.op, ops.tape.leaf
    heads = ops.model.heads_of(block)
    if ops.style.unknown:
        return ops.unknown(x, block.attention)
    if block.kind == "delta":
        return _delta_net(ops, x, block, heads)
    gate = None
    if block.kind == "latent":
        q, k, v, out = _project_latent(ops, x, block)
    else:
        q, k, v, out, gate = _project(ops, x, block)
        if ops.style.complex_rotary:
            q, k = (_rotate_complex(ops, y, block, heads.size) for y in (q, k))
        elif ops.style.rotary:
            tables = ops.tables.get(heads.size, [])
            q, k = _rotate(ops, q, tables), _rotate(ops, k, tables)
    k, v = ops.method.extend_keys(ops, k), ops.method.extend_keys(ops, v)
    if ops.eager:
        y = _eager_attention(ops, q, k, v, heads)
    elif ops.run.attention == "short":
        # our blockwise matrix products for short sequences save the weights, heads · T² per
        # sequence; of one block there are the scores too, and in backward the gradients of both
        product = heads.queries * ops.product * ops.w
        y = op(
            q,
            k,
            v,
            saves=[q, k, v, leaf(heads.queries * ops.scores, ops.w)],
            temp=product,
            back=2 * product,
        )
    else:
        # flash attention saves q, k, v, the output, and a log-sum-exp per head and token in
        # fp32, but no scores
        size = ops.n * heads.queries * heads.value_size
        y = op(
            q,
            k,
            v,
            elements=size,
            saves=[q, k, v, leaf(ops.n * heads.queries, 4)],
            saves_out=True,
        )
    if ops.style.rejoins and not ops.eager:
        y = op(y)  # a copy, since the layout is not the one that o_proj reads
    if gate is not None:
        share = op(gate, saves_out=True)
        y = op(y, share, saves=[y, share])
    return ops.linear(y, out)


def _delta_net(ops: Layers, x: Value, block: Block, heads: Heads) -> Value:
    """A gated delta net with the kernels of flash-linear-attention and causal-conv1d.

    Chunks of 64 tokens: a matrix (64, 64) per chunk and head is saved, a state (K, V) per chunk
    and head is computed in forward and again in backward. Hv heads of values, and of the
    states; Hk of queries and keys.
    """
    op, leaf = ops.tape.op, ops.tape.leaf
    n, w = ops.n, ops.w
    mixed, z_proj, b_proj, a_proj, out = block.attention
    qkv, z = ops.linear(x, mixed), ops.linear(x, z_proj)
    b, a = ops.linear(x, b_proj), ops.linear(x, a_proj)
    # the convolution, with its activation
    qkv = op(qkv, saves=[qkv], weights=ops.trained_weights(block.other))
    beta = op(b, saves_out=True)
    wide = ops.cast(a, 4)
    decay = op(wide, saves=[wide, leaf(wide.elements, 4)])
    keys, values = n * heads.keys * heads.size, n * heads.queries * heads.value_size
    expanded = n * heads.queries * heads.size  # keys, one per head of values
    states = -(-n // CHUNK) * heads.queries * heads.size * heads.value_size
    saved = [leaf(size, w) for size in (keys, keys, values, n * heads.queries * CHUNK)]
    y = op(
        qkv,
        decay,
        beta,
        elements=values,
        width=w,
        saves=[*saved, decay, beta],
        temp=(expanded + 2 * values + states) * w,
        back=(5 * expanded + 4 * values + 2 * states) * w,
    )
    # transformers 5.25 copies what the kernel computed, and keeps it until the layer returns
    copied = op(y)
    return ops.linear(_gated_norm(ops, copied, z, heads.value_size), out)


def _gated_norm(ops: Layers, x: Value, z: Value, size: int) -> Value:
    """RMSNorm(x) · silu(z), the norm and the activation in fp32."""
    op = ops.tape.op
    wide = ops.cast(x, 4)
    mean = op(op(wide, saves=[wide], back=wide.elements * 4), elements=wide.elements // size)
    root = op(mean, saves_out=True)
    y = op(wide, root, saves=[wide, root], back=wide.elements * 4)
    del wide
    y = ops.cast(y, ops.w)
    y = op(y, saves=[y] if ops.trains else [], weights=ops.trained_weights(size))
    gate = ops.cast(z, 4)
    share = op(gate, saves=[gate])
    return ops.cast(op(y, share, width=4, saves=[y, share]), ops.w)


def _project(
    ops: Layers, x: Value, block: Block
) -> tuple[Value, Value, Value, Linear, Value | None]:
    """q (N, H·K), k and v (N, kv_heads · K), the output projection, and its gate or None."""
    m = ops.model
    heads = m.heads_of(block)
    widths = [
        heads.queries * heads.size,
        heads.keys * heads.size,
        heads.keys * heads.value_size,
    ]
    if len(block.attention) == 2:  # q, k and v are views of one linear's output
        fused, out = sorted(block.attention, key=lambda linear: linear.is_last)
        qkv = ops.linear(x, fused)
        q, k, v = (ops.view(qkv, ops.n * width) for width in widths)
        return q, k, v, out, None
    # by first letter: q, k, v, and o(_proj) or d(ense)
    by_letter = {linear.name.rsplit(".", 1)[-1][0]: linear for linear in block.attention}
    gate = None
    q = ops.linear(x, by_letter["q"])
    if ops.style.output_gate:
        # a copy, since the halves of each head alternate
        gate = ops.tape.op(ops.view(q, ops.n * widths[0]))
        q = ops.view(q, ops.n * widths[0])
    q = _qk_norm(ops, ops.tape.op(q) if ops.style.scaled_queries else q, widths[0], heads.size)
    k = ops.linear(x, by_letter["k"])
    v = ops.linear(x, by_letter["v"]) if "v" in by_letter else k
    k = _qk_norm(ops, k, widths[1], heads.size)
    v = ops.norm(v, heads.value_size, weight=False) if ops.style.value_norm else v
    return q, k, v, by_letter.get("o") or by_letter["d"], gate


def _qk_norm(ops: Layers, x: Value, width: int, size: int) -> Value:
    if ops.style.qk_norm in ("", "rotated"):
        return x
    return ops.norm(x, size if ops.style.qk_norm == "head" else width)


def rotated_size(model: Architecture, block: Block) -> int:
    """Width of the tables of positions that a block reads; 0 if it reads none."""
    if block.kind == "attention":
        return model.heads_of(block).size
    return model.head_size if block.kind == "latent" else 0


def _rotate(ops: Layers, x: Value, tables: list[Value]) -> Value:
    """x·cos + rotate_half(x)·sin, with a new tensor for each operation."""
    op = ops.tape.op
    share = ops.style.rotary
    rotated = op(x, elements=int(x.elements * share), view=True) if ops.style.rejoins else x
    size = rotated.elements
    half = op(rotated, elements=size // 2)  # −x₂
    swapped = op(half, rotated, elements=size, back=size * rotated.width)
    del half
    times_cos = op(rotated, saves=tables[:1])
    times_sin = op(swapped, saves=tables[1:2])
    del swapped
    y = op(times_cos, times_sin, alias=True)
    return op(y, x, elements=x.elements) if ops.style.rejoins else y


def _project_latent(ops: Layers, x: Value, block: Block) -> tuple[Value, Value, Value, Linear]:
    """q and k (N, H·K), v (N, H·V) from latents; all heads share the rotated part of k."""
    op = ops.tape.op
    heads = ops.model.heads_of(block)
    *queries, compress, expand, out = block.attention
    q = ops.linear(x, queries[0])
    q = ops.linear(ops.norm(q, queries[0].outputs), queries[1]) if len(queries) > 1 else q
    n = ops.n
    rotated = compress.outputs - expand.inputs  # elements of a head that rotate
    latent = ops.linear(x, compress)
    kv = ops.norm(ops.view(latent, n * expand.inputs), expand.inputs)
    q_turned, k_turned = (
        _rotate_pairs(ops, ops.view(y, n * count * rotated))
        for y, count in ((q, heads.queries), (latent, 1))
    )
    plain = ops.view(q, n * heads.queries * (heads.size - rotated))
    q = op(plain, q_turned, elements=n * heads.queries * heads.size)
    del plain, q_turned, latent
    expanded = ops.linear(kv, expand)
    v = ops.view(expanded, n * heads.queries * heads.value_size)
    k = op(expanded, k_turned, elements=n * heads.queries * heads.size)
    return q, k, v, out


def _rotate_complex(ops: Layers, x: Value, block: Block, size: int) -> Value:
    """Llama 4: an fp32 copy as complex numbers times the positions', then an unweighted norm."""
    op = ops.tape.op
    if not block.rotates:
        return x
    wide = ops.cast(x, 4)
    turned = op(wide, saves=ops.tables.get(size, [])[:1])
    del wide
    y = ops.cast(turned, ops.w)
    del turned
    return ops.norm(y, size, weight=False) if ops.style.qk_norm else y


def _rotate_pairs(ops: Layers, x: Value) -> Value:
    """Pairs of neighbours rotate: two products and their sum for each half, both joined."""
    op = ops.tape.op
    half = x.elements // 2
    tables = ops.tables.get(ops.model.head_size, [])

    def turned() -> Value:
        parts = [op(x, elements=half, saves=table) for table in (tables[:1], tables[1:2])]
        return op(*parts, alias=True)

    return op(turned(), turned(), elements=x.elements)


def _eager_attention(ops: Layers, q: Value, k: Value, v: Value, heads: Heads) -> Value:
    """softmax(qkᵀ·scale + mask)·v with all scores in memory: (B, H, T, keys)."""
    op = ops.tape.op
    keys = k.elements // (heads.keys * heads.size)  # of all sequences
    scores = heads.queries * (ops.n // ops.run.rows) * keys
    if heads.keys < heads.queries:  # repeated for each query head
        k = op(k, elements=keys * heads.queries * heads.size)
        v = op(v, elements=keys * heads.queries * heads.value_size)
    p = op(q, k, elements=scores, saves=[q, k])
    p = op(p)  # · scale
    if ops.style.softcap:
        p = op(op(op(p), saves_out=True))  # divide, tanh, multiply
    p = op(p, alias=True)  # + mask
    p = _softmax(ops, p)
    y = op(p, v, elements=ops.n * heads.queries * heads.value_size, saves=[p, v])
    return op(y)  # copy: concatenates the heads


def _softmax(ops: Layers, p: Value) -> Value:
    op = ops.tape.op
    # concatenate the sink's column, then subtract the maximum; dropping the column is a view
    if ops.style.sinks:
        p = op(op(p), alias=True)
        return op(p, saves_out=True)
    if not ops.style.softmax32:
        return op(p, saves_out=True)
    narrow = p.elements * (4 - p.width)
    # input and output in fp32, in forward and backward
    wide = op(p, width=4, saves_out=True, temp=2 * narrow, back=narrow)
    return ops.cast(wide, p.width)
