"""A transformer block as operations on the tape.

It follows the modules of `transformers`, and MiniGPT's, as far as it decides which tensors are alive: what each
operation saves, every copy that a rotation or a change of layout makes.
"""

from collections.abc import Callable

from pipeline.calc.architecture import Block, Linear
from pipeline.calc.simulator.ops import Parts
from pipeline.calc.simulator.tape import Value


class Blocks:
    """Runs a block of the model: x (N, D) → x (N, D). `tables`: cos and sin of the rotation."""

    def __init__(self, parts: Parts) -> None:
        self.p, self.m, self.style, self.t = parts, parts.model, parts.style, parts.tape
        self.tables: list[Value] = []

    @property
    def eager(self) -> bool:
        """Whether every attention score is a number in memory: asked for, or no fused kernel computes it."""
        return self.p.run.attention == "eager" or self.style.eager_only

    @property
    def scores(self) -> int:
        """Numbers a head that short attention keeps."""
        run = self.p.run
        return run.scores or self.p.n * (run.span or run.sequence)

    def run(self, x: Value, block: Block) -> Value:
        if self.style.norms != "parallel":
            x = self._residual(x, lambda y: self._attention(y, block))
            return self._residual(x, lambda y: self._feed_forward(y, block))
        a = self._attention(self.p.norm(x, self.m.hidden), block)
        f = self._feed_forward(self.p.norm(x, self.m.hidden), block)
        return self.t.op(self.t.op(f, a, alias=True), x, alias=True)

    def _residual(self, x: Value, part: Callable[[Value], Value]) -> Value:
        p, hidden, norms = self.p, self.m.hidden, self.style.norms
        y = part(p.norm(x, hidden) if norms in ("before", "both") else x)
        y = p.norm(y, hidden) if norms in ("both", "inside") else y
        x = self.t.op(x, y, alias=True)
        return p.norm(x, hidden) if norms == "after" else x

    # attention

    def _attention(self, x: Value, block: Block) -> Value:
        if self.style.unknown:
            return self._any(x, block.attention)
        q, k, v, out = self._projected(x, block)
        if self.style.rotary:
            q, k = self._rotated(q), self._rotated(k)
        if self.p.method.kind == "prefix":
            k, v = self._prefixed(k), self._prefixed(v)
        short = self.p.run.attention == "short" and not self.eager
        y = self._eager(q, k, v) if self.eager else self._short(q, k, v) if short else self._fused(q, k, v)
        y = self.t.op(y) if self.style.rejoins and not self.eager else y  # its layout is not the one that o reads
        return self.p.linear(y, out)

    def _projected(self, x: Value, block: Block) -> tuple[Value, Value, Value, Linear]:
        """(q, k, v, the linear of the output)."""
        p, m = self.p, self.m
        widths = [heads * m.head_size for heads in (m.heads, m.kv_heads, m.kv_heads)]
        if len(block.attention) == 2:  # q, k and v are views of one linear's output
            fused, out = sorted(block.attention, key=lambda linear: linear.outputs, reverse=True)
            qkv = p.linear(x, fused)
            q, k, v = (p.view(qkv, p.n * width) for width in widths)
            return q, k, v, out
        of = {linear.name.rsplit(".", 1)[-1][0]: linear for linear in block.attention}  # q, k, v, and o or d(ense)
        q = p.linear(x, of["q"])
        q = self._normed(self.t.op(q) if self.style.scaled_queries else q, widths[0])
        k = self._normed(p.linear(x, of["k"]), widths[1])
        return q, k, p.linear(x, of["v"]), of.get("o") or of["d"]

    def _normed(self, x: Value, width: int) -> Value:
        if not self.style.qk_norm:
            return x
        return self.p.norm(x, self.m.head_size if self.style.qk_norm == "head" else width)

    def _rotated(self, x: Value) -> Value:
        """x·cos + rotate_half(x)·sin, a new tensor for each of its parts."""
        t, share = self.t, self.style.rotary
        part = t.op(x, elements=int(x.elements * share), view=True) if self.style.rejoins else x
        half, whole = t.op(part, elements=part.elements // 2), part.elements
        swapped = t.op(half, part, elements=whole, back=whole * part.width)
        del half
        turned = t.op(part, saves=self.tables[:1])
        other = t.op(swapped, saves=self.tables[1:2])
        del swapped
        y = t.op(turned, other, alias=True)
        return t.op(y, x, elements=x.elements) if self.style.rejoins else y

    def _prefixed(self, x: Value) -> Value:
        virtual, width = self.p.method.virtual_tokens, self.m.kv_heads * self.m.head_size
        added = self.p.added(virtual * width)
        return self.t.op(x, elements=x.elements + self.p.run.virtual_places * virtual * width, weights=[added])

    def _fused(self, q: Value, k: Value, v: Value) -> Value:
        """Flash attention: no scores; saves q, k, v, its output, and a log-sum-exp a head and token in fp32."""
        sums = self.t.leaf(self.p.n * self.m.heads, 4)
        return self.t.op(q, k, v, saves=[q, k, v, sums], saves_out=True)

    def _short(self, q: Value, k: Value, v: Value) -> Value:
        """Products of matrices block by block, for short sequences: the weights, heads · S² a sequence, are kept."""
        weights = self.t.leaf(self.m.heads * self.scores, self.p.w)
        return self.t.op(q, k, v, saves=[q, k, v, weights])

    def _eager(self, q: Value, k: Value, v: Value) -> Value:
        """softmax(qkᵀ·scale + mask)·v with every score in memory: heads · S² a sequence."""
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
        return t.op(y)  # heads side by side again, a copy

    def _softmax(self, p: Value) -> Value:
        t = self.t
        if self.style.sinks:  # one more column, then the largest is subtracted, and the column's view left out
            p = t.op(t.op(p), alias=True)
            return t.op(p, saves_out=True)
        if not self.style.softmax32:
            return t.op(p, saves_out=True)
        narrow = p.elements * (4 - p.width)
        wide = t.op(p, width=4, saves_out=True, temp=2 * narrow, back=narrow)  # fp32 on either side, both ways
        return self.p.cast(wide, p.width)

    def _any(self, x: Value, linears: tuple[Linear, ...]) -> Value:
        """Linears in a row, where only their shapes are known; each that fits the width reads the block's input."""
        y = x
        for linear in linears:
            fits = linear.inputs == self.m.hidden
            y = self.p.linear(x if fits else self.t.op(y, elements=self.p.n * linear.inputs, saves=[y]), linear)
        return y if y.elements == x.elements else self.t.op(y, elements=x.elements)

    # feed-forward

    def _feed_forward(self, x: Value, block: Block) -> Value:
        p, linears = self.p, block.feed_forward
        if self.style.unknown:
            return self._any(x, linears)
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
        """Each token's copies, one an expert of its choice, sorted by expert, through grouped products."""
        t, p, (up, down) = self.t, self.p, block.feed_forward
        rows = p.n * self.style.top_k
        scores = self._routed(x, block)
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

    def _routed(self, x: Value, block: Block) -> Value:
        """The router's weight of each choice: a gradient flows through it even where it is frozen."""
        t, p = self.t, self.p
        assert block.router is not None
        shares = t.op(p.linear(x, block.router), width=4, saves_out=True)
        return t.op(shares, elements=p.n * self.style.top_k, width=p.w)
