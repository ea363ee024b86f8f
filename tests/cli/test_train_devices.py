"""`lora train --devices` trains as `lora finetune --devices`, and goes on in its own process."""

import json
import os
from pathlib import Path

import pytest

from tests.conftest import Lora
from tests.helpers.bases import toy_checkpoint
from tests.helpers.projects import folder_bytes, lora, refusal

PAIRS = "".join(
    json.dumps({"prompt": f"What is {n} and {n}?", "completion": f"It is {2 * n}."}) + "\n"
    for n in range(24)
)


@pytest.mark.parametrize(
    "options",
    [
        ("--shard",),
        ("--nnodes", "2"),
        ("--rdzv-endpoint", "127.0.0.1:1"),
        ("--node-rank", "1"),
        ("--nnodes", "2", "--rdzv-endpoint", "127.0.0.1:1", "--node-rank", "2"),
    ],
)
def test_what_contradicts_itself_is_refused_as_by_finetune(
    options: tuple[str, ...], cli: Lora, tmp_path: Path
) -> None:
    said = refusal(cli("train", "--base", "x", "--data", "y", *options, cwd=tmp_path))
    assert said == refusal(cli("finetune", "lora", *options, cwd=tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_devices_train_what_finetune_trains_on_two(tmp_path: Path) -> None:
    toy_checkpoint(tmp_path / "toy", max_position_embeddings=256)
    (tmp_path / "pairs.jsonl").write_text(PAIRS, encoding="utf-8")
    options = ("--device", "cpu", "--devices", "2", "--no-shard")
    given = ("--base", "toy", "--data", "pairs.jsonl", "--set", "epochs=1")
    done = lora("train", *given, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Next: cd run" in done.stdout, "the stages after it have run"
    adapter = tmp_path / "run/artifacts/lora_adapter"
    trained = folder_bytes(adapter)
    again = lora("finetune", "lora", "--force", *options, cwd=tmp_path / "run")
    assert again.returncode == 0, again.stderr
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert folder_bytes(adapter)[name] == trained[name]
    run = json.loads((tmp_path / "run/runs/finetune_lora/run.json").read_text(encoding="utf-8"))
    assert run["state"] == "done" and run["pid"] != os.getpid()
    single = lora("finetune", "lora", "--force", "--device", "cpu", cwd=tmp_path / "run")
    assert single.returncode == 0, single.stderr
    name = "adapter_model.safetensors"
    assert folder_bytes(adapter)[name] != trained[name], "one process sums in another order"
