"""No step adds up by an index in an order that a GPU does not keep: seen on `meta`, by what is
called.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.adapters.attach import attach
from pipeline.adapters.batched import attach_many
from pipeline.adapters.config import AdapterSpec
from pipeline.stages.methods.dpo import FinetuneDpo
from pipeline.stages.methods.lora import FinetuneLora
from pipeline.training.batched import ManyAdapters
from pipeline.training.batches import Batches
from pipeline.training.loop import steps
from pipeline.training.preferences.batches import AnswerBatches, Answers
from pipeline.training.preferences.losses import PreferencePath
from pipeline.training.step import Learner
from pipeline.training.task import TrainingTask, build_optimizer
from tests.helpers.real import listed, toy, windows_of
from tests.helpers.stand_in import to_stand_in, watched

# Their CUDA kernels add by atomics; those of `index_put_` and `embedding_dense_backward` sort their
# indices first.
UNORDERED = {"scatter_add", "scatter_add_", "scatter_reduce", "index_reduce", "put_", "cumsum"}
LENGTHS = (9, 7, 9, 5, 9, 9)


class Called(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        # also the backward of `index_select`, which is given distinct rows here: then there is no
        # order
        if name.startswith("index_add") and len(args[2]) > args[0].shape[args[1]]:
            name = "put_"
        self.names[name] += 1
        return func(*args, **(kwargs or {}))


def lora() -> TrainingTask:
    model = toy("llama", torch.bfloat16)
    attach(model, AdapterSpec(3, 6.0, ("q_proj", "v_proj"), saved=model.embedding_and_head))
    assert model.supports_packing
    batches = Batches(listed(windows_of(LENGTHS, lambda length: length // 3)), 2, 0)
    return TrainingTask.of_one(to_stand_in(model).train(), batches, FinetuneLora(epochs=9), None)


def sweep() -> TrainingTask:
    """With embeddings that train, batches of equal sequences."""
    model = toy("llama", torch.bfloat16)
    spec = AdapterSpec(3, 6.0, ("q_proj", "v_proj"), saved=model.embedding_and_head)
    path = ManyAdapters(model, attach_many(model, [partial(attach, model, spec) for _ in range(3)]))
    assert path.supports_packing
    to_stand_in(model).train()
    data = listed(windows_of((9,) * 6, lambda length: length // 3))
    learners = [
        Learner(FinetuneLora(epochs=9, seed=n), Batches(data, 2, n), name=f"{n}") for n in range(3)
    ]
    return TrainingTask(model, learners, path)


def preferences() -> TrainingTask:
    model = toy("llama", torch.bfloat16)
    attach(model, AdapterSpec(3, 6.0, ("q_proj", "v_proj")))
    assert model.supports_packing
    windows = windows_of(LENGTHS, lambda length: length // 2)
    answers = Answers(windows, lambda _: "f.jsonl:1", ((range(3), 1.0),), torch.zeros(len(windows)))
    settings = FinetuneDpo(epochs=9, loss="dpo", rpo_alpha=0.5)
    learner = Learner(settings, AnswerBatches(answers, 1, 0, 2))
    return TrainingTask(model, [learner], PreferencePath(to_stand_in(model).train(), settings))


@pytest.mark.parametrize("made", [lora, sweep, preferences])
def test_a_step_adds_in_a_fixed_order(made: Callable[[], TrainingTask]) -> None:
    task = made()
    records = steps(
        task, build_optimizer(task.model, *(learner.settings for learner in task.learners))
    )
    with watched(), Called() as called:
        next(records)
    assert called.names["mm"] or called.names["bmm"]
    assert not UNORDERED & called.names.keys()
