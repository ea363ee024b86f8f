"""Training on from an adapter: ours goes on to the byte, PEFT's as PEFT itself would; what cannot
is refused.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from pipeline.adapters.config import WEIGHTS
from pipeline.data.formats import read_examples
from pipeline.data.masking import encode
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.models.load import load_base
from pipeline.project.logs.run_log import LOSS, read_steps
from pipeline.project.runner import Progress, run
from pipeline.stages.registry import open_project
from pipeline.training.saving import STATE
from pipeline.views.models import check, describe
from tests.conftest import Lora
from tests.helpers.families import new_lines_project
from tests.helpers.json_files import read_json
from tests.helpers.projects import STAGES, WORK, make_one, note_texts, section_overrides

STAGE, OUTPUT, FIRST = "finetune_lora", "artifacts/lora_adapter", "first"
SETTINGS = {
    "data": "data/lines.jsonl",
    "batch_size": 4,
    "learning_rate": 0.02,
    "rank": 3,
    "alpha": 6,
    "save_optimizer": "true",
    "eval_share": 0.3,
}


@pytest.fixture(scope="module")
def expanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy Llama and two dozen texts of different lengths. Read it; do not write to it."""
    root = new_lines_project(tmp_path_factory.mktemp("continue") / "p")
    lines = (root / "data/lines.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (root / "data/others.jsonl").write_text("".join(lines[::2]), encoding="utf-8")
    return root


@pytest.fixture
def project(expanded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(expanded, tmp_path / "p")


def given(**changes: object) -> list[str]:
    return section_overrides(STAGE, {**SETTINGS, **changes})


def tuned(root: Path, **changes: object) -> tuple[Path, list[str]]:
    """The adapter that such a run makes, and its notes."""
    shutil.rmtree(root / OUTPUT, ignore_errors=True)
    _, events = make_one(root, STAGE, given(**changes))
    return root / OUTPUT, note_texts(events)


def first_of(root: Path, **changes: object) -> Path:
    folder, _ = tuned(root, **changes)
    return folder.rename(root / FIRST)


ALIKE: dict[str, dict[str, object]] = {
    "plain": {},
    "noise": {"lora_dropout": 0.3, "neftune_alpha": 5, "gradient_accumulation_steps": 2},
    "weights in full, texts retained": {
        "train_embeddings": "all",
        "retention_data": "data/others.jsonl",
        "retention_weight": 2,
        "retention_batch_size": 2,
    },
    "16 bits": {"adapter_precision": "bf16", "precision": "bf16", "train_embeddings": "new_rows"},
    "fp16": {"precision": "fp16", "train_embeddings": "none"},
    "DoRA and LoRA+": {"dora": "true", "loraplus_ratio": 4, "rslora": "true", "max_grad_norm": 1},
    "8-bit moments": {"optimizer": "adamw-8bit", "weight_decay": 0.1},
    "SGD": {"optimizer": "sgd", "learning_rate": 1},
    "modules in full, some blocks": {
        "train_embeddings": "none",
        "modules_to_save": "[lm_head, norm]",
        "layers_to_transform": "last 1",
    },
    "Muon": {"optimizer": "muon", "weight_decay": 0.1, "loraplus_ratio": 2, "adam_beta1": 0.8},
}


@pytest.mark.parametrize("changes", ALIKE.values(), ids=ALIKE)
@pytest.mark.sampled(4)
@pytest.mark.slow
def test_two_epochs_and_three_more_are_five_to_the_byte(
    project: Path, changes: dict[str, object]
) -> None:
    """Also with the second run killed in between, and continued from its checkpoint."""
    first_of(project, epochs=2, **changes)
    whole, _ = tuned(project, epochs=5, **changes)
    weights, losses = (
        (whole / WEIGHTS).read_bytes(),
        [step.loss for step in read_steps(whole / LOSS)],
    )
    state = (whole / STATE).read_bytes()

    second = {**changes, "epochs": 3, "init_from": FIRST}
    shutil.rmtree(project / OUTPUT)
    events = run(
        open_project(project / "params.yaml", given(**second)),
        STAGES[STAGE],
        WORK[STAGE],
        checkpoint_every=3,
    )
    next(event for event in events if isinstance(event, Progress) and event.done == 4)
    events.close()
    folder, notes = tuned(project, **second)
    assert any("resumed after step 3" in note for note in notes)
    assert any(
        f"trains on from {FIRST} and its optimizer's state, after its" in note for note in notes
    )
    assert (folder / WEIGHTS).read_bytes() == weights and (folder / STATE).read_bytes() == state
    steps = read_steps(folder / LOSS)
    assert [step.loss for step in steps] == losses[-len(steps) :] and steps[0].step == 1
    assert artifact.read_manifest(folder)["optimizer"]["steps"] == len(losses)


def test_a_schedule_is_the_runs_own(project: Path) -> None:
    """A run that continues warms up again: the rates of both are as their settings say."""
    schedule = {"schedule": "linear", "warmup_steps": 2}
    first_of(project, epochs=2, **schedule)
    folder, _ = tuned(project, epochs=2, init_from=FIRST, **schedule)
    rates = [
        [step.learning_rate for step in read_steps(one / LOSS)] for one in (project / FIRST, folder)
    ]
    assert rates[0] == rates[1] and rates[0][0] < rates[0][1] > rates[0][-1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": "data/others.jsonl"}, "optimizer's state: rank 3"),
        ({"batch_size": 3}, "optimizer's state: rank 3"),
        ({"optimizer": "sgd"}, "the optimizer's state is of other settings and is not used"),
        (
            {"loraplus_ratio": 2, "optimizer": "adamw-8bit"},
            "the optimizer's state is of other settings",
        ),
    ],
)
def test_other_data_and_settings_begin_their_own_order_with_the_same_weights(
    project: Path, changes: dict[str, object], said: str
) -> None:
    first_of(project, epochs=2)
    folder, notes = tuned(
        project, init_from=FIRST, **{"epochs": 1, "learning_rate": 1e-12, **changes}
    )
    assert any(said in note for note in notes)
    before, after = load_file(project / FIRST / WEIGHTS), load_file(folder / WEIGHTS)
    for name, value in after.items():
        assert_close(value, before[name], atol=1e-6, rtol=0)


def test_what_the_adapter_says_counts_not_the_settings(project: Path) -> None:
    """Rank, alpha and targets are the first adapter's; the catalog finds nothing wrong with
    that.
    """
    first_of(project, epochs=1, target_modules="[q_proj, down_proj]")
    folder, _ = tuned(
        project, epochs=1, init_from=FIRST, rank=7, alpha=1, target_modules="[v_proj]"
    )
    config = read_json(folder / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (
        3,
        6,
        ["down_proj", "q_proj"],
    )
    assert load_file(folder / WEIGHTS).keys() == load_file(project / FIRST / WEIGHTS).keys()
    verdict = check(describe(folder), project)
    assert (verdict.state, verdict.reason) == ("verified", None)


def peft_adapter(root: Path, out: Path, **config: Any) -> Any:
    """PEFT's own adapter with random A and B, saved."""
    model = AutoModelForCausalLM.from_pretrained(root / "artifacts/expanded")
    torch.manual_seed(5)
    settings = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        **config,
    }
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(out)
    return model


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"v_proj": 5}},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=["plain", "rank by pattern", "DoRA", "head in full"],
)
@pytest.mark.slow
def test_an_adapter_of_pefts_is_trained_as_peft_and_torch_train_it(
    project: Path, config: dict[str, Any]
) -> None:
    """One batch an epoch, so that torch's loop needs no order: weights after eight steps."""
    peft_adapter(project, project / FIRST, **config)
    changes = {
        "batch_size": 64,
        "epochs": 8,
        "learning_rate": 0.01,
        "eval_share": 0,
        "save_optimizer": "false",
    }
    folder, _ = tuned(project, init_from=FIRST, **changes)

    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(project / "artifacts/expanded"),
        project / FIRST,
        is_trainable=True,
    )
    base = load_base(project / "artifacts/expanded")
    examples = read_examples(project / "data/lines.jsonl", "data/lines.jsonl")
    encoded = [
        encode(example, base.tokenizer, 0, base.model.shape.positions) for example in examples
    ]
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0
    )
    for _ in range(8):
        losses = [
            torch.nn.functional.cross_entropy(
                model(input_ids=torch.tensor([one.ids])).logits[0, :-1],
                torch.tensor(one.ids[1:]),
                reduction="none",
            )
            for one in encoded  # texts: all that follows the first token is a label
        ]
        torch.autograd.backward(torch.cat(losses).mean())
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(project / "theirs")
    found, wanted = load_file(folder / WEIGHTS), load_file(project / "theirs" / WEIGHTS)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert_close(value, wanted[name], atol=2e-5, rtol=1e-4)
    assert (read_steps(folder / LOSS)[0].loss > read_steps(folder / LOSS)[-1].loss) and not (
        folder / STATE
    ).exists()


