"""The settings that `python -m bench.recipe_runs` tries, in the order in which they tell most."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from bench.recipe_tasks import TASKS, RecipeTask

# as `lora train` chooses: steps an epoch, as far as there are rows
LARGEST_BATCH, LEAST_STEPS = 16, 25
MANY = 2000  # rows, of which fewer epochs are enough: a setting's epochs → those of so many rows
EPOCHS_OF_MANY = {2: 1, 3: 2, 5: 3}


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
        """The keys of finetune_lora, with what `lora train` chooses for a pretrained base on a
        CPU.
        """
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


def for_rows(each: Setting, rows: int) -> Setting:
    """As it trains on so many rows."""
    return each._replace(epochs=EPOCHS_OF_MANY[each.epochs]) if rows >= MANY else each


def of_rows(trained: Setting, rows: int) -> Setting:
    """The setting that trains so on so many rows."""
    epochs = {few: each for each, few in EPOCHS_OF_MANY.items()}
    return (
        trained._replace(epochs=epochs.get(trained.epochs, trained.epochs))
        if rows >= MANY
        else trained
    )


def batch_size(rows: int) -> int:
    batch = 1
    while batch < LARGEST_BATCH and rows / (2 * batch) >= LEAST_STEPS:
        batch *= 2
    return batch


def setting(rate: float, rank: int, epochs: int, texts: int = 0, weight: float = 1.0) -> Setting:
    """Alpha is twice the rank. `texts`: of retention per step."""
    return Setting(rate, rank, 2 * rank, "linear", epochs, weight if texts else 0.0, texts)


FIRST = setting(2e-4, 8, 3)  # what `lora train` chose before this benchmark
CHOSEN = setting(1e-3, 16, 3, 4)  # what it chooses now
OTHERS = (
    setting(1e-3, 16, 5),
    setting(1e-3, 16, 5, 4),
    setting(2e-3, 16, 3, 4),
    setting(5e-4, 16, 5, 4),
    setting(1e-3, 8, 3, 4),
    setting(1e-3, 16, 3),
)
SEEDS = (0, 1, 2)


def plan() -> Iterator[tuple[RecipeTask, Setting, int]]:
    """Task, setting, seed of each run: what is chosen with all seeds, then one seed of the
    others.
    """
    few = [task for task in TASKS if task.rows < MANY]
    many = [task for task in TASKS if task.rows >= MANY]
    for tasks in (few, many):
        for each in (FIRST, CHOSEN):
            yield from ((task, for_rows(each, task.rows), 0) for task in tasks)
    yield from ((task, CHOSEN, 1) for task in few)
    yield from ((task, OTHERS[0], 0) for task in few)
    yield from ((task, CHOSEN, 2) for task in few)
    for each in OTHERS[1:]:
        yield from ((task, each, 0) for task in few)
    for each in OTHERS:
        yield from ((task, for_rows(each, task.rows), 0) for task in many)
    for seed in SEEDS[1:]:
        yield from ((task, for_rows(CHOSEN, task.rows), seed) for task in many)
        yield from ((task, FIRST, seed) for task in few)
