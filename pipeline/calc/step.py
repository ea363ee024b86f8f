"""A training step on the tape: embeddings, blocks, loss, backward.

Follows the modules of transformers, and this project's own layers, in everything that affects which
tensors are alive: what each operation saves for backward, and the copies made by rotations and
changes of layout. As in Python, a tensor is alive while a variable of a function that has not
returned refers to it: so where functions begin and end, and each `del`, is part of the model. B
sequences of T tokens, N = B·T, width D.
"""

from collections.abc import Callable, Iterator, Sequence

from pipeline.calc.architecture import Architecture, Block, Heads, Linear
from pipeline.calc.method import FinetuningMethod, ranks
from pipeline.calc.settings import TrainingConfig
from pipeline.calc.tape import Ops, Tape, Value

CHUNK = 64  # tokens that a gated delta net's kernel takes at once
BLOCK = 128  # queries of a product of attention to short sequences
# of a run of blocks that repeat, simulate this many periods at each end and extrapolate the middle
SIMULATED_ENDS = 2
LONGEST_PERIOD = 6  # Gemma's: five blocks with sliding windows and one without


def run_step(model: Architecture, method: FinetuningMethod, run: TrainingConfig) -> Tape:
    """The tape after one step, with the bytes at its peak beyond weights, adapter and optimizer."""
    step = Step(model, method, run)
    step.tape.backward(step.forward())
    return step.tape


