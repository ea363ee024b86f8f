"""vLLM's engine behind a pipe: requests in JSON lines come while others are answered.

Run as a file, by the Python of an environment in which this package is not installed. It ends with
its stdin.
"""

import json
import os
import sys
import threading
from queue import SimpleQueue
from typing import Any

# In one process, which leaves none behind; before vLLM is imported.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB


class Engine:
    """Computes a base with adapters, many sequences at once. `options`: of vLLM's EngineArgs."""

    def __init__(self, options: dict[str, Any], sink: Any) -> None:
        import vllm

        self._sink, self._name = sink, f"vLLM {vllm.__version__}"
        arguments = vllm.EngineArgs(
            **options, enable_lora=True, disable_log_stats=True, skip_tokenizer_init=True
        )
        self._engine: Any = vllm.LLMEngine.from_engine_args(arguments)
        # A token now: kernels are compiled, and a shape that they lack ends this process at once.
        first = vllm.SamplingParams(max_tokens=1, detokenize=False)
        self._engine.add_request("first", {"prompt_token_ids": [0]}, first)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        self._adapters: dict[str, Any] = {}
        self._tops: dict[str, int] = {}  # running request → alternatives to report with a token

    @property
    def is_busy(self) -> bool:
        return bool(self._tops)

    def take(self, request: dict[str, Any]) -> None:
        """Begin a request, or cancel another one."""
        id_, do = request.pop("id"), request.pop("do")
        if do == "start":
            cache = self._engine.vllm_config.cache_config
            tokens = cache.num_gpu_blocks * cache.block_size
            self._write(id_, event="done", name=self._name, tokens=tokens)
        elif do == "cancel":
            self._tops.pop(str(request["target"]), None)
            self._engine.abort_request([str(request["target"])])
        else:
            try:
                self._begin(str(id_), **request)
            except Exception as error:  # what vLLM refuses concerns this request alone
                said = str(error).strip().partition("\n")[0]
                self._write(id_, event="refused", message=said[:600] or type(error).__name__)

    def _begin(
        self, id_: str, ids: list[int], adapter: str | None, top: int, **sampling: Any
    ) -> None:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        if adapter and adapter not in self._adapters:
            number = len(self._adapters) + 1
            self._adapters[adapter] = LoRARequest(f"adapter{number}", number, adapter)
        parameters = SamplingParams(
            **sampling,
            logprobs=top,
            ignore_eos=True,  # the caller names what ends an answer
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        lora = adapter and self._adapters[adapter]
        self._engine.add_request(id_, {"prompt_token_ids": ids}, parameters, lora_request=lora)
        self._tops[id_] = top

    def step(self) -> None:
        """Compute a token for every request, and send it."""
        for output in self._engine.step():
            most = self._tops.get(output.request_id)
            if most is None:
                continue  # cancelled
            (answer,) = output.outputs
            tokens = []
            for id_, likely in zip(answer.token_ids, answer.logprobs or (), strict=False):
                ranked = sorted(likely.items(), key=lambda pair: pair[1].rank)
                # the drawn token is there too, if it is none of the likeliest
                top = [[other, found.logprob] for other, found in ranked[:most]]
                tokens.append([id_, likely[id_].logprob, top])
            self._write(int(output.request_id), event="tokens", tokens=tokens)
            if output.finished:
                del self._tops[output.request_id]
                self._write(int(output.request_id), event="done")

    def _write(self, id_: int, **answer: Any) -> None:
        self._sink.write(json.dumps({"id": id_, **answer}).encode() + b"\n")
        self._sink.flush()


def read(waiting: "SimpleQueue[dict[str, Any]]") -> None:
    """Queue the requests of stdin; its end is that of the process, whatever is computed."""
    for line in sys.stdin.buffer:
        waiting.put(json.loads(line))
    os._exit(0)


def main() -> None:
    # The descriptor too: C libraries print past Python.
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    waiting = SimpleQueue[dict[str, Any]]()
    threading.Thread(target=read, args=(waiting,), daemon=True).start()
    engine = Engine(json.loads(sys.argv[1]), sink)
    while True:
        while not (engine.is_busy and waiting.empty()):
            engine.take(waiting.get())
        engine.step()


if __name__ == "__main__":
    main()
