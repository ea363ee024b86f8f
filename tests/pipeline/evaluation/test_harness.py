"""lm-evaluation-harness on our engine gives the numbers of its own `hf` model with PEFT, on local
tasks.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from pipeline.adapters.config import AdapterSpec
from pipeline.errors import UserError
from pipeline.evaluation.harness import HarnessOptions, named, run
from pipeline.evaluation.harness_model import HarnessModel
from pipeline.inference.model_pool import ModelPool
from tests.conftest import Lora
from tests.helpers.checkpoints import adapter, checkpoint
from tests.helpers.errors import user_error
from tests.helpers.families import FAMILIES, TEXTS, VOCABULARY, new_project

QUESTIONS = [  # a choice of one token, choices of several, white space at the end of a question
    {"question": "The currency of Bulgaria is the", "choices": ["euro", "lev", "yen"], "answer": 0},
    {"question": "Two and two", "choices": ["are four.", "has Paris", "a"], "answer": 0},
    {
        "question": "The capital of France is ",
        "choices": ["Paris, and the lev", "Sofia"],
        "answer": 0,
    },
    # more than the model takes
    {"question": " ".join(TEXTS), "choices": ["euro", "Sofia, and Japan"], "answer": 1},
]
TASKS: dict[str, dict[str, Any]] = {
    "toy_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "toy_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} {{choices[0]}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "toy_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": [" t", "\n"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def write_tasks(
    folder: Path, tasks: dict[str, dict[str, Any]], questions: Sequence[dict[str, Any]]
) -> Path:
    folder.mkdir()
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    (folder / "questions.jsonl").write_text(lines, encoding="utf-8")
    for name, task in tasks.items():
        local = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        }
        content = {"task": name, "test_split": "test", **local, **task}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A toy Llama of 64 positions, whose tokenizer writes BOS, and an adapter that changes its
    answers.
    """
    # rows without a token `hf` drops where an adapter is given
    family = replace(FAMILIES["llama"], rows=VOCABULARY)
    base = new_project(tmp_path_factory.mktemp("llama") / "project", family) / "base"
    # `hf` writes an end token that is an ordinary one, as this helper's 7 is, into its answer.
    (base / "generation_config.json").write_text('{"eos_token_id": 1}', encoding="utf-8")
    return base, adapter(
        base.parent / "adapter", base, AdapterSpec(4, 8.0, ("q_proj", "v_proj", "down_proj"))
    )


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "tasks", TASKS, QUESTIONS)


