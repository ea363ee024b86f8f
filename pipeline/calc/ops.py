"""Operations of a training step on the tape, of which blocks and fine-tuning methods are made.

Each follows what transformers, and this project's own layers, save for backward and copy.
"""

from pipeline.calc.architecture import Architecture, Linear
from pipeline.calc.settings import TrainingConfig, precision
from pipeline.calc.tape import Tape, Value, Weight


class Ops:
    """Operations of one step of N tokens (`n`, virtual tokens included) with activations of `w` bytes.

    `adapter`: bytes of an adapter's parameter; `trains`: whether the base weights at hand get gradients; `flat`:
    gradients are added to one buffer that is allocated before the step.
    """

    def __init__(self, model: Architecture, run: TrainingConfig, virtual: int = 0) -> None:
        self.model, self.run, self.style = model, run, model.style
        self.tape = Tape()
        self.n, self.w = run.tokens + virtual * run.virtual_places, run.width
        self.adapter = precision(run.adapter_precision).compute
        self.quantized = precision(run.precision).quantized
        self.flat = model.style.ours or run.trainer
        self.trains = False
        self._shared: dict[str, Weight] = {}

    # weights that train

    def base_weight(self, parameters: int) -> Weight:
        """A trainable weight of the base."""
        return Weight(parameters * self.w, preallocated=self.flat)

    def adapter_weight(self, parameters: int, shared: str = "") -> Weight:
        """A trainable weight of the adapter. With a name in `shared`, the same one at each call, as for tied tables."""
        weight = Weight(parameters * self.adapter, preallocated=self.flat)
        return self._shared.setdefault(shared, weight) if shared else weight

    def fp32_weight(self, parameters: int) -> Weight:
        """A trainable weight of the adapter that our layers keep in fp32."""
        return Weight(parameters * 4, preallocated=self.flat)

    def trained_weights(self, parameters: int) -> list[Weight]:
        """A weight of the base, if those at hand train."""
        return [self.base_weight(parameters)] if self.trains else []

    # parts of a block

    def cast(self, x: Value, width: int) -> Value:
        return x if x.width == width else self.tape.op(x, width=width)

    def view(self, x: Value, elements: int) -> Value:
        """A slice of a tensor, without a copy; in backward its gradient is padded with zeros to the size of x."""
        return self.tape.op(x, elements=elements, view=True)

    def matmul(self, x: Value, linear: Linear, rows: int, bias: int = 0) -> Value:
        """Wx (rows, O) of x (rows, I). A frozen W saves nothing, a trained one saves x."""
        # a quantized W is dequantized to 16 bit for every product, in forward and in backward
        scratch = linear.weights * self.w if self.quantized else 0
        return self.tape.op(
            x,
            elements=rows * linear.outputs,
            saves=[x] if self.trains else [],
            weights=self.trained_weights(linear.parameters),
            temp=scratch + bias,
            back=scratch,
        )

    def norm(self, x: Value, size: int) -> Value:
        """RMSNorm in fp32 with a tensor per operation, or LayerNorm as one operation; `size`: width of a row."""
        t, kind, rows = self.tape, self.style.norm, x.elements // size
        if kind == "layer":  # saves mean and 1/σ of each row
            return t.op(x, saves=[x, t.leaf(2 * rows, 4)], weights=self.trained_weights(2 * size))
        if self.run.trainer:  # our kernel saves the input and one number per row, and computes in fp32 beside it
            fp32 = 4 * x.elements
            saved = [x, t.leaf(rows, 4)]
            return t.op(x, saves=saved, weights=self.trained_weights(size), temp=fp32, back=2 * fp32)
        wide = self.cast(x, 4)
        square = t.op(wide, saves=[wide], back=wide.elements * 4)
        mean = t.op(square, elements=rows)
        del square  # freed before 1/σ is computed, as in transformers, where no variable refers to it
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
        """activation(gate) · up, for gate and up in one tensor (N, 2·I)."""
        t, gate, up = self.tape, self.view(h, h.elements // 2), self.view(h, h.elements // 2)
        if not self.style.clamps:
            a = self.activation(gate)
            return t.op(a, up, saves=[a, up])
        gate, up = t.op(gate, saves=[gate]), t.op(up, saves=[up])
        share = t.op(t.op(gate), saves_out=True)  # gate · sigmoid(α · gate)
        a = t.op(gate, share, saves=[gate, share])
        up = t.op(up)  # up + 1
        return t.op(up, a, saves=[up, a])
