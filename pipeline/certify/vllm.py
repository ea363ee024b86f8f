"""vLLM computes the answers of `lora serve`: its engine in a child process, behind our API."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.adapters.config import read_config
from pipeline.adapters.folder import quantization_of
from pipeline.certify.engines import Wanted
from pipeline.certify.process import Process
from pipeline.data.tokenizers.word import load_tokenizer
from pipeline.errors import UserError, first_line
from pipeline.export.formats import Export, vllm
from pipeline.files.digest_cache import signature
from pipeline.inference.batching import BatchedGenerator, GeneratedToken, Running, Ticket
from pipeline.inference.engine import LoadedModel
from pipeline.inference.http.models import Sources
from pipeline.inference.model_pool import ModelPool, Resident, ResidentBase
from pipeline.inference.requests import FieldError
from pipeline.models.device import best_device, device_limits
from pipeline.models.load import skeleton, stored_precision

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # ours → vLLM's
LEAST_RANK = 16  # of adapters that clients load
TURN_SECONDS = 0.05  # after which new requests are looked at


@dataclass(frozen=True)
class Exported(Resident):
    """A model that vLLM computes: its tensors are on the meta device."""

    folder: Path | None = None  # of its adapter's updates


class VllmPool(ModelPool):
    """A base and adapters on it, exported for vLLM into a temporary folder."""

    def __init__(self, base: Path, trust_remote_code: bool) -> None:
        super().__init__()
        model = skeleton(base, trust_remote_code)
        loaded = LoadedModel(base.name, model, load_tokenizer(base), base)
        self.base = ResidentBase(base, trust_remote_code, "none", loaded)
        self._folder = tempfile.TemporaryDirectory(prefix="lora-vllm-")
        self._exported = 0
        self.widest = LEAST_RANK

    def load(
        self, name: str, base: Path, adapter: Path | None, _trusted: bool = False
    ) -> tuple[Resident, bool]:
        """The model, with its adapter exported. Raises UserError for what vLLM cannot compute."""
        if base.resolve() != self.base.folder.resolve():
            raise UserError(f"{name} is on {base}, and vLLM has one base, {self.base.folder}")
        loaded = replace(self.base.loaded, name=name, base=base, adapter=adapter)
        files = signature(adapter) if adapter else ()
        folder = self._export(adapter) if adapter else None
        resident = Exported(loaded, self.base, files, folder=folder)
        self._put(name, resident)
        return resident, True

    def _export(self, adapter: Path) -> Path:
        if (kind := quantization_of(adapter)) != "none":
            raise UserError(f"{adapter} was trained on a base in {kind}, which vLLM has not")
        self._exported += 1
        out = Path(self._folder.name, str(self._exported), adapter.name)
        export = Export(adapter, self.base.folder, trust_remote_code=self.base.trusted)
        for _ in vllm.write(export, out):
            pass
        self.widest = max(self.widest, read_config(out)["r"])
        return out

    def close(self) -> None:
        """Remove the exports."""
        self._folder.cleanup()


class VllmGenerator(BatchedGenerator):
    """Hands requests to vLLM's engine, which batches them, and their tokens on."""

    pool: VllmPool

    def __init__(
        self, pool: VllmPool, python: Path, max_batch: int | None, max_waiting: int
    ) -> None:
        folder = pool.base.folder
        options: Mapping[str, Any] = {
            "model": str(folder),
            "dtype": DTYPES.get(stored_precision(folder) or "", "auto"),
            "trust_remote_code": pool.base.trusted,
            "max_num_seqs": max_batch or device_limits(torch.device("cuda")).sequences,
            "max_logprobs": 20,
            "max_lora_rank": next(rank for rank in vllm.RANKS if rank >= pool.widest),
            # One more than the adapters: on a CPU, the base would get the head's update in the last.
            "max_loras": len(pool.names),
        }
        self._process = Process(python, "vllm_engine.py", json.dumps(options))
        self._by_id: dict[int, Running] = {}
        self.name = self._process.name
        super().__init__(pool, max_batch, max_waiting, self._process.about["tokens"])

    def fit_to_memory(self) -> None:
        """Nothing: vLLM has reserved the memory for keys and values."""

    def close(self) -> None:
        super().close()
        self._process.close()
        self.pool.close()

    def _begin(self, ticket: Ticket) -> Running:
        generation = ticket.generation
        resident = self.pool.get(generation.model)
        assert isinstance(resident, Exported)
        if generation.grammar is not None:
            raise FieldError(generation.grammar.field, " needs `lora serve --engine own`.")
        adapter = resident.folder if generation.strength else None
        sampling, ids = generation.sampling, generation.ids
        self._capacity(generation)  # again: its files may have changed
        limit = min(generation.limit, resident.loaded.model.max_length - len(ids))
        ends = resident.loaded.tokenizer.end_ids
        id_ = self._process.send(
            "generate",
            ids=ids,
            adapter=adapter and str(adapter),
            top=generation.top_logprobs,
            max_tokens=max(limit, 1),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop_token_ids=sorted(ends),
        )
        unused = torch.Generator()  # vLLM draws
        run = Running(ticket, resident, None, None, id_, [*ids], [], limit, unused, ends)
        self._by_id[id_] = run
        return run

    def _step(self) -> None:
        """Hand on the tokens that have come."""
        for run in [run for run in self._running if run.left <= 0]:
            self._end(run, "length")
        seconds = TURN_SECONDS
        while self._by_id:
            try:
                answer, _ = self._process.read(seconds)
            except TimeoutError:
                return
            except UserError as error:
                for run in [*self._running]:
                    self._end(run, UserError(f"vLLM failed, {error}. Start the server again."))
                return
            if (owner := self._by_id.get(answer["id"])) is not None:
                self._take(owner, answer)
            seconds = 0

    def _take(self, run: Running, answer: Mapping[str, Any]) -> None:
        for id_, logprob, top in answer.get("tokens", ()):
            if run in self._running:
                self._sample(run, GeneratedToken(id_, logprob, tuple(map(tuple, top))))
        if answer["event"] != "tokens" and run in self._running:
            refused = answer.get("message")
            self._end(run, UserError(f"vLLM refused: {refused}") if refused else "length")

    def _end(self, run: Running, reason: str | Exception) -> None:
        self._process.send("cancel", target=run.cache)
        del self._by_id[run.cache]
        super()._end(run, reason)


