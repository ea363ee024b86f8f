"""Sample answers: which examples are asked, how the answers are counted, and the limit on them."""

from pathlib import Path

import pytest

from pipeline.data.answers.questions import MOST_TOKENS, questions
from pipeline.data.examples import Example
from pipeline.evaluation import samples
from pipeline.evaluation.comparison import comparison
from pipeline.evaluation.limits import verdict
from pipeline.evaluation.samples import count_answers, sample_answers
from pipeline.inference import engine
from pipeline.inference.engine import LoadedModel
from tests.helpers.families import FAMILIES, new_project
from tests.helpers.json_files import read_json


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return engine.load(
        new_project(tmp_path_factory.mktemp("llama") / "p", FAMILIES["llama"]) / "base",
        None,
        "base",
    )


def example(
    number: int, completion: str = " Paris", prompt: str = "The capital of France is"
) -> Example:
    return Example(prompt + completion, "rows.jsonl", number, prompt=prompt)


def test_questions_come_evenly_from_a_file_and_leave_out_what_cannot_be_asked(
    llama: LoadedModel,
) -> None:
    rows = [example(n, f" {n}") for n in range(90)]
    asked = questions(rows, llama.tokenizer, 3, 100)
    assert [question.expected for question in asked] == [" 0", " 30", " 60"]
    plain = Example("a text without a prompt", "rows.txt", 1)
    long = example(1, prompt="Paris " * 200)
    assert questions([plain, long], llama.tokenizer, 5, 100) == []
    (endless,) = questions([example(1, " Paris" * 5000)], llama.tokenizer, 5, 100)
    assert endless.limit == MOST_TOKENS


def test_answers_are_the_models_own_and_have_room_for_the_expected_one(llama: LoadedModel) -> None:
    rows = sample_answers(llama, [example(1), example(2, " the yen" * 60)], 5)
    for row, expected in zip(rows, (" Paris", " the yen" * 60), strict=True):
        tokens = len(llama.tokenizer.encode_following(expected))
        room = min(
            max(64, tokens + 16),
            llama.model.max_length - len(llama.tokenizer.encode(row["prompt"])),
        )
        assert row["answer"] == engine.complete(llama, row["prompt"], room).strip()
        assert row["reference"] == expected


def test_answers_are_counted_and_a_limit_can_be_set_on_them(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ['{"city": "Paris"}', '{"city":"Paris"}', '{"city": "Sofia"}', "Paris"]
    monkeypatch.setattr(samples, "complete_all", lambda *_: said)
    rows = sample_answers(llama, [example(n, '{"city": "Paris"}') for n in range(4)], 4)
    assert [row["match"] for row in rows] == ["exact", "JSON", "different", "different"]
    assert [row.get("differs") for row in rows] == [None, None, ["city"], [""]]
    counts = count_answers(rows)
    assert counts["answers"] == {
        "n": 4,
        "as_expected": 2,
        "exact": 1,
        "white_space": 0,
        "json": 1,
        "differs": {"city": 1, "": 1},
    }
    assert count_answers([]) == {}
    for least, passed in ((0.5, True), (0.51, False)):
        assert verdict({"answers": least}, {"lora": counts}, ["lora"])["passed"] is passed
    assert not verdict({"answers": 0.0}, {"lora": {}}, ["lora"])["passed"], "not measured"
    columns, table_rows = comparison({"lora": {**counts, "bytes": 1}})
    assert dict(zip(columns, table_rows[0], strict=True))["answers\nas data"] == "2/4"


def test_texts_without_prompts_are_not_asked(brief: Path) -> None:
    metrics = read_json(brief / "artifacts/evaluation/metrics.json")
    assert not any("answers" in numbers for numbers in metrics.values())
