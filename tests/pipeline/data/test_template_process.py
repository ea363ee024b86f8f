"""Chat templates in their own process: same output as transformers, limited time and memory."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pipeline.data.examples import Example
from pipeline.data.masking import Encoder
from pipeline.data.tokenizers import template_process
from pipeline.data.tokenizers.chat_template import render
from pipeline.data.tokenizers.subword import SubwordTokenizer
from pipeline.data.tokenizers.template_process import (
    Conversation,
    Rendered,
    Renderer,
    TemplateError,
)
from pipeline.errors import UserError
from tests.conftest import Lora
from tests.helpers.projects import ROOT
from tests.helpers.tokenizers import (
    INSTRUCTS,
    MARKED,
    MARKED_WITHOUT_END,
    PLAIN,
    SMOLLM2,
    THINKS,
    folder_with,
)

LOADS = """
import sys
from pathlib import Path
from pipeline.data.tokenizers.subword import SubwordTokenizer
from pipeline.data.tokenizers.template_process import RENDERER
SubwordTokenizer.load(Path(sys.argv[1]))
print(RENDERER._worker is not None)
"""
TURNS = [
    {"role": "user", "content": "Hällo 🙂\u2028"},
    {"role": "assistant", "content": "<think>x</think> A\n"},
] * 2
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLES = (
    "{% set n = namespace(x='a' * 999) %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% "
    "endfor %}{{ n.x }}"
)


def written(
    by: Renderer, template: str, messages: Any = TURNS, reply: bool = False, tokens: Any = None
) -> Rendered:
    ((result,),) = by.render(
        template, [Conversation(messages, [(len(messages), reply)])], tokens or {}
    ).answer()
    if isinstance(result, TemplateError):
        raise result
    return result


@pytest.fixture
def renderer() -> Iterator[Renderer]:
    instance = Renderer()
    yield instance
    instance.stop()


@pytest.mark.parametrize(
    "template", [SMOLLM2, MARKED, MARKED_WITHOUT_END, THINKS, INSTRUCTS, PLAIN]
)
@pytest.mark.parametrize("reply", [False, True])
@pytest.mark.sampled(5)
def test_a_template_writes_what_transformers_writes(
    renderer: Renderer, tmp_path: Path, template: str, reply: bool
) -> None:
    theirs = AutoTokenizer.from_pretrained(folder_with(tmp_path, template, bos="<s>", eos="</s>"))
    result = written(renderer, template, TURNS, reply, theirs.special_tokens_map)
    assert result == theirs.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=reply)
    assert bool(result.marks) == ("generation %" in template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (DOUBLES, "was stopped: it takes more than 512 MiB of memory"),
        ("{{ 'a' * 10**12 }}", "was stopped: it takes more than 512 MiB of memory"),
        ("{{ 'a' * 10**7 }}", "was stopped: it wrote 10,000,000 characters, more than 4,19"),
        (
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "fails: maximum recursion depth exceeded",
        ),
        ("{{ raise_exception('no tools') }}", "fails: no tools$"),
        ("{% if %}", "fails: Expected an expression"),
        ("{{ messages.append(1) }}", "fails: .*unsafe"),
    ],
)
@pytest.mark.sampled(3)
@pytest.mark.slow
def test_a_template_that_fails_or_takes_too_much_says_so_and_the_next_is_rendered(
    renderer: Renderer, template: str, message: str
) -> None:
    for _ in range(2):
        with pytest.raises(TemplateError, match=message):
            written(renderer, template)
        assert written(renderer, "{{ messages | length }}") == "4"


@pytest.mark.slow
def test_a_template_that_never_ends_is_stopped_with_its_process(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(renderer, "")
    assert renderer._worker is not None
    process = renderer._worker.process
    monkeypatch.setattr(template_process, "RENDER_SECONDS", 0.2)
    with pytest.raises(TemplateError, match=r"was stopped: it did not finish within 0\.2 seconds"):
        written(renderer, ENDLESS)
    assert process.poll() == -signal.SIGKILL
    monkeypatch.undo()
    assert written(renderer, "{{ 1 }}") == "1"


def test_several_beginnings_of_a_conversation_are_rendered_at_once_and_fail_one_by_one(
    renderer: Renderer,
) -> None:
    template = "{% if messages | length == 2 %}{{ raise_exception('two') }}{% endif %}" + SMOLLM2
    prefixes = [(1, True), (2, False), (4, False)]
    ((instance, two, all_),) = renderer.render(
        template, [Conversation(TURNS, prefixes)], {}
    ).answer()
    assert isinstance(two, TemplateError) and str(two) == "fails: two"
    assert (instance, all_) == (
        written(renderer, template, TURNS[:1], True),
        written(renderer, template),
    )


@pytest.mark.slow
def test_a_long_conversation_is_written_in_full(renderer: Renderer) -> None:
    turns: list[dict[str, Any]] = [{"role": "user", "content": "ü" * 3_000_000}]
    assert written(renderer, "{{ messages[0].content * 2 }}", turns) == "ü" * 6_000_000


@pytest.mark.slow
def test_the_command_and_a_prompt_name_the_template_that_was_stopped(
    cli: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = folder_with(tmp_path / "model", ENDLESS)
    (model / "config.json").write_text("{}", encoding="utf-8")
    line = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    (tmp_path / "d.jsonl").write_text(line, encoding="utf-8")
    written(template_process.RENDERER, "")  # start the process
    monkeypatch.setattr(template_process, "RENDER_SECONDS", 0.2)
    code, out, err = cli("data", "show", "d.jsonl", "--base", "model", cwd=tmp_path)
    message = " ".join(err.split())
    assert (code, out) == (1, "")
    assert "d.jsonl:1: model: its chat template was stopped: it did not finish within" in message
    assert message.endswith("Fix the template, or choose another model.")
    (model / "chat_template.jinja").write_text(DOUBLES, encoding="utf-8")
    monkeypatch.undo()
    with pytest.raises(
        UserError, match="model: its chat template was stopped: it takes more than 512 MiB"
    ):
        render(model, "Hello")


@pytest.mark.slow
def test_the_conversation_of_a_group_that_hangs_is_found_without_waiting_for_those_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = "{% if messages[0].content == 'hang' %}" + ENDLESS + "{% endif %}" + SMOLLM2
    tokenizer = SubwordTokenizer.load(folder_with(tmp_path / "model", hangs))
    examples = [
        Example(
            "",
            "d",
            n,
            messages=({"role": "user", "content": text}, {"role": "assistant", "content": "b"}),
        )
        for n, text in enumerate(["a", "b", *["hang"] * 60], 1)
    ]
    tokenizer.end_ids  # noqa: B018  # renders: starts the process
    monkeypatch.setattr(template_process, "RENDER_SECONDS", 0.3)
    began, encoded = time.monotonic(), Encoder(tokenizer).each(examples)
    assert [next(encoded)[0].line for _ in range(2)] == [1, 2]
    with pytest.raises(UserError, match=r"d:3: .* its chat template was stopped"):
        next(encoded)
    assert time.monotonic() - began < 30  # the process starts twice


def running(pid: int) -> bool:
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
            != "Z"
        )
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("template", [SMOLLM2, None])
def test_the_process_starts_with_a_tokenizer_that_has_a_template(
    tmp_path: Path, template: str | None
) -> None:
    command = [sys.executable, "-c", LOADS, str(folder_with(tmp_path / "model", template))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{template is not None}\n"


def test_a_process_that_dies_while_it_starts_is_started_again(renderer: Renderer) -> None:
    renderer.start()
    assert renderer._worker is not None
    renderer._worker.process.kill()
    renderer._worker.process.wait()
    assert written(renderer, "{{ 1 }}") == "1"


@pytest.mark.slow
def test_the_process_ends_with_its_parent_and_a_fork_starts_its_own() -> None:
    code = f"""
import os, time
from pipeline.data.tokenizers.template_process import RENDERER
text = lambda: RENDERER.render("{{{{ 1 }}}}", [({TURNS!r}, [(1, False)], ())], {{}}).answer()[0][0]
assert text() == "1"
mine = RENDERER._worker.process.pid
if os.fork() == 0:
    good = text() == "1" and RENDERER._worker.process.pid != mine
    RENDERER.stop()
    os._exit(not good)
assert os.wait()[1] == 0
assert text() == "1" and RENDERER._worker.process.pid == mine
print(mine, flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert running(pid)
        parent.kill()
    until = time.monotonic() + 10
    while running(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not running(pid)


@pytest.mark.skipif(
    not hasattr(resource, "prlimit"), reason="the system cannot read another process's limits"
)
@pytest.mark.slow
def test_a_process_whose_parent_was_killed_has_few_seconds_left(renderer: Renderer) -> None:
    written(renderer, "")
    assert renderer._worker is not None
    assert (
        resource.prlimit(renderer._worker.process.pid, resource.RLIMIT_CPU)[0]
        <= 5 + template_process.RENDER_SECONDS + 2
    )
    os.kill(renderer._worker.process.pid, 0)
