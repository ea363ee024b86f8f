"""The loop against plain torch on the stock model, and what it leaves on the disk."""

import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from pipeline.data import IGNORED, Window, read_examples, windows
from pipeline.errors import UserError
from pipeline.metrics import COLUMNS, Step, epoch_means, flat_from, read_steps
from pipeline.models.base import load_base
from pipeline.params import Training
from pipeline.runner import Note, Progress
from pipeline.training.batches import Batches
from pipeline.training.loop import steps
from pipeline.training.optimizer import FlatAdam
from tests.support import BRIEF, ROOT, make, make_one


def test_training_is_that_of_plain_adam_on_the_stock_model(brief: Path) -> None:
    """Thirty steps of full fine-tuning: the same losses and gradient norms as transformers and torch.optim.Adam."""
    folder = brief / "artifacts/expanded"
    ours, tokenizer = load_base(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    theirs.model.decoder.embed_positions.requires_grad_(False)
    settings = Training(epochs=5)
    examples = read_examples(ROOT / "data/finetune.de.txt", "f")
    batches = Batches([w for e in examples for w in windows(tokenizer.encode_example(e, 32), 4)], 4, 0, 0)
    adam = torch.optim.Adam([p for p in theirs.parameters() if p.requires_grad], lr=settings.learning_rate)
    for record in steps(ours, batches, FlatAdam(ours, settings.learning_rate), settings):
        batch = batches[record.step - 1]
        adam.zero_grad()
        logits = theirs(input_ids=batch.ids, position_ids=batch.positions).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)
        torch.autograd.backward(loss)
        norm = torch.nn.utils.get_total_norm([p.grad for p in theirs.parameters() if p.grad is not None])
        adam.step()
        assert record.loss == pytest.approx(loss.item(), rel=1e-3)
        assert record.grad_norm == pytest.approx(float(norm), rel=1e-3)
    assert record.step == 5 * len(batches)


lengths = st.lists(st.integers(1, 5), min_size=1, max_size=20)


@given(lengths, st.integers(1, 7), st.integers(0, 3))
def test_an_epoch_holds_every_window_once_padded_only_where_nothing_counts(
    sizes: list[int], batch_size: int, seed: int
) -> None:
    cut = [Window(i, tuple(range(10, 10 + n)), tuple(range(11, 11 + n))) for i, n in enumerate(sizes)]
    batches = Batches(cut, batch_size, seed, pad_id=0)
    assert len(batches) == math.ceil(len(sizes) / batch_size)
    for epoch in (0, 2):
        seen = []
        for index in range(len(batches)):
            batch = batches[epoch * len(batches) + index]
            counted = batch.labels != IGNORED
            assert int(counted.sum()) == batch.tokens
            for row in range(len(batch.ids)):
                n = int(counted[row].sum())
                assert counted[row, :n].all()
                start = int(batch.positions[row, 0])
                seen.append(start)
                assert batch.ids[row, :n].tolist() == list(range(10, 10 + n))
                assert batch.labels[row, :n].tolist() == list(range(11, 11 + n))
                assert batch.positions[row, :n].tolist() == list(range(start, start + n))
        assert sorted(seen) == list(range(len(sizes)))


def test_batches_are_the_same_from_wherever_one_starts() -> None:
    cut = [Window(0, (i,), (i + 1,)) for i in range(10)]
    forward = [Batches(cut, 4, 7, 0)[step].ids.tolist() for step in range(9)]
    one = Batches(cut, 4, 7, 0)
    assert [one[step].ids.tolist() for step in reversed(range(9))] == forward[::-1]
    assert forward[:3] != forward[3:6], "epochs are shuffled anew"


def test_frozen_and_padded_rows_get_no_gradient(brief: Path) -> None:
    model, _ = load_base(brief / "artifacts/expanded")
    model.requires_grad_(False)
    model.embeddings.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = Batches([Window(0, (5, 6), (6, 7)), Window(0, (5,), (6,))], 2, 0, pad_id=0)
    for _ in steps(model, batches, FlatAdam(model, 1e-2), Training(epochs=3)):
        pass
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    name = "model.decoder.embed_tokens.weight"
    assert changed == {name}
    rows = (model.embeddings.weight != before[name]).any(dim=1).nonzero().flatten().tolist()
    assert rows == [5, 6], "the rows that were read, and not the pad's"


