"""The loop against plain torch on the stock model, and the files it writes."""

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

from pipeline.data.examples import IGNORED, Window, cut_windows
from pipeline.data.formats import read_examples
from pipeline.data.masking import encode
from pipeline.data.windows import InMemoryDataset, as_window
from pipeline.errors import UserError
from pipeline.models.load import load_base
from pipeline.project.logs.run_log import COLUMNS, Step, epoch_means, flat_from, read_steps
from pipeline.project.params.sections import Training
from pipeline.project.runner import Progress
from pipeline.training.batches import Batch, Batches
from pipeline.training.optimizer import FlatOptimizer
from tests.helpers.projects import (
    BRIEF,
    METHODS,
    PIPELINE,
    ROOT,
    logged_memory,
    make,
    make_one,
    note_texts,
    section_overrides,
)
from tests.helpers.real import steps_of


def listed(cut: list[Window]) -> InMemoryDataset:
    return InMemoryDataset(cut, [f"f.txt:{number}" for number in range(1, len(cut) + 1)])


def test_training_is_that_of_plain_adam_on_the_stock_model(brief: Path) -> None:
    """Thirty steps of full fine-tuning: the same losses and gradient norms as transformers and
    torch.optim.Adam.
    """
    folder = brief / "artifacts/expanded"
    ours, tokenizer = load_base(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    theirs.model.decoder.embed_positions.requires_grad_(False)
    settings = Training(epochs=5)
    examples = read_examples(ROOT / "data/finetune.de.txt", "f")
    batches = Batches(
        listed([w for e in examples for w in cut_windows(as_window(encode(e, tokenizer)), 4)]), 4, 0
    )
    adam = torch.optim.Adam(
        [p for p in theirs.parameters() if p.requires_grad], lr=settings.learning_rate
    )
    for record in steps_of(ours, batches, settings, FlatOptimizer(ours)):
        (batch,) = batches[record.step - 1]
        assert batch.segments is None, "windows of one length stack"
        adam.zero_grad()
        logits = theirs(input_ids=batch.ids, position_ids=batch.positions).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels)
        torch.autograd.backward(loss)
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in theirs.parameters() if p.grad is not None]
        )
        adam.step()
        assert record.loss == pytest.approx(loss.item(), rel=1e-3)
        assert record.grad_norm == pytest.approx(float(norm), rel=1e-3)
    assert record.step == 5 * len(batches)


def cut_of(sizes: list[tuple[int, int, int]]) -> list[Window]:
    """One window per triple: the numbers of tokens without a label, with one, and without one
    again.
    """
    return [
        Window(
            i,
            tuple(range(10, 10 + a + b + c)),
            (IGNORED,) * a + tuple(range(11 + a, 11 + a + b)) + (IGNORED,) * c,
        )
        for i, (a, b, c) in enumerate(sizes)
    ]


def sequences_of(batch: Batch) -> list[tuple[list[int], list[int], list[int]]]:
    """Ids, positions and labels of each sequence, packed or stacked."""
    labels = torch.full((batch.ids.numel(),), IGNORED)
    labels[slice(None) if batch.label_index is None else batch.label_index] = batch.labels
    if batch.segments is None:
        rows = [
            row.tolist()
            for t in (batch.ids, batch.positions, labels.view_as(batch.ids))
            for row in t
        ]
        return list(
            zip(
                *(rows[i * len(batch.ids) : (i + 1) * len(batch.ids)] for i in range(3)),
                strict=True,
            )
        )
    assert len(batch.ids) == 1
    parts = [
        torch.split(t.flatten(), list(batch.segments)) for t in (batch.ids, batch.positions, labels)
    ]
    return [(a.tolist(), b.tolist(), c.tolist()) for a, b, c in zip(*parts, strict=True)]


lengths = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(0, 2)), min_size=1, max_size=20
)


