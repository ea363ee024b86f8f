"""llama.cpp from the llama-cpp-py-sync wheel, if it is installed: opens and quantizes GGUF files.

All native code runs in another process (llama_cpp_process.py); nothing is compiled or downloaded.
"""

import re
import signal
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import UserError, first_line, install_command, missing_libraries
from pipeline.files.worker import Answer, Worker, python_module
from pipeline.project.runner import Event, Progress

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.data.tokenizers.word import Tokenizer
    from pipeline.export.certificate import Candidate
    from pipeline.inference.engine import LoadedModel

INSTALL = install_command("llama-cpp")
NOT_COMPARED = f"There is no llama.cpp here, so nothing was compared. Install one: {INSTALL}."
# for one answer, such as the logits of 512 tokens; a large model takes a minute to load
SILENCE_SECONDS = 600.0
COMMAND = python_module("pipeline.export.llama_cpp_process")
# Without statistics of the activations, smaller kinds (iq1, iq2) are rejected or useless.
KINDS = (
    "f32",
    "f16",
    "bf16",
    "q8_0",
    "q6_k",
    "q5_k_m",
    "q5_k_s",
    "q5_1",
    "q5_0",
    "q4_k_m",
    "q4_k_s",
    "q4_1",
    "q4_0",
    "iq4_nl",
    "iq4_xs",
    "q3_k_l",
    "q3_k_m",
    "q3_k_s",
    "iq3_m",
    "iq3_s",
    "q2_k",
)
LAST_WORDS = re.compile(
    r"GGML_ASSERT\(.*\) failed|(?:terminate called|error|what\(\)).*", re.IGNORECASE
)


class Found(NamedTuple):
    """A llama.cpp with its build, such as `llama.cpp b11739`, and its library."""

    name: str
    path: str


def is_installed() -> bool:
    return not missing_libraries("lora export --quantize q4_k_m")


def find() -> Found | None:
    """The installed llama.cpp; None without one. Raises UserError if it does not start."""
    if not is_installed():
        return None
    with closing(_Process()) as process:
        return process.found


def quantize(source: Path, target: Path, kind: str) -> Generator[Event, None, None]:
    """Write the GGUF file `source` as `target`, quantized to a kind of KINDS. Raises UserError."""
    from torch import get_num_threads

    if kind not in KINDS:
        raise UserError(f"unknown quantization {kind!r}. Use one of {', '.join(KINDS)}.")
    with closing(_Process(source)) as process:
        process.worker.send(
            "quantize",
            source=str(source),
            target=str(target),
            kind=kind,
            threads=get_num_threads(),
        )
        while (answer := process.read()[0])["event"] == "progress":
            yield Progress(answer["done"], answer["total"], kind)


def candidate(kind: str, model: Path, adapter: Path | None = None, label: str = "") -> "Candidate":
    """A GGUF file of a kind of KINDS for `certificate.compare`, with an adapter's file if given."""
    from pipeline.export.certificate import Candidate

    size = (adapter or model).stat().st_size
    return Candidate(label or kind, kind, size, lambda: LlamaCpp(model, adapter))


def certify(
    load: Callable[[], "LoadedModel"],
    tokenizer: "Tokenizer",
    files: Sequence["Candidate"],
    prompts: Path | None = None,
) -> Generator[Event, None, tuple[dict[str, Any], list[str]]]:
    """Compare `files` with base + adapter as `load` gives them, on a file of prompts if given.

    Returns the certificate's entries, and lines; without llama.cpp no entries, and a line that says
    so. Raises UserError if a file is not the model (`certificate.compare`).
    """
    if not is_installed():
        return {}, [NOT_COMPARED]
    from pipeline.data.answers.prompts import prompt_texts
    from pipeline.export.certificate import compare, describe

    certificate = yield from compare(load, tokenizer, files, prompt_texts(prompts))
    table = describe(certificate)
    for file in certificate["files"]:
        del file["tokens_per_second"]  # two exports of one adapter have the same bytes
    return {"gguf": certificate}, table


