"""LoRA Without Regret (Schulman et al., Thinking Machines Lab 2025, thinkingmachines.ai/blog/lora).

The document does not cite it; §5's advice on learning rate, rank and targets is what it measures on
large models. Each quote is a statement of the post in short, measured on the base of the project:
MiniGPT, or an imported one.
"""

from itertools import pairwise

from lab.claims import Chapter, Result, at_most, between
from lab.claims.sources import Record, Sources, n, times

chapter = Chapter()
BEST, ALL = "learning_rate/best", "all-linear"
STEP = "3.4 ×"  # between two rates that are tried: 1, 3, 10, …


def _adapters(m: Sources) -> list[Record]:
    """The best of each rank on all linears."""
    return m.rows(BEST, rank=tuple(m.column(BEST, "rank", targets=ALL)), targets=ALL)


def _rate(row: Record) -> str:
    return f"{row.learning_rate:g}{' (the last one tried on its side)' if row['at_edge'] else ''}"


with chapter.section("LoRA Without Regret") as claim:

    @claim(
        "LoRA's best learning rate is about 10 times that of full fine-tuning, up to 15 times in "
        "short runs",
        between("5 ×", "20 ×"),
        words="about 10 ×",
    )
    def regret_ten_times(m: Sources) -> Result:
        full, adapters = m.of_any_base.row(BEST, targets="full"), _adapters(m.of_any_base)
        ratios = {f"rank {row.rank}": row.learning_rate / full.learning_rate for row in adapters}
        rates = ", ".join(f"{_rate(row)} at rank {row.rank}" for row in adapters)
        return (
            ratios,
            f"the best of the rates tried: {_rate(full)} in full; LoRA {rates}; those tried are "
            "about 3 × apart",
        )

    @claim(
        "the best learning rate hardly depends on the rank",
        at_most(STEP),
        words="hardly: at most one step of rates",
    )
    def regret_rank_independent(m: Sources) -> Result:
        adapters = _adapters(m.of_any_base)
        rates = [row.learning_rate for row in adapters]
        return {
            "all ranks": max(rates) / min(rates),
            "without the lowest rank": max(rates[1:]) / min(rates[1:]),
        }, "the highest to the lowest of " + ", ".join(
            f"{_rate(row)} at rank {row.rank}" for row in adapters
        )

    @claim(
        "LoRA on attention alone learns less than on the feed-forward layers with as many "
        "parameters",
        True,
    )
    def regret_feed_forward(m: Sources) -> Result:
        attention, forward = m.of_any_base.rows(BEST, targets=("attention", "feed_forward"))
        return {
            "in the mean": forward.loss < attention.loss,
            "beyond the spread over seeds": forward.loss.high < attention.loss.low,
        }, (
            f"evaluation loss {n(attention.loss)} on attention with {n(attention.trained)} "
            f"parameters, {n(forward.loss)} on feed-forward with {n(forward.trained)}"
        )

    @claim(
        "on a small data set LoRA reaches the loss of full fine-tuning",
        at_most(0.05),
        words="reaches: within 0.05 nats",
    )
    def regret_like_full(m: Sources) -> Result:
        full, adapters = m.of_any_base.row(BEST, targets="full"), _adapters(m.of_any_base)
        above = {f"rank {row.rank}": row.loss - full.loss for row in adapters}
        losses = ", ".join(f"{n(row.loss)} at rank {row.rank}" for row in adapters)
        return above, f"nats per token above it: {n(full.loss)} in full; LoRA {losses}"

    @claim("at its best learning rate a higher rank is never worse", True)
    def regret_higher_rank(m: Sources) -> Result:
        adapters = _adapters(m.of_any_base)
        share = times(adapters[0].loss / adapters[-1].loss)
        return {f"rank {b.rank} to {a.rank}": b.loss <= a.loss for a, b in pairwise(adapters)}, (
            f"the loss of the lowest rank is {share} that of the highest, in the mean of the seeds"
        )
