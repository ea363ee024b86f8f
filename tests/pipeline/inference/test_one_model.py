"""Where models are used one after the other, a base is loaded once for all adapters on it, and its
blocks are out of memory before the next one is loaded.
"""

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from pipeline.data.examples import Example
from pipeline.data.formats import read_examples
from pipeline.evaluation.measuring import measuring
from pipeline.inference import engine
from pipeline.inference.score import SameLogits, costs, quality
from pipeline.models.base import CausalLM
from pipeline.models.load import load_base
from pipeline.stages import evaluate
from pipeline.stages.registry import open_project
from tests.conftest import Lora
from tests.helpers.projects import BRIEF, make

ADAPTERS = ("artifacts/lora_adapter", "artifacts/copied")


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For each model that is loaded from now on, how many others have their blocks in memory."""
    blocks, counts = list[weakref.ref[Tensor]](), list[int]()

    def load(*args: Any) -> tuple[CausalLM, Any]:
        counts.append(sum(block() is not None for block in blocks))
        model, tokenizer = load_base(*args)
        blocks.append(weakref.ref(next(model.blocks.parameters())))
        return model, tokenizer

    monkeypatch.setattr(engine, "load_base", load)
    return counts


def _measure(project: Path) -> None:
    job = measuring(open_project(project / "params.yaml", BRIEF))
    list(evaluate.measure(job, [project / name for name in ADAPTERS]))


def _examples(project: Path) -> list[Example]:
    return read_examples(project / "data/finetune.de.txt", "finetune.de.txt")


def _quality(project: Path) -> None:
    base, tuned, adapter = (
        project / f"artifacts/{name}" for name in ("expanded", "full_finetuned", "lora_adapter")
    )
    quality(base, tuned, adapter, _examples(project))


def _costs(project: Path) -> None:
    adapters = {name: project / name for name in ADAPTERS}
    costs(project / "artifacts/expanded", {"base": None, **adapters}, _examples(project))


def _folders_of_variants(project: Path) -> int:
    """How many folders hold the variants that are no adapters, without the certified merge."""
    variants = open_project(project / "params.yaml", BRIEF).variants
    return len({base for name, (base, _) in variants.items() if name != "merged"})


@pytest.mark.parametrize(
    ("compute", "loads"),
    [
        (lambda project: make(project, ["evaluate"], BRIEF, force=True), _folders_of_variants),
        (_measure, lambda _: 2),  # of the pretrained base, and of the adapters' base
        (_quality, lambda _: 2),
        (_costs, lambda _: 1),
    ],
    ids=["evaluate", "measure", "quality", "costs"],
)
def test_evaluation_loads_a_base_once_and_has_one_in_memory(
    project: Path,
    others: list[int],
    compute: Callable[[Path], None],
    loads: Callable[[Path], int],
) -> None:
    shutil.copytree(project / ADAPTERS[0], project / ADAPTERS[1])
    compute(project)
    assert others == [0] * loads(project)


def test_lora_compare_has_one_base_in_memory(project: Path, others: list[int], cli: Lora) -> None:
    code, out, _ = cli("compare", "der wind", "--max-tokens", "2", "--json", cwd=project)
    assert code == 0
    assert len(others) >= 3 and not any(others)
    # in the project's order, in whichever they were loaded
    variants = open_project(project / "params.yaml", BRIEF).variants
    assert [*json.loads(out)] == [name for name in variants if name in json.loads(out)]


def test_a_merge_is_compared_with_two_models_in_memory(project: Path, others: list[int]) -> None:
    folders = [
        project / f"artifacts/{name}" for name in ("expanded", "lora_adapter", "lora_merged")
    ]
    SameLogits(folders[0], folders[1], ["der wind"])(folders[2])
    assert others == [0, 1]
