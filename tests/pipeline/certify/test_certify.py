"""A broken adapter is told from a whole one in each program, and the reason names what is broken."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_workbench.api import ignore, play
from pipeline.adapters.config import WEIGHTS, AdapterSpec
from pipeline.certify import environment, record
from pipeline.certify.certify import FAILED, NOT_RUN, PASSED, Checked, Processes, certify
from pipeline.certify.engines import Wanted, parse
from tests.conftest import Lora
from tests.helpers.bases import toy_checkpoint
from tests.helpers.broken_adapters import BROKEN, broken
from tests.helpers.checkpoints import adapter
from tests.helpers.errors import user_error

pytest.importorskip("peft")
SPEC = AdapterSpec(4, 8, ("q_proj", "v_proj", "down_proj"))
WHOLE = {
    "LoRA": SPEC,
    "DoRA": AdapterSpec(4, 8, ("q_proj", "v_proj"), dora=True),
    "rsLoRA": AdapterSpec(4, 8, ("q_proj", "o_proj"), rslora=True),
    "token rows": AdapterSpec(4, 8, ("q_proj",), rows={"embed_tokens": (3, 310)}),
    "a head in full": AdapterSpec(4, 8, ("q_proj",), saved=("lm_head",)),
    "an embedding": AdapterSpec(4, 8, ("q_proj", "embed_tokens")),
    "several ranks": AdapterSpec(4, 8, ("q_proj", "v_proj"), ranks={"v_proj": 2}),
    "several alphas": AdapterSpec(4, 8, ("q_proj", "v_proj"), alphas={"v_proj": 3}),
}
PEFT = Wanted("peft", None)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certify") / "base"
    toy_checkpoint(folder, tie_word_embeddings=False)
    return folder


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with Processes() as opened:
        yield opened


def certificate(folder: Path, base: Path, processes: Processes, *engines: Wanted) -> dict[str, Any]:
    return play(certify(Checked(folder, base), engines or (PEFT,), processes), ignore)


@pytest.mark.parametrize("name", WHOLE)
def test_whole(name: str, base: Path, processes: Processes, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "whole", base, WHOLE[name])
    found = certificate(folder, base, processes)
    assert found["verdict"] == PASSED and found["problems"] == [], found
    (entry,) = found["engines"]
    assert entry["effect"] > 0.1 and entry["missed"] < 1e-5
    assert all(group["moved"] > 0 for group in entry["groups"].values())


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name: str, base: Path, processes: Processes, tmp_path: Path) -> None:
    whole = adapter(tmp_path / "whole", base, SPEC)
    found = certificate(broken(whole, tmp_path / "broken", name), base, processes)
    assert found["verdict"] == FAILED
    assert found["problems"] or found["engines"][0]["problems"]


def test_a_group_without_effect_is_named(base: Path, processes: Processes, tmp_path: Path) -> None:
    whole = adapter(tmp_path / "whole", base, SPEC)
    dead = broken(whole, tmp_path / "broken", "B of a module is all zeros")
    assert certificate(dead, base, processes)["problems"] == [
        "no effect of self_attn.q_proj.lora_A"
    ]


def test_engines_are_named_with_versions() -> None:
    assert parse("peft==0.18, transformers") == [
        Wanted("peft", "0.18"),
        Wanted("transformers", None),
    ]
    assert parse("peft,peft") == [PEFT]
    assert "got 'tgi'" in user_error(parse, "tgi")


def test_the_command_says_why_and_exits_with_1(cli: Lora, base: Path, tmp_path: Path) -> None:
    whole = adapter(tmp_path / "whole", base, SPEC)
    code, said, _ = cli("certify", str(whole), "--base", str(base), cwd=tmp_path)
    assert code == 0 and "6 of 6" in said
    assert record.read(whole) is not None
    lost = broken(whole, tmp_path / "lost", "alpha is lost")
    code, said, _ = cli("certify", str(lost), "--base", str(base), cwd=tmp_path)
    assert code == 1 and "no lora_alpha: PEFT takes 8" in said


def test_a_certificate_is_of_exactly_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(b"1")
    record.write(record.place_of(folder), folder, {"verdict": PASSED})
    assert record.read(folder) == {"files": record.digests(folder), "verdict": PASSED}
    (folder / WEIGHTS).write_bytes(b"2")
    assert record.read(folder) is None


def test_an_engine_that_cannot_be_had_is_not_run(
    base: Path, processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "_find_uv", lambda: "/nonexistent/uv")
    monkeypatch.setenv(environment.FOLDER, str(tmp_path / "engines"))
    whole = adapter(tmp_path / "whole", base, SPEC)
    found = certificate(whole, base, processes, Wanted("peft", "0.1"))
    assert found["verdict"] == NOT_RUN and found["engines"][0]["verdict"] == NOT_RUN


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.17", "0.18", "0.19", "0.20", "0.21"])
def test_peft_of_every_version(
    version: str, base: Path, processes: Processes, tmp_path: Path
) -> None:
    """Before transformers 5 a tokenizer that it saved does not open, and nothing else differs."""
    whole = adapter(tmp_path / "whole", base, SPEC)
    (entry,) = certificate(whole, base, processes, Wanted("peft", version))["engines"]
    assert entry["name"].startswith(f"peft {version}.") and entry["missed"] < 1e-5
    assert all("TokenizersBackend" in problem for problem in entry["problems"])
