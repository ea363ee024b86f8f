"""On an accelerator every model is moved, and nothing that it needs is left behind; what runs out
of memory is said.

The accelerator is `tests/helpers/fake_accelerator.py`: its numbers are the CPU's, and it rejects
tensors of two devices as a GPU does.
"""

import json
import logging
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from msgspec.structs import replace
from torch import nn
from typer.main import get_command

from cli.main import app
from pipeline.adapters.lora import principal
from pipeline.errors import UserError
from pipeline.files.artifact import MANIFEST
from pipeline.files.text import in_units
from pipeline.inference import engine, server
from pipeline.inference.handlers import RequestHandler
from pipeline.models import device, quantized_linear
from pipeline.models import generate as generation
from pipeline.models.generate import Sampling, draw, generate
from pipeline.models.load import load_base
from pipeline.models.pages import PAGE, PagePool
from pipeline.project import process
from pipeline.project.dvc_yaml import render_dvc_yaml
from pipeline.project.logs.run_log import read_steps
from pipeline.project.runner import checkpoints
from pipeline.stages.methods.lora import FinetuneLora
from pipeline.stages.methods.lora import Lora as LoraMethod
from pipeline.stages.registry import open_project
from pipeline.training.batches import Batches, collate
from pipeline.training.memory.prediction import (
    predict_peak_memory,
    suggest_less_memory,
)
from pipeline.training.task import prepare_model
from tests.conftest import Lora
from tests.helpers import fake_accelerator, families
from tests.helpers.bases import FAMILIES, toy_checkpoint
from tests.helpers.checkpoints import checkpoint
from tests.helpers.errors import user_error
from tests.helpers.fake_accelerator import NAME, alike, used
from tests.helpers.projects import BRIEF, METHODS, STAGES, folder_bytes, make, new_project
from tests.helpers.real import listed, toy, windows_of, with_lora

EIGH, SVD = "aten::_linalg_eigh", "aten::_linalg_svd"
TWO = ("artifacts/lora_adapter", "artifacts/lora_adapter")
TRAINING = [
    "pretrain",
    "train_from_scratch",
    *(f"finetune_{name}" for name in ("full", "freeze", "lora", "prefix", "prompt")),
]


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The best device here, for models of any size."""
    with fake_accelerator.best(monkeypatch) as there:
        yield there


on_accelerator = pytest.mark.usefixtures("accelerator")


@pytest.fixture
def strays(accelerator: torch.device) -> Iterator[list[str]]:
    """The modules that were called while parameters of theirs were not on the accelerator."""
    with fake_accelerator.strays(accelerator) as found:
        yield found


@pytest.fixture
def without_fp64(accelerator: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the accelerator, as Apple's GPU is."""
    fake_accelerator.narrow(accelerator, monkeypatch)


def losses(root: Path, stage: str) -> list[list[float]]:
    """Those of each adapter or model that a stage trained."""
    folder = open_project(root / "params.yaml").artifact(stage)
    return [[step.loss for step in read_steps(path)] for path in sorted(folder.rglob("loss.csv"))]


# training


@pytest.mark.parametrize("stage", [*TRAINING, "finetune_sweep"])
@pytest.mark.sampled(3)
@pytest.mark.slow
def test_each_stage_trains_there_as_on_the_cpu(
    brief: Path, project: Path, stage: str, strays: list[str]
) -> None:
    make(project, [stage], BRIEF, force=True)
    assert used() and not strays
    found = losses(project, stage)
    assert found == [pytest.approx(each, abs=1e-5) for each in losses(brief, stage)]
    assert found


