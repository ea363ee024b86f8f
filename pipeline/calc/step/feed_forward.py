"""A feed-forward on the tape: dense, gated, or experts with a router.

Where functions begin and end, and each `del`, is part of the model: see `step/__init__.py`.
"""

from collections.abc import Sequence

from pipeline.calc.architecture import Block, Linear
from pipeline.calc.step.layers import Layers
from pipeline.calc.tape import Value


def feed_forward(ops: Layers, x: Value, block: Block) -> Value:
    linears = block.feed_forward
    if ops.style.unknown:
        return ops.unknown(x, linears)
    if linears[0].experts > 1 and ops.style.all_experts:
        return _all_experts(ops, x, block)
    if linears[0].experts > 1:
        y = _experts(ops, x, block, _route(ops, x, block))
        return _add_shared(ops, y, x, linears[2:]) if len(linears) > 2 else y
    if not ops.style.gated:
        return ops.linear(ops.activation(ops.linear(x, linears[0])), linears[1])
    if len(linears) == 2:
        return ops.linear(ops.gate(ops.linear(x, linears[0])), linears[1])
    return _gated(ops, x, linears)


def _all_experts(ops: Layers, x: Value, block: Block) -> Value:
    """The shared expert's output plus that of all experts, whose inputs are scaled copies of x."""
    op = ops.tape.op
    up, down, *shared = block.feed_forward
    rows = ops.n * up.experts
    shares = ops.cast(_route(ops, x, block), ops.w)
    copies = op(x, elements=rows * up.inputs)
    scaled = op(
        copies,
        shares,
        elements=copies.elements,
        saves=[copies, shares],
        back=copies.elements * ops.w,
    )
    del copies
    y = ops.grouped(ops.gate(ops.grouped(scaled, up, rows)), down, rows)
    always = _gated(ops, x, shared)
    return op(always, op(y, elements=x.elements), alias=True)


def _add_shared(ops: Layers, y: Value, x: Value, shared: Sequence[Linear]) -> Value:
    """y plus the shared expert's output, which a gate's sigmoid may scale."""
    op = ops.tape.op
    always = _gated(ops, x, shared)
    if len(shared) > 3:
        share = op(ops.linear(x, shared[3]), saves_out=True)
        always = op(
            share,
            always,
            elements=x.elements,
            saves=[share, always],
            back=always.elements * ops.w,
        )
    return op(y, always, alias=True)


def _gated(ops: Layers, x: Value, linears: Sequence[Linear]) -> Value:
    native = ops.run.native and ops.style.activation == "silu"
    if native or (ops.run.ours and not ops.run.cpu):
        gate, up = ops.linear(x, linears[0]), ops.linear(x, linears[1])
        # in plain torch, for a GPU, the activation is a tensor of its own, and computed again
        # in backward
        size = 0 if native else gate.elements * gate.width
        y = ops.tape.op(gate, up, saves=[gate, up], temp=size, back=2 * size)
        del gate, up
        return ops.linear(y, linears[2])
    a = ops.activation(ops.linear(x, linears[0]))
    up = ops.linear(x, linears[1])
    return ops.linear(ops.tape.op(a, up, saves=[a, up]), linears[2])


def dense_and_experts(ops: Layers, x: Value, block: Block) -> Value:
    """x + norm(norm(dense(norm x)) + norm(experts(norm x))).

    The router has an unweighted norm of its own.
    """
    op = ops.tape.op
    hidden = ops.model.hidden
    y = ops.norm(_gated(ops, ops.norm(x, hidden), block.feed_forward[2:]), hidden)
    routed = ops.norm(x, hidden, weight=False)
    scale = ops.trained_weights(hidden)
    routed = op(op(routed, saves=[routed] if scale else [], weights=scale))
    shares = _route(ops, routed, block)
    del routed
    z = ops.norm(_experts(ops, ops.norm(x, hidden), block, shares), hidden)
    y = ops.norm(op(y, z, alias=True), hidden)
    return op(x, y, alias=True)


def _route(ops: Layers, x: Value, block: Block) -> Value:
    """Probabilities of the experts (N, E) in fp32, with gradients even if the router is frozen."""
    assert block.router is not None
    return ops.tape.op(ops.linear(x, block.router), width=4, saves_out=True)


def _experts(ops: Layers, x: Value, block: Block, shares: Value) -> Value:
    """Copies each token for its top-k experts, sorts by expert, and uses grouped products."""
    op, leaf = ops.tape.op, ops.tape.leaf
    up, down, *_ = block.feed_forward
    rows = ops.n * ops.style.top_k
    # weights of the chosen experts (N, top_k)
    wide = 4 if ops.style.router32 else ops.w
    scores = op(shares, elements=rows, width=wide)
    del shares
    order = leaf(rows, 8)
    copies = op(x, elements=rows * up.inputs, saves=[order])
    m = ops.gate(ops.grouped(copies, up, rows))
    del copies
    out = ops.grouped(m, down, rows)
    del m
    # backward: two products in `wide`, of the gradient with scores and with out; less the gradient
    # of out (the first product, cast), which the tape adds itself
    back = out.elements * (2 * wide - out.width)
    weighted = op(out, scores, width=wide, saves=[out, scores], back=back)
    del out
    weighted = op(weighted, saves=[order])  # back in the order of the tokens
    y = op(weighted, elements=x.elements)  # the sum over a token's experts
    del weighted
    return ops.cast(y, ops.w)
