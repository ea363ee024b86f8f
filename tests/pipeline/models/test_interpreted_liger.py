"""Liger's kernels and ours, interpreted, against plain torch."""

import importlib.util
import json
import subprocess
import sys

import pytest

from tests.helpers.projects import ROOT

pytestmark = pytest.mark.slow
ERRORS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
# of ERRORS: the interpreter has no sums of bf16
PARTS = {"norm": 3, "loss": 3, "silu": 2, "gelu": 2, "rotation": 2}
CASES = [(part, dtype) for part, count in PARTS.items() for dtype in [*ERRORS][:count]]


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    for name in ("triton", "liger_kernel"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.interpreted_liger"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("part, dtype", CASES)
def test_its_outputs_and_gradients_are_those_of_the_formula(
    part: str, dtype: str, errors: dict[str, float]
) -> None:
    own = {
        name: error
        for name, error in errors.items()
        if name.startswith(part) and name.endswith(f".{dtype}")
    }
    assert own and all(error < ERRORS[dtype] for error in own.values()), own


def test_a_label_without_a_logit_has_no_loss(errors: dict[str, float]) -> None:
    assert errors["foreign labels"] == 0


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq"])
def test_weights_of_four_bits_have_the_bits_of_plain_torch(
    kind: str, errors: dict[str, float]
) -> None:
    assert errors[f"weights {kind}"] == 0


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_models_take_its_kernels_and_compute_the_same(
    family: str, errors: dict[str, float]
) -> None:
    """In fp32: logits and the gradient of the embedding."""
    assert errors[f"model {family}"] < 1e-4
