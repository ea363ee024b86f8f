"""A training step on the tape: embeddings, blocks, loss, backward.

Follows the modules of transformers, and this project's own layers, in everything that affects which
tensors are alive: what each operation saves for backward, and the copies made by rotations and
changes of layout. As in Python, a tensor is alive while a variable of a function that has not
returned refers to it: so where functions begin and end, and each `del`, is part of the model. B
sequences of T tokens, N = B·T, width D.
"""

from collections.abc import Callable, Iterator

from pipeline.calc.architecture import Architecture, Block
from pipeline.calc.method import FinetuningMethod
from pipeline.calc.settings import TrainingConfig, chunk_rows
from pipeline.calc.step.attention import attention, rotated_size
from pipeline.calc.step.feed_forward import dense_and_experts, feed_forward
from pipeline.calc.step.layers import Layers
from pipeline.calc.tape import Tape, Value

# of a run of blocks that repeat, simulate this many periods at each end and extrapolate the middle
SIMULATED_ENDS = 2
LONGEST_PERIOD = 6  # Gemma's: five blocks with sliding windows and one without


def run_step(model: Architecture, method: FinetuningMethod, run: TrainingConfig) -> Tape:
    """The tape after one step, with the bytes at its peak beyond weights, adapter and optimizer."""
    step = Step(model, method, run)
    step.tape.backward(step.forward())
    return step.tape


class Step(Layers):
    """A model with a method's adapters, its blocks x (N, D) → x (N, D), and its loss."""

    def __init__(self, model: Architecture, method: FinetuningMethod, run: TrainingConfig) -> None:
        super().__init__(model, method, run)
        self.base = method.trained_base(model)
        self.adapted = [model.ranks_in(n, self.ranks) for n in range(len(model.blocks))]
        self.embedding = self.base_weight(model.embedding)
        self.head = self.embedding if model.tied else self.base_weight(model.embedding)

    def forward(self) -> Value:
        """The loss."""
        t, run, model, style = self.tape, self.run, self.model, self.style
        width, length = model.embedding_width, self.n // run.rows
        # an operation keeps the phase and kind in which it was recorded: what its backward
        # allocates counts there too
        t.phase = "forward, embeddings"
        self.trains = self.base.rest
        # ids and labels, alive for the whole step
        self.inputs = [t.leaf(self.n, 8), t.leaf(self.n, 8)]
        ids = self.inputs[0]
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
        for size in dict.fromkeys(rotated_size(model, block) for block in model.blocks):
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
        """(start, stop, period) of runs of blocks with equal shapes, ranks and training."""
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
        """Blocks `start` to `stop`, which repeat; the middle of a long run is extrapolated.

        Two periods at each end are enough: the first of a run may differ, as perhaps no gradient
        reaches it, and each later one adds the same bytes. Simulating 80 blocks would take 15 times
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

    # a block

    def block(self, x: Value, block: Block) -> Value:
        ranks = [self.rank_of(linear) for linear in block.linears]
        if (fused := self.method.fuse(self, x, block, ranks)) is not None:
            return fused
        if self.style.norms != "parallel":
            x = self._residual(x, lambda y: attention(self, y, block))
            if self.style.experts_beside:
                return dense_and_experts(self, x, block)
            return self._residual(x, lambda y: feed_forward(self, y, block))
        a = attention(self, self.norm(x, self.model.hidden), block)
        f = feed_forward(self, self.norm(x, self.model.hidden), block)
        return self.tape.op(self.tape.op(f, a, alias=True), x, alias=True)

    def _residual(self, x: Value, branch: Callable[[Value], Value]) -> Value:
        hidden, norms = self.model.hidden, self.style.norms
        y = branch(self.norm(x, hidden) if norms in ("before", "both") else x)
        y = self.norm(y, hidden) if norms in ("both", "inside") else y
        y = self.tape.op(y) if self.style.scaled_branches else y
        x = self.tape.op(x, y, alias=True)
        return self.norm(x, hidden) if norms == "after" else x

    # loss

    def _loss(self, x: Value) -> Value:
        """The loss of hidden states (N, D): at once, or in chunks that are differentiated."""
        t, run, width = self.tape, self.run, self.model.embedding_width
        t.phase, t.kind = "forward, loss", "logits"
        if run.loss not in ("full", "divergence"):
            x = t.op(x, elements=run.labels * width)
        # a chunk's logits at a time, in 16 bits, overwritten with their gradient
        if run.loss == "fused":
            rows = min(run.labels, chunk_rows(self.model.vocabulary))
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
        """Logits (rows, V), then log p, log q and p in fp32; saves q − p as wide as the logits."""
        t, rows = self.tape, x.elements // self.model.embedding_width
        trained = [self.head] if self.base.ends else []
        size = rows * self.model.vocabulary
        y = t.op(x, elements=size, saves=[x] if trained else [], weights=trained, temp=4 * size)
        return t.op(y, elements=1, width=4, saves=[t.leaf(size, self.w)], temp=3 * 4 * size)

    def _cross_entropy(self, x: Value) -> Value:
        """Logits (rows, V) in fp32, saved log-softmax, mean; backward fills two such tensors."""
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
