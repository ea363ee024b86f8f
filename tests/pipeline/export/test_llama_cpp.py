"""GGUF files in llama.cpp: the same logits as in transformers, and whatever happens to its process
is one message.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from pipeline.adapters.config import AdapterSpec
from pipeline.data.tokenizers.template_process import Rendered
from pipeline.errors import UserError
from pipeline.export import llama_cpp
from pipeline.export.llama_cpp import LlamaCpp
from pipeline.inference.engine import load
from pipeline.project.runner import Progress
from tests.conftest import Lora
from tests.helpers.bases import TEXT, toy_checkpoint, toy_tokenizer
from tests.helpers.checkpoints import adapter
from tests.helpers.gguf_files import rewritten, write_adapter, write_llama
from tests.helpers.side_by_side import IDS, logits

pytest.importorskip("llama_cpp_py_sync")
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}"
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """A folder with a toy Llama as checkpoint and as GGUF, and the model in transformers."""
    root = tmp_path_factory.mktemp("toy")
    model = toy_checkpoint(root / "base", max_position_embeddings=2048)
    write_llama(root / "model.gguf", model)
    return root, model


@pytest.fixture
def runner(toy: tuple[Path, torch.nn.Module]) -> Iterator[LlamaCpp]:
    with LlamaCpp(toy[0] / "model.gguf") as opened:
        yield opened


@pytest.mark.parametrize("times", [1, 200])
def test_logits_are_those_of_transformers_for_few_and_for_many_tokens(
    toy: tuple[Path, torch.nn.Module], runner: LlamaCpp, times: int
) -> None:
    ids = IDS * times
    torch.testing.assert_close(runner.logits(ids), logits(toy[1], ids), atol=1e-4, rtol=1e-4)


def test_logits_do_not_depend_on_what_was_computed_before(runner: LlamaCpp) -> None:
    first = runner.logits(IDS)
    runner.generate(IDS, 8)
    runner.logits(IDS[:2])
    assert torch.equal(runner.logits(IDS), first)


def test_generation_is_greedy_and_stops_before_an_end_token(
    toy: tuple[Path, torch.nn.Module], runner: LlamaCpp, tmp_path: Path
) -> None:
    new, speed = runner.generate(IDS, 12)
    theirs = toy[1].generate(torch.tensor([IDS]), max_new_tokens=12, do_sample=False)[0, len(IDS) :]  # type: ignore[operator]
    assert (new, speed > 0) == (theirs.tolist(), True)
    ends = rewritten(
        toy[0] / "model.gguf", tmp_path / "ends.gguf", {"tokenizer.ggml.eos_token_id": new[3]}
    )
    with LlamaCpp(ends) as other:
        assert new[3] in other.ends
        assert other.generate(IDS, 12)[0] == new[: new.index(new[3])]


def test_an_adapter_adds_its_product_times_the_scale(
    toy: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    root, model = toy
    folder = adapter(
        tmp_path / "adapter", root / "base", AdapterSpec(4, 8, ("q_proj", "k_proj", "down_proj"))
    )
    write_adapter(tmp_path / "adapter.gguf", folder, model.config, alpha=8)
    tuned = load(root / "base", folder).model
    with LlamaCpp(root / "model.gguf", tmp_path / "adapter.gguf") as opened, torch.no_grad():
        ours = tuned.logits(tuned.hidden_states(torch.tensor([IDS]))[0])
        torch.testing.assert_close(opened.logits(IDS), ours, atol=1e-4, rtol=1e-4)
        assert (ours - logits(model)).abs().max() > 1
    with LlamaCpp(root / "model.gguf", tmp_path / "adapter.gguf", scale=0) as opened:
        torch.testing.assert_close(opened.logits(IDS), logits(model), atol=1e-4, rtol=1e-4)


def test_texts_have_the_ids_of_the_tokenizer_that_the_file_was_made_from(runner: LlamaCpp) -> None:
    fast = toy_tokenizer()
    for text in (*TEXT, "", "  1,5 €\n\tŁódź 東京 👍🏽", "<s>user</s>"):
        assert runner.encode(text) == fast(text)["input_ids"]
    assert runner.template == fast.chat_template


@pytest.mark.parametrize("rendered", ["<s>user: hi</s>", "user: hi</s>"])
def test_a_rendered_chat_has_bos_once_if_the_file_adds_it(
    toy: tuple[Path, torch.nn.Module], tmp_path: Path, rendered: str
) -> None:
    fields = {"tokenizer.ggml.add_bos_token": True}
    with LlamaCpp(rewritten(toy[0] / "model.gguf", tmp_path / "bos.gguf", fields)) as opened:
        once = toy_tokenizer()("<s>user: hi</s>")["input_ids"]
        assert opened.encode(Rendered(rendered)) == once
        assert opened.encode("<s>user: hi</s>") == [0, *once]


def test_a_chat_is_rendered_in_the_templates_that_llama_cpp_knows(
    toy: tuple[Path, torch.nn.Module], runner: LlamaCpp, tmp_path: Path
) -> None:
    turns = [{"role": "system", "content": "Ü"}, {"role": "user", "content": "hi"}]
    assert runner.chat(turns) is None
    fields = {"tokenizer.chat_template": CHATML}
    with LlamaCpp(rewritten(toy[0] / "model.gguf", tmp_path / "chatml.gguf", fields)) as opened:
        chat = "<|im_start|>system\nÜ<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        assert opened.chat(turns, add_generation_prompt=False) == chat
        assert opened.chat(turns) == chat + "<|im_start|>assistant\n"


@pytest.mark.slow
def test_quantizing_shows_its_progress_and_gives_a_file_that_opens(tmp_path: Path) -> None:
    model = toy_checkpoint(tmp_path / "base", hidden_size=256, intermediate_size=256)
    write_llama(tmp_path / "f32.gguf", model)
    sizes = {}
    for kind in ("q8_0", "q4_k_m"):
        events = list(llama_cpp.quantize(tmp_path / "f32.gguf", tmp_path / f"{kind}.gguf", kind))
        assert events[-1] == Progress(len(events), len(events), kind)
        sizes[kind] = (tmp_path / f"{kind}.gguf").stat().st_size
    assert (tmp_path / "f32.gguf").stat().st_size > sizes["q8_0"] > sizes["q4_k_m"]
    with LlamaCpp(tmp_path / "q8_0.gguf") as opened:
        differences = (opened.logits(IDS) - logits(model)).abs()
    assert 1e-3 < differences.max() < 0.1 * logits(model).abs().max()


def test_an_unknown_kind_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"unknown quantization 'q4_9'. Use one of f32, f16, bf16, q8_0, "
    ):
        list(llama_cpp.quantize(tmp_path / "f32.gguf", tmp_path / "q.gguf", "q4_9"))


# Files and processes that break


def refused(file: Path, add: Path | None = None) -> str:
    with pytest.raises(UserError) as error, LlamaCpp(file, add):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.slow
def test_a_file_that_cannot_be_opened_is_one_message(
    toy: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    whole = (toy[0] / "model.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    assert "cut.gguf: llama.cpp cannot use it: " in refused(tmp_path / "cut.gguf")
    (tmp_path / "text.gguf").write_text("no model", encoding="utf-8")
    assert "expected 'GGUF'" in refused(tmp_path / "text.gguf")
    assert "No such file" in refused(tmp_path / "missing.gguf")
    wrong = rewritten(
        toy[0] / "model.gguf", tmp_path / "wrong.gguf", {"tokenizer.ggml.pre": "of-no-model"}
    )
    assert "unknown pre-tokenizer type: 'of-no-model'" in refused(wrong)
    assert "model.gguf: llama.cpp cannot use it: " in refused(
        toy[0] / "model.gguf", toy[0] / "model.gguf"
    )


@pytest.mark.parametrize("ids", [[320], [-1], [2**30]])
def test_an_id_that_is_no_token_is_one_message(runner: LlamaCpp, ids: list[int]) -> None:
    with pytest.raises(UserError, match=f"token id {ids[0]} is not one of 320"):
        runner.logits(ids)


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV, signal.SIGKILL])
def test_a_crash_of_llama_cpp_is_one_message(runner: LlamaCpp, number: signal.Signals) -> None:
    os.kill(runner._process.worker.process.pid, number)
    with pytest.raises(UserError, match=rf"model.gguf: llama.cpp died \({number.name}\)"):
        runner.logits(IDS)


def test_a_file_on_which_an_assertion_of_llama_cpp_fails_is_one_message(
    toy: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    whole = (toy[0] / "model.gguf").read_bytes()
    (tmp_path / "null.gguf").write_bytes(whole.replace(b"<unused313>", b"<\0nused313>"))
    said = refused(tmp_path / "null.gguf")
    assert (
        "null.gguf: llama.cpp died (SIGABRT): GGML_ASSERT(id_to_token.size() == "
        "token_to_id.size()) failed." in said
    )


HELLO = """echo '{"id": 1, "event": "done", "name": "llama.cpp b0", "path": "libllama.so"}'; """


@pytest.mark.parametrize(
    "then, said",
    [
        (
            "echo 'ggml.c:1: GGML_ASSERT(a == b) failed' >&2; kill -ABRT $$",
            r"died \(SIGABRT\): GGML_ASSERT\(a == b\) failed",
        ),
        ("exit 3", "died"),
        ("exec sleep 60", r"was stopped: it did not answer within 0\.5 seconds"),
    ],
)
def test_an_assertion_and_a_hang_say_why(
    toy: tuple[Path, torch.nn.Module], monkeypatch: pytest.MonkeyPatch, then: str, said: str
) -> None:
    monkeypatch.setattr(llama_cpp, "COMMAND", ("sh", "-c", HELLO + then))
    monkeypatch.setattr(llama_cpp, "SILENCE_SECONDS", 0.5)
    with (
        pytest.raises(UserError, match=rf"model\.gguf: llama\.cpp {said}\. The file is damaged"),
        LlamaCpp(toy[0] / "model.gguf"),
    ):
        pass


def test_a_library_that_does_not_start_is_one_message_with_one_full_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ("sh", "-c", "echo 'ImportError: no library.' >&2; exit 1")
    monkeypatch.setattr(llama_cpp, "COMMAND", command)
    with pytest.raises(UserError, match=r"^llama\.cpp died: Error: no library\. Install it again"):
        llama_cpp.find()


@pytest.mark.slow
def test_the_process_ends_with_its_parent(toy: tuple[Path, torch.nn.Module]) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom pipeline.export.llama_cpp import LlamaCpp\n"
        f"with LlamaCpp(Path({str(toy[0] / 'model.gguf')!r})) as runner:\n"
        "    print(runner._process.worker.process.pid, flush=True)\n    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    pid = int(done.stdout)
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or ") Z " in stat.read_text(encoding="utf-8"):
            return
        subprocess.run(["sleep", "0.05"], check=True)
    pytest.fail(f"process {pid} outlives its parent")


def test_without_llama_cpp_the_extra_is_named(
    toy: tuple[Path, torch.nn.Module], monkeypatch: pytest.MonkeyPatch, cli: Lora, tmp_path: Path
) -> None:
    def find(name: str) -> ModuleSpec | None:
        return None if name == "llama_cpp_py_sync" else ModuleSpec(name, None)

    found = llama_cpp.find()
    assert found is not None and found.name.startswith("llama.cpp b") and Path(found.path).is_file()
    assert json.loads(cli("doctor", "--json", cwd=tmp_path)[1])["llama.cpp"].endswith(found.path)
    monkeypatch.setattr("pipeline.errors.find_spec", find)
    assert llama_cpp.find() is None
    assert "not installed" in json.loads(cli("doctor", "--json", cwd=tmp_path)[1])["llama.cpp"]
    assert "pip install 'lora-workbench[llama-cpp]'" in refused(toy[0] / "model.gguf")
