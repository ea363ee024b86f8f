"""Samples while a model learns: they are what it says, and they change nothing that it learns."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.inference.engine import complete, load
from pipeline.models.kernels import decode
from pipeline.project.logs.run_log import SAMPLES, Sample, Step, final_answers, parse_sample
from pipeline.project.runner import Progress, run
from pipeline.stages.registry import open_project
from tests.helpers.errors import user_error
from tests.helpers.json_files import read_json
from tests.helpers.projects import BRIEF, METHODS, STAGES, WORK, folder_bytes, make

PROMPTS = ["der hund", "die währung von bulgarien"]
SAMPLED = "samples={prompts: [der hund, die währung von bulgarien], every: %d}"
OF_SAMPLES = (SAMPLES, "manifest.json")
WAYS = {  # what draws random numbers, folds, quantizes or recomputes
    "finetune_full": ["gradient_checkpointing=full"],
    "finetune_lora": ["lora_dropout=0.3", "neftune_alpha=5", "dora=true"],
    "finetune_prefix": [],
    "finetune_prompt": ["neftune_alpha=5"],
    "finetune_ia3": [],
    "train_from_scratch": [],
}


def samples(folder: Path) -> list[Sample]:
    return [
        parse_sample(line) for line in (folder / SAMPLES).read_text(encoding="utf-8").splitlines()
    ]


def artifact_after(root: Path, stage: str, *settings: str) -> dict[str, bytes]:
    """The artifact's files, without those that name or hold samples."""
    make(root, [stage], [*BRIEF, *(f"{stage}.{one}" for one in settings)], force=True)
    files = folder_bytes(root / STAGES[stage].path)
    return {name: data for name, data in files.items() if Path(name).name not in OF_SAMPLES}


@pytest.mark.parametrize("stage", WAYS)
@pytest.mark.sampled(5)
@pytest.mark.slow
def test_samples_change_no_byte_of_what_is_trained(project: Path, stage: str) -> None:
    ways = ["eval_share=0.3", "eval_steps=2", *WAYS[stage]]
    without = artifact_after(project, stage, *ways)
    assert not (project / STAGES[stage].path / SAMPLES).exists()
    assert artifact_after(project, stage, *ways, SAMPLED % 1) == without
    answered = samples(project / STAGES[stage].path)
    assert [one.prompt for one in answered[:2]] == PROMPTS
    # after every step
    assert len({one.step for one in answered}) == answered[-1].step == len(answered) // 2
    assert artifact_after(project, stage, *ways) == without
    # those of the run before are not taken for this one's
    assert not (project / "runs" / stage / SAMPLES).exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.sampled(3)
@pytest.mark.slow
def test_a_pretrained_base_answers_in_its_template_and_trains_on_as_without(
    family: Callable[[str], Path], tmp_path: Path, name: str, precision: str
) -> None:
    root = tmp_path / "p"
    shutil.copytree(family(name), root)
    ways = [
        f"precision={precision}",
        "quantization=nf4",
        "epochs=3",
        "lora_dropout=0.2",
        "eval_steps=0",
    ]
    without = artifact_after(root, "finetune_lora", *ways)
    asked = '{prompts: [[{role: user, content: "Which currency has Bulgaria?"}], "Two and two"], every: 2, max_tokens: 9}'
    assert artifact_after(root, "finetune_lora", *ways, f"samples={asked}") == without
    *_, chat, text = samples(root / "artifacts/lora_adapter")
    assert (chat.prompt, text.prompt) == ("Which currency has Bulgaria?", "Two and two")
    loaded = load(
        open_project(root / "params.yaml").artifact("expand_vocab"), root / "artifacts/lora_adapter"
    )
    rendered = loaded.tokenizer.render([{"role": "user", "content": chat.prompt}], True)
    with pytest.MonkeyPatch.context() as patch:  # sums in another order round otherwise, in 16 bits
        patch.setattr(decode, "_is_available", lambda: False)
        assert [chat.answer, text.answer] == [
            complete(loaded, rendered, 9),
            complete(loaded, text.prompt, 9),
        ]


@pytest.mark.parametrize(
    "stage", [f"finetune_{method}" for method in METHODS if method in ("lora", "freeze", "prefix")]
)
def test_the_last_answers_are_those_of_the_artifact(project: Path, stage: str) -> None:
    artifact_after(project, stage, SAMPLED % 7)
    folder, expanded = project / STAGES[stage].path, project / "artifacts/expanded"
    loaded = load(expanded, folder) if STAGES[stage].kind == "adapter" else load(folder)
    last = samples(folder)[-2:]
    assert [one.answer for one in last] == [complete(loaded, text) for text in PROMPTS]
    assert (folder / SAMPLES).read_bytes() == (project / "runs" / stage / SAMPLES).read_bytes()


def steps_of(project: Path, *settings: str) -> list[int]:
    artifact_after(project, "finetune_lora", *settings)
    return sorted({one.step for one in samples(project / "artifacts/lora_adapter")})


def test_without_every_the_model_answers_at_each_evaluation_or_epoch(project: Path) -> None:
    prompts = "samples={prompts: [der hund]}"
    total = 12  # 2 epochs of 6
    assert steps_of(project, prompts) == [6, total]
    held_out = ["eval_data=data/pretrain.de.txt", "eval_steps=5"]
    assert steps_of(project, *held_out, prompts) == [5, 10, total]
    assert steps_of(project, *held_out, prompts[:-1] + ", every: 8}") == [8, total]


