"""Configs and command lines as other tools' documentation has them: nothing but the file is ours."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import Lora
from tests.helpers.bases import toy_checkpoint
from tests.helpers.projects import load, refusal

pytestmark = pytest.mark.slow
PAIRS = "".join(
    json.dumps({"prompt": f"What is {n} and {n}?", "completion": f"It is {2 * n}."}) + "\n"
    for n in range(24)
)
CONFIGS = {
    "axolotl.yml": """\
base_model: toy
load_in_4bit: false
datasets:
  - path: pairs.jsonl
    type: alpaca
val_set_size: 0.1
output_dir: ./outputs/lora-out
adapter: lora
sequence_len: 64
sample_packing: true
lora_r: 8
lora_alpha: 16
lora_target_linear: true
gradient_accumulation_steps: 1
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_torch_fused
lr_scheduler: cosine
learning_rate: 0.0002
bf16: false
tf32: false
gradient_checkpointing: false
logging_steps: 1
flash_attention: true
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
""",
    "llamafactory.yaml": """\
model_name_or_path: toy
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 64
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 1
learning_rate: 1.0e-4
num_train_epochs: 1.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
""",
    "lora_config.yaml": """\
model: toy
train: true
fine_tune_type: lora
optimizer: adamw
data: pairs.jsonl
seed: 0
batch_size: 2
iters: 10
val_batches: 25
learning_rate: 1e-5
steps_per_report: 10
steps_per_eval: 200
adapter_path: adapters
save_every: 100
max_seq_length: 64
grad_checkpoint: false
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 2.0
  dropout: 0.0
""",
    "sft.yaml": """\
model_name_or_path: toy
dataset_name: pairs.jsonl
learning_rate: 2.0e-4
num_train_epochs: 1
per_device_train_batch_size: 2
gradient_checkpointing: true
lr_scheduler_type: cosine
use_peft: true
lora_r: 8
lora_alpha: 16
lora_target_modules: all-linear
bf16: true
push_to_hub: true
""",
    "training_args.json": json.dumps(
        {
            "output_dir": "out",
            "per_device_train_batch_size": 2,
            "num_train_epochs": 1.0,
            "learning_rate": 5e-5,
            "lr_scheduler_type": "linear",
            "optim": "adamw_torch",
            "bf16": True,
            "report_to": ["wandb"],
        }
    ),
    "unsloth.yaml": """\