class Step(Ops):
    """A model with a method's adapters, its blocks x (N, D) → x (N, D), and its loss."""

    def __init__(self, model: Architecture, method: FinetuningMethod, run: TrainingConfig) -> None:
        super().__init__(model, run, method.positions)
        self.method, self.ranks = method, ranks(model, method)
        self.name_prefix = ""  # of the linears of the block at hand
        # size of a head → cos and sin of the rotary positions, (T, K) each
        self.tables: dict[int, list[Value]] = {}
        # all attention scores are in memory: by setting, or because there is no fused kernel
        self.eager = run.attention == "eager" or self.style.eager_only
        # weights per head that short attention saves
        self.scores = run.scores or self.n * (run.span or run.sequence)
        # weights per head of its largest product; of packed sequences that are shorter than a block
        # some share one
        self.product = min(self.scores, run.batch * BLOCK * max(BLOCK, run.span or run.sequence))
        self.base = method.trained_base(model)
        self.adapted = [
            [
                self.ranks.get(model.block_name(index) + linear.name, 0)
                for linear in model.adaptable(block)
            ]
            for index, block in enumerate(model.blocks)
        ]
        self.embedding = self.base_weight(model.embedding)
        self.head = self.embedding if model.tied else self.base_weight(model.embedding)

    def forward(self) -> Value:
        """The loss."""
        t, run, model, style = self.tape, self.run, self.model, self.style
        width, length = model.embedding_width, self.n // run.rows
        # an operation keeps the phase and kind in which it was recorded: what its backward
        # allocates counts there too
        t.phase, self.trains = "forward, embeddings", self.base.rest
        # alive for the whole step
        self.inputs = ids, _labels = [t.leaf(self.n, 8), t.leaf(self.n, 8)]
        # a mask with one row per query of a group of heads
        if run.attention == "short" and not self.eager:
            self.mask = t.leaf(model.heads // model.kv_heads * (self.scores // run.rows), self.w)
        trained = [self.embedding] if self.base.ends else []
        x = t.op(elements=run.tokens * width, width=self.w, saves=[ids], weights=trained)
        x = t.op(x, temp=x.elements * x.width) if run.neftune_alpha else x  # the noise itself
        x = self.method.embed(self, x, ids)
        x = self.linear(x, model.outside[1]) if width != model.hidden else x
        x = t.op(x) if style.scaled_embeddings else x
        if model.positions or model.fixed_positions:
            # transformers broadcasts one sequence's positions
            rows = self.n if style.ours else length
            table = self.trained_weights(model.positions) if model.positions else []
            x = t.op(
                x,
                t.op(elements=rows * model.hidden, width=self.w, saves=[ids], weights=table),
                alias=True,
            )
        # cos and sin of the rotary positions, and the mask of eager attention; every block reads
        # them
        for size in dict.fromkeys(map(self._rotated_size, model.blocks)):
            if rotated := int(style.rotary * size):
                self.tables[size] = [t.leaf(length * rotated, self.w) for _ in range(2)]
        self.tables[0] = [t.leaf(length * length, self.w)] if self.eager else []
        y = x  # transformers has a variable of its own for the embeddings, which keeps them alive
        for start, stop, period in self._repeats():
            y = self._repeated_blocks(y, start, stop, period)
        x = y
        del y
        t.phase, self.name_prefix, self.trains = "forward, last norm", "", self.base.rest
        x = self.norm(x, model.hidden) if model.final_norm else x
        x = self.linear(x, model.outside[0]) if width != model.hidden else x
        self.tables.clear()  # the model has returned: from here on only backward refers to them
        if self.method.positions and self.flat:  # our models drop the outputs of virtual tokens
            x = t.op(x, elements=run.tokens * width)
        return self._loss(x)

    # blocks

    def _is_trained(self, index: int) -> bool:
        return index >= self.base.first_block

    def _trained_bytes(self, index: int) -> int:
        """Bytes of the trainable weights in block `index`."""
        block = self.model.blocks[index]
        if self._is_trained(index):
            return block.parameters * self.w
        pairs = zip(self.model.adaptable(block), self.adapted[index], strict=True)
        added = sum(self.method.linear_parameters(linear, rank) for linear, rank in pairs if rank)
        return (added + self.method.block_parameters(self.model)) * self.adapter

    def _repeats(self) -> Iterator[tuple[int, int, int]]:
        """(start, stop, period) of runs of blocks that repeat after `period`: shapes, ranks and
        trained weights.
        """
        blocks = self.model.blocks  # equal ones are one object, so that none has to be compared
        kinds = [
            (id(blocks[index]), self._is_trained(index), self.adapted[index])
            for index in range(len(blocks))
        ]
        start = 0
        while start < len(kinds):
            found = start + 1, 1
            for period in range(1, LONGEST_PERIOD + 1):
                stop = start + period
                while stop < len(kinds) and kinds[stop] == kinds[stop - period]:
                    stop += 1
                if stop - start >= 2 * period and stop > found[0]:
                    found = stop, period
            yield start, *found
            start = found[0]

    def _repeated_blocks(self, x: Value, start: int, stop: int, period: int) -> Value:
        """Blocks `start` to `stop`, which repeat; the middle of a long run is extrapolated instead
        of simulated.

        Two periods at each end are enough: the first of a run may differ, since no gradient may
        reach it, and each later one adds the same bytes. Simulating 80 blocks would take 15 times
        as long.
        """
        # every second block is checkpointed
        if self.run.checkpointing == "selective" and period % 2:
            period *= 2
        skipped = max(0, (stop - start - 2 * SIMULATED_ENDS * period) // period)
        resume = start + (SIMULATED_ENDS + skipped) * period
        before: dict[str, int] = {}
        for index in range(start, stop):
            if skipped and index == start + (SIMULATED_ENDS - 1) * period:
                before = dict(self.tape.live)
            if skipped and index == start + SIMULATED_ENDS * period:
                growth = {
                    kind: (size - before.get(kind, 0)) * skipped
                    for kind, size in self.tape.live.items()
                }
                # a flat buffer is there already
                gradients = 0 if self.flat else sum(map(self._trained_bytes, range(index, resume)))
                x = self.tape.skip(x, growth, gradients)
            if not skipped or index < start + SIMULATED_ENDS * period or index >= resume:
                x = self._block_or_checkpoint(x, index)
        return x

    def _block_or_checkpoint(self, x: Value, index: int) -> Value:
        self.tape.phase = f"forward, block {index + 1} of {len(self.model.blocks)}"

        def forward(y: Value) -> Value:  # runs again in backward if it is checkpointed
            self.name_prefix, self.trains = self.model.block_name(index), self._is_trained(index)
            return self.block(y, self.model.blocks[index])

        # a checkpoint around a block that needs no gradient keeps nothing and never runs again
        needs_gradient = x.node is not None or self._trained_bytes(index) > 0
        checkpointed = self.run.checkpointed(index) and needs_gradient
        return self.tape.checkpoint(x, forward) if checkpointed else forward(x)

    # linears

    def linear(self, x: Value, linear: Linear) -> Value:
        """Wx + b (N, O), with the method's adapter."""
        rank = self.ranks.get(self.name_prefix + linear.name, 0)
        folded = self.method.fold(self, x, linear, rank) if rank else None
        if folded is not None:
            return folded
        y = self.matmul(x, linear, self.n)
        return self.method.adapt(self, y, x, linear, rank, self.n) if rank else y

    def grouped(self, x: Value, linear: Linear, rows: int) -> Value:
        """The product of `rows` tokens, each with the matrix of its expert."""
        # the bias of each token's expert is copied to a row of its own
        y = self.matmul(x, linear, rows, bias=rows * linear.outputs * self.w if linear.bias else 0)
        rank = self.ranks.get(self.name_prefix + linear.name, 0)
        return self.method.adapt(self, y, x, linear, rank, rows) if rank else y

    # a block

    def block(self, x: Value, block: Block) -> Value:
        ranks = [self.ranks.get(self.name_prefix + linear.name, 0) for linear in block.linears]
        if (fused := self.method.fuse(self, x, block, ranks)) is not None:
            return fused
        if self.style.norms != "parallel":
            x = self._residual(x, lambda y: self._attention(y, block))
            if self.style.experts_beside:
                return self._dense_and_experts(x, block)
            return self._residual(x, lambda y: self._feed_forward(y, block))
        a = self._attention(self.norm(x, self.model.hidden), block)
        f = self._feed_forward(self.norm(x, self.model.hidden), block)
        return self.tape.op(self.tape.op(f, a, alias=True), x, alias=True)

    def _residual(self, x: Value, branch: Callable[[Value], Value]) -> Value:
        hidden, norms = self.model.hidden, self.style.norms
        y = branch(self.norm(x, hidden) if norms in ("before", "both") else x)
        y = self.norm(y, hidden) if norms in ("both", "inside") else y
        y = self.tape.op(y) if self.style.scaled_branches else y
        x = self.tape.op(x, y, alias=True)
        return self.norm(x, hidden) if norms == "after" else x

    # attention

    def _attention(self, x: Value, block: Block) -> Value:
        t, method, heads = self.tape, self.method, self.model.heads_of(block)
        if self.style.unknown:
            return self._unknown(x, block.attention)
        if block.kind == "delta":
            return self._delta_net(x, block, heads)
        gate = None
        if block.kind == "latent":
            q, k, v, out = self._project_latent(x, block)
        else:
            q, k, v, out, gate = self._project(x, block)
            if self.style.complex_rotary:
                q, k = (self._rotate_complex(y, block, heads.size) for y in (q, k))
            elif self.style.rotary:
                tables = self.tables.get(heads.size, [])
                q, k = self._rotate(q, tables), self._rotate(k, tables)
        k, v = method.extend_keys(self, k), method.extend_keys(self, v)
        if self.eager:
            y = self._eager_attention(q, k, v, heads)
        elif self.run.attention == "short":
            # our blockwise matrix products for short sequences save the weights, heads · T² per
            # sequence; of one block there are the scores too, and in backward the gradients of both
            product = heads.queries * self.product * self.w
            y = t.op(
                q,
                k,
                v,
                saves=[q, k, v, t.leaf(heads.queries * self.scores, self.w)],
                temp=product,
                back=2 * product,
            )
        else:
            # flash attention saves q, k, v, the output, and a log-sum-exp per head and token in
            # fp32, but no scores
            size = self.n * heads.queries * heads.value_size
            y = t.op(
                q,
                k,
                v,
                elements=size,
                saves=[q, k, v, t.leaf(self.n * heads.queries, 4)],
                saves_out=True,
            )
        if self.style.rejoins and not self.eager:
            y = t.op(y)  # a copy, since the layout is not the one that o_proj reads
        if gate is not None:
            share = t.op(gate, saves_out=True)
            y = t.op(y, share, saves=[y, share])
        return self.linear(y, out)

    def _delta_net(self, x: Value, block: Block, heads: Heads) -> Value:
        """A gated delta net with the kernels of flash-linear-attention and causal-conv1d.

        Chunks of 64 tokens: a matrix (64, 64) per chunk and head is saved, a state (K, V) per chunk
        and head is computed in forward and again in backward. Hv heads of values, and of the
        states; Hk of queries and keys.
        """
        t, n, w = self.tape, self.n, self.w
        mixed, z_proj, b_proj, a_proj, out = block.attention
        qkv, z = self.linear(x, mixed), self.linear(x, z_proj)
        b, a = self.linear(x, b_proj), self.linear(x, a_proj)
        # the convolution, with its activation
        qkv = t.op(qkv, saves=[qkv], weights=self.trained_weights(block.other))
        beta = t.op(b, saves_out=True)
        wide = self.cast(a, 4)
        decay = t.op(wide, saves=[wide, t.leaf(wide.elements, 4)])
        keys, values = n * heads.keys * heads.size, n * heads.queries * heads.value_size
        expanded = n * heads.queries * heads.size  # keys, one per head of values
        states = -(-n // CHUNK) * heads.queries * heads.size * heads.value_size
        saved = [t.leaf(size, w) for size in (keys, keys, values, n * heads.queries * CHUNK)]
        y = t.op(
            qkv,
            decay,
            beta,
            elements=values,
            width=w,
            saves=[*saved, decay, beta],
            temp=(expanded + 2 * values + states) * w,
            back=(5 * expanded + 4 * values + 2 * states) * w,
        )
        return self.linear(self._gated_norm(y, z, heads.value_size), out)

    def _gated_norm(self, x: Value, z: Value, size: int) -> Value:
        """RMSNorm(x) · silu(z), the norm and the activation in fp32."""
        t = self.tape
        wide = self.cast(x, 4)
        mean = t.op(
            t.op(wide, saves=[wide], back=wide.elements * 4), elements=wide.elements // size
        )
        root = t.op(mean, saves_out=True)
        y = t.op(wide, root, saves=[wide, root], back=wide.elements * 4)
        del wide
        y = self.cast(y, self.w)
        y = t.op(y, saves=[y] if self.trains else [], weights=self.trained_weights(size))
        gate = self.cast(z, 4)
        share = t.op(gate, saves=[gate])
        return self.cast(t.op(y, share, width=4, saves=[y, share]), self.w)

    def _project(self, x: Value, block: Block) -> tuple[Value, Value, Value, Linear, Value | None]:
        """q (N, H·K), k and v (N, kv_heads · K), the output projection, and the output's gate if it
        has one.
        """
        m = self.model
        heads = m.heads_of(block)
        widths = [
            heads.queries * heads.size,
            heads.keys * heads.size,
            heads.keys * heads.value_size,
        ]
        if len(block.attention) == 2:  # q, k and v are views of one linear's output
            fused, out = sorted(block.attention, key=lambda linear: linear.is_last)
            qkv = self.linear(x, fused)
            q, k, v = (self.view(qkv, self.n * width) for width in widths)
            return q, k, v, out, None
        # by first letter: q, k, v, and o(_proj) or d(ense)
        by_letter = {linear.name.rsplit(".", 1)[-1][0]: linear for linear in block.attention}
        q, gate = self.linear(x, by_letter["q"]), None
        if self.style.output_gate:
            # a copy, since the halves of each head alternate
            gate = self.tape.op(self.view(q, self.n * widths[0]))
            q = self.view(q, self.n * widths[0])
        q = self._qk_norm(
            self.tape.op(q) if self.style.scaled_queries else q, widths[0], heads.size
        )
        k = self.linear(x, by_letter["k"])
        v = self.linear(x, by_letter["v"]) if "v" in by_letter else k
        k = self._qk_norm(k, widths[1], heads.size)
        v = self.norm(v, heads.value_size, weight=False) if self.style.value_norm else v
        return q, k, v, by_letter.get("o") or by_letter["d"], gate

    def _qk_norm(self, x: Value, width: int, size: int) -> Value:
        if self.style.qk_norm in ("", "rotated"):
            return x
        return self.norm(x, size if self.style.qk_norm == "head" else width)

    def _rotated_size(self, block: Block) -> int:
        """Width of the tables of positions that a block reads; 0 if it reads none."""
        if block.kind == "attention":
            return self.model.heads_of(block).size
        return self.model.head_size if block.kind == "latent" else 0

    def _rotate(self, x: Value, tables: list[Value]) -> Value:
        """x·cos + rotate_half(x)·sin, with a new tensor for each operation."""
        t, share = self.tape, self.style.rotary
        rotated = t.op(x, elements=int(x.elements * share), view=True) if self.style.rejoins else x
        half, size = t.op(rotated, elements=rotated.elements // 2), rotated.elements  # −x₂
        swapped = t.op(half, rotated, elements=size, back=size * rotated.width)
        del half
        times_cos = t.op(rotated, saves=tables[:1])
        times_sin = t.op(swapped, saves=tables[1:2])
        del swapped
        y = t.op(times_cos, times_sin, alias=True)
        return t.op(y, x, elements=x.elements) if self.style.rejoins else y

    def _project_latent(self, x: Value, block: Block) -> tuple[Value, Value, Value, Linear]:
        """q and k (N, H·K), v (N, H·V), expanded from latents; the rotated part of k is shared by
        all heads.
        """
        t, heads = self.tape, self.model.heads_of(block)
        *queries, compress, expand, out = block.attention
        q = self.linear(x, queries[0])
        q = self.linear(self.norm(q, queries[0].outputs), queries[1]) if len(queries) > 1 else q
        rotated, n = compress.outputs - expand.inputs, self.n
        latent = self.linear(x, compress)
        kv = self.norm(self.view(latent, n * expand.inputs), expand.inputs)
        q_turned, k_turned = (
            self._rotate_pairs(self.view(y, n * count * rotated))
            for y, count in ((q, heads.queries), (latent, 1))
        )
        plain = self.view(q, n * heads.queries * (heads.size - rotated))
        q = t.op(plain, q_turned, elements=n * heads.queries * heads.size)
        del plain, q_turned, latent
        expanded = self.linear(kv, expand)
        v = self.view(expanded, n * heads.queries * heads.value_size)
        k = t.op(expanded, k_turned, elements=n * heads.queries * heads.size)
        return q, k, v, out

    def _rotate_complex(self, x: Value, block: Block, size: int) -> Value:
        """Llama 4: an fp32 copy as complex numbers times those of the positions, then a norm
        without a weight.
        """
        t = self.tape
        if not block.rotates:
            return x
        wide = self.cast(x, 4)
        turned = t.op(wide, saves=self.tables.get(size, [])[:1])
        del wide
        y = self.cast(turned, self.w)
        del turned
        return self.norm(y, size, weight=False) if self.style.qk_norm else y

    def _rotate_pairs(self, x: Value) -> Value:
        """Pairs of neighbours are rotated: two products for each half, their sum or difference, and
        both joined.
        """
        t, half, tables = self.tape, x.elements // 2, self.tables.get(self.model.head_size, [])

        def turned() -> Value:
            parts = [t.op(x, elements=half, saves=table) for table in (tables[:1], tables[1:2])]
            return t.op(*parts, alias=True)

        return t.op(turned(), turned(), elements=x.elements)

    def _eager_attention(self, q: Value, k: Value, v: Value, heads: Heads) -> Value:
        """softmax(qkᵀ·scale + mask)·v with all scores in memory: (B, H, T, keys)."""
        t = self.tape
        keys = k.elements // (heads.keys * heads.size)  # of all sequences
        scores = heads.queries * (self.n // self.run.rows) * keys
        if heads.keys < heads.queries:  # repeated for each query head
            k = t.op(k, elements=keys * heads.queries * heads.size)
            v = t.op(v, elements=keys * heads.queries * heads.value_size)
        p = t.op(q, k, elements=scores, saves=[q, k])
        p = t.op(p)  # · scale
        if self.style.softcap:
            p = t.op(t.op(t.op(p), saves_out=True))  # divide, tanh, multiply
        p = t.op(p, alias=True)  # + mask
        p = self._softmax(p)
        y = t.op(p, v, elements=self.n * heads.queries * heads.value_size, saves=[p, v])
        return t.op(y)  # copy: concatenates the heads

    def _softmax(self, p: Value) -> Value:
        t = self.tape
        # concatenate the sink's column, then subtract the maximum; dropping the column is a view
        if self.style.sinks:
            p = t.op(t.op(p), alias=True)
            return t.op(p, saves_out=True)
        if not self.style.softmax32:
            return t.op(p, saves_out=True)
        narrow = p.elements * (4 - p.width)
        # input and output in fp32, in forward and backward
        wide = t.op(p, width=4, saves_out=True, temp=2 * narrow, back=narrow)
        return self.cast(wide, p.width)

    def _unknown(self, x: Value, linears: tuple[Linear, ...]) -> Value:
        """Linears of which only the shapes are known, in sequence; those of the block's width read
        its input.
        """
        y = x
        for linear in linears:
            fits = linear.inputs == self.model.hidden
            y = self.linear(
                x if fits else self.tape.op(y, elements=self.n * linear.inputs, saves=[y]), linear
            )
        return y if y.elements == x.elements else self.tape.op(y, elements=x.elements)

    # feed-forward

    def _feed_forward(self, x: Value, block: Block) -> Value:
        linears = block.feed_forward
        if self.style.unknown:
            return self._unknown(x, linears)
        if linears[0].experts > 1 and self.style.all_experts:
            return self._all_experts(x, block)
        if linears[0].experts > 1:
            y = self._experts(x, block, self._route(x, block))
            return self._add_shared(y, x, linears[2:]) if len(linears) > 2 else y
        if not self.style.gated:
            return self.linear(self.activation(self.linear(x, linears[0])), linears[1])
        if len(linears) == 2:
            return self.linear(self.gate(self.linear(x, linears[0])), linears[1])
        return self._gated(x, linears)

    def _all_experts(self, x: Value, block: Block) -> Value:
        """The shared expert's output and the sum of all experts', whose inputs are copies of x,
        each scaled.
        """
        t, (up, down, *shared) = self.tape, block.feed_forward
        rows = self.n * up.experts
        shares = self.cast(self._route(x, block), self.w)
        copies = t.op(x, elements=rows * up.inputs)
        scaled = t.op(
            copies,
            shares,
            elements=copies.elements,
            saves=[copies, shares],
            back=copies.elements * self.w,
        )
        del copies
        y = self.grouped(self.gate(self.grouped(scaled, up, rows)), down, rows)
        always = self._gated(x, shared)
        return t.op(always, t.op(y, elements=x.elements), alias=True)

    def _add_shared(self, y: Value, x: Value, shared: Sequence[Linear]) -> Value:
        """y and the output of the expert that every token uses, which may be scaled by the sigmoid
        of a gate.
        """
        t, always = self.tape, self._gated(x, shared)
        if len(shared) > 3:
            share = t.op(self.linear(x, shared[3]), saves_out=True)
            always = t.op(
                share,
                always,
                elements=x.elements,
                saves=[share, always],
                back=always.elements * self.w,
            )
        return t.op(y, always, alias=True)

    def _gated(self, x: Value, linears: Sequence[Linear]) -> Value:
        native = self.run.native and self.style.activation == "silu"
        if native or (self.run.ours and not self.run.cpu):
            gate, up = self.linear(x, linears[0]), self.linear(x, linears[1])
            # in plain torch, for a GPU, the activation is a tensor of its own, and computed again
            # in backward
            size = 0 if native else gate.elements * gate.width
            y = self.tape.op(gate, up, saves=[gate, up], temp=size, back=2 * size)
            del gate, up
            return self.linear(y, linears[2])
        a = self.activation(self.linear(x, linears[0]))
        up = self.linear(x, linears[1])
        return self.linear(self.tape.op(a, up, saves=[a, up]), linears[2])

    def _dense_and_experts(self, x: Value, block: Block) -> Value:
        """x + norm(norm(dense(norm x)) + norm(experts(norm x))), where the router has an unweighted
        norm of its own.
        """
        t, hidden = self.tape, self.model.hidden
        y = self.norm(self._gated(self.norm(x, hidden), block.feed_forward[2:]), hidden)
        routed = self.norm(x, hidden, weight=False)
        scale = self.trained_weights(hidden)
        routed = t.op(t.op(routed, saves=[routed] if scale else [], weights=scale))
        shares = self._route(routed, block)
        del routed
        z = self.norm(self._experts(self.norm(x, hidden), block, shares), hidden)
        y = self.norm(t.op(y, z, alias=True), hidden)
        return t.op(x, y, alias=True)

    def _route(self, x: Value, block: Block) -> Value:
        """Probabilities of the experts (N, E), in fp32; gradients flow through them even if the
        router is frozen.
        """
        assert block.router is not None
        return self.tape.op(self.linear(x, block.router), width=4, saves_out=True)

    def _experts(self, x: Value, block: Block, shares: Value) -> Value:
        """Copies each token for its top-k experts, sorts by expert, and uses grouped products."""
        t, (up, down, *_) = self.tape, block.feed_forward
        rows = self.n * self.style.top_k
        # weights of the chosen experts (N, top_k)
        wide = 4 if self.style.router32 else self.w
        scores = t.op(shares, elements=rows, width=wide)
        del shares
        order = t.leaf(rows, 8)
        copies = t.op(x, elements=rows * up.inputs, saves=[order])
        m = self.gate(self.grouped(copies, up, rows))
        del copies
        out = self.grouped(m, down, rows)
        del m
        # backward: the products of the gradient with both, of which out's is cast afterwards
        back = out.elements * (2 * wide - out.width)
        weighted = t.op(out, scores, width=wide, saves=[out, scores], back=back)
        del out
        weighted = t.op(weighted, saves=[order])  # back in the order of the tokens
        y = t.op(weighted, elements=x.elements)  # the sum over a token's experts
        del weighted
        return self.cast(y, self.w)

    # loss

    def _loss(self, x: Value) -> Value:
        """The loss of the last hidden states (N, D): at once, or in chunks whose gradients are
        computed in forward.
        """
        t, run, width = self.tape, self.run, self.model.embedding_width
        t.phase, t.kind = "forward, loss", "logits"
        if run.loss not in ("full", "divergence"):
            x = t.op(x, elements=run.labels * width)
        # Liger's: a chunk's logits at a time, in 16 bits, overwritten with their gradient
        if run.loss == "fused":
            rows = -(-run.labels // -(-self.model.vocabulary // width))
            rows = min(run.labels, 1 << (rows - 1).bit_length())
            gradient = t.leaf(run.labels * width, self.w)
            return t.op(
                x, elements=1, width=4, saves=[gradient], temp=rows * self.model.vocabulary * self.w
            )
        if run.loss not in ("chunked", "divergence"):
            return self._cross_entropy(x)
        # the base's hidden states
        before = t.leaf(run.tokens * width, self.w) if run.loss == "divergence" else None
        full_chunks, last = divmod(run.labels, run.chunk)
        # From the second on, a chunk runs beside the gradients of those before: a third would only
        # add its own
        chunk_sizes = [run.chunk] * min(full_chunks, 2) + [last] * bool(last)
        grads = []
        for rows in chunk_sizes:
            chunk = t.op(x, elements=rows * width, view=True)
            t.differentiate(chunk, self._divergence if before else self._cross_entropy)
            grads.append(t.leaf(rows * width, self.w))
        grads.append(t.leaf((run.labels - sum(chunk_sizes)) * width, self.w))
        gradient = t.leaf(run.labels * width, self.w)  # the chunks' gradients in one tensor
        del grads, before
        return t.op(x, elements=1, width=4, saves=[gradient, *t.take_finished_gradients()])

    def _divergence(self, x: Value) -> Value:
        """Logits (rows, V), then log p, log q and p in fp32; saves q − p in the dtype of the
        logits.
        """
        t, rows = self.tape, x.elements // self.model.embedding_width
        trained = [self.head] if self.base.ends else []
        size = rows * self.model.vocabulary
        y = t.op(x, elements=size, saves=[x] if trained else [], weights=trained, temp=4 * size)
        return t.op(y, elements=1, width=4, saves=[t.leaf(size, self.w)], temp=3 * 4 * size)

    def _cross_entropy(self, x: Value) -> Value:
        """Logits (rows, V), cast to fp32, log-softmax (saved), mean; backward fills two tensors of
        their size.
        """
        t, model, rows = self.tape, self.model, x.elements // self.model.embedding_width
        trained = [self.head] if self.base.ends else []
        y = t.op(x, elements=rows * model.vocabulary, saves=[x] if trained else [], weights=trained)
        if rank := self.ranks.get(model.head_name, 0):
            y = self.method.adapt(self, y, x, model.head_linear, rank, rows)
        if new := self.method.new_logits(self, x, rows):
            y = t.op(y, new, elements=y.elements)
        if self.style.scaled_branches:
            y = t.op(y)
        if self.style.final_softcap:
            y = t.op(t.op(t.op(y), saves_out=True))  # divide, tanh, multiply
        if self.run.native:  # the gradient is computed in forward, in the dtype of the logits
            return t.op(y, elements=1, width=4, saves=[t.leaf(y.elements, y.width)])
        log = t.op(self.cast(y, 4), saves_out=True)
        return t.op(log, elements=1, width=4, saves=[log])
