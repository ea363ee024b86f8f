"""Runs llama.cpp on one GGUF file, in a process of its own, by the llama-cpp-py-sync wheel.

A failed GGML_ASSERT aborts the process, and a damaged file may crash it, which must not end the
user's command.
"""

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import worker

STEP = 512  # tokens whose logits one call computes
# address space for compute buffers and thread stacks, beside what the files take
EXTRA_MEMORY = 4 * 2**30
ERROR = 4  # ggml's log level
TENSOR = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")  # how quantizing counts in its log


class Failed(Exception):
    """Why llama.cpp refuses a request."""


class Library:
    """libllama through cffi, and what it logs during a request."""

    def __init__(self) -> None:
        import llama_cpp_py_sync
        from llama_cpp_py_sync._cffi_bindings import _find_library, get_ffi, get_lib

        self.ffi, self.lib = get_ffi(), get_lib()
        self.name = f"llama.cpp {llama_cpp_py_sync.__llama_cpp_tag__}"
        self.path = str(_find_library())
        self.request: worker.Request | None = None
        self.errors: list[str] = []

        def log(level: int, text: Any, _: Any) -> None:
            line = self.text(text).strip()
            if self.request and (match := TENSOR.match(line)):
                self.request.send(event="progress", done=int(match[1]), total=int(match[2]))
            if level == ERROR and line:
                self.errors.append(line)

        # kept: C calls it
        self._log = self.ffi.callback("void(enum ggml_log_level, const char *, void *)", log)
        self.lib.llama_log_set(self._log, self.ffi.NULL)
        self.lib.llama_backend_init()

    def text(self, pointer: Any) -> str:
        """A C string."""
        return str(self.ffi.string(pointer).decode("utf-8", "replace"))

    def failed(self, default: str) -> Failed:
        """The reason of a failure: the first error in the log, which caused the others."""
        return Failed(self.errors[0] if self.errors else default)


class Session:
    """A model file, with an adapter file at a scale if there is one."""

    def __init__(
        self, library: Library, model: str, adapter: str | None, scale: float, threads: int
    ) -> None:
        self._library, self._ffi, self._lib = library, library.ffi, library.lib
        self._threads, self._scale = threads, scale
        self._context, self._adapter = self._ffi.NULL, None
        self._exact = False
        parameters = self._lib.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.check_tensors = True
        self._model = self._lib.llama_model_load_from_file(os.fsencode(model), parameters)
        if self._model == self._ffi.NULL:
            raise library.failed("the model does not load")
        if adapter is not None:
            self._adapter = self._lib.llama_adapter_lora_init(self._model, os.fsencode(adapter))
            if self._adapter == self._ffi.NULL:
                raise library.failed("the adapter does not load")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self._rows: int = self._lib.llama_vocab_n_tokens(self._vocab)

    def facts(self) -> dict[str, Any]:
        lib, vocab = self._lib, self._vocab
        template = lib.llama_model_chat_template(self._model, self._ffi.NULL)
        special = {"bos": lib.llama_vocab_bos(vocab), "eos": lib.llama_vocab_eos(vocab)}
        words = {
            key: self._library.text(lib.llama_vocab_get_text(vocab, id_)) if id_ >= 0 else ""
            for key, id_ in special.items()
        }
        return {
            "rows": self._rows,
            "max_length": lib.llama_model_n_ctx_train(self._model),
            "template": None if template == self._ffi.NULL else self._library.text(template),
            "ends": [id_ for id_ in range(self._rows) if lib.llama_vocab_is_eog(vocab, id_)],
            "add_bos": lib.llama_vocab_get_add_bos(vocab),
            "add_eos": lib.llama_vocab_get_add_eos(vocab),
            **words,
        }

    def tokenize(self, text: str) -> list[int]:
        """With the file's own BOS and EOS rules; special tokens in the text are read as such."""
        encoded = text.encode()
        size = len(encoded) + 2  # never more tokens than bytes, besides BOS and EOS
        ids = self._ffi.new("llama_token[]", size)
        count = self._lib.llama_tokenize(self._vocab, encoded, len(encoded), ids, size, True, True)
        if count < 0:
            raise self._library.failed("the text has more tokens than bytes")
        return list(ids[0:count])

    def chat(self, messages: Sequence[dict[str, str]], ask: bool, template: str) -> str | None:
        """Rendered by llama.cpp's list of known templates; None if it knows none like this one."""
        ffi = self._ffi
        kept = []  # a C string is freed with its Python object
        turns = ffi.new("llama_chat_message[]", len(messages))
        for turn, message in zip(turns, messages, strict=True):
            for key in ("role", "content"):
                kept.append(ffi.new("char[]", message[key].encode()))
                setattr(turn, key, kept[-1])
        form = template.encode()
        size = 0
        for _ in range(2):  # first for the size
            out = ffi.new("char[]", size + 1)
            size = self._lib.llama_chat_apply_template(form, turns, len(messages), ask, out, size)
            if size < 0:
                return None
        return str(ffi.buffer(out, size)[:].decode())

    def logits(self, ids: Sequence[int]) -> Iterator[bytes]:
        """fp32 (n, V) of the next positions, in order. The cache, no part of the file, is fp32."""
        self._restart(len(ids), exact=True)
        for start in range(0, len(ids), STEP):
            part = ids[start : start + STEP]
            self._decode(part, start, every=True)
            yield self._ffi.buffer(
                self._lib.llama_get_logits(self._context), 4 * len(part) * self._rows
            )[:]

    def generate(self, ids: Sequence[int], limit: int) -> dict[str, Any]:
        """The greedy continuation without its end token, up to `limit` tokens, and the seconds."""
        from numpy import frombuffer

        self._restart(len(ids) + limit, exact=False)
        for start in range(0, len(ids), STEP):
            self._decode(ids[start : start + STEP], start)
        new: list[int] = []
        started = time.perf_counter()
        for position in range(len(ids), len(ids) + limit):
            row = self._ffi.buffer(
                self._lib.llama_get_logits_ith(self._context, -1), 4 * self._rows
            )
            token = int(frombuffer(row, dtype="f4").argmax())
            if self._lib.llama_vocab_is_eog(self._vocab, token):
                break
            new.append(token)
            self._decode([token], position)
        return {"ids": new, "seconds": time.perf_counter() - started}

    def _restart(self, length: int, exact: bool) -> None:
        """An empty context for `length` tokens; `exact`: attention in fp32, not the default."""
        lib, ffi = self._lib, self._ffi
        if (
            self._context != ffi.NULL
            and self._exact == exact
            and lib.llama_n_ctx(self._context) >= length
        ):
            lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
            return
        if self._context != ffi.NULL:
            lib.llama_free(self._context)
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = max(length, STEP)
        parameters.n_batch = parameters.n_ubatch = parameters.n_outputs_max_per_seq = STEP
        parameters.n_threads = parameters.n_threads_batch = self._threads
        if exact:  # flash attention rounds to fp16, as the cache does by default
            parameters.type_k = parameters.type_v = lib.GGML_TYPE_F32
            parameters.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = lib.llama_init_from_model(self._model, parameters)
        self._exact = exact
        if self._context == ffi.NULL:
            raise self._library.failed("no context for the model")
        if self._adapter is not None:
            adapters = ffi.new("struct llama_adapter_lora *[]", [self._adapter])
            scales = ffi.new("float[]", [self._scale])
            if lib.llama_set_adapters_lora(self._context, adapters, 1, scales):
                raise self._library.failed("the adapter does not fit the model")

    def _decode(self, ids: Sequence[int], start: int, every: bool = False) -> None:
        """Compute the logits of the last of `ids`, whose positions begin at `start`, or of all."""
        if wrong := [id_ for id_ in ids if not 0 <= id_ < self._rows]:
            raise Failed(f"token id {wrong[0]} is not one of {self._rows}")
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for n, id_ in enumerate(ids):
            batch.token[n], batch.pos[n] = id_, start + n
            batch.n_seq_id[n], batch.seq_id[n][0] = 1, 0
            batch.logits[n] = every or n == len(ids) - 1
        failed = self._lib.llama_decode(self._context, batch)
        self._lib.llama_batch_free(batch)
        if failed:
            raise self._library.failed(f"llama_decode returned {failed}")