@given(lengths, st.integers(1, 7), st.integers(1, 3), st.integers(0, 3))
def test_an_epoch_holds_every_window_once_without_a_token_more_than_its_labels_need(
    sizes: list[tuple[int, int, int]], batch_size: int, accumulate: int, seed: int
) -> None:
    cut = cut_of(sizes)
    batches = Batches(listed(cut), batch_size, seed, accumulate)
    assert len(batches) == math.ceil(len(sizes) / (batch_size * accumulate))
    for epoch in (0, 2):
        seen = []
        for index in range(len(batches)):
            step, rows = (
                batches[epoch * len(batches) + index],
                batches.rows(epoch * len(batches) + index),
            )
            numbers = [number for row in rows for number in row]
            assert batches.locations(epoch * len(batches) + index) == [
                f"f.txt:{n + 1}" for n in numbers
            ]
            if index < len(batches) - 1:
                assert [*map(len, rows)] == [batch_size] * accumulate
            for batch, row in zip(step, rows, strict=True):
                assert batch.tokens == sum(sizes[number][1] for number in row)
                for number, (ids, positions, labels) in zip(row, sequences_of(batch), strict=True):
                    # tokens after the last label do not affect the loss
                    kept = sizes[number][0] + sizes[number][1]
                    assert ids == list(range(10, 10 + kept))
                    assert positions == list(range(number, number + kept))
                    assert labels == list(cut[number].labels[:kept])
                    seen.append(number)
        assert sorted(seen) == list(range(len(sizes)))


@given(lengths)
def test_a_batch_taken_apart_is_its_sequences_one_by_one(sizes: list[tuple[int, int, int]]) -> None:
    ((batch,),) = [Batches(listed(cut_of(sizes)), len(sizes), 0)[0]]
    apart = batch.unpack()
    assert all(one.segments is None for one in apart)
    assert [s for one in apart for s in sequences_of(one)] == sequences_of(batch)
    assert batch.segments is None or len(apart) == len(sizes)


def test_batches_are_the_same_from_wherever_one_starts() -> None:
    cut = listed([Window(0, (i,), (i + 1,)) for i in range(20)])

    def ids(batches: Batches, step: int) -> list[object]:
        return [batch.ids.tolist() for batch in batches[step]]

    forward = [ids(Batches(cut, 4, 7, 2), step) for step in range(9)]
    one = Batches(cut, 4, 7, 2)
    assert [ids(one, step) for step in reversed(range(9))] == forward[::-1]
    assert forward[:3] != forward[3:6], "each epoch is shuffled differently"


def test_the_largest_step_is_the_one_with_the_most_tokens_in_a_batch() -> None:
    sizes = [(0, n, 0) for n in (3, 9, 1, 4, 7, 2, 5)]
    batches = Batches(listed(cut_of(sizes)), 2, 0)
    tokens = [max(batch.ids.numel() for batch in batches[step]) for step in range(2 * len(batches))]
    assert len(set(tokens)) > 2
    for steps_ in (range(8), range(3, 8), range(5, 6)):
        assert tokens[batches.largest_step(steps_)] == max(tokens[step] for step in steps_)


def test_frozen_rows_and_rows_that_are_not_read_get_no_gradient(brief: Path) -> None:
    model, _ = load_base(brief / "artifacts/expanded")
    model.requires_grad_(False)
    model.embeddings.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = Batches(listed([Window(0, (5, 6, 9), (6, 7, IGNORED)), Window(0, (5,), (6,))]), 2, 0)
    for _ in steps_of(model, batches, Training(epochs=3), FlatOptimizer(model)):
        pass
    after = model.state_dict()
    name = "model.decoder.embed_tokens.weight"
    assert {key for key, value in after.items() if not torch.equal(value, before[key])} == {name}
    rows = (after[name] != before[name]).any(dim=1).nonzero().flatten().tolist()
    assert rows == [5, 6], "the rows of tokens before a label, and not the padding's"


def test_a_loss_that_is_not_finite_stops_with_advice(project: Path) -> None:
    overrides = [*BRIEF, "finetune_full.learning_rate=1e30"]
    before = (project / "artifacts/full_finetuned/manifest.json").read_bytes()
    with pytest.raises(
        UserError,
        match=r"finetune_full: the loss is .* at step \d+, on data/finetune.de.txt:\d.* Lower finetune_full.lear",
    ):
        make(project, ["finetune_full"], overrides)
    assert (project / "artifacts/full_finetuned/manifest.json").read_bytes() == before


