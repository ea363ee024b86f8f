"""What the base computes before training, the reference and completed prompts, where it is sharded:
the numbers of one process, and never with the whole base.
"""

from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from lora_workbench.running import run_stage
from pipeline.models.transformers_model import TransformersModel
from pipeline.project.runner import Event, Job
from pipeline.stages import finetune
from pipeline.stages.registry import open_project
from pipeline.training.loop import train
from pipeline.training.parallel import sharding
from pipeline.training.preferences.batches import Answers
from pipeline.training.preferences.data import SCORED_TOGETHER
from pipeline.training.task import TrainingTask
from tests.helpers.families import TEXTS, new_lines_project
from tests.helpers.json_files import write_jsonl
from tests.helpers.projects import fresh, make_one, section_overrides
from tests.helpers.ranks import run_ranks

STAGE = "finetune_dpo"
SETTINGS = {
    "data": "data/pairs.jsonl",
    "epochs": 1,
    "batch_size": 4,
    "train_embeddings": "all",
    "retention_data": "data/old.jsonl",
    "retention_weight": 1,
    "retention_batch_size": 2,
}


class Begun(NamedTuple):
    """A rank's run."""

    reference: list[float]  # of its answers
    texts: list[tuple[int, ...]]  # that it retains
    forwards: list[bool]  # whether the base was sharded in each


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = new_lines_project(tmp_path_factory.mktemp("sharded") / "p")
    words = " ".join(TEXTS).split()
    pairs = []
    for n in range(18):
        answers = {"chosen": f" {words[n + 4]}", "rejected": " " + " ".join(words[n : n + 5])}
        pairs.append({"prompt": " ".join(words[n : n + 3]), **answers})
    write_jsonl(root / "data/pairs.jsonl", pairs)
    prompts = [{"prompt": " ".join(words[n : n + 2])} for n in range(3)]
    write_jsonl(root / "data/old.jsonl", [*prompts, {"text": " ".join(words[:7])}])
    given = {"data": "data/lines.jsonl", "train_embeddings": "all", "learning_rate": 0.02}
    make_one(root, "finetune_lora", section_overrides("finetune_lora", {**given, "epochs": 3}))
    return root


def begun(root: Path, init_from: str, shard: bool | None, small: bool) -> Begun:
    """`small`: the device has no room for the base."""
    tasks, forwards, run_body = list[TrainingTask](), list[bool](), TransformersModel.run_body

    def recorded(job: Job, task: TrainingTask) -> Generator[Event, None, Any]:
        tasks.append(task)
        return (yield from train(job, task))

    def counted(self: TransformersModel, *given: Any, **options: Any) -> Any:
        forwards.append(sharding.is_sharded(self))
        return run_body(self, *given, **options)

    vars(finetune)["train"] = recorded
    TransformersModel.run_body = counted  # type: ignore[method-assign]
    if small:
        vars(sharding)["free_bytes"] = lambda _: 1
    overrides = section_overrides(STAGE, {**SETTINGS, "init_from": init_from})
    for _ in run_stage(open_project(root / "params.yaml", overrides), STAGE, True, None, shard):
        pass
    (task,) = tasks
    (learner,) = task.learners
    answers, retain = learner.batches.dataset, learner.retain
    assert isinstance(answers, Answers) and answers.reference is not None and retain is not None
    texts = retain.batches.dataset
    windows = [texts[n].ids for n in range(len(texts))]
    return Begun(answers.reference.tolist(), windows, forwards)


def run_on(ranks: int, root: Path, *given: Any) -> list[Begun]:
    fresh(root, STAGE)
    found: list[Begun] = run_ranks(ranks, begun, root, *given, grouped=False, seconds=120)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("init_from", "shard", "small"),
    [("", True, False), ("", None, True), ("artifacts/lora_adapter", True, False)],
    ids=["asked for", "no room", "of an earlier run"],
)
def test_a_sharded_base_has_the_reference_and_the_completions_of_a_whole_one(
    project: Path, init_from: str, shard: bool | None, small: bool
) -> None:
    (alone,) = run_on(1, project, init_from, None, False)
    ranks = run_on(2, project, init_from, shard, small)
    assert -(-len(alone.reference) // SCORED_TOGETHER) % 2, "a rank has a part less"
    for rank in ranks:
        assert rank.reference and all(rank.forwards), "no forward before the base is sharded"
        assert len(rank.forwards) == len(ranks[0].forwards), "else a gather waits for ever"
        torch.testing.assert_close(rank.reference, alone.reference, rtol=0, atol=1e-4)
        assert rank.texts == alone.texts
    assert any(value < -1 for value in alone.reference)
    assert max(map(len, alone.texts)) > 7, "prompts are completed"
    assert not any(alone.forwards)
