"""`lora serve --quantization q8_0`: which bases it changes, what that is certified by, and when it
is refused.
"""

import math
from pathlib import Path

import pytest
import torch

from pipeline.adapters.config import AdapterSpec
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.base_model import base_fingerprint
from pipeline.inference import engine
from pipeline.inference.http import q8_0
from pipeline.inference.http.models import Source
from pipeline.inference.http.q8_0 import Q8Bases, store_in_q8_0
from pipeline.inference.http.server import HttpServer
from pipeline.inference.model_pool import ModelPool
from pipeline.inference.score import builtin_prompts
from pipeline.models.kernels import native
from pipeline.models.quantized_linear import Q8Linear, QuantizedLinear, quantizable
from tests.conftest import Lora
from tests.helpers.bases import toy_checkpoint
from tests.helpers.checkpoints import adapter
from tests.helpers.http_server import ask, serving
from tests.helpers.projects import refusal

needs_native = pytest.mark.skipif(native.native() is None, reason="no compiler here")
LINEARS = ("q_proj", "v_proj", "up_proj")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    toy_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    return tmp_path / "base"


def kinds(loaded: engine.LoadedModel) -> set[type]:
    model = loaded.model
    return {type(module) for module in model.modules() if "Linear" in type(module).__name__}


@needs_native
def test_base_and_adapters_are_served_from_it(base: Path) -> None:
    adapter(base.parent / "a", base, AdapterSpec(2, 8.0, LINEARS), 1)
    prepare, sources = Q8Bases(), {"base": Source(base), "a": Source(base, base.parent / "a")}
    wanted = []
    for source in sources.values():
        loaded = engine.load(source.base)
        store_in_q8_0(loaded)
        pool = ModelPool(prepare=Q8Bases())
        resident, _ = pool.load("", source.base, source.adapter)
        wanted.append(engine.continued(resident.loaded, "Two and two are", 12))
    with serving(sources, prepare=prepare) as desk:
        for name, text in zip(sources, wanted, strict=True):
            body = {"model": name, "prompt": "Two and two are", "max_tokens": 12, "temperature": 0}
            status, answer, _ = ask(desk, "/v1/completions", body)
            assert (status, answer["choices"][0]["text"]) == (200, text)
        base_model = desk.models.pool.get("base").loaded
        assert Q8Linear in kinds(base_model) and torch.bfloat16 == base_model.model.dtype
    assert wanted[0] != wanted[1]
    (line,) = prepare.lines
    assert line.startswith("base is in q8_0: KL ") and "of 17 next tokens as before." in line


@needs_native
def test_the_difference_is_that_of_two_copies(base: Path) -> None:
    difference = store_in_q8_0(loaded := engine.load(base))
    before, ids = engine.load(base).model, loaded.tokenizer.encode(builtin_prompts()[0])
    rows = [
        model.logits(model.hidden_states(torch.tensor([ids])))[0]
        for model in (before, loaded.model)
    ]
    assert 0 < (rows[0] - rows[1]).abs().max() <= difference.max_logit_difference + 1e-6
    assert 0 < difference.divergence < q8_0.MOST_DIVERGENCE


@needs_native
def test_a_base_in_fp32_computes_in_bf16(tmp_path: Path) -> None:
    toy_checkpoint(tmp_path / "base")
    loaded = engine.load(tmp_path / "base")
    store_in_q8_0(loaded)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


@needs_native
def test_a_base_on_whose_4_bits_adapters_were_trained_keeps_them(base: Path) -> None:
    changes = adapter(base.parent / "a", base, AdapterSpec(2, 8.0, LINEARS))
    inputs = {"base": base_fingerprint(base), "params": {"quantization": "nf4-dq"}}
    artifact.seal(changes, inputs)
    prepare = Q8Bases()
    resident, _ = ModelPool(prepare=prepare).load("a", base, changes)
    assert QuantizedLinear in kinds(resident.base.loaded) and prepare.lines == []


@needs_native
@pytest.mark.parametrize("limit", [0.0, math.nan])
def test_a_base_that_it_would_change_is_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch, limit: float
) -> None:
    monkeypatch.setattr(q8_0, "MOST_DIVERGENCE", limit)
    pool = ModelPool(prepare=Q8Bases())
    with pytest.raises(
        UserError, match=r"q8_0 changes the answers of .*base: KL .* nats per token"
    ):
        pool.load("base", base, None)
    assert not pool.names and not pool.bases


def test_where_it_would_be_no_faster_it_is_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch, cli: Lora
) -> None:
    monkeypatch.setattr(Q8Linear, "takes", lambda _: False)
    command = ["serve", "--base", str(base), "--port", "0", "--quantization", "q8_0"]
    if native.native() is not None:
        message = refusal(cli(*command, cwd=base.parent))
        assert "--quantization q8_0 needs linears whose sizes are multiples of 32." in message
    monkeypatch.setattr(q8_0, "native", lambda: None)
    message = refusal(cli(*command, cwd=base.parent))
    assert f"needs the kernels of native.c, and so a C compiler (cc). Serve {base}" in message


@needs_native
def test_the_command_says_what_it_changed(
    base: Path, monkeypatch: pytest.MonkeyPatch, cli: Lora
) -> None:
    monkeypatch.setattr(HttpServer, "run", HttpServer.close)
    code, out, _ = cli(
        "serve", "--base", str(base), "--port", "0", "--quantization", "q8_0", cwd=base.parent
    )
    assert code == 0 and "base is in q8_0: KL " in out


def test_the_head_and_the_embedding_keep_their_weights(base: Path) -> None:
    model = engine.load(base).model
    names = quantizable(model)
    assert names and not any("head" in name or "embed" in name for name in names)
