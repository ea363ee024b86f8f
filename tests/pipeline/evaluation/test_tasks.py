"""Task files are read, refused and asked; the numbers are those of transformers, of one prompt at a
time.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import UserError
from pipeline.evaluation.answers import Answers, ask, score, summary
from pipeline.evaluation.tasks import Task, read_tasks, task_prompts
from pipeline.inference import engine
from pipeline.inference.completions import complete_all
from pipeline.inference.engine import LoadedModel
from tests.helpers.checkpoints import WORDS, adapter, checkpoint
from tests.helpers.errors import user_error
from tests.helpers.families import ASKED, FAMILIES, new_project
from tests.helpers.json_files import write_jsonl

CAPITALS: dict[str, Any] = {
    "name": "capitals",
    "kind": "exact_match",
    "examples": [
        {"prompt": "The capital of France is", "answer": "Paris"},
        {"prompt": "Two and two?", "answer": "Four."},
    ],
}
# Nine aliases of nine aliases of nine …
LAUGHS = "a: &a [x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefghi")
)
CHOICE = {
    "prompt": "The capital of Bulgaria is",
    "choices": ["Sofia", "the lev", "Paris and the yen"],
    "answer": "Sofia",
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return engine.load(
        new_project(tmp_path_factory.mktemp("llama") / "p", FAMILIES["llama"]) / "base",
        None,
        "base",
    )


def write(root: Path, *tasks: Any, name: str = "tasks.yaml") -> str:
    plain = json.loads(json.dumps(tasks))  # or what they share would be written as an alias
    (root / name).write_text(yaml.safe_dump(plain, allow_unicode=True), encoding="utf-8")
    return name


def one(root: Path, task: dict[str, Any], *more: str) -> Task:
    (read,) = read_tasks(root, [write(root, task), *more])
    return read


def test_yaml_and_json_lines_say_the_same(tmp_path: Path) -> None:
    other = {"name": "more", "kind": "multiple_choice", "normalized": True, "examples": [CHOICE]}
    lines = [json.dumps(task) for task in (CAPITALS, other)]
    (tmp_path / "tasks.jsonl").write_text("\n".join(lines), encoding="utf-8")
    in_yaml, in_lines = (
        read_tasks(tmp_path, [name]) for name in (write(tmp_path, CAPITALS, other), "tasks.jsonl")
    )
    for here, there in zip(in_yaml, in_lines, strict=True):
        assert (here.name, here.kind, here.options) == (there.name, there.kind, there.options)
        assert [example.row for example in here.examples] == [
            example.row for example in there.examples
        ]


def test_the_prompts_of_tasks_are_read_without_their_scorers(tmp_path: Path) -> None:
    (tmp_path / "more.csv").write_text("prompt,answer\nWhy?,So.\n", encoding="utf-8")
    asked = [
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]}
    ]
    tasks = [CAPITALS, {"name": "m", "kind": "python", "scorer": "gone.py", "examples": asked}]
    tasks.append({"name": "f", "kind": "contains", "file": "more.csv"})
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(tasks), encoding="utf-8")
    prompts = [prompt for prompt, _ in task_prompts(tmp_path / "tasks.yaml", "tasks.yaml")]
    assert prompts == ["The capital of France is", "Two and two?", "Who?", "Why?"]


@pytest.mark.parametrize(
    "task",
    [
        {"examples": [{"messages": [{"role": "assistant", "content": "Me."}]}]},
        {"file": "a\0b"},
        {"file": "\ud800"},
    ],
)
def test_what_is_no_task_has_no_prompts(tmp_path: Path, task: dict[str, Any]) -> None:
    write_jsonl(tmp_path / "t.jsonl", [{"name": "t", "kind": "contains", **task}])
    with pytest.raises(UserError, match=r"^t\.jsonl: t"):
        list(task_prompts(tmp_path / "t.jsonl", "t.jsonl"))


def test_examples_come_from_any_data_file(tmp_path: Path) -> None:
    rows = [("Two and two?", "Four."), ("Which capital?", "Paris.")]
    (tmp_path / "a.csv").write_text(
        "prompt,answer,note\n" + "".join(f"{p},{a},x\n" for p, a in rows), encoding="utf-8"
    )
    write_jsonl(tmp_path / "b.jsonl", ({"prompt": p, "completion": f" {a}"} for p, a in rows))
    turns = [[{"role": "user", "content": p}, {"role": "assistant", "content": a}] for p, a in rows]
    write_jsonl(tmp_path / "c.jsonl", ({"messages": t} for t in turns))
    for file in ("a.csv", "b.jsonl", "c.jsonl"):
        task = one(tmp_path, {"name": "t", "kind": "exact_match", "file": file}, file)
        assert [score(task, [a for _, a in rows]), score(task, ["", ""])] == [
            [{"score": 1}] * 2,
            [{"score": 0}] * 2,
        ]
        asked = [
            (e.prompt if isinstance(e.prompt, str) else e.prompt[-1]["content"])
            for e in task.examples
        ]
        assert asked == [p for p, _ in rows]
        assert task.examples[0].location == f"{file}:{2 if file == 'a.csv' else 1}"


def test_a_file_that_yaml_wrote_with_anchors_is_read_as_written_out(tmp_path: Path) -> None:
    examples = [{"prompt": "Which capital?", "answer": "Paris"}]
    tasks = [
        {"name": name, "kind": "contains", "examples": examples, "chat": True}
        for name in ("a", "b")
    ]
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(tasks), encoding="utf-8")
    assert "*id001" in (tmp_path / "tasks.yaml").read_text(encoding="utf-8")
    first, second = read_tasks(tmp_path, ["tasks.yaml"])
    assert (
        [example.row for example in first.examples]
        == [example.row for example in second.examples]
        == examples
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "tasks.yaml must be a list of tasks, each with name, kind and examples, got None"),
        ("a: [", "tasks.yaml is not valid YAML: "),
        ("? [a]\n: b", "tasks.yaml is not valid YAML: "),
        ("[" * 2000, "tasks.yaml is not valid YAML: "),
        ("- &a [1]\n- *a", "tasks.yaml must be a list of tasks"),
        (
            LAUGHS,
            "tasks.yaml is not valid YAML: its aliases (*name) stand for more than 1,000,000 "
            "values",
        ),
        pytest.param(
            f"a: &a {'x' * 200_000}\nb: [{', '.join(['*a'] * 1000)}]",
            "tasks.yaml is not valid YAML: its aliases (*name) stand for more than 1,000,000 "
            "values",
            id="a long text a thousand times",
        ),
        ("[1]", "tasks.yaml must be a list of tasks"),
        ("- {kind: regex}", "tasks.yaml: task 1: name must be a text of at most 60 letters"),
        (
            '- {name: "\\e[31m", kind: regex}',
            "tasks.yaml: task 1: name must be a text of at most 60 letters",
        ),
        (
            "- {name: t, kind: regexp}",
            "tasks.yaml: t: kind must be one of contains, exact_match, multiple_choice, python",
        ),
        (
            "- {name: t, kind: contains, exemples: []}",
            "tasks.yaml: t: unknown key 'exemples'. Did you mean 'examples'?",
        ),
        ("- {name: t, kind: contains}", "tasks.yaml: t: give examples, a list, or file"),
        (
            "- {name: t, kind: contains, examples: [], file: x}",
            "tasks.yaml: t: give examples, a list, or file",
        ),
        (
            "- {name: t, kind: contains, examples: []}",
            "tasks.yaml: t: examples must be a list of examples",
        ),
        (
            "- {name: t, kind: contains, examples: [a]}",
            "tasks.yaml: t, example 1 must have keys such as prompt and answer",
        ),
        (
            "- {name: t, kind: contains, examples: [{answer: a}]}",
            "tasks.yaml: t, example 1: prompt must be a string",
        ),
        (
            "- {name: t, kind: contains, file: x.csv}",
            "tasks.yaml: t: file x.csv is not in evaluate.tasks. Add it there",
        ),
        (
            '- {name: t, kind: contains, file: "a\\0b"}',
            "tasks.yaml: task 1: file must not have a NUL or half a surrogate pair in a text",
        ),
        (
            '- {name: t, kind: python, scorer: "a\\0b", examples: [{prompt: a}]}',
            "tasks.yaml: task 1: scorer must not have a NUL or half a surrogate pair in a text",
        ),
        (
            "- {name: t, kind: contains, examples: [{messages: [{role: assistant, content: a}]}]}",
            "tasks.yaml: t, example 1: messages must have a turn before the answer",
        ),
        (
            "- {name: t, kind: contains, max_new_tokens: 0, examples: [{prompt: a, answer: b}]}",
            "tasks.yaml: t: max_new_tokens must be at least 1, got 0. Edit tasks.yaml.",
        ),
        (
            "- {name: t, kind: multiple_choice, stop: x, examples: [{prompt: a, answer: b}]}",
            "tasks.yaml: t: unknown key 'stop'",
        ),
        (
            "- {name: t, kind: python, examples: [{prompt: a}]}",
            'tasks.yaml: t: a task of kind python needs "scorer"',
        ),
        (
            "- {name: t, kind: contains, examples: [{prompt: a, answer: b}]}\n" * 2,
            "tasks.yaml: task 2: there are two tasks 't'. Rename one of them.",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_message(
    tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "tasks.yaml").write_text(text, encoding="utf-8")
    reason = user_error(read_tasks, tmp_path, ["tasks.yaml"])
    assert reason.startswith(said)
    assert len(reason) < 400


def test_a_file_that_no_task_names_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n', encoding="utf-8")
    with pytest.raises(
        UserError, match=r"^rows.jsonl is in evaluate.tasks, but no task is in it and none names it"
    ):
        read_tasks(tmp_path, [write(tmp_path, CAPITALS), "rows.jsonl"])


def test_log_likelihoods_are_those_of_transformers(tmp_path: Path, llama: LoadedModel) -> None:
    chat = [{"role": "user", "content": ASKED[0][0]}]
    rows: list[Any] = [
        CHOICE,
        {**CHOICE, "prompt": chat},
        {"prompt": "Japan has", "choices": ["the yen", "lev"], "answer": 0},
    ]
    task = one(tmp_path, {"name": "t", "kind": "multiple_choice", "examples": rows})
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(llama.base),
        AutoTokenizer.from_pretrained(llama.base),
    )
    answers = ask(llama, task)
    for row, answer in zip(rows, answers, strict=True):
        is_chat = isinstance(row["prompt"], list)
        prompt = (
            tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
            if is_chat
            else row["prompt"]
        )
        for choice, value in zip(row["choices"], answer, strict=True):
            before = tokenizer(prompt, add_special_tokens=not is_chat).input_ids
            # the template ends with a space, which the model has read when it answers
            whole = (
                before
                + tokenizer(choice if is_chat else f" {choice}", add_special_tokens=False).input_ids
            )
            with torch.no_grad():
                log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            expected = sum(float(log_p[n - 1, whole[n]]) for n in range(len(before), len(whole)))
            assert value == pytest.approx(expected, abs=1e-3)
    best = [float(answer.index(max(answer)) == 0) for answer in answers]
    assert [each["score"] for each in score(task, answers)] == best


@pytest.mark.parametrize("kind", ["base", "lora", "prefix"])
def test_many_completions_are_those_of_one_prompt_at_a_time(tmp_path: Path, kind: str) -> None:
    from pipeline.adapters.config import AdapterSpec
    from pipeline.adapters.virtual import attach_virtual_tokens, save_virtual
    from pipeline.models.load import load_base

    base, folder = checkpoint(tmp_path / "base"), None
    if kind == "lora":
        folder = adapter(tmp_path / "lora", base, AdapterSpec(3, 6.0, ("q_proj", "fc1")))
    elif kind == "prefix":
        folder = tmp_path / "prefix"
        folder.mkdir()
        model, tokenizer = load_base(base)
        attach_virtual_tokens(model, "prefix", 3, len(tokenizer), seed=0)
        save_virtual(folder, model, str(base))
    loaded = engine.load(base, folder, kind)
    # more than a batch, of several lengths
    prompts = [" ".join(WORDS[n : n + 1 + n % 5]) for n in range(40)]
    alone = [engine.complete(loaded, prompt, 7) for prompt in prompts]
    assert complete_all(loaded, prompts, 7) == alone
    assert len({*alone}) > 10, "the model says something of each"
    stop = alone[3].split()[2]
    cut = [text[: text.find(stop)].strip() if stop in text else text for text in alone]
    assert complete_all(loaded, prompts, 7, ["nowhere", stop]) == cut
    assert complete_all(loaded, [], 7) == []


def test_options_of_a_task_reach_the_model(tmp_path: Path, llama: LoadedModel) -> None:
    def answers(**options: Any) -> Sequence[str]:
        return ask(llama, one(tmp_path, {**CAPITALS, **options}))

    prompts = [example["prompt"] for example in CAPITALS["examples"]]
    assert answers(max_new_tokens=5) == [engine.complete(llama, prompt, 5) for prompt in prompts]
    chats = [
        llama.tokenizer.render([{"role": "user", "content": prompt}], True) for prompt in prompts
    ]
    assert answers(max_new_tokens=5, chat=True) == [
        engine.complete(llama, chat, 5) for chat in chats
    ]


def test_where_training_asks_in_the_template_tasks_do_unless_they_say_otherwise(
    tmp_path: Path, llama: LoadedModel
) -> None:
    def answers(**options: Any) -> Sequence[str]:
        return ask(
            llama, one(tmp_path, {**CAPITALS, "max_new_tokens": 5, **options}), templated=True
        )

    prompts = [example["prompt"] for example in CAPITALS["examples"]]
    chats = [
        llama.tokenizer.render([{"role": "user", "content": prompt}], True) for prompt in prompts
    ]
    assert answers() == [engine.complete(llama, chat, 5) for chat in chats]
    assert answers(chat=False) == [engine.complete(llama, prompt, 5) for prompt in prompts]
    assert answers() != answers(chat=False)


def test_a_word_that_a_model_does_not_know_costs_its_example_and_no_more(tmp_path: Path) -> None:
    loaded = engine.load(checkpoint(tmp_path / "base"), None, "base")
    said = engine.complete(loaded, "w1", 3)
    rows: list[dict[str, Any]] = [
        {"prompt": "w1", "answer": said},
        {"prompt": "w1 euro", "answer": said},
    ]
    task = one(
        tmp_path, {"name": "t", "kind": "exact_match", "max_new_tokens": 3, "examples": rows}
    )
    assert ask(loaded, task) == [said, None]
    assert score(task, [said, None]) == [{"score": 1}, {"score": 0}]
    rows = [
        {"prompt": prompt, "choices": ["w1", "euro"], "answer": "w1"}
        for prompt in ("w1", "w1 euro")
    ]
    task = one(tmp_path, {"name": "t", "kind": "multiple_choice", "examples": rows})
    (first, unknown), nothing = ask(loaded, task)
    assert (first < 0, unknown, nothing) == (True, None, [None, None])
    assert [each["score"] for each in score(task, [[first, unknown], nothing])] == [1, 0]


def test_a_prompt_that_is_too_long_is_named(tmp_path: Path) -> None:
    loaded = engine.load(checkpoint(tmp_path / "base"), None, "base")  # 32 positions
    long = " ".join(WORDS[:32])
    task = one(
        tmp_path,
        {"name": "t", "kind": "contains", "examples": [{"prompt": f"{long} w1", "answer": "x"}]},
    )
    with pytest.raises(
        UserError, match=r"^tasks.yaml: t, example 1: The prompt has 33 tokens; base takes 32"
    ):
        ask(loaded, task)
    rows = [{"prompt": long, "choices": ["w1", "w2 w3"], "answer": 0}]
    task = one(tmp_path, {"name": "t", "kind": "multiple_choice", "examples": rows})
    with pytest.raises(
        UserError,
        match=r"^tasks.yaml: t, example 1: prompt and choice have 34 tokens; base takes 32",
    ):
        ask(loaded, task)


def test_the_difference_is_of_each_example_from_the_base() -> None:
    mine, base = (
        [{"score": value} for value in values]
        for values in ((1.0, 1.0, 0.0, 1.0), (0.0, 1.0, 0.0, 1.0))
    )
    measured = summary(mine, base)
    assert (measured["score"], measured["n"]) == (0.75, 4)
    assert measured["difference"]["score"] == 0.25
    assert 0 <= measured["difference"]["low"] <= 0.25 <= measured["difference"]["high"] <= 1
    assert "difference" not in summary(base, None)
    both = summary([{"score": 1.0, "acc_norm": 0.0}], [{"score": 0.0, "acc_norm": 0.0}])
    assert both["acc_norm"] == {
        "score": 0,
        "low": 0,
        "high": 0,
        "difference": {"score": 0, "low": 0, "high": 0},
    }


def test_an_example_without_an_answer_has_zero_of_all_that_a_kind_measures(tmp_path: Path) -> None:
    task = replace(one(tmp_path, CAPITALS), score=lambda _answer, _row: {"score": 1.0, "more": 0.5})
    for answers in (["a", None], [None, "a"]):
        measured = summary(score(task, answers), score(task, [None, None]))
        assert (measured["score"], measured["more"]["score"]) == (0.5, 0.25)
        assert measured["more"]["difference"]["score"] == 0.25


def test_every_answer_is_kept_with_its_scores(tmp_path: Path, llama: LoadedModel) -> None:
    tasks = read_tasks(
        tmp_path,
        [
            write(
                tmp_path, CAPITALS, {"name": "mc", "kind": "multiple_choice", "examples": [CHOICE]}
            )
        ],
    )
    answers = Answers(tasks, templated=False)
    measured = answers.add(llama)["tasks"]
    kept = json.loads(json.dumps(answers.predictions()))["tasks"]
    assert [row["prompt"] for row in kept["capitals"]] == [
        example["prompt"] for example in CAPITALS["examples"]
    ]
    for name in ("capitals", "mc"):
        scores = [row["answers"]["base"]["score"] for row in kept[name]]
        assert measured[name]["score"] == sum(scores) / len(scores)
    said = kept["mc"][0]["answers"]["base"]
    assert (
        said["answer"]
        == CHOICE["choices"][said["log_likelihoods"].index(max(said["log_likelihoods"]))]
    )
