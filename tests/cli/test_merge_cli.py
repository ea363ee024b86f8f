"""`lora merge --adapter A --out O`: merges any adapter into its base's files, atomically and in
little memory.
"""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.peft import load_adapter
from pipeline.files.base_model import INDEX
from pipeline.models.load import load_base
from tests.conftest import Lora
from tests.helpers.bases import opened, toy_checkpoint
from tests.helpers.checkpoints import adapter, checkpoint
from tests.helpers.json_files import read_json
from tests.helpers.process import Forked
from tests.helpers.projects import LORA, folder_bytes, refusal
from tests.helpers.reference_merge import merged_model
from tests.helpers.side_by_side import logits

LINEARS = AdapterSpec(3, 12.0, "all-linear")
SPECS = {
    "llama": LINEARS,
    "qwen3": AdapterSpec(3, 12.0, ("q_proj",), rows={"embed_tokens": (7, 300)}),
    "gpt2": AdapterSpec(3, 12.0, ("c_attn", "mlp.c_proj")),
    "mixtral": AdapterSpec(3, 12.0, ("q_proj",), saved=("embed_tokens", "lm_head")),
}
SHARD = "30KB"
CARRIED = ("LICENSE", "own.py", "README.md", "additional_chat_templates/tools.jinja")
REPLACED = "out: the earlier result there is replaced.\n"
LEFT = ("pytorch_model.bin", "manifest.json", "original/consolidated.00.pth", ".cache/lock")


def sharded(
    root: Path, family: str, spec: AdapterSpec, dtype: torch.dtype = torch.bfloat16, **settings: Any
) -> Path:
    """A base of several shards with all other files that a base may have, and the adapter
    `adapter`.
    """
    base = root / "base"
    toy_checkpoint(base, family, dtype, SHARD, **settings)
    for name in (*CARRIED, *LEFT):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(f"{name} of the base", encoding="utf-8")
    adapter(root / "adapter", base, spec)
    return base


def merge(cli: Lora, root: Path, *more: str) -> tuple[int, str, str]:
    return cli("merge", "--adapter", "adapter", "--out", "out", "--base", "base", *more, cwd=root)


