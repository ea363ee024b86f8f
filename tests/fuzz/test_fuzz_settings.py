"""Settings: params.yaml, configs of other tools, task files of evaluate."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from pipeline.evaluation.tasks import read_tasks
from pipeline.project.foreign import read_config
from pipeline.stages.registry import GRAPH, open_project
from tests.helpers.fuzz import (
    NUMBERS,
    ODD,
    PATTERNS,
    as_json,
    changed,
    damaged,
    fuzz,
    read_or_refuse,
)
from tests.helpers.projects import ROOT

pytestmark = pytest.mark.slow
BOMBS = (  # YAML that is small and means much
    "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(
        f"{c}: &{c} [*{p},*{p},*{p},*{p},*{p},*{p},*{p},*{p},*{p}]\n"
        for p, c in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "a: &a {<<: *a}\n",
    "a: &a [*a]\n",
    "[" * 5_000,
    "{a: " * 5_000,
    "- " * 5_000,
    "!!python/object/apply:os.system ['touch ran']\n",
    "a: !!binary '%%%'\n",
    "a: !!timestamp '9999-99-99'\n",
    "a: 2001-02-30\n",
    "a: 0x" + "f" * 5_000,
    "a: " + "9" * 5_000,
    "a: 1" + ":59" * 2_000,  # base 60
    "%YAML 9.9\n---\na: 1\n",
    "? [a, b]\n: 1\n",
    "a: 1\n---\nb: 2\n",
    "\x85\u2028\ufeff",
)


def yaml_files(tree: Any, values: st.SearchStrategy[Any] = ODD) -> st.SearchStrategy[bytes]:
    """The bytes of a YAML file like `tree`: another tree, other bytes, or a text that means
    much.
    """
    # JSON is YAML, but for NaN, and what PyYAML writes may be what it reads
    trees = changed(tree, values).map(as_json)
    bombs = st.sampled_from([bomb.encode() for bomb in BOMBS])
    return st.one_of(
        trees, trees, trees, damaged(yaml.safe_dump(tree, sort_keys=False).encode()), bombs
    )


PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
PARAMS["training"] |= {"epochs": 3, "target_modules": ["q_proj"], "learning_rate": 1e-3}
PARAMS["finetune_sweep"] = {"grid": {"rank": [1, 2], "learning_rate": [1e-3, 1e-4]}}
PARAMS["running"] = None
VALUES = st.one_of(
    ODD, st.sampled_from((*NUMBERS, *PATTERNS, "1e-3", "../data/x.txt", ["a.txt", "a.txt"]))
)


@fuzz(
    "params",
    text=yaml_files({key: value for key, value in PARAMS.items() if key != "running"}, VALUES),
)
def test_params(folder: Path, text: bytes) -> None:
    (folder / "params.yaml").write_bytes(text)

    def look() -> None:
        project = open_project(folder / "params.yaml")
        for name in project.params.written:
            if name != "training":
                project.params.section(name)

    read_or_refuse(look, folder)


CONFIGS: dict[str, Any] = {
    "axolotl.yaml": {
        **{
            "base_model": "org/name",
            "adapter": "lora",
            "lora_r": 8,
            "lora_alpha": 16,
            "lora_target_linear": True,
        },
        **{
            "datasets": [{"path": "a.jsonl", "type": "alpaca"}],
            "load_in_4bit": True,
            "micro_batch_size": 2,
        },
        **{
            "gradient_accumulation_steps": 4,
            "num_epochs": 1,
            "learning_rate": 2e-4,
            "sequence_len": 64,
            "rl": None,
        },
    },
    "llama_factory.yaml": {
        **{
            "model_name_or_path": "org/name",
            "stage": "sft",
            "finetuning_type": "lora",
            "lora_rank": 8,
            "dataset": "a,b",
        },
        **{
            "lora_target": "all",
            "cutoff_len": 64,
            "per_device_train_batch_size": 1,
            "num_train_epochs": 3.0,
        },
    },
    "mlx.yaml": {
        **{
            "model": "org/name",
            "fine_tune_type": "lora",
            "num_layers": 4,
            "iters": 100,
            "batch_size": 2,
            "data": ".",
        },
        **{
            "lora_parameters": {
                "rank": 8,
                "scale": 20.0,
                "dropout": 0.0,
                "keys": ["self_attn.q_proj"],
            }
        },
        **{"lr_schedule": {"name": "cosine_decay", "warmup": 10, "arguments": [1e-5, 1000, 1e-7]}},
    },
    "training.json": {
        **{
            "output_dir": "out",
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-4,
            "num_train_epochs": 2,
        },
        **{
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.1,
            "optim": "adamw_torch",
            "bf16": True,
            "seed": 1,
        },
    },
    "adapter.json": {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj"],
        "use_dora": True,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configs_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(as_json(CONFIGS[name]))
    assert read_or_refuse(lambda: read_config(tmp_path / name, GRAPH.sections), tmp_path) is None


@fuzz(
    "configs of other tools",
    drawn=st.sampled_from(sorted(CONFIGS)).flatmap(
        lambda name: st.tuples(
            st.just(name), yaml_files(CONFIGS[name], st.one_of(ODD, st.sampled_from(NUMBERS)))
        )
    ),
)
def test_configs_of_other_tools(folder: Path, drawn: tuple[str, bytes]) -> None:
    name, text = drawn
    (folder / name).write_bytes(text)
    read_or_refuse(lambda: read_config(folder / name, GRAPH.sections), folder)


TASKS: list[dict[str, Any]] = [
    {
        **{
            "name": "capitals",
            "kind": "exact_match",
            "ignore_case": True,
            "max_new_tokens": 8,
            "stop": ["\n"],
        },
        **{
            "examples": [
                {"prompt": "France:", "answer": ["Paris"]},
                {"prompt": "Japan:", "completion": "Tokyo"},
            ]
        },
    },
    {
        "name": "dates",
        "kind": "regex",
        "chat": True,
        "examples": [{"prompt": "When?", "pattern": r"\d{4}"}],
    },
    {
        **{"name": "choose", "kind": "multiple_choice", "normalized": True},
        **{"examples": [{"prompt": "2+2", "choices": ["4", "5"], "answer": 0}]},
    },
    {"name": "rows", "kind": "contains", "file": "rows.jsonl"},
    {
        "name": "talk",
        "kind": "contains",
        "examples": [
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        ],
    },
]
TASK_VALUES = st.one_of(
    ODD, st.sampled_from((*PATTERNS, "../../etc/passwd", "evil.py", "python", "regex", *NUMBERS))
)


def test_the_tasks_are_read(tmp_path: Path) -> None:
    (tmp_path / "tasks.yaml").write_bytes(as_json(TASKS))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    assert (
        read_or_refuse(lambda: read_tasks(tmp_path, ["tasks.yaml", "rows.jsonl"]), tmp_path) is None
    )


@fuzz(
    "task files",
    text=yaml_files(TASKS, TASK_VALUES),
    answer=st.sampled_from(("", "a" * 100, "2024", "\0")),
)
def test_tasks(folder: Path, text: bytes, answer: str) -> None:
    (folder / "tasks.yaml").write_bytes(text)
    (folder / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    (folder / "evil.py").write_text("raise SystemExit('ran')")

    def look() -> None:
        for task in read_tasks(folder, ["tasks.yaml", "rows.jsonl"]):
            for example in task.examples:
                choices = task.kind.choices and task.kind.choices(example.row)
                task.score([-1.0] * len(choices) if choices else answer, example)

    read_or_refuse(look, folder)
