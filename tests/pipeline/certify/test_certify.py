"""A broken adapter is told from a whole one in each program, and the reason names what is broken."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_workbench.api import ignore, play
from pipeline.adapters.config import WEIGHTS, AdapterSpec
from pipeline.certify import environment, record
from pipeline.certify.certify import FAILED, NOT_RUN, PASSED, Processes, certify
from pipeline.certify.compare import against
from pipeline.certify.engines import Wanted, as_stored, parse
from pipeline.certify.kinds import Checked
from pipeline.certify.measured import Question, ask
from tests.conftest import Lora
from tests.helpers.bases import TEMPLATE, toy_checkpoint
from tests.helpers.broken_adapters import BROKEN, Break, broken
from tests.helpers.checkpoints import adapter, edit_adapter_config, edit_tensors
from tests.helpers.errors import user_error
from tests.helpers.json_files import read_json

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
    assert entry["groups_that_act"] == entry["groups"] > 0


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name: str, base: Path, processes: Processes, tmp_path: Path) -> None:
    whole = adapter(tmp_path / "whole", base, SPEC)
    found = certificate(broken(whole, tmp_path / "broken", name), base, processes)
    _, reason = BROKEN[name]
    assert found["verdict"] == FAILED
    assert any(reason in problem for problem in found["problems"]), found


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
    written = read_json(whole / "certificate.json")
    assert written["verdict"] == PASSED and written["files"] == record.digests(Checked(whole, base))
    lost = broken(whole, tmp_path / "lost", "alpha is lost")
    code, said, _ = cli("certify", str(lost), "--base", str(base), cwd=tmp_path)
    assert code == 1 and "no lora_alpha: PEFT takes 8" in said


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


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4, target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM"),
        peft.LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM"),
        peft.IA3Config(
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            task_type="CAUSAL_LM",
        ),
    ],
    ids=["bias", "lora_bias", "IA3"],
)
def test_what_only_peft_reads_is_noted_and_not_failed(
    config: peft.PeftConfig, base: Path, processes: Processes, tmp_path: Path
) -> None:
    found = certificate(saved_by_peft(config, base, tmp_path / "adapter"), base, processes)
    assert found["verdict"] == PASSED and len(found["notes"]) == 1, found


def saved_by_peft(config: peft.PeftConfig, base: Path, folder: Path) -> Path:
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 10)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("start", "verdict"), [("pissa", PASSED), ("pissa_niter_4", FAILED)])
def test_an_adapter_must_be_the_same_each_time_that_it_is_opened(
    start: str, verdict: str, base: Path, processes: Processes, tmp_path: Path
) -> None:
    config = peft.LoraConfig(
        r=4, init_lora_weights=start, target_modules=["q_proj"], task_type="CAUSAL_LM"
    )
    found = certificate(saved_by_peft(config, base, tmp_path / "adapter"), base, processes)
    differs = "it answers differently each time that it is opened" in found["problems"]
    assert found["verdict"] == verdict and differs == (verdict == FAILED), found


def with_tokenizer(folder: Path, base: Path, template: str | None) -> Path:
    """The adapter with the base's tokenizer and another chat template."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "no chat template"),
        ("<s><s>{% for m in messages %}{{ m['content'] }}{% endfor %}", "begins with <s> twice"),
    ],
)
def test_a_tokenizer_that_comes_with_the_adapter(
    template: str | None, reason: str, tmp_path: Path, processes: Processes
) -> None:
    base = tmp_path / "base"
    toy_checkpoint(base)
    write_bos_rule(base)
    whole = with_tokenizer(adapter(tmp_path / "whole", base, SPEC), base, TEMPLATE)
    assert certificate(whole, base, processes)["verdict"] == PASSED
    found = certificate(with_tokenizer(whole, base, template), base, processes)
    assert found["verdict"] == FAILED and any(reason in problem for problem in found["problems"])


