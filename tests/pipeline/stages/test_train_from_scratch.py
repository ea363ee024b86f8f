"""Training from scratch: the base's shape and vocabulary, nothing of its weights, old and new data
together.
"""

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.data import formats
from pipeline.data.containers import Row, read_rows
from pipeline.data.examples import Example, in_evaluation
from pipeline.data.formats import read_examples
from pipeline.data.masking import Encoded, Encoder
from pipeline.errors import UserError
from pipeline.models.load import load_base
from pipeline.models.minigpt import MiniGPT, MiniGPTConfig
from pipeline.project.logs.run_log import read_steps
from pipeline.project.runner import Progress, run
from pipeline.stages.registry import open_project
from tests.helpers.families import FAMILIES, new_project
from tests.helpers.json_files import read_json
from tests.helpers.projects import (
    BRIEF,
    STAGES,
    WORK,
    folder_bytes,
    load,
    make,
    make_base,
    make_one,
    note_texts,
)

FOLDER = "artifacts/from_scratch"
STILL = [
    "train_from_scratch.epochs=1",
    "train_from_scratch.learning_rate=1e-12",
]  # so small a rate leaves the weights as they began


def weights(root: Path, name: str = FOLDER) -> dict[str, torch.Tensor]:
    return load_file(root / name / "model.safetensors")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy Llama stored in fp32, expanded. Copy it before anything is made in it."""
    return make_base(new_project(tmp_path_factory.mktemp("scratch") / "p", FAMILIES["llama"]))


@pytest.fixture
def real(llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llama, tmp_path / "p")


def test_minigpt_begins_with_its_own_initialisation_from_the_seed(project: Path) -> None:
    make(project, ["train_from_scratch"], [*BRIEF, *STILL, "train_from_scratch.seed=7"])
    config = read_json(project / "artifacts/expanded/config.json")
    torch.manual_seed(7)
    expected = MiniGPT(MiniGPTConfig.from_opt(config, "config"))
    found = load_base(project / FOLDER).model
    for name, value in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), value, atol=1e-9, rtol=0)


def test_another_base_begins_with_the_weights_that_transformers_gives_its_config(
    real: Path,
) -> None:
    make(real, ["train_from_scratch"], [*STILL, "train_from_scratch.seed=7"])
    config = AutoConfig.from_pretrained(real / "artifacts/expanded")
    torch.manual_seed(7)
    expected = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    found = AutoModelForCausalLM.from_pretrained(real / FOLDER)
    for name, value in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), value, atol=1e-9, rtol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stored", ["fp32", "bf16"])
def test_no_weight_of_the_base_leaves_a_trace(real: Path, stored: str, precision: str) -> None:
    """Bases that differ in every weight give the same bytes, in the bits that the base is stored
    in.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[stored]
    made = []
    for scale in (1.0, 1.7):
        changed = {name: (scale * value).to(dtype) for name, value in weights(real, "base").items()}
        save_file(changed, real / "base/model.safetensors", metadata={"format": "pt"})
        make(
            real,
            ["pretrain", "expand_vocab", "train_from_scratch"],
            [f"import.dtype={stored}", f"train_from_scratch.precision={precision}"],
        )
        made.append((real / FOLDER / "model.safetensors").read_bytes())
    assert made[0] == made[1]
    assert {value.dtype for value in weights(real).values()} == {dtype}
    steps = read_steps(real / FOLDER / "loss.csv")
    assert steps[-1].loss < 0.9 * steps[0].loss


def test_the_seed_decides_and_two_runs_give_the_same_bytes(project: Path) -> None:
    first = folder_bytes(project / FOLDER)
    make(project, ["train_from_scratch"], BRIEF, force=True)
    assert folder_bytes(project / FOLDER) == first
    make(project, ["train_from_scratch"], [*BRIEF, "train_from_scratch.seed=1"])
    assert (project / FOLDER / "model.safetensors").read_bytes() != first["model.safetensors"]


@pytest.mark.slow
def test_a_run_that_stops_goes_on_and_ends_with_the_same_bytes(real: Path) -> None:
    given = [
        "train_from_scratch.epochs=8",
        "train_from_scratch.precision=bf16",
        "train_from_scratch.eval_share=0.2",
        "train_from_scratch.schedule=cosine",
    ]
    make(real, ["train_from_scratch"], given)
    expected = folder_bytes(real / FOLDER)
    shutil.rmtree(real / "runs/train_from_scratch")
    shutil.rmtree(real / ".lora-cache")
    events = run(
        open_project(real / "params.yaml", given),
        STAGES["train_from_scratch"],
        WORK["train_from_scratch"],
        checkpoint_every=5,
    )
    next(event for event in events if isinstance(event, Progress) and event.done == 13)
    events.close()
    _, seen = make_one(real, "train_from_scratch", given)
    assert "train_from_scratch: resumed after step 10" in note_texts(seen)
    assert folder_bytes(real / FOLDER) == expected


def test_each_epoch_holds_the_examples_of_every_file(brief: Path) -> None:
    """Also in other order: the files' tokens add up."""

    def tokens(*stages: str) -> int:
        return sum(read_steps(brief / "runs" / stage / "loss.csv")[-1].tokens for stage in stages)

    assert tokens("train_from_scratch") == tokens("pretrain", "finetune_full")  # two epochs each