SETTINGS = {
    "retained prompts": ["retention_data=prompts.jsonl", "retention_weight=1"],
    "PiSSA": ["init_lora_weights=pissa"],
    "DoRA": ["dora=true"],
    "new rows": ["train_embeddings=new_rows"],
    "held out": ["eval_share=0.3", "patience=1", "eval_steps=1"],
    "accumulated and clipped": ["gradient_accumulation_steps=2", "max_grad_norm=0.1"],
    "bf16": ["precision=bf16"],
    "fp16": ["precision=fp16"],
    "nf4": ["quantization=nf4-dq"],
    "8-bit moments": ["optimizer=adamw-8bit", "weight_decay=0.1"],
    "8-bit moments of the host": ["optimizer=paged-adamw-8bit", "weight_decay=0.1"],
    "SGD": ["optimizer=sgd", "learning_rate=0.1"],
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.sampled(5)
@pytest.mark.slow
def test_lora_trains_there_with_every_kind_of_setting(
    project: Path, name: str, strays: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_linear, "_bitsandbytes", lambda: None)  # it knows no such device
    (project / "prompts.jsonl").write_text(
        '{"prompt": "der hund"}\n{"prompt": "die katze sitzt"}\n'
    )
    settings = [*BRIEF, *(f"finetune_lora.{setting}" for setting in SETTINGS[name])]
    make(project, ["finetune_lora"], settings, force=True)
    assert used() and not strays
    found = losses(project, "finetune_lora")
    with monkeypatch.context() as at_home:
        at_home.setattr(device, "best_device", lambda: torch.device("cpu"))
        make(project, ["finetune_lora"], settings, force=True)
    assert not used()
    wide = name in ("bf16", "fp16")
    assert found == [
        pytest.approx(each, rel=0.02 if wide else 1e-4) for each in losses(project, "finetune_lora")
    ]


@on_accelerator
# the CPU cannot count its tokens an expert
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"mixtral"}))
def test_a_packed_step_and_generation_of_each_family_are_the_cpus(
    tmp_path: Path, family: str
) -> None:
    toy_checkpoint(tmp_path, family)
    model = engine.load(tmp_path).model
    assert model.device.type == fake_accelerator.NAME and model.supports_packing
    assert list(generate(model, (5, 9, 17), {1}, 12)) == list(
        generate(load_base(tmp_path).model, (5, 9, 17), {1}, 12)
    )


@on_accelerator
def test_pages_there_are_of_sizes_that_flash_attention_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_checkpoint(tmp_path, max_position_embeddings=512)
    prompts, limits, sizes = [(5, 9, 17), (3, 4)], [12, 300], set[int]()

    class Noted(PagePool):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            sizes.add(self.size)

    monkeypatch.setattr(generation, "PagePool", Noted)
    there = generation.generate_all(engine.load(tmp_path).model, prompts, {1}, limits)
    assert sizes == {PAGE, 2 * PAGE}
    sizes.clear()
    here = generation.generate_all(load_base(tmp_path).model, prompts, {1}, limits)
    assert there == here and sizes == {16, 304}, "a CPU keeps no more than it needs"


def test_a_seed_draws_there_what_it_draws_on_the_cpu(accelerator: torch.device) -> None:
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(1)) * 3
    samplings = [Sampling(0.8), Sampling(1.0, 40, 0.9), Sampling(1.3, top_p=0.7)]

    def drawn(logits: torch.Tensor, seed: int, n: int = 3) -> list[int]:
        seeded = [torch.Generator().manual_seed(seed + row) for row in range(n)]
        ids: list[int] = draw(logits[:n], [*zip(samplings[:n], seeded, strict=True)]).tolist()
        return ids

    there = logits.to(accelerator)
    for seed in range(50):
        expected = drawn(logits, seed)
        assert drawn(there, seed) == expected and drawn(there, seed, 1) == expected[:1]


# as preferences are read where a base does not read sequences end to end
@pytest.mark.parametrize("given", [0, 2])
def test_a_batch_that_is_there_is_taken_apart_there(accelerator: torch.device, given: int) -> None:
    batch = collate(windows_of((3, 5), lambda _: given))
    expected, apart = batch.unpack(), batch.to(accelerator).unpack()
    assert [part.ids.device.type for part in apart] == [accelerator.type] * 2
    for part, other in zip(apart, expected, strict=True):
        assert part.ids.tolist() == other.ids.tolist()
        assert part.labels.tolist() == other.labels.tolist()


# asking


ASKED = {
    "prompt": [
        "prompt",
        "der wind",
        "--base",
        "artifacts/expanded",
        "--adapter",
        "artifacts/lora_adapter",
        "--json",
    ],
    "prompt, virtual tokens": [
        "prompt",
        "der",
        "--base",
        "artifacts/expanded",
        "--adapter",
        "artifacts/prefix",
    ],
    "compare": ["compare", "der wind", "--json"],
    "verify": ["adapters", "verify", "artifacts/lora_adapter"],
    "merge": [
        "merge",
        "--adapter",
        "artifacts/lora_adapter",
        "--out",
        "OUT",
        "--prompts",
        "data/prompts.yaml",
    ],
    "export": [
        "export",
        "artifacts/lora_adapter",
        "--format",
        "merged",
        "--out",
        "OUT",
        "--prompts",
        "data/prompts.yaml",
    ],
    "spectrum": [
        *("spectrum", "artifacts/expanded", "artifacts/full_finetuned"),
        *("--rank", "4", "--out", "OUT", "--data", "data/finetune.de.txt"),
    ],
}