def write_bos_rule(base: Path) -> None:
    """Let the tokenizer begin every text with <s>."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    rule = processors.TemplateProcessing("<s> $A", None, [("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = rule
    tokenizer.save_pretrained(base)


def test_no_pickle_is_opened(cli: Lora, base: Path, tmp_path: Path) -> None:
    whole = adapter(tmp_path / "whole", base, SPEC)
    (whole / WEIGHTS).rename(whole / "adapter_model.bin")
    code, _, errors = cli("certify", str(whole), "--base", str(base), cwd=tmp_path)
    assert code == 1 and "has no adapter_model.safetensors" in errors


def test_numbers_that_are_none_are_null(cli: Lora, base: Path, tmp_path: Path) -> None:
    whole = adapter(tmp_path / "whole", base, SPEC)
    folder = broken(whole, tmp_path / "broken", "values that are no numbers")
    code, said, _ = cli("certify", str(folder), "--base", str(base), "--json", cwd=tmp_path)
    assert code == 1
    found = json.loads(said, parse_constant=pytest.fail)
    assert "its answers are no finite numbers" in found["problems"]


def test_tensors_that_are_no_real_numbers_are_no_group(
    base: Path, processes: Processes, tmp_path: Path
) -> None:
    whole = adapter(tmp_path / "whole", base, SPEC)
    edit_tensors(whole, lambda t: {**t, "count": torch.tensor([1]), "none": torch.empty(0)})
    found = certificate(whole, base, processes)
    assert found["verdict"] == FAILED and "count" in " ".join(found["problems"])


@pytest.mark.slow
def test_transformers_by_itself(base: Path, processes: Processes, tmp_path: Path) -> None:
    whole = adapter(tmp_path / "whole", base, SPEC)
    (entry,) = certificate(whole, base, processes, Wanted("transformers", "4.57"))["engines"]
    assert entry["groups_that_act"] == entry["groups"] and entry["missed"] < 1e-5
    assert all("TokenizersBackend" in problem for problem in entry["problems"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: edit_adapter_config(folder, lora_alpha=4), "% of the effect"),
        (BROKEN["B is all zeros"][0], "it has no effect"),
        (
            lambda folder: edit_tensors(
                folder,
                lambda t: {
                    k: v * 0 if "layers.0.self_attn.q_proj" in k else v for k, v in t.items()
                },
            ),
            "another effect of",
        ),
    ],
    ids=["half the scale", "nothing", "not one matrix"],
)
def test_a_program_that_makes_something_else_of_an_adapter(
    change: Break, reason: str, base: Path, processes: Processes, tmp_path: Path
) -> None:
    """Stood in for by PEFT on an adapter that is what such a program would read."""
    whole = adapter(tmp_path / "whole", base, SPEC)
    other = Path(shutil.copytree(whole, tmp_path / "other"))
    change(other)
    question = Question([[3, 4, 5], [6, 7]], [[3, 4, 5]], [3], 4, [1])
    answers = []
    for number, folder in enumerate((whole, whole, other)):
        room = tmp_path / str(number)
        room.mkdir()
        checked = Checked(folder, base)
        process = processes.of(PEFT, "adapter")
        answers.append(ask(process, as_stored(checked, None, room), checked, question, room))
    expected, same, found = answers
    assert against(expected, same)[1] == []
    problems = against(expected, found)[1]
    assert any(reason in problem for problem in problems), problems


def test_without_the_reference_nothing_is_failed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = adapter(tmp_path / "whole", base, SPEC)
    monkeypatch.setattr("pipeline.certify.engines.find_spec", lambda _: None)  # no PEFT here
    monkeypatch.setattr(environment, "_find_uv", lambda: "/nonexistent/uv")
    monkeypatch.setenv(environment.FOLDER, str(tmp_path / "engines"))
    with Processes() as none:
        assert "uv does not start" in user_error(certificate, whole, base, none)