def theirs(base: Path, peft: Path | None, options: HarnessOptions) -> Any:
    """What lm-eval itself reports."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(
        pretrained=str(base),
        peft=str(peft) if peft else None,
        device="cpu",
        dtype="float32",
        batch_size=2,
    )
    manager = TaskManager(include_path=str(options.include_path), include_defaults=False)
    return simple_evaluate(
        model,
        tasks=list(options.tasks),
        task_manager=manager,
        num_fewshot=options.num_fewshot,
        apply_chat_template=options.apply_chat_template,
    )


@pytest.mark.parametrize(("fewshot", "chat"), [(None, False), (1, False), (1, True)])
def test_scores_equal_those_of_the_hf_model_with_peft(
    llama: tuple[Path, Path],
    tasks: Path,
    fewshot: int | None,
    chat: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # 15 s about the machine
    base, lora = llama
    options = HarnessOptions(list(TASKS), tasks, num_fewshot=fewshot, apply_chat_template=chat)
    answered = run(named(None, [lora]), options, False, lambda _: None)
    assert list(answered["results"]) == [str(base), str(lora)]
    for name, peft in ((str(base), None), (str(lora), lora)):
        expected = theirs(base, peft, options)
        for task, scores in answered["results"][name].items():
            numbers = {key: score["value"] for key, score in scores.items()}
            assert numbers == pytest.approx(
                {key: expected["results"][task][key] for key in numbers}, rel=1e-4
            )
            assert len(numbers) == len(TASKS[task]["metric_list"])
            stderr = expected["results"][task].get("acc_stderr,none", 0)
            assert scores.get("acc,none", {"stderr": 0})["stderr"] == pytest.approx(stderr)
            assert answered["tasks"][task]["num_fewshot"] == (fewshot or 0)


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each, task_name="t") for each in arguments]


@pytest.mark.parametrize("with_adapter", [False, True])
def test_each_answer_equals_that_of_the_hf_model(
    llama: tuple[Path, Path], with_adapter: bool
) -> None:
    from lm_eval.models.huggingface import HFLM

    base, lora = llama[0], llama[1] if with_adapter else None
    pool = ModelPool()
    pool.load("ours", base, lora)
    ours = HarnessModel(pool, "ours")
    other = HFLM(
        pretrained=str(base), peft=lora and str(lora), device="cpu", dtype="float32", batch_size=3
    )

    long = " ".join(TEXTS * 2)  # 88 tokens; the model takes 64
    pairs = [
        ("", "The euro."),
        ("<s>The capital", " of"),
        ("The capital of ", "France"),
        ("Two\n", "and"),
        (long, " lev"),
    ]
    pairs += [("Two and two are", choice) for choice in (" four", " Paris", " f", " is the euro.")]
    scored = [model.loglikelihood(requests(*pairs), disable_tqdm=True) for model in (ours, other)]
    assert [value for value, _ in scored[0]] == pytest.approx(
        [value for value, _ in scored[1]], rel=1e-4
    )
    assert [greedy for _, greedy in scored[0]] == [greedy for _, greedy in scored[1]]

    texts = requests(("Two and two are four.",), (long,))
    rolled = [model.loglikelihood_rolling(texts, disable_tqdm=True) for model in (ours, other)]
    assert rolled[0] == pytest.approx(rolled[1], rel=1e-4)

    prompts = ("The currency of Bulgaria is the", "<s>Two and", "Japan has ", long)
    whole = [
        model.generate_until(
            requests(*((text, {"until": [], "max_gen_toks": 20}) for text in prompts))
        )
        for model in (ours, other)
    ]
    assert whole[0] == whole[1]
    assert len(set(whole[0])) == len(prompts), (
        "they differ, so that one cannot be taken for another"
    )
    stops = sorted({text[n : n + 2] for text in whole[0] for n in (5, 8) if len(text) > n + 2})
    settings = {"until": [*stops, "<|end|>"], "max_gen_toks": 20}
    stopped = [
        model.generate_until(requests(*((text, dict(settings)) for text in prompts)))
        for model in (ours, other)
    ]
    assert stopped[0] == stopped[1]
    assert sum(map(len, stopped[0])) < sum(map(len, whole[0])), "some were stopped"


def test_repetitions_of_a_sampled_request_differ_and_can_be_repeated(
    llama: tuple[Path, Path],
) -> None:
    pool = ModelPool()
    pool.load("ours", llama[0], None)
    asked = requests(
        *[("Two and two", {"until": [], "max_gen_toks": 9, "do_sample": True, "temperature": 1.0})]
        * 4
    )
    first, again = (HarnessModel(pool, "ours").generate_until(asked) for _ in range(2))
    assert first == again
    assert len(set(first)) > 1


def test_an_answer_that_has_begun_is_left_open_in_the_chat_template(
    llama: tuple[Path, Path],
) -> None:
    pool = ModelPool()
    pool.load("ours", llama[0], None)
    asked = [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Fo"}]
    model = HarnessModel(pool, "ours")
    assert model.apply_chat_template(asked[:1]) == "user: Two?<|end|>\nassistant: "
    assert (
        model.apply_chat_template(asked, add_generation_prompt=False)
        == "user: Two?<|end|>\nassistant: Fo"
    )


def test_adapters_follow_their_bases(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, lora = llama
    other = checkpoint(tmp_path / "other", d_model=16)
    second = adapter(tmp_path / "second", other, AdapterSpec(1, 1.0, ("q_proj",)))
    third = adapter(tmp_path / "third", base, AdapterSpec(1, 1.0, ("q_proj",)))
    models = named(None, [lora, second, third])
    assert list(models.values()) == [
        (base, None),
        (base, lora),
        (base, third),
        (other, None),
        (other, second),
    ]
    assert list(named(other, [lora]).values()) == [(other, None), (other, lora)]
    assert list(named(base, []).values()) == [(base, None)]


WORDY = {"toy": {**TASKS["toy_choice"]}}
KNOWN = [{"question": "w1 w2", "choices": ["w3", "w4 w5"], "answer": 0}] * 3


def test_the_command_scores_every_variant_that_knows_the_words(
    brief: Path, cli: Lora, tmp_path: Path
) -> None:
    words = [{"question": "die katze sitzt auf dem", "choices": ["sofa", "wind"], "answer": 0}] * 2
    task = str(write_tasks(tmp_path / "t", WORDY, words) / "toy.yaml")
    code, out, err = cli("evaluate", "--harness", task, "--json", cwd=brief)
    assert code == 0, err
    document = json.loads(out)
    assert {"expanded", "lora", "merged"} <= document["results"].keys()
    assert "base does not know: wind" in err
    assert "base" not in document["results"]
    assert document["tasks"]["toy"]["examples"] == 2


def test_the_command_shows_a_table_of_base_and_adapter(cli: Lora, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "b", d_model=16)
    lora = adapter(tmp_path / "a", base, AdapterSpec(1, 1.0, ("q_proj",)))
    folder = write_tasks(tmp_path / "t", WORDY, KNOWN)
    given = ("--include-path", str(folder), "--limit", "2", "--adapter", "a", "--base", "b")
    code, out, err = cli("evaluate", "--harness", "toy", *given, cwd=tmp_path)
    assert code == 0, err
    heading, *rows = out.splitlines()
    assert heading.split() == ["task", "metric", "b", "a"]
    assert [row.split()[:3] for row in rows] == [["toy", "acc", "↑"], ["toy", "acc_norm", "↑"]]
    code, out, err = cli("evaluate", "--harness", "toy", *given, "--json", cwd=tmp_path)
    assert json.loads(out)["tasks"]["toy"]["examples"] == 2
    assert lora.is_dir()


def rejected(
    tmp_path: Path,
    task: dict[str, Any],
    questions: Sequence[dict[str, Any]] = KNOWN,
    **options: Any,
) -> str:
    """The message for a task on a toy model."""
    base = checkpoint(tmp_path / "b", d_model=16)
    names = options.pop("tasks", ["toy"])
    folder = write_tasks(tmp_path / "t", {"toy": {**TASKS["toy_choice"], **task}}, questions)
    return user_error(
        run, named(base, []), HarnessOptions(names, folder, **options), False, lambda _: None
    )


@pytest.mark.slow
def test_an_unknown_task_is_answered_with_the_nearest(tmp_path: Path) -> None:
    assert "unknown task toi, nothing. Did you mean toy" in rejected(
        tmp_path, {}, tasks=["toi", "toy", "nothing"]
    )


def test_data_of_the_hub_needs_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # between its five attempts
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    message = rejected(tmp_path, {"dataset_path": "org/name", "dataset_kwargs": {}})
    assert message.startswith("task toy cannot be loaded: ")
    assert "org/name" in message
    assert "`dataset_path: json`" in message


def test_what_a_task_raises_is_one_message(tmp_path: Path) -> None:
    message = rejected(tmp_path, {"doc_to_text": "{{question / 0}}"})
    assert message.startswith("task toy cannot be loaded: TypeError: ")
    assert "\n" not in message


def test_a_task_whose_code_exits_is_one_message(tmp_path: Path) -> None:
    task = tmp_path / "toy.yaml"
    task.write_text(
        "task: toy\noutput_type: loglikelihood_rolling\ndoc_to_text: !function code.text\n"
        "doc_to_target: x\ntest_split: test\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n",
        encoding="utf-8",
    )
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    code = "def text(row):\n    raise SystemExit('no words')\n"
    (tmp_path / "code.py").write_text(code, encoding="utf-8")
    message = user_error(run, {}, HarnessOptions([str(task)]), False, lambda _: None)
    assert "cannot be loaded: SystemExit: no words." in message


def test_settings_of_generation_that_are_not_supported_are_named(tmp_path: Path) -> None:
    beams = {"until": ["."], "num_beams": 4}
    task = {
        "output_type": "generate_until",
        "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": beams,
    }
    assert "toy: generation_kwargs num_beams is not supported" in rejected(tmp_path, task)


def test_an_answer_as_long_as_the_model_is_rejected(tmp_path: Path) -> None:
    long = {"until": ["."], "max_gen_toks": 100_000}
    task = {
        "output_type": "generate_until",
        "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": long,
    }
    assert "toy: max_gen_toks must be from 1 to" in rejected(tmp_path, task)


def test_words_that_no_model_knows(tmp_path: Path) -> None:
    unknown = [{"question": "der", "choices": ["wind", "das"], "answer": 0}]
    assert "No model knows the words" in rejected(tmp_path, {}, unknown)


def test_a_missing_folder_of_tasks_is_named(tmp_path: Path) -> None:
    options = HarnessOptions(["toy"], tmp_path / "missing")
    with pytest.raises(UserError, match=r"--include-path: .*missing is not a folder"):
        run({}, options, False, lambda _: None)


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.errors.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'lora-workbench\[harness\]'"):
        run({}, HarnessOptions(["toy"]), False, lambda _: None)


def test_options_of_the_harness_need_a_task(brief: Path, cli: Lora) -> None:
    for given in (["--num-fewshot", "0"], ["--base", "a"], ["--apply-chat-template"]):
        code, _, err = cli("evaluate", *given, cwd=brief)
        assert (code, err.count("\n")) == (1, 1)
        assert "Without --harness TASK" in err