def quantize(library: Library, source: str, target: str, kind: str, threads: int) -> None:
    parameters = library.lib.llama_model_quantize_default_params()
    parameters.nthread = threads
    parameters.ftype = getattr(library.lib, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    if library.lib.llama_model_quantize(
        os.fsencode(source),
        os.fsencode(target),
        library.ffi.new("llama_model_quantize_params *", parameters),
    ):
        raise library.failed("the file cannot be quantized")


class Handler:
    """Answers the requests of `llama_cpp.py` with the library, and with the file that is open."""

    def __init__(self) -> None:
        self._library = Library()
        self._session: Session | None = None

    def answer(self, request: worker.Request) -> Iterator[worker.Answer]:
        self._library.request, self._library.errors = request, []
        try:
            yield from self._answer(request.do, request.fields)
        except (Failed, OSError, MemoryError) as error:
            raise UserError(*(str(error) or "not enough memory").splitlines()) from None

    def _answer(self, do: str, fields: Mapping[str, Any]) -> Iterator[worker.Answer]:
        if do == "library":
            yield {"event": "done", "name": self._library.name, "path": self._library.path}
        elif do == "open":
            files = [fields[key] for key in ("model", "adapter") if fields[key]]
            _limit_memory(sum(Path(file).stat().st_size for file in files))
            self._session = Session(self._library, **fields)
            yield {"event": "done", **self._session.facts()}
        elif do == "quantize":
            _limit_memory(Path(fields["source"]).stat().st_size)
            quantize(self._library, **fields)
            yield {"event": "done"}
        elif do == "logits":
            assert self._session is not None
            for data in self._session.logits(**fields):
                yield {"event": "logits", "data": data}
            yield {"event": "done"}
        else:
            yield {"event": "done", "answer": getattr(self._session, do)(**fields)}


def _limit_memory(size: int) -> None:
    """Limit memory to EXTRA_MEMORY and three times `size`: llama.cpp may map, load and repack."""
    worker.limit_memory(3 * size + EXTRA_MEMORY)


def main() -> None:
    worker.serve(lambda: Handler().answer, most_bytes=-1)


if __name__ == "__main__":
    main()