def test_a_loss_that_is_not_finite_stops_with_advice(project: Path) -> None:
    overrides = [*BRIEF, "finetune_full.learning_rate=1e30"]
    before = (project / "artifacts/full_finetuned/manifest.json").read_bytes()
    with pytest.raises(
        UserError, match=r"finetune_full: the loss is .* at step \d+. Lower finetune_full.learning_rate"
    ):
        make(project, ["finetune_full"], overrides)
    assert (project / "artifacts/full_finetuned/manifest.json").read_bytes() == before


def test_the_run_log_has_the_contracts_columns_and_every_step(finished: Path) -> None:
    for name, count in (("base", 900), ("full_finetuned", 300), ("lora_adapter", 300)):
        path = finished / "artifacts" / name / "loss.csv"
        assert path.read_text(encoding="utf-8").splitlines()[0] == "step,epoch,loss,learning_rate,grad_norm,tokens"
        found = read_steps(path)
        assert [step.step for step in found] == list(range(1, count + 1))
        assert all(later.tokens > earlier.tokens for earlier, later in pairwise(found))
    telemetry = (finished / "runs/finetune_lora/telemetry.csv").read_text(encoding="utf-8").splitlines()
    assert telemetry[0] == (
        "step,seconds,tokens_per_second,peak_memory_bytes,device,predicted_tensor_bytes,measured_tensor_bytes"
    )
    assert len(telemetry) == 301


def test_the_prediction_follows_every_choice_of_targets(project: Path) -> None:
    """Also names of one module, the head, and all-linear: what can be trained can be predicted."""
    for targets in (
        "lm_head",
        "[fc1, lm_head]",
        "model.decoder.layers.0.fc1",
        "decoder.layers.1.self_attn.q_proj",
        "all-linear",
    ):
        overrides = [*BRIEF, f"finetune_lora.target_modules={targets}", "finetune_lora.train_embeddings=none"]
        make(project, ["finetune_lora"], overrides)
        last = (project / "runs/finetune_lora/telemetry.csv").read_text(encoding="utf-8").splitlines()[-1]
        predicted, measured = map(int, last.split(",")[-2:])
        assert measured == pytest.approx(predicted, rel=0.05), targets


@pytest.mark.parametrize("stage", ["pretrain", "finetune_full", "finetune_freeze", "finetune_lora"])
def test_the_trainer_measures_what_the_calculator_predicts(finished: Path, stage: str) -> None:
    lines = (finished / "runs" / stage / "telemetry.csv").read_text(encoding="utf-8").splitlines()
    predicted, measured = map(int, lines[-1].split(",")[-2:])
    assert measured == pytest.approx(predicted, rel=0.03)


@given(st.integers(0, 200))
def test_a_log_is_read_up_to_its_last_whole_line(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.getbasetemp() / "loss.csv"
    text = ",".join(COLUMNS) + "\n" + "".join(f"{i},1,0.5,0.001,1.0,{i * 16}\n" for i in range(1, 6))
    path.write_text(text[:cut], encoding="utf-8")
    assert [step.step for step in read_steps(path)] == list(range(1, max(1, text[:cut].count("\n"))))


def curve(*means: float) -> list[Step]:
    return [Step(i, i, mean, 0.1, 1.0, i) for i, mean in enumerate(means, 1)]


def test_a_curve_is_flat_from_where_it_stays_near_its_end() -> None:
    assert flat_from(curve(10, 5, 1.2, 1.1, 1.0)) == 3
    assert flat_from(curve(10, 1, 5, 1.0, 1.0)) == 4
    assert flat_from(curve(10, 8, 6, 4, 2)) is None
    assert flat_from([]) is None
    assert epoch_means([Step(1, 1, 2.0, 0.1, 1, 1), Step(2, 1, 4.0, 0.1, 1, 2), Step(3, 2, 1.0, 0.1, 1, 3)]) == [3, 1]


def test_two_runs_give_the_same_bytes(project: Path) -> None:
    folder = project / "artifacts/lora_adapter"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    _, events = make_one(project, "finetune_lora", BRIEF, force=True)
    assert len([e for e in events if isinstance(e, Progress)]) == 12, "it was trained again: 2 epochs of 6 steps"
    notes = [e.text for e in events if isinstance(e, Note)]
    assert re.match(r"finetune_lora: [\d.]+ KiB of tensors predicted", notes[0])
    assert re.match(r"finetune_lora: [\d.]+ KiB of tensors measured", notes[1])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
