"""Training on preferences as a stage: what it logs, saves and resumes, its data, and what it
refuses.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from pipeline.adapters.config import WEIGHTS
from pipeline.data.examples import IGNORED
from pipeline.data.formats import read_examples
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.inference.engine import load
from pipeline.inference.score import score
from pipeline.models.load import load_base
from pipeline.project.logs.run_log import LOSS, read_steps
from pipeline.project.runner import Job, Progress, run
from pipeline.stages.registry import open_project
from pipeline.training.preferences.data import build_answers
from tests.conftest import Lora
from tests.helpers.checkpoints import token_ids
from tests.helpers.families import FAMILIES, TEXTS, new_project
from tests.helpers.json_files import read_json, write_jsonl
from tests.helpers.projects import (
    STAGES,
    WORK,
    folder_bytes,
    fresh,
    logged_memory,
    make_base,
    make_one,
    note_texts,
    played,
    section_overrides,
)
from tests.helpers.side_by_side import logits, ours, theirs

STAGE, OUTPUT = "finetune_dpo", "artifacts/dpo_adapter"
SETTINGS = {
    "data": "data/pairs.jsonl",
    "epochs": 4,
    "learning_rate": 0.01,
    "eval_share": 0.3,
    "batch_size": 3,
}
LOSSES = ("dpo", "ipo", "kto", "orpo", "simpo")


@pytest.fixture(scope="module")
def with_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy Llama and pairs of answers. Read it; do not write to it."""
    root = new_project(tmp_path_factory.mktemp("dpo") / "p", FAMILIES["llama"])
    words = " ".join(TEXTS).split()
    pairs = [
        {
            "prompt": " ".join(words[n : n + 3]),
            "chosen": " " + " ".join(words[n + 4 : n + 5 + n % 3]),
            "rejected": " " + " ".join(words[n + 7 : n + 9 + n % 4]),
        }
        for n in range(24)
    ]
    write_jsonl(root / "data/pairs.jsonl", pairs)
    return make_base(root)


@pytest.fixture
def project(with_pairs: Path, tmp_path: Path) -> Path:
    return shutil.copytree(with_pairs, tmp_path / "p")


def given(**changes: object) -> list[str]:
    return section_overrides(STAGE, {**SETTINGS, **changes})


def tuned(root: Path, **changes: object) -> tuple[Path, str]:
    """The adapter that such a run makes, and its notes."""
    _, events = make_one(fresh(root, STAGE), STAGE, given(**changes))
    return root / OUTPUT, "\n".join(note_texts(events))


