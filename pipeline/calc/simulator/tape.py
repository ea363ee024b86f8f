"""A step's tensors by size alone: allocated, saved for backward and freed in the order in which PyTorch does it.

An autograd engine without numbers. A program of operations runs forward as Python; what its variables hold is
alive, what an operation saves for backward stays alive until its turn in `backward`, and the tape adds up the bytes
that are alive, by kind, and remembers the moment of the peak. A step is predicted in milliseconds; the same step traced
with PyTorch's fake tensors takes seconds.
"""

from collections import Counter
from collections.abc import Callable, Sequence

ROUNDING = 512  # bytes: what CUDA's caching allocator rounds a tensor up to


class Storage:
    """Bytes that are alive as long as something holds this object."""

    __slots__ = ("_tape", "bytes", "kind")

    def __init__(self, tape: "Tape", size: int, kind: str) -> None:
        self._tape, self.kind = tape, kind
        self.bytes = -(-size // ROUNDING) * ROUNDING
        tape.grow(kind, self.bytes)

    def __del__(self) -> None:
        self._tape.live[self.kind] -= self.bytes


class Value:
    """A tensor: `elements` numbers of `width` bytes, and the node that made it if a gradient flows back through it."""

    __slots__ = ("elements", "node", "storage", "width")

    def __init__(self, storage: Storage, elements: int, width: int, node: "Node | None") -> None:
        self.storage, self.elements, self.width, self.node = storage, elements, width, node


class Node:
    """One operation on the way back: what it saved, and the nodes of its inputs with their gradients' bytes."""

    __slots__ = ("again", "alias", "back", "grad", "inputs", "kind", "phase", "saved", "skipped", "weights")

    def __init__(
        self, phase: str, kind: str, inputs: list[tuple["Node", int]], saved: list[Storage], weights: list["Weight"]
    ) -> None:
        self.phase, self.kind, self.inputs, self.saved, self.weights = phase, kind, inputs, saved, weights
        self.back = 0  # bytes that its backward allocates for its own use
        self.alias = False  # the gradient is handed on as it is
        self.skipped = False  # it stands for several blocks
        self.grad: Storage | None = None
        self.again: Callable[[Node | None], Value] | None = None  # a checkpointed block's forward


class Weight:
    """A trainable weight: its gradient, `bytes` large, is allocated in backward and stays.

    `placed`: there is a place that gradients are added into, so that each is needed for a moment only; where a weight
    is used twice, the first waits for the second.
    """

    __slots__ = ("bytes", "grad", "placed", "uses")

    def __init__(self, size: int, placed: bool = False) -> None:
        self.bytes, self.placed, self.uses = size, placed, 0
        self.grad: Storage | None = None


class Tape:
    """What is alive now, by kind; and at the peak, with the phase that it fell into."""

    def __init__(self) -> None:
        self.live: Counter[str] = Counter()
        self.peak, self.at_peak, self.peak_phase = -1, dict[str, int](), ""
        self.phase, self.kind = "", "activations"
        self._nodes: list[Node] = []
        self._recording = True
        self._kept: list[Weight] = []
        self._in_place = False

    def grow(self, kind: str, size: int) -> None:
        self.live[kind] += size
        now = sum(self.live.values())
        if now > self.peak:
            self.peak, self.at_peak, self.peak_phase = now, dict(self.live), self.phase

    def leaf(self, elements: int, width: int) -> Value:
        """A tensor that no operation made and that needs no gradient."""
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
        """An operation on `inputs`. Its output has the first input's size where none is given.

        `saves`: what backward needs; `temp`, `back`: bytes it allocates meanwhile, forward and backward;
        `alias`: its gradient is the inputs' gradient; `view`: its output is the first input's storage.
        """
        elements = inputs[0].elements if elements is None else elements
        width = inputs[0].width if width is None else width
        working = Storage(self, temp, self.kind) if temp else None
        storage = inputs[0].storage if view else Storage(self, elements * width, self.kind)
        del working
        wanted = [(i.node, i.elements * i.width) for i in inputs if i.node is not None]
        if not (self._recording and (wanted or weights)):
            return Value(storage, elements, width, None)
        node = self._record(wanted, [value.storage for value in saves] + [storage] * saves_out, weights)
        node.back, node.alias = back, alias
        return Value(storage, elements, width, node)

    def _record(self, inputs: list[tuple[Node, int]], saved: list[Storage], weights: Sequence[Weight] = ()) -> Node:
        node = Node(self.phase, self.kind, inputs, saved, list(weights))
        self._nodes.append(node)
        for weight in weights:
            weight.uses += 1
        return node

    def checkpoint(self, x: Value, forward: Callable[[Value], Value]) -> Value:
        """`forward(x)` that keeps x alone, and runs a second time in backward."""
        self._recording = False
        out = forward(x)
        self._recording = True
        node = self._record([(x.node, x.elements * x.width)] if x.node else [], [x.storage])
        storage, elements, width = x.storage, x.elements, x.width
        node.again = lambda inner: forward(Value(storage, elements, width, inner))
        return Value(out.storage, out.elements, out.width, node)

    def differentiate(self, x: Value, forward: Callable[[Value], Value]) -> None:
        """`forward(x)` and its way back at once, in forward: x gets no gradient, the weights get theirs, in place."""
        mark = len(self._nodes)
        inner = self._record([], [])
        out = forward(Value(x.storage, x.elements, x.width, inner))
        assert out.node is not None
        out.node.grad = Storage(self, 0, self.kind)
        del out
        self._in_place = True
        self._back(mark + 1)
        self._in_place = False
        self._nodes.pop()

    def handed_over(self) -> list[Value]:
        """Gradients that were taken in forward and have a place: alive until backward adds them there."""
        placed = [w for w in self._kept if w.placed and w.grad is not None and not w.uses]
        values = [Value(weight.grad, 0, 0, None) for weight in placed if weight.grad is not None]
        self._kept = [weight for weight in self._kept if weight not in placed]
        for weight in placed:
            weight.grad = None
        return values

    def skip(self, x: Value, kept: dict[str, int], gradients: int) -> Value:
        """Blocks like those before it that are not run one by one: what they keep, the gradients they leave."""
        if x.node is None and not gradients:  # no gradient comes so far down
            return x
        saved = [Storage(self, size, kind) for kind, size in kept.items() if size > 0]
        node = self._record([(x.node, 0)] if x.node else [], saved, [Weight(gradients)])
        node.alias = node.skipped = True
        return Value(x.storage, x.elements, x.width, node)

    def backward(self, out: Value) -> None:
        """From `out` to every weight."""
        if out.node is not None:
            out.node.grad = Storage(self, 0, self.kind)
        self._back(0)

    def _back(self, stop: int) -> None:
        while len(self._nodes) > stop:
            node = self._nodes.pop()
            if node.grad is None:
                continue
            self.phase, self.kind = node.phase.replace("forward", "backward"), node.kind
            if node.again is not None:
                self._replay(node)
            self._pass_on(node)

    def _replay(self, node: Node) -> None:
        """A checkpointed block: forward again, now recorded, then backward through it to its input."""
        assert node.again is not None
        mark = len(self._nodes)
        self.phase = node.phase.replace("forward", "recomputing")
        inner = self._record([], [])
        out = node.again(inner if node.inputs else None)
        assert out.node is not None
        out.node.grad, node.grad = node.grad, None
        del out
        self._back(mark + 1)
        self._nodes.pop()
        node.grad, node.alias = inner.grad, True

    def _pass_on(self, node: Node) -> None:
        working = Storage(self, node.back, node.kind) if node.back else None
        grad, node.grad = node.grad, None
        for target, size in node.inputs:
            share = grad if node.alias else Storage(self, size, node.kind)
            # a second gradient for one tensor is added to the first: three are alive for a moment
            target.grad = share if target.grad is None or share is None else Storage(self, share.bytes, node.kind)
        if node.skipped:  # block after block: what one saved is gone before the next one's gradients come
            node.saved.clear()
        for weight in node.weights:
            self._add(weight)
        node.saved.clear()
        node.inputs.clear()
        del grad, working

    def _add(self, weight: Weight) -> None:
        fresh = Storage(self, weight.bytes, "gradients")
        weight.uses -= 1
        if weight.placed and not self._in_place:
            if weight.uses:
                weight.grad = weight.grad or fresh
            elif weight.grad is not None:
                fresh = Storage(self, weight.bytes, "gradients")  # the sum, while both shares are alive
                weight.grad = None
            return
        if weight.grad is not None and not self._in_place:
            fresh = Storage(self, weight.bytes, "gradients")  # the sum, while both shares are alive
            weight.grad = fresh
        weight.grad = weight.grad or fresh
        self._kept.append(weight)