@pytest.mark.parametrize("command", ASKED)
@pytest.mark.slow
def test_each_command_that_asks_a_model_asks_it_there(
    project: Path, command: str, cli: Lora, strays: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = cli(*("there" if word == "OUT" else word for word in ASKED[command]), cwd=project)
    assert there[0] == 0, there[2]
    assert used() or command == "verify"  # which loads a model and asks nothing
    assert not strays
    monkeypatch.setattr(device, "best_device", lambda: torch.device("cpu"))
    here = cli(*("here" if word == "OUT" else word for word in ASKED[command]), cwd=project)
    assert alike(there[1].replace("there", "here"), here[1])


@pytest.mark.parametrize("stage", ["expand_vocab", "merge", "evaluate"])
@pytest.mark.sampled(4)
def test_the_stages_that_ask_models_ask_them_there(
    brief: Path, project: Path, stage: str, strays: list[str]
) -> None:
    make(project, [stage], BRIEF, force=True)
    assert used() and not strays
    name = STAGES[stage].path
    tables = [
        path
        for path in folder_bytes(project / name)
        if path.endswith((".json", ".md")) and path != MANIFEST
    ]
    assert tables
    assert all(
        alike((project / name / path).read_text(), (brief / name / path).read_text())
        for path in tables
    )


@on_accelerator
def test_the_terminal_uis_models_are_there(project: Path) -> None:
    answers = RequestHandler()

    def last(do: str, **fields: Any) -> dict[str, Any]:
        return list(answers.answer(do, {"id": 1, **fields}))[-1]

    base, adapter = str(project / "artifacts/expanded"), str(project / "artifacts/lora_adapter")
    last("load", name="base", base=base)
    last("load", name="lora", base=base, adapter=adapter)
    for name in ("base", "lora"):
        assert answers.models.get(name).loaded.model.device.type == fake_accelerator.NAME
    last("top_k", models=["base", "lora"], text="der wind", k=3, strengths={"lora": 0.5})
    assert used()
    last("generate", model="lora", text="der wind", limit=3)
    assert used()
    assert last("status")["device"].startswith(NAME)


def test_the_terminal_ui_names_the_device_that_its_models_are_on(
    brief: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = RequestHandler()
    monkeypatch.setattr(device, "device_info", lambda where: {"device": str(where)})
    monkeypatch.setattr(device, "best_device", lambda: torch.device("cuda", 1))
    (before,) = answers.answer("status", {"id": 1})
    list(answers.answer("load", {"name": "base", "base": str(brief / "artifacts/expanded")}))
    (after,) = answers.answer("status", {"id": 3})
    assert (before["device"], after["device"]) == ("cuda:1", "cpu")  # a small model


@on_accelerator
def test_a_model_that_finds_no_room_there_is_asked_on_the_cpu(
    brief: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # a library that another test loaded may have turned logging off, and its loggers
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(logging.getLogger(device.__name__), "disabled", False)
    monkeypatch.setattr(device, "free_bytes", lambda _: 1)
    assert engine.load(brief / "artifacts/expanded").model.device.type == "cpu"
    (record,) = caplog.records
    assert re.fullmatch(
        rf"the model needs .* on {NAME}, which has 1 .* free: it runs on the CPU", record.message
    )


def test_a_model_that_is_there_already_needs_no_more_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 3, device="meta")
    monkeypatch.setattr(device, "device_for", lambda _: torch.device("meta"))
    monkeypatch.setattr(device, "free_bytes", lambda _: 1)
    assert device.move_for_inference(model).weight.device.type == "meta"


@on_accelerator
@pytest.mark.parametrize("stage", ["merge", "evaluate"])
@pytest.mark.sampled(3)
def test_two_models_that_are_compared_may_be_on_two_devices(
    project: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms = iter([float("inf"), 1] * 99)
    monkeypatch.setattr(device, "free_bytes", lambda _: next(rooms))
    make(project, [stage], BRIEF, force=True)
    assert used()


def test_an_imported_base_is_compared_with_transformers_there(
    tmp_path: Path, strays: list[str]
) -> None:
    toy_checkpoint(tmp_path / "toy", "llama")
    strays.clear()  # what made the checkpoint
    make(new_project(tmp_path / "project"), ["import"], ["base=../toy"])
    assert used() and not strays


@pytest.mark.slow
def test_a_base_of_transformers_never_computes_on_the_cpu(
    tmp_path: Path, strays: list[str]
) -> None:
    root = families.new_project(tmp_path / "project", families.FAMILIES["llama"])
    strays.clear()  # what made the checkpoint
    make(root, ["pretrain", "expand_vocab", "finetune_lora", "merge"])
    assert used() and not strays


# matrices


MATRICES = {  # a command, and what it must have decomposed there
    "spectrum": (
        [
            "spectrum",
            "artifacts/expanded",
            "artifacts/full_finetuned",
            "--rank",
            "4",
            "--out",
            "OUT",
        ],
        EIGH,
    ),
    "intruders": (
        ["spectrum", "artifacts/expanded", "artifacts/lora_adapter", "--intruders"],
        EIGH,
    ),
    "diff": (["adapters", "diff", *TWO, "--json"], SVD),
    "svd": (["adapters", "combine", *TWO, "--method", "svd", "--out", "OUT"], SVD),
    "ties": (["adapters", "combine", *TWO, "--method", "ties", "--out", "OUT"], SVD),
    "compress": (
        ["adapters", "compress", "artifacts/lora_adapter", "--rank", "2", "--out", "OUT"],
        SVD,
    ),
}


@pytest.fixture
def low_rank(project: Path) -> Path:
    """A project whose LoRA trained no embedding, so that it can be combined."""
    make(project, ["finetune_lora"], [*BRIEF, "finetune_lora.train_embeddings=none"], force=True)
    fake_accelerator.ran.clear()
    return project


@on_accelerator
@pytest.mark.parametrize("command", MATRICES)
@pytest.mark.slow
def test_large_matrices_are_decomposed_there(
    low_rank: Path, command: str, cli: Lora, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(out: str) -> str:
        code, said, problem = cli(
            *(out if word == "OUT" else word for word in MATRICES[command][0]), cwd=low_rank
        )
        assert code == 0, problem
        return said

    here = ask("here")
    assert MATRICES[command][1] not in fake_accelerator.ran
    monkeypatch.setattr(device, "LARGE_MATRIX", 0)
    assert alike(ask("there").replace("there", "here"), here)
    assert MATRICES[command][1] in fake_accelerator.ran


@on_accelerator
def test_pissas_svd_is_computed_there_of_a_base_that_is_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    here = principal(weight, 2, 1.0)
    monkeypatch.setattr(device, "LARGE_MATRIX", 0)
    there = principal(weight, 2, 1.0)
    assert SVD in fake_accelerator.ran
    assert all(torch.equal(one.cpu(), other) for one, other in zip(there, here, strict=True))


@pytest.mark.usefixtures("without_fp64")
@pytest.mark.parametrize("command", [*ASKED, *MATRICES])
@pytest.mark.sampled(4)
def test_no_command_needs_fp64_of_the_accelerator(
    low_rank: Path, command: str, cli: Lora, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "LARGE_MATRIX", 0)
    words = ASKED[command] if command in ASKED else MATRICES[command][0]
    assert cli(*words, cwd=low_rank)[0] == 0


@pytest.mark.usefixtures("without_fp64")
@pytest.mark.parametrize(
    "stage", ["expand_vocab", "finetune_lora", "finetune_sweep", "merge", "evaluate"]
)
@pytest.mark.sampled(3)
def test_no_stage_needs_fp64_of_the_accelerator(project: Path, stage: str) -> None:
    make(project, [stage], BRIEF, force=True)
    assert used()


@pytest.mark.usefixtures("without_fp64")
@pytest.mark.parametrize("name", ["PiSSA", "nf4", "DoRA"])
@pytest.mark.slow
def test_no_setting_of_lora_needs_fp64_of_the_accelerator(
    project: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_linear, "_bitsandbytes", lambda: None)
    make(
        project,
        ["finetune_lora"],
        [*BRIEF, *(f"finetune_lora.{one}" for one in SETTINGS[name])],
        force=True,
    )


# which device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Two of CUDA, so far as torch says; the list has those that were made the current one."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


SMALL, BIG = nn.Linear(2, 2), nn.Linear(4000, 4000, device="meta")


def on(model: nn.Module) -> str:
    return str(device.device_for(model))


def test_a_small_model_stays_on_the_cpu_unless_a_device_is_named(
    gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (on(SMALL), on(BIG)) == ("cpu", "cuda:0")
    for name, device_ in {"cuda": "cuda:0", "cuda:1": "cuda:1", "cpu": "cpu"}.items():
        monkeypatch.setenv("LORA_DEVICE", name)
        assert (on(SMALL), on(BIG)) == (device_, device_)
        assert str(device.device_for_matrix(1)) == device_
        assert str(gpus[-1]) == device_ or name == "cpu"


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("name", ["cuda:256", "cuda:001", "cuda:\u0663"])
def test_a_number_that_torch_takes_for_another_or_for_none_is_no_device(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_DEVICE", name)
    rule = "must be auto, cpu, cuda, cuda:N or mps"
    with pytest.raises(UserError, match=f"{rule}, got '{name}'"):
        on(BIG)


def test_each_rank_has_its_gpu(gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
    }.items():
        monkeypatch.setenv(key, value)
    for name in ("auto", "cuda"):
        monkeypatch.setenv("LORA_DEVICE", name)
        assert on(BIG) == "cuda:1" == str(gpus[-1])
    for name in ("cuda:0", "mps"):
        monkeypatch.setenv("LORA_DEVICE", name)
        with pytest.raises(
            UserError, match=f"LORA_DEVICE must be cpu or cuda for several processes, got '{name}'"
        ):
            on(BIG)


@pytest.mark.usefixtures("gpus")
@pytest.mark.slow
def test_the_option_wins_over_the_environment_and_that_over_the_params_file(
    project: Path, cli: Lora, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(*option: str) -> str:
        monkeypatch.setattr(process, "_of_params", None)  # of the call before
        facts: dict[str, str] = json.loads(cli("doctor", "--json", *option, cwd=project)[1])
        return facts["device"]

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1, 2))
    assert chosen().startswith("cuda:0 for models of 10 million parameters or more")
    with (project / "params.yaml").open("a") as file:
        file.write("\ndevice: cuda:1\n")
    assert chosen() == "cuda:1, by device in params.yaml"
    open_project(project / "params.yaml", ["device=cpu"])
    assert device.explain_choice() == "cpu, by device in --set"
    monkeypatch.setenv("LORA_DEVICE", "cpu")
    assert chosen() == "cpu, by LORA_DEVICE"
    assert chosen("--device", "cuda") == "cuda:0, by --device"
    # what children get
    assert os.environ["LORA_DEVICE"] == process.environment()["LORA_DEVICE"] == "cuda"


def test_a_device_that_is_not_there_is_one_message(project: Path, cli: Lora) -> None:
    for command in (
        ["prompt", "der"],
        ["finetune", "lora", "--force"],
        ["expand-vocab", "--force"],
    ):
        code, _, err = cli(*command, "--device", "cuda:7", cwd=project)
        said = "error: --device must name a device of this machine, got 'cuda:7'. It has cpu."
        assert (code, err.strip().splitlines()[-1]) == (1, said)
    assert cli("prompt", "der", "--device", "gpu", cwd=project)[0] == 2
    with pytest.raises(UserError, match="device must be auto, cpu, cuda, cuda:N or mps, got 'gpu'"):
        open_project(project / "params.yaml", ["device=gpu"])


def test_the_device_makes_nothing_again(project: Path) -> None:
    manifest = folder_bytes(project / "artifacts/lora_adapter")
    with (project / "params.yaml").open("a") as file:
        file.write("\ndevice: cpu\n")
    make(project, ["finetune_lora"], BRIEF)
    assert folder_bytes(project / "artifacts/lora_adapter") == manifest
    stages = yaml.safe_load(render_dvc_yaml(open_project(project / "params.yaml")))["stages"]
    assert not any("device" in stage["params"] for stage in stages.values())


COMPUTING = {  # every command that computes with a model or with weights
    *(
        "train",
        "new",
        "import",
        "pretrain",
        "expand-vocab",
        "train-from-scratch",
        "merge",
        "evaluate",
    ),
    *("spectrum", "prompt", "chat", "compare", "serve", "certify", "export", "push", "doctor"),
    *(f"adapters {name}" for name in ("verify", "diff", "combine", "compress", "export")),
    *(f"finetune {name}" for name in (*METHODS, "sweep")),
}


def test_every_command_that_computes_has_the_option() -> None:
    def walk(group: Any, path: str) -> Iterator[tuple[str, bool]]:
        for name in group.commands:
            command = group.commands[name]
            yield f"{path}{name}", any("--device" in one.opts for one in command.params)
            if hasattr(command, "commands"):
                yield from walk(command, f"{path}{name} ")

    has = dict(walk(get_command(app), ""))
    assert {name for name, there in has.items() if there} == COMPUTING


# out of memory


class Scarce:
    """The accelerator runs out of memory at its product number `last`: in a forward, for what is
    raised in the thread in which autograd runs a backward on a Python backend ends the process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, last: int) -> None:
        self.done, self.last, self._run = 0, last, fake_accelerator._run
        monkeypatch.setattr(fake_accelerator, "_run", self)

    def __call__(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        self.done += func._schema.name in fake_accelerator.PRODUCTS
        if self.done >= self.last and threading.current_thread() is threading.main_thread():
            self.done = 0
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB.\nMore that nobody reads."
            )
        return self._run(func, *args, **kwargs)


@on_accelerator
@pytest.mark.parametrize("stage", ["finetune_lora", "finetune_full", "finetune_sweep"])
@pytest.mark.slow
def test_training_out_of_memory_says_what_to_lower_and_goes_on_from_the_last_whole_step(
    brief: Path, project: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as scarce:
        Scarce(scarce, 200)
        said = user_error(make, project, [stage], BRIEF, force=True)
    assert (
        said.startswith(f"{stage}: out of memory in step ") and "Tried to allocate 2.00 GiB" in said
    )
    assert "\n" not in said
    assert f"{stage}.{'grid' if stage == 'finetune_sweep' else 'tokens_per_batch=4'}" in said
    kept = checkpoints(open_project(project / "params.yaml").run_folder(stage))
    assert len(kept) == 1 and not kept[0].name.endswith("-000000000")
    make(project, [stage], BRIEF, force=True)
    assert losses(project, stage) == [
        pytest.approx(each, abs=1e-5) for each in losses(brief, stage)
    ]


@on_accelerator
def test_a_model_that_finds_no_room_to_train_is_one_message(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 GiB.")

    monkeypatch.setattr("pipeline.training.loop.prepare_model", full)
    with pytest.raises(
        UserError, match=r"finetune_lora: out of memory in step 1 .*16\.00 GiB.*checkpointing=full"
    ):
        make(project, ["finetune_lora"], BRIEF, force=True)


def test_the_advice_is_the_calculators() -> None:
    model = with_lora(toy("llama"), torch.float32)
    prepare_model(model, "none")
    batches = Batches(listed(windows_of((5, 9, 2, 14))), 4, seed=None)
    batch = batches[0][0]
    settings, method = (
        FinetuneLora(batch_size=4, gradient_accumulation_steps=2),
        LoraMethod(4, 4.0, ("attention",)),
    )
    said = suggest_less_memory(
        model, method, settings, batch, batches.longest_alone(0), "finetune_lora"
    )
    sizes = {
        "": predict_peak_memory(model, method, settings, batch),
        "finetune_lora.gradient_checkpointing=full": predict_peak_memory(
            model, method, replace(settings, gradient_checkpointing="full"), batch
        ),
        "finetune_lora.tokens_per_batch=14": predict_peak_memory(
            model, method, settings, collate(windows_of((14,)))
        ),
    }
    for words, size in sizes.items():
        assert size and f"{in_units(size)}{words and ' with '}{words}" in said
    assert "quantization" in said


@on_accelerator
def test_a_command_out_of_memory_is_one_message(
    project: Path, cli: Lora, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scarce(monkeypatch, 3)
    for command in (
        ["prompt", "der wind", "--base", "artifacts/expanded"],
        ["compare", "der wind"],
    ):
        code, out, err = cli(*command, cwd=project)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert err.startswith(
            "error: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.)"
        )


def test_the_inference_process_knows_the_same_words(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    assert engine.load(base).model.device.type == "cpu"  # too small to gain anything elsewhere
    for words in (
        "CUDA out of memory.",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
    ):
        assert "out of memory" in (server.device_failure(RuntimeError(words)) or "")
