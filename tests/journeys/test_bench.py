"""The benchmarks on MiniGPT, in a few steps: they call what the trainer is made of, and nothing
else runs them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from bench import compress, methods, packing, real, sweep, training
from bench.measure import Row
from bench.peers import PaddingFree, TrlPaddingFree
from bench.real_sides import BATCH, encoded
from pipeline.data.windows import as_window
from pipeline.models.transformers_model import load_pretrained
from pipeline.training.batches import collate
from pipeline.training.step import loss_of
from tests.helpers.bases import toy_checkpoint


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


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A checkpoint for the sides of bench/real.py."""
    toy_checkpoint(tmp_path / "toy", vocab_size=1500, max_position_embeddings=512)
    return tmp_path / "toy"


@contextmanager
def in_this_process(kind: Callable[[Path], object], folder: Path) -> Iterator[object]:
    yield kind(folder)


def ask(side: object, order: str) -> float:
    result: float = getattr(side, order)()
    return result


@pytest.mark.slow
def test_an_epoch_is_compared_with_every_peer_and_all_losses_agree(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_BENCH_BASE", str(toy))
    monkeypatch.setattr(real, "ROUNDS", 1)
    monkeypatch.setattr(real, "side", in_this_process)
    monkeypatch.setattr(real, "ask", ask)
    rows = list(real.real())
    count = len(real.PEERS)
    # times, the matrix products' share, memory and loss of each, generation
    assert len(rows) == count + 1 + 2 * count + 1
    assert all(peer.name in row.reference for peer, row in zip(real.PEERS, rows, strict=False))
    losses = [row for row in rows if row.goal == "within 1%"]
    assert len(losses) == count and all(row.met for row in losses)


@pytest.mark.parametrize("peer", [PaddingFree, TrlPaddingFree])
@pytest.mark.slow
def test_a_peer_without_padding_has_the_loss_of_its_examples_by_themselves(
    toy: Path, peer: type[PaddingFree | TrlPaddingFree]
) -> None:
    side = peer(toy)
    side.model.float().eval()
    group = side.train[:BATCH]
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in group]
    trainer = side.trainer()
    together = trainer.compute_loss(side.model, trainer.data_collator(rows))
    total, count = torch.tensor(0.0), 0
    for ids, labels in group:
        targets = torch.tensor(labels[1:])
        total += F.cross_entropy(side.logits(torch.tensor([ids]))[:-1], targets, reduction="sum")
        count += int((targets != -100).sum())
    assert_close(together, total / count, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_compressing_damping_and_combining_have_a_table_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_checkpoint(tmp_path / "toy", max_position_embeddings=128)
    monkeypatch.setenv("LORA_BENCH_BASE", str(tmp_path / "toy"))
    for name, value in (
        ("TRAINED", 16),
        ("HELD_OUT", 4),
        ("EPOCHS", 1),
        ("EPSILON", 1.0),
        ("HIGH", compress.LEARNING_RATE),
    ):
        monkeypatch.setattr(compress, name, value)
    compress.main()
    tables = [
        block.splitlines()
        for block in capsys.readouterr().out.split("\n\n")
        if block.startswith("|")
    ]
    assert [len(rows) - 2 for rows in tables] == [12, 5, 10]
    assert all(len({row.count("|") for row in rows}) == 1 for rows in tables)
    same, removed = tables[1][2].split("|")[2:], tables[1][-1].split("|")[2:]
    # at factor 1 it is the adapter as trained
    assert tables[0][4].split("|")[4:7] == same[:3] != removed[:3]


def test_a_padded_batch_has_the_loss_of_a_packed_one(tmp_path: Path) -> None:
    toy_checkpoint(tmp_path / "toy", max_position_embeddings=128)
    model = load_pretrained(tmp_path / "toy", torch.float32)
    group = [
        as_window(encoded(([*range(1, length)], [-100] * 3 + [*range(4, length)])))
        for length in (9, 30, 17)
    ]
    packed, padded = collate(group), packing.padded(group)
    assert packed.ids.numel() == 7 + 28 + 15 and padded.ids.shape == (3, 28)
    assert_close(loss_of(model, padded), loss_of(model, packed), rtol=1e-5, atol=1e-6)
