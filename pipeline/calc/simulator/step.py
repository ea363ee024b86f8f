"""A training step on the tape: embeddings, blocks, loss, and the way back."""

from collections.abc import Mapping

from pipeline.calc.architecture import Architecture
from pipeline.calc.parameters import lora_parameters
from pipeline.calc.settings import FinetuningMethod, TrainingConfig
from pipeline.calc.simulator.block import Blocks
from pipeline.calc.simulator.ops import Parts
from pipeline.calc.simulator.tape import Tape, Value

EACH_END = 2  # blocks at either end of a run of equal ones that are run one by one; those between are multiplied


def run_step(model: Architecture, method: FinetuningMethod, run: TrainingConfig, ranks: Mapping[str, int]) -> Tape:
    """The tape after one step: what was alive at its peak, beyond weights and optimizer.

    `ranks`: full name of a linear → its LoRA rank; it has none where it is not named.
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
        self.p = Parts(model, method, run, ranks)
        self.t, self.blocks = self.p.tape, Blocks(self.p)
        self.adapted = [self._ranks(index) for index in range(len(model.blocks))]  # of each block's linears
        self.full = method.kind == "full"
        self.first_trained = len(model.blocks) - method.last_blocks if method.kind == "freeze" else 0
        self.ends_train = self.full or {
            "freeze": method.train_embeddings,
            "lora": method.embeddings == "all",
        }.get(method.kind, False)
        self.embedding = self.p.weight(model.embedding)
        self.head = self.embedding if model.tied else self.p.weight(model.embedding)
        self.new_rows = method.new_rows if method.kind == "lora" and method.embeddings == "new_rows" else 0
        self.rows = self.p.added(self.new_rows * model.embedding_width)  # of the embedding, and of a tied head
        self.head_rows = self.rows if model.tied else self.p.added(self.new_rows * model.embedding_width)

    def forward(self) -> Value:
        """The loss."""
        t, p, model = self.t, self.p, self.model
        t.phase = "forward, embeddings"
        self.inputs = [t.leaf(p.n, 8), t.leaf(p.n, 8)]  # ids and labels, alive for the whole step
        self.masks = self._remembered()
        x = self._embed()
        self.blocks.tables = tables = self._tables()
        x = self._all_blocks(x)
        t.phase, p.where, p.trains = "forward, last norm", "", self.full
        x = p.norm(x, model.hidden) if model.final_norm else x
        x = p.linear(x, model.outside[0]) if model.embedding_width != model.hidden else x
        tables.clear()
        if self.method.kind == "prompt" and p.flat:  # our models leave out what virtual tokens give
            x = t.op(x, elements=self.run_.tokens * model.embedding_width)
        return self._loss(x)

    def _embed(self) -> Value:
        t, p, model, ids = self.t, self.p, self.model, self.inputs[0]
        trained = [self.embedding] if self.ends_train else []
        x = t.op(elements=self.run_.tokens * model.embedding_width, width=p.w, saves=[ids], weights=trained)
        if self.new_rows:  # looked up beside the frozen table, then chosen where they stand
            x = t.op(x, t.op(elements=x.elements, width=p.w, saves=[ids], weights=[self.rows]), saves=[ids])
        if self.method.kind == "prompt":
            virtual = p.added(self.method.virtual_tokens * model.embedding_width)
            x = t.op(x, elements=p.n * model.embedding_width, weights=[virtual])
        x = p.linear(x, model.outside[1]) if model.embedding_width != model.hidden else x
        x = t.op(x) if model.style.scaled_embeddings else x
        if model.positions or model.fixed_positions:
            rows = p.n if model.style.ours else p.n // self.run_.batch
            table = p.trained(model.positions) if model.positions else []
            x = t.op(x, t.op(elements=rows * model.hidden, width=p.w, saves=[ids], weights=table), alias=True)
        return x

    def _tables(self) -> list[Value]:
        """cos and sin of the rotation, and the mask of eager attention, which every block reads."""
        s = self.p.n // self.run_.batch
        rotated = int(self.model.style.rotary * self.model.head_size)
        tables = [self.t.leaf(s * rotated, self.p.w) for _ in range(2)] if rotated else []
        return [*tables, self.t.leaf(s * s, self.p.w)] if self.blocks.eager else tables

    def _remembered(self) -> list[Value]:
        """The mask of short attention, a row for each query of a group of heads, alive for the whole step."""
        run, m = self.run_, self.model
        if run.attention != "short" or self.blocks.eager:
            return []
        return [self.t.leaf(m.heads // m.kv_heads * (self.blocks.scores // run.batch), self.p.w)]

    def _all_blocks(self, x: Value) -> Value:
        blocks, start = self.model.blocks, 0
        while start < len(blocks):
            stop = start
            while stop < len(blocks) and self._alike(start, stop):
                stop += 1
            x = self._equal_blocks(x, start, stop)
            start = stop
        return x

    def _alike(self, i: int, j: int) -> bool:
        blocks = self.model.blocks
        same = blocks[i] is blocks[j] and self._trains(i) == self._trains(j)
        return same and self.adapted[i] == self.adapted[j]

    def _ranks(self, index: int) -> list[int]:
        linears, where = self.model.adaptable(self.model.blocks[index]), self.model.block_name(index)
        return [self.ranks.get(where + linear.name, 0) for linear in linears]

    def _equal_blocks(self, x: Value, start: int, stop: int) -> Value:
        """Blocks `start` to `stop`; of a long run the middle is multiplied instead of run."""
        period = 2 if self.run_.checkpointing == "selective" else 1
        skipped = max(0, (stop - start - 2 * EACH_END * period) // period)
        resume = start + (EACH_END + skipped) * period
        before: dict[str, int] = {}
        for index in range(start, stop):
            if skipped and index == start + (EACH_END - 1) * period:
                before = dict(self.t.live)
            if skipped and index == start + EACH_END * period:
                kept = {kind: (size - before.get(kind, 0)) * skipped for kind, size in self.t.live.items()}
                x = self.t.skip(x, kept, sum(map(self._gradients, range(index, resume))))
            if not skipped or index < start + EACH_END * period or index >= resume:
                x = self._block(x, index)
        return x

    def _gradients(self, index: int) -> int:
        """Bytes of the gradients that block `index` leaves: none where there is a place for them already."""
        return 0 if self.p.flat else self._trained(index)

    def _trained(self, index: int) -> int:
        """Bytes of what trains in block `index`."""
        block = self.model.blocks[index]
        if self._trains(index):
            return block.parameters * self.p.w
        pairs = zip(self.model.adaptable(block), self.adapted[index], strict=True)
        added = sum(lora_parameters(linear, rank, self.method) for linear, rank in pairs if rank)
        if self.method.kind == "prefix":
            added += 2 * self.method.virtual_tokens * self.model.kv_heads * self.model.head_size
        return added * self.p.adapter

    def _trains(self, index: int) -> bool:
        return self.full or (self.method.kind == "freeze" and index >= self.first_trained)

    def _block(self, x: Value, index: int) -> Value:
        self.t.phase = f"forward, block {index + 1} of {len(self.model.blocks)}"

        def forward(y: Value) -> Value:
            self.p.where, self.p.trains = self.model.block_name(index), self._trains(index)
            return self.blocks.run(y, self.model.blocks[index])

        grows = x.node is not None or self._trained(index) > 0
        checkpointed = self.run_.checkpointed(index) and grows
        return self.t.checkpoint(x, forward) if checkpointed else forward(x)

    def _loss(self, x: Value) -> Value:
        t, run, width = self.t, self.run_, self.model.embedding_width
        t.phase, t.kind = "forward, loss", "logits"
        if run.loss not in ("full", "divergence"):
            x = t.op(x, elements=run.labels * width)
        before = t.leaf(run.tokens * width, self.p.w) if run.loss == "divergence" else None  # the base's hidden states
        part = self._divergence if before else self._cross_entropy
        if run.loss not in ("chunked", "divergence"):
            return self._cross_entropy(x)
        whole_chunks, last = divmod(run.labels, run.chunk)
        # a chunk between finds what the second found, and adds its gradient
        run_ones = [run.chunk] * min(whole_chunks, 2) + [last] * bool(last)
        grads = []
        for rows in run_ones:
            t.differentiate(t.op(x, elements=rows * width, view=True), part)
            grads.append(t.leaf(rows * width, self.p.w))
        grads.append(t.leaf((run.labels - sum(run_ones)) * width, self.p.w))
        whole = t.leaf(run.labels * width, self.p.w)
        del grads, before
        return t.op(x, elements=1, width=4, saves=[whole, *t.handed_over()])

    def _divergence(self, x: Value) -> Value:
        """Logits, then in fp32 log p, log q and p; q − p is kept at the logits' precision."""
        t, rows = self.t, x.elements // self.model.embedding_width
        trained = [self.head] if self.ends_train else []
        size = rows * self.model.vocabulary
        y = t.op(x, elements=size, saves=[x] if trained else [], weights=trained, temp=4 * size)
        return t.op(y, elements=1, width=4, saves=[t.leaf(size, self.p.w)], temp=3 * 4 * size)

    def _cross_entropy(self, x: Value) -> Value:
        """Logits, to fp32, log-softmax (kept), the mean; backward fills a tensor of their size twice."""
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