def test_the_run_log_has_the_contracts_columns_and_every_step(finished: Path) -> None:
    for name, count in (("base", 900), ("full_finetuned", 300), ("lora_adapter", 300)):
        path = finished / "artifacts" / name / "loss.csv"
        assert (
            path.read_text(encoding="utf-8").splitlines()[0]
            == "step,epoch,loss,learning_rate,grad_norm,tokens"
        )
        found = read_steps(path)
        assert [step.step for step in found] == list(range(1, count + 1))
        assert all(later.tokens > earlier.tokens for earlier, later in pairwise(found))
    telemetry = (
        (finished / "runs/finetune_lora/telemetry.csv").read_text(encoding="utf-8").splitlines()
    )
    assert telemetry[0] == (
        "step,seconds,tokens_per_second,peak_memory_bytes,device,predicted_tensor_bytes,measured_tensor_bytes"
    )
    assert len(telemetry) == 301


def test_the_prediction_follows_every_choice_of_targets(project: Path) -> None:
    """Also the name of a single module, the head, and all-linear: whatever can be trained can be
    predicted.
    """
    for targets in (
        "lm_head",
        "[fc1, lm_head]",
        "model.decoder.layers.0.fc1",
        "decoder.layers.1.self_attn.q_proj",
        "all-linear",
    ):
        overrides = [
            *BRIEF,
            f"finetune_lora.target_modules={targets}",
            "finetune_lora.train_embeddings=none",
        ]
        make(project, ["finetune_lora"], overrides)
        predicted, measured = logged_memory(project / "runs/finetune_lora/telemetry.csv")
        assert measured == pytest.approx(predicted, rel=0.05), targets


@pytest.mark.parametrize(
    "stage",
    [
        "pretrain",
        "train_from_scratch",
        *(n for n in PIPELINE if n.removeprefix("finetune_") in METHODS),
    ],
)
def test_the_trainer_measures_what_the_calculator_predicts(finished: Path, stage: str) -> None:
    predicted, measured = logged_memory(finished / "runs" / stage / "telemetry.csv")
    assert measured == pytest.approx(predicted, rel=0.03)


@pytest.mark.parametrize("optimizer", ["adamw-8bit", "paged-adamw-8bit", "sgd", "muon"])
def test_what_it_measures_with_other_optimizers_dropout_and_noise_is_predicted(
    project: Path, optimizer: str
) -> None:
    options = {
        "optimizer": optimizer,
        "lora_dropout": 0.1,
        "neftune_alpha": 5,
        "batch_size": 16,
        "window": 0,
    }
    make(
        project,
        ["finetune_lora"],
        [*BRIEF, *section_overrides("finetune_lora", options)],
    )
    predicted, measured = logged_memory(project / "runs/finetune_lora/telemetry.csv")
    assert measured == pytest.approx(predicted, rel=0.02)


@given(st.integers(0, 200))
def test_a_log_is_read_up_to_its_last_whole_line(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "loss.csv"
    text = (
        ",".join(COLUMNS) + "\n" + "".join(f"{i},1,0.5,0.001,1.0,{i * 16}\n" for i in range(1, 6))
    )
    path.write_text(text[:cut], encoding="utf-8")
    assert [step.step for step in read_steps(path)] == list(
        range(1, max(1, text[:cut].count("\n")))
    )


def curve(*means: float) -> list[Step]:
    return [Step(i, i, mean, 0.1, 1.0, i) for i, mean in enumerate(means, 1)]


def test_a_curve_is_flat_from_where_it_stays_near_its_end() -> None:
    assert flat_from(curve(10, 5, 1.2, 1.1, 1.0)) == 3
    assert flat_from(curve(10, 1, 5, 1.0, 1.0)) == 4
    assert flat_from(curve(10, 8, 6, 4, 2)) is None
    assert flat_from([]) is None
    assert epoch_means(
        [Step(1, 1, 2.0, 0.1, 1, 1), Step(2, 1, 4.0, 0.1, 1, 2), Step(3, 2, 1.0, 0.1, 1, 3)]
    ) == [3, 1]


def test_two_runs_give_the_same_bytes(project: Path) -> None:
    folder = project / "artifacts/lora_adapter"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    _, events = make_one(project, "finetune_lora", BRIEF, force=True)
    assert len([e for e in events if isinstance(e, Progress)]) == 12, (
        "it was trained again: 2 epochs of 6 steps"
    )
    notes = note_texts(events)
    assert re.match(r"finetune_lora: [\d.]+ KiB of tensors predicted", notes[0])
    assert re.match(r"finetune_lora: [\d.]+ KiB of tensors measured", notes[1])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