def tensors(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor by name, from all files."""
    result = {
        name: value
        for path in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }
    return {
        name: value.contiguous().view(torch.uint8).numpy().tobytes()
        for name, value in result.items()
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", SPECS)
def test_a_sharded_base_is_merged_shard_by_shard_to_the_bytes_of_a_merge_in_memory(
    cli: Lora, family: str, tmp_path: Path
) -> None:
    base, out = sharded(tmp_path, family, SPECS[family]), tmp_path / "out"
    assert merge(cli, tmp_path)[::2] == (0, "")
    model = load_base(base).model
    load_adapter(model, base, tmp_path / "adapter")
    merged_model(model).save(tmp_path / "memory")
    assert tensors(out) == tensors(tmp_path / "memory")
    assert tensors(out) != tensors(base)
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 1
    for name in shards:
        assert load_file(out / name).keys() == load_file(base / name).keys()
    assert_carried_over(base, out)
    assert_opens(out, base, tmp_path / "adapter")


def assert_carried_over(base: Path, out: Path) -> None:
    """Index, tokenizer, templates, code: all but weights in other formats and records of how the
    base was made.
    """
    there, here = folder_bytes(base), folder_bytes(out)
    left = {*LEFT, *(name for name in there if name.endswith(".safetensors"))}
    kept = {name: content for name, content in there.items() if name not in left}
    assert {INDEX, "tokenizer.json", "chat_template.jinja", *CARRIED} <= kept.keys()
    assert {name: here.get(name) for name in kept} == kept
    assert here.keys() == kept.keys() | {
        "certificate.json",
        *(n for n in there if n.endswith(".safetensors")),
    }


@torch.no_grad()
def assert_opens(out: Path, base: Path, adapter: Path) -> None:
    """With transformers only, and with the logits of base + adapter up to 16-bit rounding."""
    tuned = load_base(base, "fp32").model
    load_adapter(tuned, base, adapter)
    ids = torch.tensor([[5, 9, 200, 17, 3, 64]])
    wanted, result = tuned(ids)[0], logits(opened(out).float())
    off, learned = (
        (result - wanted).abs().max(),
        (wanted - logits(opened(base).float())).abs().max(),
    )
    assert off < 0.1 * learned


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_an_update_of_a_tied_head_alone_adds_it_to_its_shard_and_to_the_index(
    cli: Lora, tmp_path: Path
) -> None:
    base = sharded(tmp_path, "qwen3", AdapterSpec(3, 12.0, ("lm_head",)), torch.float32)
    assert merge(cli, tmp_path)[0] == 0
    out, before = read_json(tmp_path / "out" / INDEX), read_json(base / INDEX)
    assert out["weight_map"].keys() - before["weight_map"].keys() == {"lm_head.weight"}
    for name, file in out["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    assert out["metadata"]["total_size"] == sum(map(len, tensors(tmp_path / "out").values()))
    assert_opens(tmp_path / "out", base, tmp_path / "adapter")


def test_with_prompts_it_says_how_far_the_merged_model_is_from_base_and_adapter(
    cli: Lora, brief: Path, tmp_path: Path
) -> None:
    source, out = "artifacts/lora_adapter", str(tmp_path / "out")
    code, output, err = cli(
        "merge", "--adapter", source, "--out", out, "--prompts", "data/prompts.yaml", cwd=brief
    )
    assert (code, err) == (0, "")
    certificate = read_json(tmp_path / "out/certificate.json")
    assert output.endswith(f"largest logit difference {certificate['max_logit_difference']:.1e}\n")
    assert certificate["max_logit_difference"] < 1e-5
    assert certificate["same_first_choices"] == certificate["prompts_checked"] > 5


def test_an_update_that_is_mostly_lost_to_rounding_is_reported(cli: Lora, tmp_path: Path) -> None:
    sharded(tmp_path, "llama", AdapterSpec(3, 1e-4, "all-linear"))
    code, _, err = merge(cli, tmp_path)
    assert code == 0 and "rounding leaves" in err and "--precision fp32" in err
    assert merge(cli, tmp_path, "--precision", "fp32")[::2] == (0, REPLACED)


# Killed

DYING: dict[str, tuple[str, int]] = {  # at which call of what
    "as it begins": ("pipeline.weights.merge.rewrite", 1),
    "in a file": ("pipeline.files.safetensors_file.write_at", 3),
    "before the certificate": ("pipeline.weights.merge_check.update_ratios", 1),
    "before the rename": ("pipeline.files.artifact.sync_tree", 1),
    "between two renames": ("pathlib.Path.rename", 2),
}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    base = checkpoint(tmp_path / "base")
    adapter(tmp_path / "adapter", base, AdapterSpec(3, 12.0, ("q_proj", "fc1")))
    adapter(tmp_path / "other", base, AdapterSpec(2, 4.0, ("v_proj",)))
    return tmp_path


def killed(root: Path, at: tuple[str, int]) -> None:
    command = [LORA, "merge", "--adapter", "adapter", "--out", "out"]
    assert Forked(command, root, at).end() == (-signal.SIGKILL, "")


@pytest.mark.parametrize("at", DYING)
@pytest.mark.slow
def test_killed_before_its_last_rename_it_leaves_the_old_result_or_none(
    cli: Lora, plain: Path, at: str
) -> None:
    if at != "between two renames":
        killed(plain, DYING[at])
        assert not (plain / "out").exists()
    assert cli("merge", "--adapter", "other", "--out", "out", cwd=plain)[0] == 0
    old = folder_bytes(plain / "out")
    killed(plain, DYING[at])
    assert (plain / "out").exists() is (at != "between two renames")
    assert not (plain / "out").exists() or folder_bytes(plain / "out") == old
    assert merge(cli, plain)[::2] == (0, REPLACED if at != "between two renames" else "")
    assert folder_bytes(plain / "out") != old
    assert not list(plain.glob(".*")), "no temporary folder is left"


@pytest.mark.slow
def test_killed_between_two_renames_the_next_run_begins_with_the_old_result(
    cli: Lora, plain: Path
) -> None:
    """Tested by making the next run fail."""
    assert cli("merge", "--adapter", "other", "--out", "out", cwd=plain)[0] == 0
    old = folder_bytes(plain / "out")
    killed(plain, DYING["between two renames"])
    (plain / "adapter/adapter_model.safetensors").unlink()
    refusal(merge(cli, plain))
    assert folder_bytes(plain / "out") == old


# Refused


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2)])
def test_too_little_disk_is_refused_before_anything_is_written(
    cli: Lora, plain: Path, precision: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = (
        sum(value.numel() for value in load_file(plain / "base/model.safetensors").values()) * width
    )
    free = needed - 1
    usage = shutil.disk_usage(plain)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=free))
    before = folder_bytes(plain)
    assert "Free some space, or name a folder elsewhere with --out" in refusal(
        merge(cli, plain, "--precision", precision)
    )
    assert folder_bytes(plain) == before and not (plain / "out").exists()
    free = needed
    assert merge(cli, plain, "--precision", precision)[0] == 0


BOTH = "name it with --adapter and the folder to write with --out"
REFUSED: dict[str, tuple[list[str], str]] = {
    "no out": (["--adapter", "adapter"], BOTH),
    "no adapter": (["--out", "out"], BOTH),
    "neither, with a precision": (["--precision", "bf16"], BOTH),
    "neither, with a base": (["--base", "base"], BOTH),
    "params": (["--adapter", "adapter", "--out", "out", "--set", "merge.prompts=x"], "--set"),
    "force": (["--adapter", "adapter", "--out", "out", "--force"], "--force"),
    "nowhere": (
        ["--adapter", "nowhere", "--out", "out"],
        "nowhere/adapter_config.json: No such file",
    ),
    "no base": (
        ["--adapter", "adapter", "--out", "out", "--base", "x"],
        "x has no model.safetensors",
    ),
    "itself": (["--adapter", "adapter", "--out", "adapter"], "adapter is also an input"),
    "its base": (["--adapter", "adapter", "--out", "base"], "base is also an input"),
    "in what is read": (["--adapter", "adapter", "--out", "adapter/merged"], "contain one another"),
    "around what is read": (["--adapter", "adapter", "--out", "."], "contain one another"),
    "another adapter": (
        ["--adapter", "adapter", "--out", "other"],
        "other exists and holds other files",
    ),
    "no prompts": (["--adapter", "adapter", "--out", "out", "--prompts", "x.yaml"], "x.yaml"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_one_message_and_nothing_is_written(
    cli: Lora, plain: Path, name: str
) -> None:
    arguments, message = REFUSED[name]
    before = folder_bytes(plain)
    assert message in refusal(cli("merge", *arguments, cwd=plain))
    assert folder_bytes(plain) == before and not (plain / "out").exists()


def test_a_merge_never_takes_the_place_of_the_pipelines(cli: Lora, project: Path) -> None:
    before = folder_bytes(project / "artifacts/lora_merged")
    refused = cli(
        "merge",
        "--adapter",
        "artifacts/lora_adapter",
        "--out",
        "artifacts/lora_merged",
        cwd=project,
    )
    assert "artifacts/lora_merged exists and holds other files" in refusal(refused)
    assert folder_bytes(project / "artifacts/lora_merged") == before
