"""A transformer block as operations on the tape.

Follows the modules of transformers, and MiniGPT's, in everything that affects which tensors are alive: what each
operation saves for backward, and the copies made by rotations and changes of layout.
"""

from collections.abc import Callable

from pipeline.calc.architecture import Block, Linear
from pipeline.calc.simulator.ops import Ops
from pipeline.calc.simulator.tape import Value


class Blocks:
    """Runs a block of the model: x (N, D) → x (N, D), N tokens. `tables`: cos and sin of the rotary positions."""

    def __init__(self, ops: Ops) -> None:
        self.p, self.m, self.style, self.t = ops, ops.model, ops.style, ops.tape
        self.tables: list[Value] = []

    @property
    def eager(self) -> bool:
        """Whether all attention scores are in memory: by setting, or because there is no fused kernel."""
        return self.p.run.attention == "eager" or self.style.eager_only

    @property
    def scores(self) -> int:
        """Attention weights per head that short attention saves."""
        run = self.p.run
        return run.scores or self.p.n * (run.span or run.sequence)

    def run(self, x: Value, block: Block) -> Value:
        if self.style.norms != "parallel":
            x = self._residual(x, lambda y: self._attention(y, block))
            return self._residual(x, lambda y: self._feed_forward(y, block))
        a = self._attention(self.p.norm(x, self.m.hidden), block)
        f = self._feed_forward(self.p.norm(x, self.m.hidden), block)
        return self.t.op(self.t.op(f, a, alias=True), x, alias=True)

    def _residual(self, x: Value, branch: Callable[[Value], Value]) -> Value:
        p, hidden, norms = self.p, self.m.hidden, self.style.norms
        y = branch(p.norm(x, hidden) if norms in ("before", "both") else x)
        y = p.norm(y, hidden) if norms in ("both", "inside") else y
        x = self.t.op(x, y, alias=True)
        return p.norm(x, hidden) if norms == "after" else x

    # attention

    def _attention(self, x: Value, block: Block) -> Value:
        if self.style.unknown:
            return self._unknown(x, block.attention)
        q, k, v, out = self._project(x, block)
        if self.style.rotary:
            q, k = self._rotate(q), self._rotate(k)
        if self.p.method.kind == "prefix":
            k, v = self._prepend_prefix(k), self._prepend_prefix(v)
        if self.eager:
            y = self._eager_attention(q, k, v)
        elif self.p.run.attention == "short":
            y = self._short_attention(q, k, v)
        else:
            y = self._fused_attention(q, k, v)
        if self.style.rejoins and not self.eager:
            y = self.t.op(y)  # a copy, since the layout is not the one that o_proj reads
        return self.p.linear(y, out)

    def _project(self, x: Value, block: Block) -> tuple[Value, Value, Value, Linear]:
        """(q, k, v, output projection)."""
        p, m = self.p, self.m
        widths = [heads * m.head_size for heads in (m.heads, m.kv_heads, m.kv_heads)]
        if len(block.attention) == 2:  # q, k and v are views of one linear's output
            fused, out = sorted(block.attention, key=lambda linear: linear.outputs, reverse=True)
            qkv = p.linear(x, fused)
            q, k, v = (p.view(qkv, p.n * width) for width in widths)
            return q, k, v, out
        # by first letter: q, k, v, and o(_proj) or d(ense)
        by_letter = {linear.name.rsplit(".", 1)[-1][0]: linear for linear in block.attention}
        q = p.linear(x, by_letter["q"])
        q = self._qk_norm(self.t.op(q) if self.style.scaled_queries else q, widths[0])
        k = self._qk_norm(p.linear(x, by_letter["k"]), widths[1])
        return q, k, p.linear(x, by_letter["v"]), by_letter.get("o") or by_letter["d"]

    def _qk_norm(self, x: Value, width: int) -> Value:
        if not self.style.qk_norm:
            return x
        return self.p.norm(x, self.m.head_size if self.style.qk_norm == "head" else width)

    def _rotate(self, x: Value) -> Value:
        """x·cos + rotate_half(x)·sin, with a new tensor for each operation."""
        t, share = self.t, self.style.rotary
        rotated = t.op(x, elements=int(x.elements * share), view=True) if self.style.rejoins else x
        half, size = t.op(rotated, elements=rotated.elements // 2), rotated.elements
        swapped = t.op(half, rotated, elements=size, back=size * rotated.width)
        del half
        times_cos = t.op(rotated, saves=self.tables[:1])
        times_sin = t.op(swapped, saves=self.tables[1:2])
        del swapped
        y = t.op(times_cos, times_sin, alias=True)
        return t.op(y, x, elements=x.elements) if self.style.rejoins else y

    def _prepend_prefix(self, x: Value) -> Value:
        virtual, width = self.p.method.virtual_tokens, self.m.kv_heads * self.m.head_size
        added = self.p.adapter_weight(virtual * width)
        return self.t.op(x, elements=x.elements + self.p.run.virtual_places * virtual * width, weights=[added])

    def _fused_attention(self, q: Value, k: Value, v: Value) -> Value:
        """Flash attention: saves q, k, v, the output, and a log-sum-exp per head and token in fp32, but no scores."""
        sums = self.t.leaf(self.p.n * self.m.heads, 4)
        return self.t.op(q, k, v, saves=[q, k, v, sums], saves_out=True)

    def _short_attention(self, q: Value, k: Value, v: Value) -> Value:
        """Blockwise matrix products for short sequences: saves the weights, heads · S² per sequence."""
        weights = self.t.leaf(self.m.heads * self.scores, self.p.w)
        return self.t.op(q, k, v, saves=[q, k, v, weights])

    def _eager_attention(self, q: Value, k: Value, v: Value) -> Value:
        """softmax(qkᵀ·scale + mask)·v with all scores in memory: heads · S² per sequence."""
        t, m = self.t, self.m
        keys = k.elements // (m.kv_heads * m.head_size)
        scores = m.heads * (self.p.n // self.p.run.batch) * keys
        if m.kv_heads < m.heads:
            k, v = (t.op(x, elements=keys * m.heads * m.head_size) for x in (k, v))
        p = t.op(q, k, elements=scores, saves=[q, k])
        p = t.op(p)  # · scale
        if self.style.softcap:
            p = t.op(t.op(t.op(p), saves_out=True))  # divide, tanh, multiply
        p = t.op(p, alias=True)  # + mask
        p = self._softmax(p)
        y = t.op(p, v, elements=q.elements, saves=[p, v])
        return t.op(y)  # copy: concatenates the heads

    def _softmax(self, p: Value) -> Value:
        t = self.t
        if self.style.sinks:  # concatenate the sink's column, then subtract the maximum; dropping the column is a view
            p = t.op(t.op(p), alias=True)
            return t.op(p, saves_out=True)
        if not self.style.softmax32:
            return t.op(p, saves_out=True)
        narrow = p.elements * (4 - p.width)
        # input and output in fp32, in forward and backward
        wide = t.op(p, width=4, saves_out=True, temp=2 * narrow, back=narrow)
        return self.p.cast(wide, p.width)

    def _unknown(self, x: Value, linears: tuple[Linear, ...]) -> Value:
        """Linears of which only the shapes are known, in sequence; those of the block's width read its input."""
        y = x
        for linear in linears:
            fits = linear.inputs == self.m.hidden
            y = self.p.linear(x if fits else self.t.op(y, elements=self.p.n * linear.inputs, saves=[y]), linear)
        return y if y.elements == x.elements else self.t.op(y, elements=x.elements)

    # feed-forward

    def _feed_forward(self, x: Value, block: Block) -> Value:
        p, linears = self.p, block.feed_forward
        if self.style.unknown:
            return self._unknown(x, linears)
        if linears[0].experts > 1:
            return self._experts(x, block)
        if not self.style.gated:
            return p.linear(p.activation(p.linear(x, linears[0])), linears[1])
        if len(linears) == 2:
            return p.linear(p.gate(p.linear(x, linears[0])), linears[1])
        a = p.activation(p.linear(x, linears[0]))
        up = p.linear(x, linears[1])
        return p.linear(self.t.op(a, up, saves=[a, up]), linears[2])

    def _experts(self, x: Value, block: Block) -> Value:
        """Copies each token for its top-k experts, sorts by expert, and uses grouped products."""
        t, p, (up, down) = self.t, self.p, block.feed_forward
        rows = p.n * self.style.top_k
        scores = self._route(x, block)
        order = t.leaf(rows, 8)
        copies = t.op(x, elements=rows * up.inputs, saves=[order])
        m = p.gate(p.grouped(copies, up, rows))
        del copies
        out = p.grouped(m, down, rows)
        del m
        weighted = t.op(out, scores, saves=[out, scores], back=out.elements * out.width)
        del out
        weighted = t.op(weighted, saves=[order])
        return t.op(weighted, elements=x.elements)

    def _route(self, x: Value, block: Block) -> Value:
        """The router's weights of the chosen experts (N, top_k); gradients flow through them even if it is frozen."""
        t, p = self.t, self.p
        assert block.router is not None
        shares = t.op(p.linear(x, block.router), width=4, saves_out=True)
        return t.op(shares, elements=p.n * self.style.top_k, width=p.w)
