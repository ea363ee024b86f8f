"""A merged model whose certificate says that it answers as its adapter has the numbers of the
adapter.
"""

import math
from pathlib import Path

import pytest

from pipeline.data.formats import read_examples
from pipeline.evaluation.comparison import weight_bytes
from pipeline.inference import engine
from pipeline.inference.score import score
from pipeline.stages.evaluate import _answers_alike
from pipeline.stages.registry import open_project
from tests.helpers.json_files import read_json


def test_a_merged_model_is_not_measured_again_where_its_certificate_says_that_it_is_the_adapter(
    brief: Path,
) -> None:
    metrics = read_json(brief / "artifacts/evaluation/metrics.json")
    merged, lora = metrics["merged"], metrics["lora"]
    assert merged["measured_as"] == "lora" and "trainable" not in merged
    own = ("measured_as", "parameters", "bytes")
    shared = {key: value for key, value in merged.items() if key not in own}
    assert shared == {key: lora[key] for key in shared}
    # and these are the merged model's own numbers
    loaded = engine.load(brief / "artifacts/lora_merged")
    new = read_examples(brief / "data/finetune.de.txt", "data/finetune.de.txt")
    assert merged["new_loss"] == pytest.approx(score(loaded, new).loss, rel=1e-5)
    assert merged["bytes"] == weight_bytes(brief / "artifacts/lora_merged")
    assert list(metrics) == list(open_project(brief / "params.yaml").variants)
    for document in ("predictions.json", "samples.json"):
        answers = read_json(brief / "artifacts/evaluation" / document)
        assert answers["merged"] == answers["lora"]
    assert "so it was not measured again" in (brief / "artifacts/evaluation/report.md").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("certificate", "alike"),
    [
        ({"same_first_choices": 8, "prompts_checked": 8, "divergence": 1e-6}, True),
        ({"same_first_choices": 7, "prompts_checked": 8, "divergence": 1e-6}, False),
        ({"same_first_choices": 8, "prompts_checked": 8, "divergence": 0.01}, False),
        ({"same_first_choices": 8, "prompts_checked": 8, "divergence": math.nan}, False),
        ({"same_first_choices": 0, "prompts_checked": 0, "divergence": 0.0}, False),
        ({}, False),
    ],
)
def test_a_certificate_says_that_a_merge_answers_alike(
    certificate: dict[str, float], alike: bool
) -> None:
    assert _answers_alike(certificate) is alike
