"""The parts of a block as operations on the tape: linears with adapters, norms, activations."""

from collections.abc import Mapping

from pipeline.calc.architecture import Architecture, Linear
from pipeline.calc.precision import precision
from pipeline.calc.settings import FinetuningMethod, TrainingConfig
from pipeline.calc.simulator.tape import Tape, Value, Weight

FOLD_BELOW = 2**16  # elements; our layers first add the LoRA update of smaller linears to W


class Ops:
    """Operations of one step. `name_prefix` is that of the block's linears; `trains`: its base weights are trained."""

    def __init__(
        self, model: Architecture, method: FinetuningMethod, run: TrainingConfig, ranks: Mapping[str, int]
    ) -> None:
        self.model, self.method, self.run, self.style = model, method, run, model.style
        self.tape, self._ranks = Tape(), ranks
        virtual = method.virtual_tokens if method.kind == "prompt" else 0
        self.n, self.w = run.tokens + virtual * run.virtual_places, run.width  # tokens of the step, bytes per element
        self.adapter = precision(run.adapter_precision).compute
        self._quantized = precision(run.precision).quantized
        self.flat = model.style.ours or run.trainer
        self.name_prefix, self.trains = "", method.kind == "full"

    def base_weight(self, parameters: int) -> Weight:
        """A trainable weight of the base."""
        return Weight(parameters * self.w, preallocated=self.flat)

    def adapter_weight(self, parameters: int) -> Weight:
        """A trainable weight of the adapter."""
        return Weight(parameters * self.adapter, preallocated=self.flat)

    def trained_weights(self, parameters: int) -> list[Weight]:
        return [self.base_weight(parameters)] if self.trains else []

    def cast(self, x: Value, width: int) -> Value:
        return x if x.width == width else self.tape.op(x, width=width)

    def view(self, x: Value, elements: int) -> Value:
        """A slice of a tensor, without a copy; in backward its gradient is padded with zeros to the size of x."""
        return self.tape.op(x, elements=elements, view=True)

    def linear(self, x: Value, linear: Linear) -> Value:
        """Wx + b, plus s·BAx with an adapter. A frozen W saves nothing; a trained W or A saves x."""
        rank = self._ranks.get(self.name_prefix + linear.name, 0)
        if rank and linear.weights < FOLD_BELOW and (self.flat or not self.method.dora):
            return self._fold(x, linear, rank)
        y = self._matmul(x, linear, self.n)
        if not rank:
            return y
        return self.with_low_rank(y, x, linear, rank, self.n)

    def with_low_rank(self, y: Value, x: Value, linear: Linear, rank: int, rows: int) -> Value:
        """y + s·BAx, for `rows` tokens."""
        if self.method.dora and self.flat:
            return self._scale_rows(self._add_low_rank_in_place(y, x, linear, rank, rows), linear)
        if self.run.trainer and not self.method.dora:
            return self._add_low_rank_in_place(y, x, linear, rank, rows)
        b = self._low_rank(x, linear, rank, rows)
        b = self._apply_magnitude(y, b, linear) if self.method.dora else b
        if b.width != y.width:  # 16-bit y + 32-bit update is 32-bit
            return self.cast(self.tape.op(y, b, width=b.width), y.width)
        return self.tape.op(y, b, alias=True)

    def grouped(self, x: Value, linear: Linear, rows: int) -> Value:
        """The product of `rows` tokens, each with the matrix of its expert."""
        y = self._matmul(x, linear, rows, bias=rows * linear.outputs * self.w if linear.bias else 0)
        rank = self._ranks.get(self.name_prefix + linear.name, 0)
        return self.with_low_rank(y, x, linear, rank, rows) if rank else y

    def _matmul(self, x: Value, linear: Linear, rows: int, bias: int = 0) -> Value:
        """Wx; a quantized W is dequantized to 16 bit for every product."""
        scratch = linear.weights * self.w if self._quantized else 0
        return self.tape.op(
            x,
            elements=rows * linear.outputs,
            saves=[x] if self.trains else [],
            weights=self.trained_weights(linear.parameters),
            temp=scratch + bias,
            back=scratch,
        )

    def _low_rank(self, x: Value, linear: Linear, rank: int, rows: int) -> Value:
        """s·BAx. Casts A and B to the dtype of x; or x to theirs, once per linear, as PEFT does."""
        t, of_inputs = self.tape, self.run.casts == "inputs"
        sizes = linear.experts * rank * linear.inputs, linear.experts * rank * linear.outputs
        copied = self.adapter != self.w and not of_inputs
        A, B = ([t.leaf(size, self.w)] if copied else [] for size in sizes)
        x = self.cast(x, self.adapter) if of_inputs else x
        a = t.op(x, elements=rows * rank, saves=[x, *A], weights=[self.adapter_weight(sizes[0])])
        a = a if of_inputs else t.op(a)
        b = t.op(a, elements=rows * linear.outputs, saves=[a, *B], weights=[self.adapter_weight(sizes[1])])
        return t.op(b) if of_inputs else b

    def _add_low_rank_in_place(self, y: Value, x: Value, linear: Linear, rank: int, rows: int) -> Value:
        """y += s·BAx; PiSSA's factors are stacked with their initial values."""
        t, sizes = self.tape, (linear.experts * rank * linear.inputs, linear.experts * rank * linear.outputs)
        copied, twice = self.adapter != self.w or self.method.pissa, 2 if self.method.pissa else 1
        A, B = ([t.leaf(twice * size, self.w)] if copied else [] for size in sizes)
        a = t.op(x, elements=rows * twice * rank, saves=[x, *A], weights=[self.adapter_weight(sizes[0])])
        return t.op(y, a, view=True, alias=True, saves=[a, *B], weights=[self.adapter_weight(sizes[1])])

    def _fold(self, x: Value, linear: Linear, rank: int) -> Value:
        """(W + s·BA)x."""
        t, sizes = self.tape, (rank * linear.inputs, rank * linear.outputs)
        factors = [t.leaf(2 * size, self.w) for size in sizes] if self.method.pissa else []
        w = t.op(
            elements=linear.weights, width=self.w, weights=[self.adapter_weight(size) for size in sizes], saves=factors
        )
        if self.method.dora:  # rows are rescaled in fp32
            w = self._scale_rows(w, linear)
        saves = [x, w] if x.node else [x]
        return t.op(x, w, elements=self.n * linear.outputs, saves=saves)

    def _scale_rows(self, y: Value, linear: Linear) -> Value:
        """Our DoRA: m/norm · y in fp32, rounded once. Saves y, m/norm and the norm, one number per output each."""
        t, fp32 = self.tape, 4 * y.elements
        saved = [y, *(t.leaf(linear.outputs, 4) for _ in range(2))]
        y = t.op(y, width=4, saves=saved, weights=[self.magnitude(linear)], back=fp32)
        return self.cast(y, self.w)

    def magnitude(self, linear: Linear) -> Weight:
        """DoRA's magnitude, always fp32."""
        return Weight(linear.outputs * 4, preallocated=self.flat)

    def _apply_magnitude(self, y: Value, b: Value, linear: Linear) -> Value:
        """DoRA (Liu et al. 2024): (m/norm − 1)·Wx + m/norm·s·BAx, with the norm of W + s·BA, as PEFT computes it."""
        t = self.tape
        norm = (3 if self._quantized else 2) * linear.weights * self.w
        base = t.op(y, saves=[y], weights=[self.adapter_weight(linear.outputs)], temp=norm)
        return t.op(base, t.op(b, saves=[b]), alias=True)

    def norm(self, x: Value, size: int) -> Value:
        """RMSNorm in fp32 with a tensor per operation, or LayerNorm as one operation."""
        t, kind, rows = self.tape, self.style.norm, x.elements // size
        if kind == "layer":
            return t.op(x, saves=[x, t.leaf(2 * rows, 4)], weights=self.trained_weights(2 * size))
        if self.run.trainer:  # saves the input and one number per row
            fp32 = 4 * x.elements
            saved = [x, t.leaf(rows, 4)]
            return t.op(x, saves=saved, weights=self.trained_weights(size), temp=fp32, back=2 * fp32)
        wide = self.cast(x, 4)
        square = t.op(wide, saves=[wide], back=wide.elements * 4)
        mean = t.op(square, elements=rows)
        del square
        root = t.op(mean, saves_out=True)
        y = t.op(wide, root, saves=[wide, root], back=wide.elements * 4)
        del wide
        y = self.cast(y, self.w) if kind == "rms" else y
        return self.cast(t.op(y, saves=[y] if self.trains else [], weights=self.trained_weights(size)), self.w)

    def activation(self, x: Value) -> Value:
        t = self.tape
        if self.style.activation == "gelu_new":  # separate operations in transformers: x³, tanh, two products
            cube = t.op(x, saves=[x])
            inner = t.op(x, t.op(cube), alias=True)
            tanh = t.op(t.op(inner), saves_out=True)
            plus, half = t.op(tanh, alias=True), t.op(x)
            return t.op(half, plus, saves=[half, plus])
        return t.op(x, saves_out=True) if self.style.activation == "relu" else t.op(x, saves=[x])

    def gate(self, h: Value) -> Value:
        """activation(gate) · up, for gate and up in one tensor."""
        t, gate, up = self.tape, self.view(h, h.elements // 2), self.view(h, h.elements // 2)
        if not self.style.clamps:
            a = self.activation(gate)
            return t.op(a, up, saves=[a, up])
        gate, up = t.op(gate, saves=[gate]), t.op(up, saves=[up])
        share = t.op(t.op(gate), saves_out=True)  # gate · sigmoid(α · gate)
        a = t.op(gate, share, saves=[gate, share])
        up = t.op(up)
        return t.op(up, a, saves=[up, a])
