"""Simulates a step's memory: tensors, by size alone, are allocated, saved and freed.

An autograd engine without values. The forward pass runs as Python: a tensor is alive while a
variable refers to it, or until `backward` has used it if an operation saved it. The tape sums the
live bytes by kind and records the peak. A step takes milliseconds; tracing it with PyTorch's fake
tensors takes seconds.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.calc.architecture import Architecture, Linear
from pipeline.calc.settings import TrainingConfig, precision

ROUNDING = 512  # bytes: CUDA's caching allocator rounds tensors up to a multiple


class Storage:
    """Bytes that are alive as long as this object is referenced."""

    __slots__ = ("_tape", "bytes", "kind")

    def __init__(self, tape: "Tape", size: int, kind: str) -> None:
        self._tape, self.kind = tape, kind
        self.bytes = -(-size // ROUNDING) * ROUNDING  # rounded up
        tape.grow(kind, self.bytes)

    # CPython calls it when the last reference goes, which is when torch frees a tensor's storage
    def __del__(self) -> None:
        self._tape.live[self.kind] -= self.bytes


class Value:
    """A tensor of `elements` × `width` bytes, and its node if it needs a gradient."""

    __slots__ = ("elements", "node", "storage", "width")

    def __init__(self, storage: Storage, elements: int, width: int, node: "Node | None") -> None:
        self.storage, self.elements, self.width, self.node = storage, elements, width, node


@dataclass(eq=False, slots=True)
class Weight:
    """A trainable weight, whose gradient of `bytes` is allocated in backward and stays.

    `preallocated`: the gradient is added into an existing buffer and then freed. If the weight is
    used twice, the first gradient stays until the second.
    """

    bytes: int
    preallocated: bool = False
    uses: int = 0
    grad: Storage | None = None


@dataclass(eq=False, slots=True)
class Node:
    """An operation in the backward graph: what it saved, and its inputs' nodes and gradients."""

    phase: str
    kind: str
    inputs: list[tuple["Node", int]]
    saved: list[Storage]
    weights: Sequence[Weight]
    back: int = 0  # temporary bytes of its backward
    alias: bool = False  # the gradient is passed on without a copy
    skipped: bool = False  # stands for several blocks
    grad: Storage | None = None
    recompute: Callable[["Node | None"], Value] | None = None  # a checkpointed block's forward


