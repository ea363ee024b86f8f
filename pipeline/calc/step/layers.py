"""The linears of a model with a method's adapters, and what its blocks share during a step."""

from pipeline.calc.architecture import Architecture, Linear
from pipeline.calc.method import FinetuningMethod, ranks
from pipeline.calc.settings import TrainingConfig
from pipeline.calc.tape import Ops, Value

BLOCK = 128  # queries of a product of attention to short sequences


class Layers(Ops):
    """Operations of a step, in which every adapted linear runs as its method does it."""

    def __init__(self, model: Architecture, method: FinetuningMethod, run: TrainingConfig) -> None:
        super().__init__(model, run, method.positions)
        self.method, self.ranks = method, ranks(model, method)
        self.name_prefix = ""  # of the linears of the current block
        # size of a head → cos and sin of the rotary positions, (T, K) each
        self.tables: dict[int, list[Value]] = {}
        # all attention scores are in memory: by setting, or because there is no fused kernel
        self.eager = run.attention == "eager" or self.style.eager_only
        # weights per head that short attention saves
        self.scores = run.scores or self.n * run.attended
        rows = min(run.batch, run.rows)
        # weights per head of its largest product; packed sequences shorter than a block share one
        self.product = min(self.scores, rows * BLOCK * max(BLOCK, run.attended))

    def rank_of(self, linear: Linear) -> int:
        """Rank of a linear of the current block; 0 if it is not adapted."""
        return self.ranks.get(self.name_prefix + linear.name, 0)

    def linear(self, x: Value, linear: Linear) -> Value:
        """Wx + b (N, O), with the method's adapter."""
        rank = self.rank_of(linear)
        folded = self.method.fold(self, x, linear, rank) if rank else None
        if folded is not None:
            return folded
        y = self.matmul(x, linear, self.n)
        return self.method.adapt(self, y, x, linear, rank, self.n) if rank else y

    def grouped(self, x: Value, linear: Linear, rows: int) -> Value:
        """The product of `rows` tokens, each with the matrix of its expert."""
        # the bias of each token's expert is copied to a row of its own
        bias = rows * linear.outputs * self.w if linear.bias else 0
        y = self.matmul(x, linear, rows, bias)
        rank = self.rank_of(linear)
        return self.method.adapt(self, y, x, linear, rank, rows) if rank else y

    def unknown(self, x: Value, linears: tuple[Linear, ...]) -> Value:
        """Linears known by their shapes alone, in sequence; those as wide as the block read x."""
        y = x
        for linear in linears:
            if linear.inputs == self.model.hidden:
                y = self.linear(x, linear)
            else:
                resized = self.tape.op(y, elements=self.n * linear.inputs, saves=[y])
                y = self.linear(resized, linear)
                del resized
        return y if y.elements == x.elements else self.tape.op(y, elements=x.elements)