@pytest.mark.parametrize("loss", LOSSES)
def test_it_learns_what_is_preferred_and_opens_in_peft(project: Path, loss: str) -> None:
    folder, said = tuned(
        project, loss=loss, train_embeddings="none", beta=2 if loss == "simpo" else 0.1
    )
    steps = read_steps(folder / LOSS)
    third = len(steps) // 3
    assert sum(step.loss for step in steps[-third:]) < sum(step.loss for step in steps[:third])
    last = steps[-1]
    assert (
        last.reward_chosen is not None
        and last.reward_rejected is not None
        and last.reward_margin is not None
    )
    assert last.reward_margin == pytest.approx(last.reward_chosen - last.reward_rejected, abs=1e-5)
    assert (
        0 <= (last.reward_accuracy or 0) <= 1
        and last.eval_accuracy is not None
        and last.eval_loss is not None
    )
    assert sum(step.reward_accuracy or 0 for step in steps[-third:]) > sum(
        s.reward_accuracy or 0 for s in steps[:third]
    )
    assert ("under the reference are computed once" in said) == (loss in ("dpo", "ipo", "kto"))

    ids = token_ids(90, 2, 9)
    found, wanted = (
        logits(opened(project / "artifacts/expanded", folder), ids) for opened in (ours, theirs)
    )
    assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_command_prints_the_accuracy_and_the_report_has_the_adapter_before_it_is_evaluated(
    project: Path, cli: Lora
) -> None:
    pairs = [
        json.loads(line)
        for line in (project / "data/pairs.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    turned = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    write_jsonl(project / "data/turned.jsonl", turned)
    for evaluated, fell in (("pairs", False), ("turned", True)):  # what it learns, and the opposite
        settings = given(eval_share=0, eval_data=f"data/{evaluated}.jsonl")
        flags = [word for setting in settings for word in ("--set", setting)]
        code, out, err = cli("finetune", "dpo", *flags, cwd=project)
        measured = artifact.read_manifest(project / OUTPUT)["preferences"]
        before, after = (f"{measured[when]['accuracy']:.0%}" for when in ("before", "after"))
        assert (code, f"  accuracy {before} → {after} on held-out pairs  loss " in out) == (0, True)
        assert ("finetune_dpo: the accuracy fell. Lower finetune_dpo.learning_rate" in err) == fell
        code, out, err = cli("report", cwd=project)
        row = next(line.split() for line in out.splitlines() if line.startswith("dpo "))
        assert (code, " ".join(row[3:6])) == (0, f"{before} → {after}")
        assert f"dpo is not evaluated yet. Run `lora evaluate --adapter {OUTPUT}`." in err
    flags = [word for setting in given(eval_share=0) for word in ("--set", setting)]
    _, out, _ = cli("finetune", "dpo", *flags, cwd=project)
    steps = read_steps(project / OUTPUT / LOSS)
    last = [step for step in steps if step.epoch == max(each.epoch for each in steps)]
    share = sum(step.reward_accuracy or 0 for step in last) / len(last)
    assert f"  accuracy {share:.0%} on the pairs of the last epoch, none held out  loss " in out
    listed = json.loads(cli("adapters", "--json", cwd=project)[1])
    assert [(adapter["path"], adapter["method"]) for adapter in listed] == [(OUTPUT, "dpo")]
    limits = "evaluate.limits={new_loss: 0}"
    assert cli("evaluate", "--adapter", OUTPUT, "--set", limits, cwd=project)[0] == 1
    code, out, err = cli("report", cwd=project)
    measured = read_json(project / "artifacts/measured/metrics.json")[OUTPUT]
    assert f"{measured['new_loss']:.3f}" in next(
        line for line in out.splitlines() if line.startswith("dpo ")
    )
    assert "dpo breaks evaluate.limits: new_loss " in err


@pytest.mark.parametrize(
    "changes",
    [
        {
            "loss": "dpo",
            "rpo_alpha": 0.5,
            "label_smoothing": 0.1,
            "gradient_accumulation_steps": 2,
            "epochs": 6,
        },
        {"loss": "kto", "precision": "bf16", "lora_dropout": 0.2},
        {"loss": "orpo", "train_embeddings": "all", "schedule": "cosine", "patience": 9},
        {"loss": "simpo", "retention_data": "data/retained.jsonl", "retention_weight": 1},
    ],
    ids=lambda changes: str(changes["loss"]),
)
@pytest.mark.sampled(4)
def test_a_killed_run_resumes_to_the_byte(project: Path, changes: dict[str, object]) -> None:
    write_jsonl(project / "data/retained.jsonl", [{"text": text} for text in TEXTS])
    whole, _ = tuned(project, **changes)
    unbroken = folder_bytes(whole)
    for name in (OUTPUT, f"runs/{STAGE}", ".lora-cache"):
        shutil.rmtree(project / name)
    events = run(
        open_project(project / "params.yaml", given(**changes)),
        STAGES[STAGE],
        WORK[STAGE],
        checkpoint_every=3,
    )
    next(
        event
        for event in events
        if isinstance(event, Progress) and event.text != "reference" and event.done == 5
    )
    events.close()
    _, events_ = make_one(project, STAGE, given(**changes))
    assert any("resumed after step 3" in text for text in note_texts(events_))
    assert folder_bytes(project / OUTPUT) == unbroken


@pytest.mark.slow
def test_the_references_log_probs_are_computed_once_for_all_losses(project: Path) -> None:
    def said(loss: str) -> str:
        """The notes of a run beside what earlier ones left in the cache."""
        _, events = make_one(project, STAGE, given(loss=loss))
        return "\n".join(note_texts(events))

    assert "are computed once" in said("dpo")
    assert "are computed once" not in said("ipo")
    write_jsonl(
        project / "data/pairs.jsonl",
        [json.loads(line) for line in (project / "data/pairs.jsonl").open()][:20],
    )
    assert "are computed once" in said("dpo")


def test_batches_that_are_accumulated_are_one(project: Path) -> None:
    found = [
        load_file(
            tuned(project, batch_size=size, gradient_accumulation_steps=6 // size)[0] / WEIGHTS
        )
        for size in (6, 2)
    ]
    for name, value in found[0].items():
        assert_close(found[1][name], value, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_preferred_of_the_held_out_pairs_before_and_after_is_in_the_manifest(
    project: Path, loss: str
) -> None:
    pairs = [json.loads(line) for line in (project / "data/pairs.jsonl").open()]
    write_jsonl(project / "data/held_out.jsonl", pairs[:7])
    write_jsonl(project / "data/pairs.jsonl", pairs[7:])
    folder, _ = tuned(project, loss=loss, eval_share=0, eval_data="data/held_out.jsonl")
    manifest, given = artifact.read_manifest(folder), {"before": None, "after": folder}
    if loss == "kto":  # whose answers are no pairs
        assert "preferences" not in manifest
        return
    for when, adapter in given.items():
        wanted = preferred(project, adapter, pairs[:7])
        assert manifest["preferences"][when] == pytest.approx(wanted, abs=1e-4)
    assert manifest["preferences"]["after"]["margin"] != manifest["preferences"]["before"]["margin"]


def preferred(project: Path, adapter: Path | None, pairs: list[dict[str, Any]]) -> dict[str, float]:
    """By evaluate's score of each answer alone."""
    loaded, losses = load(project / "artifacts/expanded", adapter), []
    for answer in ("chosen", "rejected"):
        file = project / f"data/{answer}.jsonl"
        write_jsonl(
            file, [{"prompt": pair["prompt"], "completion": pair[answer]} for pair in pairs]
        )
        losses.append(
            [
                score(loaded, [example]).loss
                for example in read_examples(file, file.name, templated=False)
            ]
        )
    margins = [rejected - chosen for chosen, rejected in zip(*losses, strict=True)]
    return {
        "accuracy": sum(margin > 0 for margin in margins) / len(margins),
        "margin": sum(margins) / len(margins),
    }


@pytest.mark.parametrize(
    "changes", [{"loss": "dpo"}, {"loss": "kto"}, {"loss": "orpo", "batch_size": 16}], ids=str
)
def test_the_peak_of_a_step_is_predicted(project: Path, changes: dict[str, object]) -> None:
    tuned(project, epochs=2, eval_share=0, **changes)
    predicted, measured = logged_memory(project / f"runs/{STAGE}/telemetry.csv")
    assert 0.97 * measured <= predicted <= 1.1 * measured


@pytest.mark.slow
def test_labelled_answers_are_pairs_to_kto(project: Path) -> None:
    pairs = [json.loads(line) for line in (project / "data/pairs.jsonl").open()]
    folder, _ = tuned(project, loss="kto", eval_share=0)
    from_pairs = (folder / WEIGHTS).read_bytes()
    answers = [
        {"prompt": pair["prompt"], "completion": pair[key], "label": key == "chosen"}
        for pair in pairs
        for key in ("chosen", "rejected")
    ]
    write_jsonl(project / "data/answers.jsonl", answers)
    folder, _ = tuned(project, loss="kto", eval_share=0, data="data/answers.jsonl")
    assert (folder / WEIGHTS).read_bytes() == from_pairs


def test_an_answer_behind_another_prompt_is_cut_at_the_models_positions(project: Path) -> None:
    long = "The currency of " * 16
    answers = [
        {"prompt": long, "completion": "the euro", "label": True},
        {"prompt": "The currency", "completion": long, "label": False},
    ]
    write_jsonl(project / "data/answers.jsonl", answers)
    overrides = given(loss="kto", eval_share=0, data="data/answers.jsonl")
    whole = open_project(project / "params.yaml", overrides)
    job = Job(whole, STAGES[STAGE], project / "out", project / "runs", "", 100)
    base = load_base(project / "artifacts/expanded")
    (found, _), _ = played(build_answers(job, whole.section(job.stage), "kto", base))
    own, behind = found.windows[0], found.windows[1]
    # the last of as many tokens is a label alone
    assert len(own.ids) < len(behind.ids) == base.model.shape.positions - 1
    prompt = own.labels.count(IGNORED)
    assert behind.ids[:prompt] == own.ids[:prompt]
    assert behind.labels.count(IGNORED) == prompt


@pytest.mark.slow
def test_the_reference_is_the_adapter_that_it_starts_from(project: Path) -> None:
    """Rewards begin at 0 from there; with the base as the reference they do not."""
    tuned(project)[0].rename(project / "first")
    for reference, zero in (("start", True), ("base", False)):
        folder, _ = tuned(project, init_from="first", reference=reference, learning_rate=1e-9)
        reward = read_steps(folder / LOSS)[0].reward_chosen
        assert reward is not None and (abs(reward) < 1e-4) == zero


def test_two_runs_from_the_same_base_are_one_to_the_byte(project: Path) -> None:
    changes = {"save_optimizer": "true", "reference": "base"}
    tuned(project, epochs=2, **changes)[0].rename(project / "first")
    whole = (tuned(project, epochs=5, **changes)[0] / WEIGHTS).read_bytes()
    folder, _ = tuned(project, epochs=3, init_from="first", **changes)
    assert (folder / WEIGHTS).read_bytes() == whole
    assert artifact.read_manifest(folder)["method"] == "dpo"


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (
            [{"prompt": "a", "completion": " b"}],
            {},
            "a preference is a pair .* this row has one answer",
        ),
        ([{"prompt": "a", "completion": " b"}], {"loss": "kto"}, "whose label is true or false"),
        ([{"prompt": "a", "chosen": " b", "rejected": " c"}], {"window": 4}, "window must be 0"),
        (
            [{"prompt": "a", "chosen": " b", "rejected": " c"}],
            {"label_smoothing": 0.6},
            "below 0.5",
        ),
        (
            [{"prompt": "a", "chosen": " b", "rejected": " c"}],
            {"loss": "ipo", "label_smoothing": 0.1},
            "not for ipo",
        ),
        (
            [{"prompt": "a", "chosen": " b", "rejected": " c"}],
            {"loss": "kto", "rpo_alpha": 1},
            "not for kto",
        ),
        (
            [{"prompt": "a", "chosen": " b", "rejected": " c"}],
            {"max_length": 1},
            "nothing to train on",
        ),
    ],
)
def test_what_is_no_preference_is_refused(
    project: Path, rows: list[dict[str, Any]], changes: dict[str, object], message: str
) -> None:
    write_jsonl(project / "data/pairs.jsonl", rows)
    with pytest.raises(UserError, match=message):
        tuned(project, **{"eval_share": 0, **changes})