class Tape:
    """Live bytes by kind, now and at the peak, with the phase of the peak."""

    def __init__(self) -> None:
        self.live: Counter[str] = Counter()
        self.peak, self.at_peak, self.peak_phase = -1, dict[str, int](), ""
        self.phase, self.kind = "", "activations"
        self._nodes: list[Node] = []
        self._recording = True
        self._with_gradient: list[Weight] = []
        self._in_place = False

    def grow(self, kind: str, size: int) -> None:
        self.live[kind] += size
        now = sum(self.live.values())
        if now > self.peak:
            self.peak, self.at_peak, self.peak_phase = now, dict(self.live), self.phase

    def leaf(self, elements: int, width: int) -> Value:
        """A new tensor that needs no gradient."""
        return Value(Storage(self, elements * width, self.kind), elements, width, None)

    def op(
        self,
        *inputs: Value,
        elements: int | None = None,
        width: int | None = None,
        saves: Sequence[Value] = (),
        saves_out: bool = False,
        weights: Sequence[Weight] = (),
        temp: int = 0,
        back: int = 0,
        alias: bool = False,
        view: bool = False,
    ) -> Value:
        """An operation on `inputs`, with the first input's size by default.

        `saves`: tensors kept for backward; `temp`, `back`: temporary bytes in forward and backward;
        `alias`: the inputs' gradient is the output's, without a copy; `view`: the output has the
        first input's storage.
        """
        elements = inputs[0].elements if elements is None else elements
        width = inputs[0].width if width is None else width
        # a kernel's workspace is alive while its output is allocated, and freed before the next
        # operation
        temporary = Storage(self, temp, self.kind) if temp else None
        storage = inputs[0].storage if view else Storage(self, elements * width, self.kind)
        del temporary
        differentiable = [(i.node, i.elements * i.width) for i in inputs if i.node is not None]
        if not (self._recording and (differentiable or weights)):
            return Value(storage, elements, width, None)
        node = self._record(
            differentiable, [value.storage for value in saves] + [storage] * saves_out, weights
        )
        node.back, node.alias = back, alias
        return Value(storage, elements, width, node)

    def _record(
        self, inputs: list[tuple[Node, int]], saved: list[Storage], weights: Sequence[Weight] = ()
    ) -> Node:
        node = Node(self.phase, self.kind, inputs, saved, weights)
        self._nodes.append(node)
        for weight in weights:
            weight.uses += 1
        return node

    def checkpoint(self, x: Value, forward: Callable[[Value], Value]) -> Value:
        """`forward(x)` that saves only x and is recomputed in backward."""
        self._recording = False  # as under torch.no_grad: the block's tensors are freed as it goes
        out = forward(x)
        self._recording = True
        node = self._record([(x.node, x.elements * x.width)] if x.node else [], [x.storage])
        storage, elements, width = x.storage, x.elements, x.width
        node.recompute = lambda inner: forward(Value(storage, elements, width, inner))
        return Value(out.storage, out.elements, out.width, node)

    def differentiate(self, x: Value, forward: Callable[[Value], Value]) -> None:
        """`forward(x)` and its backward at once: weights get gradients in place, x gets none."""
        mark = len(self._nodes)
        inner = self._record([], [])  # stands for x: the backward below ends here
        out = forward(Value(x.storage, x.elements, x.width, inner))
        assert out.node is not None
        out.node.grad = Storage(self, 0, self.kind)  # of a scalar
        del out
        self._in_place = True
        self._backward_until(mark + 1)
        self._in_place = False
        self._nodes.pop()

    def take_finished_gradients(self) -> list[Value]:
        """Gradients of `differentiate`, alive until backward adds them to their buffer."""
        finished = [
            w for w in self._with_gradient if w.preallocated and w.grad is not None and not w.uses
        ]
        values = [Value(weight.grad, 0, 0, None) for weight in finished if weight.grad is not None]
        self._with_gradient = [weight for weight in self._with_gradient if weight not in finished]
        for weight in finished:
            weight.grad = None
        return values

    def skip(self, x: Value, growth: dict[str, int], gradients: int) -> Value:
        """Stands for equal blocks that are not simulated: what they save, and their gradients."""
        if x.node is None and not gradients:  # no gradient flows this far
            return x
        saved = [Storage(self, size, kind) for kind, size in growth.items() if size > 0]
        node = self._record([(x.node, 0)] if x.node else [], saved, [Weight(gradients)])
        node.alias = node.skipped = True
        return Value(x.storage, x.elements, x.width, node)

    def backward(self, out: Value) -> None:
        """Backward from `out` to all weights."""
        if out.node is not None:
            out.node.grad = Storage(self, 0, self.kind)
        self._backward_until(0)

    def _backward_until(self, stop: int) -> None:
        # the last operation first: of the nodes that are ready, autograd takes the one made last
        while len(self._nodes) > stop:
            node = self._nodes.pop()
            if node.grad is None:  # no gradient arrived: the loss does not depend on it
                continue
            self.phase, self.kind = node.phase.replace("forward", "backward"), node.kind
            if node.recompute is not None:
                self._replay(node)
            self._propagate(node)

    def _replay(self, node: Node) -> None:
        """Recompute a checkpointed block with recording, then run its backward."""
        assert node.recompute is not None
        mark = len(self._nodes)
        self.phase = node.phase.replace("forward", "recomputing")
        inner = self._record([], [])
        out = node.recompute(inner if node.inputs else None)
        assert out.node is not None
        out.node.grad, node.grad = node.grad, None
        del out
        self._backward_until(mark + 1)
        self._nodes.pop()
        node.grad, node.alias = inner.grad, True  # the block's own backward made the gradient of x

    def _propagate(self, node: Node) -> None:
        """An operation's backward: gradients of inputs and weights; then what it saved is freed."""
        temporary = Storage(self, node.back, node.kind) if node.back else None
        grad, node.grad = node.grad, None
        # as autograd does: all inputs' gradients exist before the output's is freed
        for target, size in node.inputs:
            part = grad if node.alias else Storage(self, size, node.kind)
            # a second gradient is added to the first: both and the sum are alive for a moment
            target.grad = (
                part
                if target.grad is None or part is None
                else Storage(self, part.bytes, node.kind)
            )
        # blocks run one by one: their saved tensors are freed before the next gradients
        if node.skipped:
            node.saved.clear()
        for weight in node.weights:
            self._accumulate(weight)
        # by hand, at autograd's point: the caller's variable keeps the node for a moment longer
        node.saved.clear()
        node.inputs.clear()
        del grad, temporary

    def _accumulate(self, weight: Weight) -> None:
        """Add a share of a weight's gradient to its buffer, or to the first share."""
        share = Storage(self, weight.bytes, "gradients")
        weight.uses -= 1
        if weight.grad is None:
            weight.grad = share
        elif not self._in_place:
            # the sum, while both shares are alive
            weight.grad = Storage(self, weight.bytes, "gradients")
        if self._in_place or not weight.preallocated:
            self._with_gradient.append(weight)
        elif not weight.uses:
            weight.grad = None


