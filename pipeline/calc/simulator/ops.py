"""What blocks are made of, as operations on the tape: linears with their adapters, norms, activations."""

from collections.abc import Mapping

from pipeline.calc.architecture import Architecture, Linear
from pipeline.calc.precision import precision
from pipeline.calc.settings import FinetuningMethod, TrainingConfig
from pipeline.calc.simulator.tape import Tape, Value, Weight

FOLD_BELOW = 2**16  # weights; smaller linears fold their LoRA update into one matrix first, as our layers do


class Parts:
    """Operations of one step. `where` and `trains` say which block is running and whether its weights train."""

    def __init__(
        self, model: Architecture, method: FinetuningMethod, run: TrainingConfig, ranks: Mapping[str, int]
    ) -> None:
        self.model, self.method, self.run, self.style = model, method, run, model.style
        self.tape, self._ranks = Tape(), ranks
        virtual = method.virtual_tokens if method.kind == "prompt" else 0
        self.n, self.w = run.tokens + virtual * run.virtual_places, run.width  # tokens of the step, bytes of a number
        self.adapter = precision(run.adapter_precision).compute
        self._quantized = precision(run.precision).quantized
        self.flat = model.style.ours or run.trainer
        self.where, self.trains = "", method.kind == "full"

    def weight(self, parameters: int) -> Weight:
        """A weight of the base; gradients in one vector have their place already."""
        return Weight(parameters * self.w, placed=self.flat)

    def added(self, parameters: int) -> Weight:
        """A weight of the adapter."""
        return Weight(parameters * self.adapter, placed=self.flat)

    def trained(self, parameters: int) -> list[Weight]:
        return [self.weight(parameters)] if self.trains else []

    def cast(self, x: Value, width: int) -> Value:
        return x if x.width == width else self.tape.op(x, width=width)

    def view(self, whole: Value, elements: int) -> Value:
        """A part of a tensor, not copied; its gradient is first written into zeros of the whole's size."""
        return self.tape.op(whole, elements=elements, view=True)

    def linear(self, x: Value, linear: Linear) -> Value:
        """Wx + b, and s·BAx where it has an adapter. A frozen W saves nothing; a trained W or A saves x."""
        rank = self._ranks.get(self.where + linear.name, 0)
        if rank and linear.weights < FOLD_BELOW and (self.flat or not self.method.dora):
            return self._folded(x, linear, rank)
        y = self._product(x, linear, self.n)
        if not rank:
            return y
        return self.with_low_rank(y, x, linear, rank, self.n)

    def with_low_rank(self, y: Value, x: Value, linear: Linear, rank: int, rows: int) -> Value:
        """y + s·BAx, for `rows` tokens."""
        if self.method.dora and self.flat:
            return self._of_length(self._added_in_place(y, x, linear, rank, rows), linear)
        if self.run.trainer and not self.method.dora:
            return self._added_in_place(y, x, linear, rank, rows)
        b = self._low_rank(x, linear, rank, rows)
        b = self._with_magnitude(y, b, linear) if self.method.dora else b
        if b.width != y.width:  # a 16-bit y and a 32-bit update make a 32-bit sum
            return self.cast(self.tape.op(y, b, width=b.width), y.width)
        return self.tape.op(y, b, alias=True)

    def grouped(self, x: Value, linear: Linear, rows: int) -> Value:
        """The product of `rows` copies of tokens, each with the matrix of its expert."""
        y = self._product(x, linear, rows, bias=rows * linear.outputs * self.w if linear.bias else 0)
        rank = self._ranks.get(self.where + linear.name, 0)
        return self.with_low_rank(y, x, linear, rank, rows) if rank else y

    def _product(self, x: Value, linear: Linear, rows: int, bias: int = 0) -> Value:
        """Wx; a quantized W is made anew at 16 bit for every product."""
        scratch = linear.weights * self.w if self._quantized else 0
        return self.tape.op(
            x,
            elements=rows * linear.outputs,
            saves=[x] if self.trains else [],
            weights=self.trained(linear.parameters),
            temp=scratch + bias,
            back=scratch,
        )

    def _low_rank(self, x: Value, linear: Linear, rank: int, rows: int) -> Value:
        """s·BAx. A and B are cast to x's precision; or x to theirs, once for each linear, as PEFT does."""
        t, of_inputs = self.tape, self.run.casts == "inputs"
        sizes = linear.experts * rank * linear.inputs, linear.experts * rank * linear.outputs
        copied = self.adapter != self.w and not of_inputs
        A, B = ([t.leaf(size, self.w)] if copied else [] for size in sizes)
        x = self.cast(x, self.adapter) if of_inputs else x
        a = t.op(x, elements=rows * rank, saves=[x, *A], weights=[self.added(sizes[0])])
        a = a if of_inputs else t.op(a)
        b = t.op(a, elements=rows * linear.outputs, saves=[a, *B], weights=[self.added(sizes[1])])
        return t.op(b) if of_inputs else b

    def _added_in_place(self, y: Value, x: Value, linear: Linear, rank: int, rows: int) -> Value:
        """The same, added into y itself; PiSSA's factors have what they began with below them."""
        t, sizes = self.tape, (linear.experts * rank * linear.inputs, linear.experts * rank * linear.outputs)
        copied, twice = self.adapter != self.w or self.method.pissa, 2 if self.method.pissa else 1
        A, B = ([t.leaf(twice * size, self.w)] if copied else [] for size in sizes)
        a = t.op(x, elements=rows * twice * rank, saves=[x, *A], weights=[self.added(sizes[0])])
        return t.op(y, a, view=True, alias=True, saves=[a, *B], weights=[self.added(sizes[1])])

    def _folded(self, x: Value, linear: Linear, rank: int) -> Value:
        t, sizes = self.tape, (rank * linear.inputs, rank * linear.outputs)
        factors = [t.leaf(2 * size, self.w) for size in sizes] if self.method.pissa else []
        w = t.op(elements=linear.weights, width=self.w, weights=[self.added(size) for size in sizes], saves=factors)
        if self.method.dora:  # each row with its length, in fp32
            w = self._of_length(w, linear)
        saves = [x, w] if x.node else [x]
        return t.op(x, w, elements=self.n * linear.outputs, saves=saves)

    def _of_length(self, y: Value, linear: Linear) -> Value:
        """Our DoRA: m/norm · y in fp32, rounded once. m/norm and the norm, a number an output, are kept with y."""
        t, fp32 = self.tape, 4 * y.elements
        kept = [y, *(t.leaf(linear.outputs, 4) for _ in range(2))]
        y = t.op(y, width=4, saves=kept, weights=[self.length(linear)], back=fp32)
        return self.cast(y, self.w)

    def length(self, linear: Linear) -> Weight:
        """DoRA's magnitude: fp32, whatever A and B are."""
        return Weight(linear.outputs * 4, placed=self.flat)

    def _with_magnitude(self, y: Value, b: Value, linear: Linear) -> Value:
        """DoRA (Liu et al. 2024): (m/norm − 1)·Wx + m/norm·s·BAx, with the norm of W + s·BA, as PEFT computes it."""
        t = self.tape
        norm = (3 if self._quantized else 2) * linear.weights * self.w
        base = t.op(y, saves=[y], weights=[self.added(linear.outputs)], temp=norm)
        return t.op(base, t.op(b, saves=[b]), alias=True)

    def norm(self, x: Value, size: int) -> Value:
        """RMSNorm, computed in fp32 with every step a tensor; or LayerNorm, one operation."""
        t, kind, rows = self.tape, self.style.norm, x.elements // size
        if kind == "layer":
            return t.op(x, saves=[x, t.leaf(2 * rows, 4)], weights=self.trained(2 * size))
        if self.run.trainer:  # the input and a number a row are kept
            fp32 = 4 * x.elements
            kept = [x, t.leaf(rows, 4)]
            return t.op(x, saves=kept, weights=self.trained(size), temp=fp32, back=2 * fp32)
        wide = self.cast(x, 4)
        square = t.op(wide, saves=[wide], back=wide.elements * 4)
        mean = t.op(square, elements=rows)
        del square
        root = t.op(mean, saves_out=True)
        y = t.op(wide, root, saves=[wide, root], back=wide.elements * 4)
        del wide
        y = self.cast(y, self.w) if kind == "rms" else y
        return self.cast(t.op(y, saves=[y] if self.trains else [], weights=self.trained(size)), self.w)

    def activation(self, x: Value) -> Value:
        t = self.tape
        if self.style.activation == "gelu_new":  # written out in transformers: x³, tanh, and two products
            cube = t.op(x, saves=[x])
            inner = t.op(x, t.op(cube), alias=True)
            tanh = t.op(t.op(inner), saves_out=True)
            plus, half = t.op(tanh, alias=True), t.op(x)
            return t.op(half, plus, saves=[half, plus])
        return t.op(x, saves_out=True) if self.style.activation == "relu" else t.op(x, saves=[x])

    def gate(self, h: Value) -> Value:
        """activation(gate) · up, both in one tensor."""
        t, gate, up = self.tape, self.view(h, h.elements // 2), self.view(h, h.elements // 2)
        if not self.style.clamps:
            a = self.activation(gate)
            return t.op(a, up, saves=[a, up])
        gate, up = t.op(gate, saves=[gate]), t.op(up, saves=[up])
        share = t.op(t.op(gate), saves_out=True)  # gate · sigmoid(α · gate)
        a = t.op(gate, share, saves=[gate, share])
        up = t.op(up)
        return t.op(up, a, saves=[up, a])