class LlamaCpp:
    """A GGUF file in llama.cpp, with an adapter's at `scale` if given: a `certificate.Runner`.

    To be used as a context manager. Raises UserError whatever happens to the process.
    """

    def __init__(self, model: Path, adapter: Path | None = None, scale: float = 1.0) -> None:
        self._model, self._adapter, self._scale = model, adapter, scale

    def __enter__(self) -> "LlamaCpp":
        from torch import get_num_threads

        self._process = _Process(self._adapter or self._model)
        try:
            self._facts = self._process.ask(
                "open",
                model=str(self._model),
                adapter=self._adapter and str(self._adapter),
                scale=self._scale,
                threads=get_num_threads(),
            )
        except BaseException:  # Ctrl-C too: __exit__ is not called
            self._process.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.close()

    @property
    def name(self) -> str:
        return self._process.found.name

    @property
    def template(self) -> str | None:
        """The chat template that the file holds."""
        template: str | None = self._facts["template"]
        return template

    @property
    def ends(self) -> frozenset[int]:
        """Ids that end a generation."""
        return frozenset(self._facts["ends"])

    @property
    def max_length(self) -> int:
        """The context that the file names."""
        return int(self._facts["max_length"])

    def logits(self, ids: Sequence[int]) -> "Tensor":
        """(T, V) in fp32."""
        import torch

        self._process.worker.send("logits", ids=list(ids))
        logits = torch.empty(len(ids), self._facts["rows"])
        row = 0
        while data := self._process.read()[1]:  # some of the rows
            part = torch.frombuffer(data, dtype=torch.float32).view(-1, logits.shape[1])
            logits[row : row + len(part)] = part
            row += len(part)
        return logits

    def encode(self, text: str) -> list[int]:
        """The ids of a text, or of a rendered chat, as llama-server reads it.

        It removes BOS and EOS from the ends of a rendered chat if the file says that they are
        added, so that a template which writes them gives them once.
        """
        from pipeline.data.tokenizers.template_process import Rendered

        if isinstance(text, Rendered):
            text = text.removeprefix(self._facts["bos"]) if self._facts["add_bos"] else text
            text = text.removesuffix(self._facts["eos"]) if self._facts["add_eos"] else text
        return list(self._process.ask("tokenize", text=text)["answer"])

    def chat(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str | None:
        """Messages rendered by llama.cpp's C function; None if it knows no such template.

        It picks the most similar one of its list. (llama-server runs the file's own template.)
        """
        if self.template is None:
            return None
        answer = self._process.ask(
            "chat",
            messages=list(messages),
            ask=add_generation_prompt,
            template=self.template,
        )
        rendered: str | None = answer["answer"]
        return rendered

    def generate(self, ids: Sequence[int], limit: int) -> tuple[list[int], float]:
        """The greedy continuation, and its tokens per second (0 if it has none)."""
        answer = self._process.ask("generate", ids=list(ids), limit=limit)["answer"]
        return answer["ids"], len(answer["ids"]) / answer["seconds"] if answer["ids"] else 0.0


class _Process:
    """llama_cpp_process.py, at work on `file`. Raises UserError when it refuses, dies, or is silent
    for too long.
    """

    def __init__(self, file: Path | None = None) -> None:
        if not is_installed():
            raise UserError(f"There is no llama.cpp here. Run `{INSTALL}`.")
        self._file = file
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        self.worker = Worker(COMMAND, self._log)
        try:
            library = self.ask("library")
        except BaseException:  # Ctrl-C too
            self.close()
            raise
        self.found = Found(library["name"], library["path"])

    def close(self) -> None:
        self.worker.kill()
        self._log.close()

    def ask(self, do: str, **fields: Any) -> Answer:
        self.worker.send(do, **fields)
        return self.read()[0]

    def read(self) -> tuple[Answer, bytearray]:
        """The next answer, and the bytes that follow it."""
        try:
            return self.worker.read(SILENCE_SECONDS)
        except UserError as error:
            raise self._error(f"cannot use it: {first_line(error)}") from None
        except TimeoutError:
            limit = f"{SILENCE_SECONDS:g} seconds"
            raise self._error(f"was stopped: it did not answer within {limit}") from None
        except EOFError:
            raise self._error(f"died{self._last_words()}") from None

    def _last_words(self) -> str:
        """The signal that ended the process, and what it printed of the reason."""
        code = self.worker.process.wait()
        how = f" ({signal.Signals(-code).name})" if code < 0 else ""
        self._log.seek(0)
        lines = self._log.read()[-(2**16) :].decode("utf-8", "replace").splitlines()
        matches = filter(None, map(LAST_WORDS.search, lines))
        reasons = [match[0] for match in matches] or lines[-1:]
        return how + (f": {reasons[0][:200]}" if reasons else "")

    def _error(self, what: str) -> UserError:
        what = what.rstrip(".")
        if self._file is None:
            return UserError(f"llama.cpp {what}. Install it again: {INSTALL}.")
        return UserError(
            f"{self._file}: llama.cpp {what}. The file is damaged, or of a kind that "
            "this build does not know. Write it again, or install a newer llama-cpp-py-sync."
        )