class Ops:
    """Operations of one step of N tokens, of which blocks and fine-tuning methods are made.

    Each follows what transformers, and this project's own layers, save for backward and copy. They
    are not in `step/`, which imports `method.py`: `method.py` names them, and no two files import
    each other.

    `n`: tokens, virtual ones included; `w`: bytes of an activation; `adapter`: bytes of an
    adapter's parameter; `trains`: whether the base weights at hand get gradients; `flat`: gradients
    are added to one buffer that is allocated before the step.
    """

    def __init__(self, model: Architecture, run: TrainingConfig, virtual: int = 0) -> None:
        self.model, self.run, self.style = model, run, model.style
        self.tape = Tape()
        self.n, self.w = run.tokens + virtual * run.virtual_places, run.width
        self.adapter = precision(run.adapter_precision).compute
        self.quantized = precision(run.precision).quantized
        self.flat = model.style.ours or run.ours
        self.trains = False
        self._shared: dict[str, Weight] = {}

    # weights that train

    def base_weight(self, parameters: int) -> Weight:
        """A trainable weight of the base."""
        return Weight(parameters * self.w, preallocated=self.flat)

    def adapter_weight(self, parameters: int, shared: str = "") -> Weight:
        """A trainable weight of the adapter; the same at each call with one name in `shared`."""
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
        """A slice without a copy; in backward its gradient is padded to the size of x."""
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

    def norm(self, x: Value, size: int, weight: bool = True) -> Value:
        """RMSNorm in fp32, a tensor per operation, or LayerNorm as one; `size`: width of a row."""
        t, kind, rows = self.tape, self.style.norm, x.elements // size
        if kind == "layer":  # saves mean and 1/σ of each row
            return t.op(x, saves=[x, t.leaf(2 * rows, 4)], weights=self.trained_weights(2 * size))
        if self.run.ours and weight:
            # our kernel saves the input and one number per row, and computes in fp32 beside it
            fp32 = 0 if self.run.native else 4 * x.elements
            saved = [x, t.leaf(rows, 4)]
            return t.op(
                x, saves=saved, weights=self.trained_weights(size), temp=fp32, back=2 * fp32
            )
        wide = self.cast(x, 4)
        square = t.op(wide, saves=[wide], back=wide.elements * 4)
        mean = t.op(square, elements=rows)
        # freed before 1/σ is computed, as in transformers, where no variable refers to it
        del square
        root = t.op(mean, saves_out=True)
        y = t.op(wide, root, saves=[wide, root], back=wide.elements * 4)
        del wide
        if not weight:
            return self.cast(y, self.w)
        y = self.cast(y, self.w) if kind == "rms" else y
        return self.cast(
            t.op(y, saves=[y] if self.trains else [], weights=self.trained_weights(size)), self.w
        )

    def activation(self, x: Value) -> Value:
        t = self.tape
        # separate operations in transformers: x³, tanh, two products
        if self.style.activation == "gelu_new":
            cube = t.op(x, saves=[x])
            inner = t.op(x, t.op(cube), alias=True)
            tanh = t.op(t.op(inner), saves_out=True)
            plus, half = t.op(tanh, alias=True), t.op(x)
            return t.op(half, plus, saves=[half, plus])
        return t.op(x, saves_out=True) if self.style.activation == "relu" else t.op(x, saves=[x])

    def gate(self, h: Value) -> Value:
        """activation(gate) · up, for gate and up in one tensor (N, 2·I)."""
        t = self.tape
        gate, up = self.view(h, h.elements // 2), self.view(h, h.elements // 2)
        if not self.style.clamps:
            a = self.activation(gate)
            return t.op(a, up, saves=[a, up])
        gate, up = t.op(gate, saves=[gate]), t.op(up, saves=[up])
        share = t.op(t.op(gate), saves_out=True)  # gate · sigmoid(α · gate)
        a = t.op(gate, share, saves=[gate, share])
        up = t.op(up)  # up + 1
        return t.op(up, a, saves=[up, a])