def test_where_nothing_is_held_out_no_held_out_example_is_asked(project: Path) -> None:
    assert steps_of(project, "samples={prompts: [der hund], held_out: 8}", "eval_share=0") == [
        6,
        12,
    ]


@pytest.mark.parametrize("stop", [4, 5, 9])
def test_a_killed_run_goes_on_with_the_answers_of_its_checkpoint(project: Path, stop: int) -> None:
    settings = [*BRIEF, f"finetune_lora.{SAMPLED % 3}", "finetune_lora.lora_dropout=0.2"]
    make(project, ["finetune_lora"], settings, force=True)
    folder = project / "artifacts/lora_adapter"
    whole = folder_bytes(folder)
    opened = open_project(project / "params.yaml", settings)
    events = run(
        opened, STAGES["finetune_lora"], WORK["finetune_lora"], force=True, checkpoint_every=4
    )
    for event in events:
        if isinstance(event, Progress) and event.done == stop:
            break
    events.close()  # as after a kill: what came after the checkpoint is only in the logs
    assert folder_bytes(folder) == whole
    make(project, ["finetune_lora"], settings, force=True)
    notes = read_json(project / "runs/finetune_lora/run.json")["notes"]
    assert f"finetune_lora: resumed after step {stop - stop % 4}" in notes
    assert folder_bytes(folder) == whole


def test_a_checkpoint_without_its_answers_is_not_used(project: Path) -> None:
    settings = [*BRIEF, f"finetune_lora.{SAMPLED % 3}"]
    opened = open_project(project / "params.yaml", settings)
    events = run(
        opened, STAGES["finetune_lora"], WORK["finetune_lora"], force=True, checkpoint_every=4
    )
    next(event for event in events if isinstance(event, Progress) and event.done == 5)
    events.close()
    (project / "runs/finetune_lora" / SAMPLES).unlink()
    make(project, ["finetune_lora"], settings, force=True)
    notes = read_json(project / "runs/finetune_lora/run.json")["notes"]
    assert any("samples.jsonl has fewer than 2 lines" in note for note in notes)
    assert len(samples(project / "artifacts/lora_adapter")) == 2 * 4


@pytest.mark.slow
def test_each_adapter_of_a_sweep_answers_for_itself(project: Path) -> None:
    sampled = f"finetune_lora.{SAMPLED % 4}"
    grid = "finetune_sweep.grid={rank: [2, 4], learning_rate: [1e-3, 3e-2]}"

    def swept(*more: str) -> dict[str, bytes]:
        make(project, ["finetune_sweep"], [*BRIEF, grid, *more], force=True)
        files = folder_bytes(project / "artifacts/sweep")
        return {name: data for name, data in files.items() if Path(name).name not in OF_SAMPLES}

    assert swept(sampled) == swept(sampled) == {**swept()}
    make(project, ["finetune_sweep"], [*BRIEF, grid, sampled], force=True)
    folder = project / "artifacts/sweep/rank-2_lr-0.03"
    loaded = load(project / "artifacts/expanded", folder)
    assert [one.answer for one in samples(folder)[-2:]] == [
        complete(loaded, text) for text in PROMPTS
    ]
    made = [*BRIEF, sampled, "finetune_lora.rank=2", "finetune_lora.learning_rate=3e-2"]
    make(project, ["finetune_lora"], made, force=True)
    assert samples(folder) == samples(project / "artifacts/lora_adapter")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{prompts: [der xylophonist]}", "samples.prompts[0]: the base does not know: xylophonist"),
        (
            "{prompts: [[{role: user, content: hallo}]]}",
            "samples.prompts[0] has messages, but the base has no chat templ",
        ),
        ("{prompts: der hund}", "samples.prompts must be a list of prompts, got 'der hund'"),
        ("{prompts: [1]}", "samples.prompts[0] must be a text, or a list of messages"),
        ("{prompts: [[{role: user}]]}", "samples.prompts[0] must be a text, or a list of messages"),
        ("{prompts: [der hund], every: -1}", "samples.every must be at least 0, got -1"),
        ("{prompts: [der hund], often: 1}", "unknown key finetune_lora.samples.often"),
        ("[der hund]", "samples must be a mapping such as"),
        (f"{{prompts: [{'der hund ' * 20}]}}", "samples.prompts[0]: The prompt has 40 tokens"),
        (
            '{prompts: ["a\\ud800"]}',
            "samples must not have a NUL or half a surrogate pair in a text",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_trained(
    project: Path, value: str, message: str
) -> None:
    log = project / "runs/finetune_lora/loss.csv"
    before = log.read_bytes()
    said = user_error(make, project, ["finetune_lora"], [*BRIEF, f"finetune_lora.samples={value}"])
    assert message in said
    assert log.read_bytes() == before


@pytest.mark.parametrize(
    ("takes_best", "metric", "share"),
    [(False, "eval_loss", 0.25), (True, "eval_loss", 0.5), (True, "eval_answers", 0.75)],
    ids=["the last", "the lowest loss", "the most right answers"],
)
def test_the_share_of_right_answers_is_that_of_the_weights_that_are_kept(
    takes_best: bool, metric: str, share: float
) -> None:
    evaluated = [(math.nan, 0.1), (None, None), (0.9, 0.75), (0.4, 0.5), (0.6, 0.25), (None, None)]
    steps = [
        Step(n, 1, 1.0, 1e-3, 1.0, n, eval_loss=loss, eval_answers=right)
        for n, (loss, right) in enumerate(evaluated)
    ]
    assert final_answers(steps, takes_best, metric) == share
    assert final_answers(steps[1:2], takes_best, metric) is None