model_name: toy
max_seq_length: 64
load_in_4bit: false
r: 8
target_modules: [q_proj, k_proj, v_proj, o_proj]
lora_alpha: 16
lora_dropout: 0
bias: none
use_gradient_checkpointing: unsloth
random_state: 3407
use_rslora: false
per_device_train_batch_size: 2
max_steps: 10
optim: adamw_8bit
output_dir: outputs
""",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "toy"
    toy_checkpoint(folder, max_position_embeddings=256)
    return folder


@pytest.fixture
def here(base: Path, tmp_path: Path) -> Path:
    shutil.copytree(base, tmp_path / "toy")
    (tmp_path / "pairs.jsonl").write_text(PAIRS, encoding="utf-8")
    for name, text in CONFIGS.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


MODEL, DATA = "--model_name_or_path toy", "--train_file pairs.jsonl"


@pytest.mark.parametrize(
    ("arguments", "printed", "settings"),
    [
        pytest.param(
            "--config axolotl.yml",
            [
                "micro_batch_size",
                "not taken: output_dir, saves_per_epoch (results go to artifacts/",
            ],
            {"rank": 8, "batch_size": 2, "schedule": "cosine", "target_modules": ("all-linear",)},
            id="axolotl",
        ),
        pytest.param(
            "--config llamafactory.yaml --data pairs.jsonl",
            ["lora_rank", "not taken: template (the base's own chat template is used)"],
            {"rank": 8, "alpha": 16.0, "max_length": 64, "epochs": 1, "precision": "bf16"},
            id="llama-factory",
        ),
        pytest.param(
            "--config lora_config.yaml",
            ["lora_parameters.rank", "iters"],
            {"rank": 8, "alpha": 16.0, "max_steps": 10, "learning_rate": 1e-5},
            id="mlx-lm",
        ),
        pytest.param(
            "--config sft.yaml",
            ["per_device_train_batch_size", "push_to_hub (`lora push` uploads an adapter)"],
            {"rank": 8, "gradient_checkpointing": "full", "precision": "bf16"},
            id="trl",
        ),
        pytest.param(
            f"--config training_args.json --base toy {DATA}",
            ["optim", "report_to (`report_to`, above the sections"],
            {"optimizer": "adamw", "learning_rate": 5e-5, "epochs": 1},
            id="transformers",
        ),
        pytest.param(
            f"--config unsloth.yaml {DATA}",
            ["use_gradient_checkpointing", "random_state"],
            {"rank": 8, "alpha": 16.0, "gradient_checkpointing": "full", "seed": 3407},
            id="unsloth",
        ),
        pytest.param(
            "--num_train_epochs 3 --per_device_train_batch_size 2 --lora_r 8 --bf16 "
            f"--logging_steps 10 {MODEL} {DATA}",
            ["training.num_train_epochs is epochs here", "lora_r rank", "logging_steps ignored"],
            {"rank": 8, "epochs": 3, "batch_size": 2, "precision": "bf16"},
            id="trl sft",
        ),
        pytest.param(
            f"--stage sft --do_train True {MODEL} --dataset pairs.jsonl --finetuning_type lora "
            "--lora_target q_proj,v_proj --max_steps=-1 --cutoff_len 64 "
            "--lr_scheduler_type cosine --plot_loss True",
            ["cutoff_len max_length", "stage, finetune_lora.do_train ignored: it is always so"],
            {"target_modules": ("q_proj", "v_proj"), "max_length": 64, "schedule": "cosine"},
            id="llamafactory-cli",
        ),
        pytest.param(
            "--model toy --train --data pairs.jsonl --iters 10 --batch-size 2 --learning-rate 1e-5 "
            "--grad-checkpoint --adapter-path adapters --fine-tune-type lora",
            ["iters is max_steps here", "adapter_path ignored: results go to artifacts/"],
            {"max_steps": 10, "batch_size": 2, "learning_rate": 1e-5},
            id="mlx_lm.lora",
        ),
        pytest.param(
            f"{MODEL} {DATA} --lora_target_modules q_proj v_proj --load_in_4bit --use_peft "
            "--gradient_accumulation_steps 2 --optim adamw_torch",
            ["load_in_4bit quantization nf4", "lora_target_modules is target_modules here"],
            {"quantization": "nf4", "target_modules": ("q_proj", "v_proj")},
            id="trl with lists and switches",
        ),
    ],
)
def test_what_their_documentation_shows_makes_the_project_that_it_means(
    arguments: str,
    printed: list[str],
    settings: dict[str, object],
    cli: Lora,
    here: Path,
) -> None:
    code, out, err = cli("new", "run", *arguments.split(), cwd=here)
    assert code == 0, err
    for text in printed:
        assert text in out + err
    section = load(here / "run/params.yaml").finetune_lora
    assert {key: getattr(section, key) for key in settings} == settings


def test_output_dir_is_the_folder_of_what_train_makes(cli: Lora, here: Path) -> None:
    options = f"{MODEL} {DATA} --max_steps 2 --output_dir mine --lora_r 2".split()
    code, out, err = cli("train", *options, cwd=here)
    assert code == 0, err
    assert "Next: cd mine" in out and (here / "mine/artifacts/lora_adapter").is_dir()
    assert cli("train", *options, cwd=here)[0] == 0, "it goes on"


def test_train_takes_a_config_as_axolotl_train_does_and_goes_on(cli: Lora, here: Path) -> None:
    for _ in range(2):
        code, out, err = cli("train", "axolotl.yml", cwd=here)
        assert code == 0, err
        assert "Next: cd run" in out
    text = CONFIGS["axolotl.yml"].replace("lora_r: 8", "lora_r: 4")
    (here / "axolotl.yml").write_text(text, encoding="utf-8")
    code, _, err = cli("train", "axolotl.yml", cwd=here)
    assert code == 1 and "in which finetune_lora.rank is not 4" in err


def test_a_config_in_place_of_params_is_answered_with_what_reads_it(cli: Lora, here: Path) -> None:
    said = refusal(cli("finetune", "lora", "--params", "axolotl.yml", cwd=here))
    assert "`lora new DIR --from axolotl.yml` makes a project" in said


def test_what_has_no_counterpart_is_answered_as_before(cli: Lora, here: Path) -> None:
    given = f"{MODEL} {DATA}".split()
    code, _, err = cli("train", *given, "--frobnicate", "3", cwd=here)
    assert code == 2 and "No such option: --frobnicate" in err
    said = cli("train", *given, "--max_samples", "3", cwd=here)[2]
    assert "there is no key finetune_lora.max_samples: the data files" in said