class Choice:
    """What computes the answers. `line` says which and why."""

    def __init__(self, engine: str, trust_remote_code: bool, unmet: str = "") -> None:
        """`engine`: auto, own or vllm. `unmet`: an option that vLLM does not have."""
        self._engine, self._trusted, self._unmet = engine, trust_remote_code, unmet
        self.line = "Our own engine answers."

    def __call__(
        self, sources: Sources, max_batch: int | None, max_waiting: int
    ) -> BatchedGenerator | None:
        """vLLM's generator, or None for ours. Raises UserError where vLLM is asked for."""
        if self._engine == "own":
            return None
        try:
            generator = self._start(sources, max_batch, max_waiting)
        except UserError as error:
            reason = first_line(error).rstrip(".")
            if self._engine == "vllm":
                raise UserError(f"--engine vllm: {reason}. Leave it out, or use own.") from None
            self.line = f"Our own engine answers: {reason}."
            return None
        self.line = f"{generator.name} answers."
        return generator

    def _start(self, sources: Sources, max_batch: int | None, max_waiting: int) -> VllmGenerator:
        device = best_device()
        if self._unmet:
            raise UserError(f"vLLM has no {self._unmet}")
        if self._engine == "auto" and device.type != "cuda":
            raise UserError("there is no GPU for vLLM")
        if device.index:
            raise UserError(f"vLLM takes the first GPU; set CUDA_VISIBLE_DEVICES={device.index}")
        python = Wanted("vllm").python("adapter", make=self._engine == "vllm")
        pool = VllmPool(next(iter(sources.values())).base, self._trusted)
        try:
            for name, source in sources.items():  # first: it says what vLLM cannot compute
                pool.load(name, source.base, source.adapter)
            return VllmGenerator(pool, python, max_batch, max_waiting)
        except BaseException:
            pool.close()
            raise
