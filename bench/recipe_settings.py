"""The settings that `python -m bench.recipe_runs` tries, in the order in which they tell most."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from bench.recipe_tasks import TASKS, RecipeTask

LARGEST_BATCH, LEAST_STEPS = 16, 25  # as `lora train` chooses: steps an epoch, as far as there are rows
MANY = 1000  # rows: an epoch of so many is as long as several of the other tasks


class Setting(NamedTuple):
    """What is varied."""

    learning_rate: float
    rank: int
    alpha: int
    schedule: str
    epochs: int
    retention_weight: float
    retention_batch_size: int

    def params(self, rows: int) -> dict[str, Any]:
        """The keys of finetune_lora, with what `lora train` chooses for a pretrained base on a CPU."""
        return {
            **self._asdict(),
            "retention_batch_size": self.retention_batch_size or 1,
            "alpha": float(self.alpha),
            "batch_size": batch_size(rows),
            "window": 0,
            "warmup_ratio": 0.03,
            "max_grad_norm": 1.0,
            "precision": "fp32",
            "target_modules": ("all-linear",),
            "train_embeddings": "none",
        }


def batch_size(rows: int) -> int:
    batch = 1
    while batch < LARGEST_BATCH and rows / (2 * batch) >= LEAST_STEPS:
        batch *= 2
    return batch


def setting(rate: float, rank: int, epochs: int, texts: int = 0, weight: float = 1.0) -> Setting:
    """Alpha is twice the rank. `texts`: of retention per step."""
    return Setting(rate, rank, 2 * rank, "linear", epochs, weight if texts else 0.0, texts)


FIRST = setting(2e-4, 8, 3)  # the default up to this benchmark
CHOSEN = FIRST  # what `lora train` chooses
COARSE = (
    FIRST,
    setting(1e-3, 16, 3, 4),
    setting(1e-3, 16, 5),
    setting(1e-3, 16, 5, 4),
    setting(2e-3, 16, 3, 4),
    setting(5e-4, 16, 5, 4),
    setting(2e-3, 16, 5),
    setting(1e-3, 8, 3, 4),
    setting(1e-3, 16, 3, 8),
    setting(2e-3, 16, 5, 4),
)


def plan() -> Iterator[tuple[RecipeTask, Setting, int]]:
    """Task, setting, seed of each run."""
    small = [task for task in TASKS if task.rows < MANY]
    large = [task for task in TASKS if task.rows >= MANY]
    for number, each in enumerate(COARSE):
        yield from ((task, each, 0) for task in small)
        if number:  # a setting late: a run takes as long as those of several other tasks
            yield from ((task, COARSE[number - 1], 0) for task in large)
