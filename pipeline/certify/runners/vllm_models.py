"""Runs a model in vLLM, with an adapter as its server loads it.

Run as a file, by the Python of an environment in which this package is not installed.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

# In one process, so that logits can be seen; before vLLM is imported.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
sys.path.append(str(Path(__file__).parent))
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as the highest
ROOM = 64  # of most adapters: for a higher one the base is opened again


class Models:
    """A base, and an adapter on it."""

    def __init__(self) -> None:
        import vllm

        self.name = f"vLLM {vllm.__version__}"
        self._folder: str | None = None
        self._room = 0  # the highest rank
        self._model: Any = None
        self._adapter: Any = None
        self._opened = 0
        self._seen: list[Any] = []

    def open(self, base: str, adapter: str | None, trust_remote_code: bool) -> dict[str, Any]:
        """Open a checkpoint in fp32, with an adapter if given."""
        from vllm.lora.request import LoRARequest

        room = ROOM if adapter is None else _room_for(Path(adapter))
        if base != self._folder or room > self._room:
            self._open_base(base, max(room, ROOM), trust_remote_code)
        self._opened += 1  # another number: vLLM keeps adapters by it
        name = f"adapter{self._opened}"
        self._adapter = adapter and LoRARequest(name, self._opened, adapter)
        if self._adapter:  # now, not with the first prompt: a copy's files change
            self._model.llm_engine.add_lora(self._adapter)
        # vLLM refuses what it does not know, and tells no keys
        return {"rows": self._rows(), "unread": [], "missing": []}

    def _rows(self) -> int:
        return int(self._model.llm_engine.model_config.get_vocab_size())

    def _open_base(self, base: str, room: int, trust_remote_code: bool) -> None:
        from vllm import LLM

        self._model = self._folder = None
        self._model = LLM(
            base,
            dtype="float32",
            enable_lora=True,
            max_lora_rank=room,
            enforce_eager=True,
            disable_log_stats=True,
            trust_remote_code=trust_remote_code,
        )
        self._model.apply_model(self._watch)
        self._folder, self._room = base, room

    def _watch(self, model: Any) -> None:
        """See the logits that the model computes, with the adapter's part."""
        compute: Callable[..., Any] = model.compute_logits

        def watched(*arguments: Any, **named: Any) -> Any:
            logits = compute(*arguments, **named)
            self._seen.append(logits.float().cpu().clone())
            return logits

        model.compute_logits = watched

    def _run(self, ids: Sequence[int], **options: Any) -> Any:
        from vllm import SamplingParams

        self._seen.clear()
        parameters = SamplingParams(temperature=0, detokenize=False, **options)
        given: Any = {"prompt_token_ids": list(ids)}
        (answer,) = self._model.generate(
            given, parameters, lora_request=self._adapter, use_tqdm=False
        )
        return answer

    def logits(self, ids: Sequence[int]) -> bytes:
        """fp32 (T, V)."""
        import torch

        self._run(ids, max_tokens=1, prompt_logprobs=1)
        # the last position, whose token is chosen, comes first
        last, *before = self._seen
        logits = torch.cat([*before, last])[: len(ids), : self._rows()]
        return bytes(logits.contiguous().numpy().data)

    def generate(self, ids: Sequence[int], limit: int, ends: Sequence[int]) -> list[int]:
        """The greedy continuation without its end token."""
        answer = self._run(ids, max_tokens=max(1, limit), stop_token_ids=list(ends))
        new = list(answer.outputs[0].token_ids)[:limit]
        return new[:-1] if new and new[-1] in ends else new


def _room_for(adapter: Path) -> int:
    """The least highest rank of vLLM's that holds the adapter's ranks."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    return next((room for room in RANKS if room >= rank), RANKS[-1])


if __name__ == "__main__":
    import_module("transformers_models").serve(Models)