def test_what_is_held_out_is_held_out_of_every_file(project: Path) -> None:
    share = 0.3
    names = load(project / "params.yaml").train_from_scratch.data
    examples = [example for name in names for example in read_examples(project / name, name)]
    kept = [example for example in examples if not in_evaluation(example, share)]
    held = {example.file for example in examples if in_evaluation(example, share)}
    assert len(names) == 2 and held == set(names), "the share is to hold out of both"
    make(
        project,
        ["train_from_scratch"],
        [
            *BRIEF,
            "train_from_scratch.epochs=1",
            f"train_from_scratch.eval_share={share}",
            "train_from_scratch.window=0",
        ],
    )
    steps = read_steps(project / FOLDER / "loss.csv")
    # each word's next, <eos> at the end
    assert steps[-1].tokens == sum(len(example.text.split()) for example in kept)
    assert steps[-1].eval_loss is not None
    with pytest.raises(
        UserError,
        match=rf"1e-09 selects 0 of {len(examples)} labelled examples of {', '.join(names)}",
    ):
        make(project, ["train_from_scratch"], [*BRIEF, "train_from_scratch.eval_share=1e-9"])
    reason = rf"train_from_scratch.eval_share 0.9999 selects all {len(examples)} labelled examples of {', '.join(names)}"
    with pytest.raises(UserError, match=reason):
        make(project, ["train_from_scratch"], [*BRIEF, "train_from_scratch.eval_share=0.9999"])


def test_each_example_is_read_and_tokenized_once_also_where_some_are_held_out(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, tokenized = Counter[str](), Counter[str]()
    encode = Encoder._encode

    def read_file(path: Path, name: str, *how: Any) -> Iterator[Row]:
        read[name] += 1
        return read_rows(path, name, *how)

    def encode_counted(encoder: Encoder, example: Example, *how: Any) -> Encoded:
        tokenized[example.location] += 1
        return encode(encoder, example, *how)

    make(project, ["pretrain", "expand_vocab"], BRIEF)
    monkeypatch.setattr(formats, "read_rows", read_file)
    monkeypatch.setattr(Encoder, "_encode", encode_counted)
    settings = ["train_from_scratch.epochs=1", "train_from_scratch.eval_share=0.3"]
    make_one(project, "train_from_scratch", [*BRIEF, *settings])
    names = load(project / "params.yaml").train_from_scratch.data
    assert read == dict.fromkeys(names, 1)
    assert len(tokenized) > 20 and set(tokenized.values()) == {1}


def test_a_warm_up_that_lasts_as_long_as_the_training_is_refused(project: Path) -> None:
    make(project, ["train_from_scratch"], BRIEF)
    total = len(read_steps(project / FOLDER / "loss.csv"))
    make(project, ["train_from_scratch"], [*BRIEF, f"train_from_scratch.warmup_steps={total - 1}"])
    last = read_steps(project / FOLDER / "loss.csv")[-1]
    assert last.learning_rate == load(project / "params.yaml").train_from_scratch.learning_rate, (
        "it is reached"
    )
    for steps in (total, 1_000_000):
        problem = (
            rf"train_from_scratch.warmup_steps must be below {total}, the total number of training steps, "
            rf"got {steps}. Lower it."
        )
        with pytest.raises(UserError, match=problem):
            make(
                project,
                ["train_from_scratch"],
                [*BRIEF, f"train_from_scratch.warmup_steps={steps}"],
            )
    rows = "finetune_sweep, warmup_steps-1000000: finetune_lora.warmup_steps must be below "
    with pytest.raises(UserError, match=rows):
        make(
            project,
            ["finetune_sweep"],
            [*BRIEF, "finetune_sweep.grid={warmup_steps: [0, 1000000]}"],
        )


def test_a_problem_is_at_the_line_of_the_file_that_has_it(project: Path) -> None:
    with pytest.raises(
        UserError, match=r"step 2, on (?=.*data/pretrain.de.txt:\d)(?=.*data/finetune.de.txt:\d)"
    ):
        make(
            project,
            ["train_from_scratch"],
            [*BRIEF, "train_from_scratch.learning_rate=1e30", "train_from_scratch.batch_size=40"],
        )
    (project / "data/finetune.de.txt").write_text(
        "der wind weht\nder hagel fällt\n", encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"data/finetune.de.txt:2: not in the vocabulary: hagel"):
        make(project, ["train_from_scratch"], BRIEF)
    with pytest.raises(
        UserError,
        match=r"train_from_scratch.data must be a file or folder, or a list of them, .* got \[\]. Change it",
    ):
        make(project, ["train_from_scratch"], [*BRIEF, "train_from_scratch.data=[]"])


def test_it_takes_as_many_steps_as_pretraining_and_full_fine_tuning_and_forgets_less_than_lora(
    finished: Path,
) -> None:
    """The first row of the comparison: a fair one."""

    def steps(folder: str) -> int:
        return len(read_steps(finished / "artifacts" / folder / "loss.csv"))

    assert steps("from_scratch") == steps("base") + steps("full_finetuned") == 1_200
    metrics: dict[str, Any] = read_json(finished / "artifacts/evaluation/metrics.json")
    scratch, lora = metrics["scratch"], metrics["lora"]
    assert scratch["trainable"] == scratch["parameters"] == metrics["full"]["parameters"]
    assert (scratch["new_completed"], scratch["old_prompts_kept"]) == (8, scratch["old_prompts"])
    assert scratch["forgetting"]["divergence"] < 0.1 < lora["forgetting"]["divergence"]
    report = (finished / "artifacts/evaluation/report.md").read_text(encoding="utf-8")
    assert "*Training from scratch* starts from random weights" in report
