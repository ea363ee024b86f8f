"""The benchmarks on MiniGPT, in a few steps: they call what the trainer is made of, and nothing else runs them."""

from collections.abc import Callable, Iterator

import pytest
import torch

from bench import methods, sweep, training
from bench.measure import Row


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two steps a turn, one turn, and the threads that were there before."""
    for module, turns in ((methods, "ROUNDS"), (sweep, "TURNS"), (training, "ROUNDS")):
        monkeypatch.setattr(module, "STEPS", 2)
        monkeypatch.setattr(module, turns, 1)
    monkeypatch.setattr(sweep, "SMALL", (1, 3))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("benchmark", "rows"),
    [
        (training.training, len(training.GOALS)),
        (methods.methods, 2 * len(methods.METHODS)),  # time and memory
        (sweep._small, 2 * 2),  # against one adapter, and against PEFT
    ],
)
def test_every_row_is_measured(benchmark: Callable[[], Iterator[Row]], rows: int) -> None:
    measured = list(benchmark())
    assert len(measured) == rows
    assert all(row.ratio and row.ratio > 0 for row in measured)
