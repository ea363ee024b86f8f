"""`lora serve` in the terminal: what it refuses before it loads anything, what it prints, and how
it ends.
"""

import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from openai import OpenAI

from pipeline.adapters.config import AdapterSpec
from pipeline.inference import engine
from pipeline.inference.http.server import HttpServer
from pipeline.models.generate import bytes_per_token
from pipeline.models.load import load_base
from tests.conftest import Lora
from tests.helpers.checkpoints import adapter, checkpoint, sealed_copies
from tests.helpers.projects import LORA, refusal


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--host", "0.0.0.0"],
            "--host 0.0.0.0 can be reached from other machines, so --api-key is required.",
        ),
        (["--api-key", "ключ"], "--api-key must be printable ASCII characters, at least one."),
        (["--allow-origin", "*"], "--allow-origin must be like http://localhost:3000, got *."),
        (
            ["--host", "no.such.host.invalid", "--api-key", "k"],
            "Cannot serve no.such.host.invalid, port 8000: ",
        ),
        (
            ["--allow-lora-path", "nowhere"],
            "--allow-lora-path must be an existing folder, got nowhere.",
        ),
        (["--adapter", "artifacts"], "artifacts"),
        (
            ["--base", "artifacts/base", "--adapter", "artifacts/a-0", "--adapter", "other/a-0"],
            "two models are called",
        ),
    ],
)
def test_what_cannot_be_served_is_one_message(
    cli: Lora, tmp_path: Path, options: list[str], message: str
) -> None:
    sealed_copies(tmp_path, 1)
    adapter(
        _parent(tmp_path / "other/a-0"),
        tmp_path / "artifacts/base",
        AdapterSpec(1, 1.0, ("q_proj",)),
    )
    assert message in refusal(cli("serve", *options, cwd=tmp_path))


def _parent(folder: Path) -> Path:
    folder.parent.mkdir()
    return folder


def test_without_a_model_or_the_libraries_it_says_what_to_do(
    cli: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "There is no model yet. Run `lora import` or `lora pretrain`" in refusal(
        cli("serve", cwd=tmp_path)
    )
    monkeypatch.setattr(
        "pipeline.errors.find_spec", lambda name: None if name == "uvicorn" else name
    )
    message = refusal(cli("serve", cwd=tmp_path))
    assert (
        message == "error: lora serve needs uvicorn. Run `pip install 'lora-workbench[serve]'`.\n"
    )


def test_a_busy_port_is_one_message(cli: Lora, tmp_path: Path) -> None:
    checkpoint(tmp_path / "base", d_model=16)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        message = refusal(cli("serve", "--base", "base", "--port", port, cwd=tmp_path))
    assert (
        f"Cannot serve 127.0.0.1, port {port}: Address already in use. Choose another --port"
        in message
    )


def test_a_base_that_leaves_no_memory_for_keys_and_values_is_one_message_unless_the_user_says_how_many(
    cli: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = checkpoint(tmp_path / "base")
    token = bytes_per_token(load_base(base).model)
    monkeypatch.setattr("pipeline.models.generate.available_memory", lambda _: 100 * token)
    message = refusal(cli("serve", "--base", "base", "--port", "0", cwd=tmp_path))
    assert (
        "base leaves memory for the keys and values of 50 tokens; serving needs at least 256."
        in message
    )
    monkeypatch.setattr(HttpServer, "run", HttpServer.close)
    for room, options in ((100, ["--max-total-tokens", "100"]), (2048, [])):
        monkeypatch.setattr("pipeline.models.generate.available_memory", lambda _: 4096 * token)
        code, out, _ = cli("serve", "--base", "base", "--port", "0", *options, cwd=tmp_path)
        assert code == 0 and f"Running sequences may have {room:,} tokens in all." in out


def test_how_many_are_generated_together_follows_the_device_unless_the_user_says_it(
    cli: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "base")
    seen = list[int | None]()

    def run(server: HttpServer) -> None:
        seen.append(server.generator.max_batch)
        server.close()

    monkeypatch.setattr(HttpServer, "run", run)
    for options in ([], ["--max-batch", "3"]):
        assert cli("serve", "--base", "base", "--port", "0", *options, cwd=tmp_path)[0] == 0
    assert seen == [None, 3]


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
@pytest.mark.slow
def test_a_projects_models_are_served_until_a_signal_even_in_the_middle_of_a_stream(
    cli: Lora, tmp_path: Path, number: int, code: int
) -> None:
    sealed_copies(tmp_path, 3)
    checkpoint(tmp_path / "artifacts/long", max_positions=16_384)
    listed = [
        Path(each["path"]).name for each in json.loads(cli("adapters", "--json", cwd=tmp_path)[1])
    ]
    (tmp_path / "params.yaml").write_text("base: minigpt\npretrain: {}\n", encoding="utf-8")
    environment = {**os.environ, "LORA_API_KEY": "secret", "OMP_NUM_THREADS": "1"}
    command = [LORA, "serve", "--port", "0"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=-1, stderr=-1, text=True
    ) as process:
        assert process.stdout is not None
        first, *served = (process.stdout.readline() for _ in range(10))
        assert 'api_key=os.environ["LORA_API_KEY"])' in served[-1]
        (url,) = re.findall(r"http://127\.0\.0\.1:\d+/v1", first)
        client = OpenAI(base_url=url, api_key="secret", max_retries=0)
        assert [model.id for model in client.models.list().data] == ["base", *listed, "long"]
        said = client.completions.create(model="a-1", prompt="w1 w2", temperature=0).choices[0].text
        loaded = engine.load(tmp_path / "artifacts/base", tmp_path / "artifacts/a-1")
        assert said == engine.continued(loaded, "w1 w2", 16)
        stream = client.completions.create(
            model="long", prompt="w1", max_tokens=16_000, stream=True
        )
        next(iter(stream))
        process.send_signal(number)
        start = time.monotonic()
        output, errors = process.communicate(timeout=20)
        assert time.monotonic() - start < 8
    assert process.returncode == code
    assert [line.strip() for line in served[:5]] == ["base", *listed, "long"]
    assert "secret" not in first + output + errors
    assert errors.splitlines()[-1] == "Stopped serving."
    assert "Traceback" not in errors