def test_what_cannot_be_trained_on_is_refused(project: Path) -> None:
    def refused(name: str, message: str, stage: str = STAGE) -> None:
        with pytest.raises(UserError, match=message):
            make_one(project, stage, given(init_from=name, epochs=1))

    first_of(project, epochs=1)
    shutil.copytree(project / FIRST, project / OUTPUT)
    refused(OUTPUT, "which this stage itself writes. Copy the folder")
    refused("nowhere", "nowhere is not a file")
    refused("artifacts/expanded", "artifacts/expanded is a full model, not an adapter")
    make_one(
        project,
        "finetune_prefix",
        ["finetune_prefix.epochs=1", "finetune_prefix.data=data/lines.jsonl"],
    )
    refused(STAGES["finetune_prefix"].path, "is of type PREFIX_TUNING; only LoRA can be trained on")
    refused(FIRST, "a sweep trains new adapters", "finetune_sweep")
    make_one(project, "expand_vocab", ["expand_vocab.tokens=[brandneu]"])
    refused(FIRST, "was trained on another base")


def test_the_optimizers_state_stays_here(project: Path, cli: Lora) -> None:
    """An export has the adapter alone."""
    first_of(project, epochs=1, train_embeddings="none")
    for format in ("peft", "vllm"):
        code, _, err = cli("export", FIRST, "--format", format, "--out", format, cwd=project)
        assert (code, [path.name for path in (project / format).rglob(STATE)]) == (0, []), err
