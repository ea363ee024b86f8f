"""LoRA steps on packed sequences against the same steps on batches that are padded to their longest
sequence.

Model, adapter, kernels and loss are this project's on all sides: only the layout of a batch
differs. The model is that of bench/real.py.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from bench.measure import Row, in_turns
from bench.real import THREADS, base
from bench.real_sides import BATCH, Ours, encoded
from pipeline.data.examples import IGNORED, Window
from pipeline.data.windows import as_window
from pipeline.training.batches import Batch, collate
from pipeline.training.step import loss_of

ROUNDS = 3


def packing() -> Iterator[Row]:
    """Forward and backward of 32 examples of 12 to 300 tokens, in batches of 8."""
    torch.set_num_threads(THREADS)
    with base() as (folder, name):
        side = Ours(folder)
    windows = [as_window(encoded(example)) for example in side.train]
    groups = [windows[start : start + BATCH] for start in range(0, len(windows), BATCH)]
    layouts = {
        "packed": [collate(group) for group in groups],
        "padded": [padded(group) for group in groups],
        "one by one": [collate([window]) for window in windows],
    }
    tokens = {
        layout: sum(batch.ids.numel() for batch in batches) for layout, batches in layouts.items()
    }
    times = in_turns({layout: passes(side, batches) for layout, batches in layouts.items()}, ROUNDS)
    for layout in ("padded", "one by one"):
        what = f"LoRA epoch, packed, {name}, {tokens['packed']:,} tokens"
        ratio = times[layout] / times["packed"]
        yield Row(
            what,
            times["packed"],
            f"{layout}, {tokens[layout]:,} tokens",
            ratio,
            "at least 1 ×",
            ratio >= 1,
        )


def padded(group: Sequence[Window]) -> Batch:
    """(B, T) with T the longest. Attention is causal and padding comes last, so no label sees any
    of it.
    """
    length = max(len(window.ids) for window in group)
    ids = torch.tensor([[*window.ids, *[0] * (length - len(window.ids))] for window in group])
    labels = torch.tensor(
        [[*window.labels, *[IGNORED] * (length - len(window.ids))] for window in group]
    ).flatten()
    index = (labels != IGNORED).nonzero().flatten()
    return Batch(ids, torch.arange(length).expand(len(group), -1), labels[index], index)


def passes(side: Ours, batches: Sequence[Batch]) -> Callable[[], None]:
    """One forward and backward pass per batch."""

    def run() -> None:
        for batch in batches:
            loss_of(side.model, batch).backward()  # type: ignore[no-untyped-call]

    return run
