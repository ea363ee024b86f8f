"""A training step on the tape: embeddings, blocks, loss, backward."""

from collections.abc import Mapping

from pipeline.calc.architecture import Architecture
from pipeline.calc.parameters import lora_parameters
from pipeline.calc.settings import FinetuningMethod, TrainingConfig
from pipeline.calc.simulator.block import Blocks
from pipeline.calc.simulator.ops import Ops
from pipeline.calc.simulator.tape import Tape, Value

SIMULATED_ENDS = 2  # of a run of equal blocks, simulate this many at each end and extrapolate the middle


def run_step(model: Architecture, method: FinetuningMethod, run: TrainingConfig, ranks: Mapping[str, int]) -> Tape:
    """The tape after one step, with the bytes at its peak beyond weights and optimizer.

    `ranks`: full name of a linear → LoRA rank, for linears with LoRA.
    """
    step = _Step(model, method, run, ranks)
    loss = step.forward()
    step.p.tape.backward(loss)
    return step.p.tape


class _Step:
    def __init__(
        self, model: Architecture, method: FinetuningMethod, run: TrainingConfig, ranks: Mapping[str, int]
    ) -> None:
        self.model, self.method, self.run_, self.ranks = model, method, run, ranks
        self.p = Ops(model, method, run, ranks)
        self.t, self.blocks = self.p.tape, Blocks(self.p)
        self.adapted = [self._ranks_in_block(index) for index in range(len(model.blocks))]
        self.full = method.kind == "full"
        self.first_trained = len(model.blocks) - method.last_blocks if method.kind == "freeze" else 0
        self.ends_train = self.full or {
            "freeze": method.train_embeddings,
            "lora": method.embeddings == "all",
        }.get(method.kind, False)
        self.embedding = self.p.base_weight(model.embedding)
        self.head = self.embedding if model.tied else self.p.base_weight(model.embedding)
        self.new_rows = method.new_rows if method.kind == "lora" and method.embeddings == "new_rows" else 0
        self.rows = self.p.adapter_weight(self.new_rows * model.embedding_width)  # for the embedding, and a tied head
        self.head_rows = self.rows if model.tied else self.p.adapter_weight(self.new_rows * model.embedding_width)

    def forward(self) -> Value:
        """The loss."""
        t, p, model = self.t, self.p, self.model
        t.phase = "forward, embeddings"
        self.inputs = [t.leaf(p.n, 8), t.leaf(p.n, 8)]  # ids and labels, alive for the whole step
        self.masks = self._short_attention_mask()
        x = self._embed()
        self.blocks.tables = tables = self._tables()
        x = self._all_blocks(x)
        t.phase, p.name_prefix, p.trains = "forward, last norm", "", self.full
        x = p.norm(x, model.hidden) if model.final_norm else x
        x = p.linear(x, model.outside[0]) if model.embedding_width != model.hidden else x
        tables.clear()
        if self.method.kind == "prompt" and p.flat:  # our models drop the outputs of virtual tokens
            x = t.op(x, elements=self.run_.tokens * model.embedding_width)
        return self._loss(x)

    def _embed(self) -> Value:
        t, p, model, ids = self.t, self.p, self.model, self.inputs[0]
        trained = [self.embedding] if self.ends_train else []
        x = t.op(elements=self.run_.tokens * model.embedding_width, width=p.w, saves=[ids], weights=trained)
        if self.new_rows:  # looked up in their own table, then selected by id
            x = t.op(x, t.op(elements=x.elements, width=p.w, saves=[ids], weights=[self.rows]), saves=[ids])
        if self.method.kind == "prompt":
            virtual = p.adapter_weight(self.method.virtual_tokens * model.embedding_width)
            x = t.op(x, elements=p.n * model.embedding_width, weights=[virtual])
        x = p.linear(x, model.outside[1]) if model.embedding_width != model.hidden else x
        x = t.op(x) if model.style.scaled_embeddings else x
        if model.positions or model.fixed_positions:
            rows = p.n if model.style.ours else p.n // self.run_.batch
            table = p.trained_weights(model.positions) if model.positions else []
            x = t.op(x, t.op(elements=rows * model.hidden, width=p.w, saves=[ids], weights=table), alias=True)
        return x

    def _tables(self) -> list[Value]:
        """cos and sin of the rotary positions, and the mask of eager attention; every block reads them."""
        s = self.p.n // self.run_.batch
        rotated = int(self.model.style.rotary * self.model.head_size)
        tables = [self.t.leaf(s * rotated, self.p.w) for _ in range(2)] if rotated else []
        return [*tables, self.t.leaf(s * s, self.p.w)] if self.blocks.eager else tables

    def _short_attention_mask(self) -> list[Value]:
        """The mask of short attention, one row per query of a group of heads, alive during the whole step."""
        run, m = self.run_, self.model
        if run.attention != "short" or self.blocks.eager:
            return []
        return [self.t.leaf(m.heads // m.kv_heads * (self.blocks.scores // run.batch), self.p.w)]

    def _all_blocks(self, x: Value) -> Value:
        blocks, start = self.model.blocks, 0
        while start < len(blocks):
            stop = start
            while stop < len(blocks) and self._are_equal(start, stop):
                stop += 1
            x = self._equal_blocks(x, start, stop)
            start = stop
        return x

    def _are_equal(self, i: int, j: int) -> bool:
        blocks = self.model.blocks
        same = blocks[i] is blocks[j] and self._is_trained(i) == self._is_trained(j)
        return same and self.adapted[i] == self.adapted[j]

    def _ranks_in_block(self, index: int) -> list[int]:
        linears, where = self.model.adaptable(self.model.blocks[index]), self.model.block_name(index)
        return [self.ranks.get(where + linear.name, 0) for linear in linears]

    def _equal_blocks(self, x: Value, start: int, stop: int) -> Value:
        """Blocks `start` to `stop`, which are equal; the middle of a long run is extrapolated instead of simulated."""
        period = 2 if self.run_.checkpointing == "selective" else 1
        skipped = max(0, (stop - start - 2 * SIMULATED_ENDS * period) // period)
        resume = start + (SIMULATED_ENDS + skipped) * period
        before: dict[str, int] = {}
        for index in range(start, stop):
            if skipped and index == start + (SIMULATED_ENDS - 1) * period:
                before = dict(self.t.live)
            if skipped and index == start + SIMULATED_ENDS * period:
                growth = {kind: (size - before.get(kind, 0)) * skipped for kind, size in self.t.live.items()}
                x = self.t.skip(x, growth, sum(map(self._gradient_bytes, range(index, resume))))
            if not skipped or index < start + SIMULATED_ENDS * period or index >= resume:
                x = self._block(x, index)
        return x

    def _gradient_bytes(self, index: int) -> int:
        """Bytes that the gradients of block `index` allocate: none with a flat buffer."""
        return 0 if self.p.flat else self._trained_bytes(index)

    def _trained_bytes(self, index: int) -> int:
        """Bytes of the trainable weights in block `index`."""
        block = self.model.blocks[index]
        if self._is_trained(index):
            return block.parameters * self.p.w
        pairs = zip(self.model.adaptable(block), self.adapted[index], strict=True)
        added = sum(lora_parameters(linear, rank, self.method) for linear, rank in pairs if rank)
        if self.method.kind == "prefix":
            added += 2 * self.method.virtual_tokens * self.model.kv_heads * self.model.head_size
        return added * self.p.adapter

    def _is_trained(self, index: int) -> bool:
        return self.full or (self.method.kind == "freeze" and index >= self.first_trained)

    def _block(self, x: Value, index: int) -> Value:
        self.t.phase = f"forward, block {index + 1} of {len(self.model.blocks)}"

        def forward(y: Value) -> Value:
            self.p.name_prefix, self.p.trains = self.model.block_name(index), self._is_trained(index)
            return self.blocks.run(y, self.model.blocks[index])

        needs_gradient = x.node is not None or self._trained_bytes(index) > 0
        checkpointed = self.run_.checkpointed(index) and needs_gradient
        return self.t.checkpoint(x, forward) if checkpointed else forward(x)

    def _loss(self, x: Value) -> Value:
        t, run, width = self.t, self.run_, self.model.embedding_width
        t.phase, t.kind = "forward, loss", "logits"
        if run.loss not in ("full", "divergence"):
            x = t.op(x, elements=run.labels * width)
        before = t.leaf(run.tokens * width, self.p.w) if run.loss == "divergence" else None  # the base's hidden states
        loss = self._divergence if before else self._cross_entropy
        if run.loss not in ("chunked", "divergence"):
            return self._cross_entropy(x)
        full_chunks, last = divmod(run.labels, run.chunk)
        # the chunks in between have the same memory as the second
        chunk_sizes = [run.chunk] * min(full_chunks, 2) + [last] * bool(last)
        grads = []
        for rows in chunk_sizes:
            t.differentiate(t.op(x, elements=rows * width, view=True), loss)
            grads.append(t.leaf(rows * width, self.p.w))
        grads.append(t.leaf((run.labels - sum(chunk_sizes)) * width, self.p.w))
        gradient = t.leaf(run.labels * width, self.p.w)
        del grads, before
        return t.op(x, elements=1, width=4, saves=[gradient, *t.take_finished_gradients()])

    def _divergence(self, x: Value) -> Value:
        """Logits, then log p, log q and p in fp32; saves q − p in the dtype of the logits."""
        t, rows = self.t, x.elements // self.model.embedding_width
        trained = [self.head] if self.ends_train else []
        size = rows * self.model.vocabulary
        y = t.op(x, elements=size, saves=[x] if trained else [], weights=trained, temp=4 * size)
        return t.op(y, elements=1, width=4, saves=[t.leaf(size, self.p.w)], temp=3 * 4 * size)

    def _cross_entropy(self, x: Value) -> Value:
        """Logits, cast to fp32, log-softmax (saved), mean; backward fills two tensors of their size."""
        t, rows = self.t, x.elements // self.model.embedding_width
        trained = [self.head] if self.ends_train else []
        y = t.op(x, elements=rows * self.model.vocabulary, saves=[x] if trained else [], weights=trained)
        rank = self.ranks.get(self.model.head_name, 0)
        y = self.p.with_low_rank(y, x, self.model.head_linear, rank, rows) if rank else y
        if self.new_rows:
            new = t.op(x, elements=rows * self.new_rows, saves=[x], weights=[self.head_rows])
            y = t.op(y, new, elements=y.elements)
        if self.model.style.final_softcap:
            y = t.op(t.op(t.op(y), saves_out=True))
        log = t.op(self.p.cast(y, 4), saves_out=True)
        return t.op(log, elements=1, width=4, saves=[log])
