"""Whether vLLM computes the answers of a server, and what a server does with its answers."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.adapters.config import AdapterSpec
from pipeline.certify import process, vllm
from pipeline.certify.engines import Wanted
from pipeline.errors import UserError
from pipeline.inference.batching import GeneratedToken, Generation
from pipeline.inference.http.models import Source
from pipeline.inference.requests import FieldError
from tests.conftest import Built
from tests.helpers.bases import toy_checkpoint
from tests.helpers.checkpoints import adapter

# A child that speaks as the runner does: it answers a prompt with the numbers after its last token.
CHILD = """
import json, os, sys
def say(**answer):
    print(json.dumps(answer), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    id_ = asked["id"]
    if asked["do"] == "start":
        say(id=id_, event="done", name="vLLM 9", tokens=4096)
    if asked["do"] != "generate":
        continue
    last = asked["ids"][-1]
    if last == 7:
        say(id=id_, event="refused", message="too odd")
    elif last == 8:
        sys.exit("out of everything")
    elif last != 9:
        for step in range(asked["max_tokens"]):
            token = last + 1 + step
            say(id=id_, event="tokens", tokens=[[token, -1.5, [[token, -1.5]]]])
        say(id=id_, event="done")
"""


@pytest.fixture(scope="module")
def models(built: Built) -> Path:
    def build(root: Path) -> None:
        toy_checkpoint(root / "base")
        adapter(root / "plain", root / "base", AdapterSpec(4, 8, "all-linear"))
        adapter(root / "dora", root / "base", AdapterSpec(4, 8, "all-linear", dora=True))

    return built("for-vllm-engine", build)


@pytest.fixture(autouse=True)
def child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vllm_engine.py").write_text(CHILD)
    monkeypatch.setattr(process, "RUNNERS", tmp_path)
    monkeypatch.setattr(Wanted, "python", lambda *_, **__: Path(sys.executable))


def sources(models: Path, *adapters: str) -> dict[str, Source]:
    base = models / "base"
    return {"base": Source(base)} | {name: Source(base, models / name) for name in adapters}


@pytest.fixture
def generator(models: Path) -> Iterator[vllm.VllmGenerator]:
    made = vllm.Choice("vllm", False)(sources(models, "plain"), 4, 16)
    assert isinstance(made, vllm.VllmGenerator)
    yield made
    made.close()
    assert not made._process.is_alive


class Heard:
    """What a request was told."""

    def __init__(self) -> None:
        self.tokens, self.ended = list[GeneratedToken](), list[str | Exception]()

    def wait(self, generator: vllm.VllmGenerator) -> str | Exception:
        while not self.ended:
            generator.call(lambda _: None).result(30)
        return self.ended[0]


def ask(generator: vllm.VllmGenerator, *ids: int, **settings: Any) -> tuple[Heard, Any]:
    heard = Heard()
    asked = Generation("plain", ids, **{"limit": 3} | settings)
    return heard, generator.submit(asked, heard.tokens.append, heard.ended.append)


def test_its_tokens_are_handed_on(generator: vllm.VllmGenerator) -> None:
    heard, _ = ask(generator, 5, 20)
    others, _ = ask(generator, 30, limit=2)
    assert (heard.wait(generator), others.wait(generator)) == ("length", "length")
    assert [token.id for token in heard.tokens] == [21, 22, 23]
    assert others.tokens[0] == GeneratedToken(31, -1.5, ((31, -1.5),))


def test_a_request_that_it_refuses_fails_alone(generator: vllm.VllmGenerator) -> None:
    heard, _ = ask(generator, 7)
    assert "vLLM refused: too odd" in str(heard.wait(generator))
    assert ask(generator, 20)[0].wait(generator) == "length"


def test_a_request_is_cancelled(generator: vllm.VllmGenerator) -> None:
    heard, ticket = ask(generator, 9)
    generator.call(lambda _: None).result(30)
    ticket.cancel()
    assert heard.wait(generator) == "cancelled"
    assert ask(generator, 20)[0].wait(generator) == "length"


def test_its_end_is_said_to_all_that_wait(generator: vllm.VllmGenerator) -> None:
    waiting, _ = ask(generator, 9)
    heard, _ = ask(generator, 8)
    for request in (heard, waiting, ask(generator, 20)[0]):
        assert "out of everything" in str(request.wait(generator))


def test_a_grammar_needs_our_engine(generator: vllm.VllmGenerator) -> None:
    grammar: Any = type("Matcher", (), {"field": "response_format"})()
    heard, _ = ask(generator, 20, grammar=grammar)
    assert isinstance(heard.wait(generator), FieldError)


def test_adapters_are_exported_and_named(models: Path) -> None:
    pool = vllm.VllmPool(models / "base", False)
    resident, _ = pool.load("plain", models / "base", models / "plain")
    assert isinstance(resident, vllm.Exported) and resident.folder is not None
    config = json.loads((resident.folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4
    pool.close()
    assert not resident.folder.exists()


def test_auto_says_why_our_engine_answers(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def line(*adapters: str, unmet: str = "") -> str:
        choice = vllm.Choice("auto", False, unmet)
        made = choice(sources(models, *adapters), None, 16)
        if made:
            made.close()
        return choice.line

    assert line("plain") == "Our own engine answers: there is no GPU for vLLM."
    monkeypatch.setattr(vllm, "best_device", lambda: torch.device("cuda"))
    assert line("plain") == "vLLM 9 answers."
    assert line("plain", "dora").startswith("Our own engine answers: ")
    assert "--quantization" in line("plain", unmet="--quantization")
    monkeypatch.setattr(vllm, "best_device", lambda: torch.device("cuda", 1))
    assert "CUDA_VISIBLE_DEVICES=1" in line("plain")


def test_vllm_that_is_asked_for_is_an_error_where_it_cannot(models: Path) -> None:
    with pytest.raises(UserError, match=r"--engine vllm: .*dora"):
        vllm.Choice("vllm", False)(sources(models, "dora"), None, 16)
    with pytest.raises(UserError, match="--max-total-tokens"):
        vllm.Choice("vllm", False, "--max-total-tokens")(sources(models), None, 16)
