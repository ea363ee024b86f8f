"""The inference process as the terminal app uses it: time to the first token, and to switch the
adapter.
"""

import asyncio
import itertools
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path

import torch

from bench.measure import Row, in_turns
from pipeline.adapters.attach import attach
from pipeline.adapters.peft import save_adapter
from pipeline.data.tokenizers.word import WordTokenizer
from pipeline.files import artifact
from pipeline.files.base_model import base_fingerprint
from pipeline.models.load import Base, load_base, save_base
from pipeline.models.minigpt import MiniGPT, MiniGPTConfig
from pipeline.stages.methods.lora import FinetuneLora, lora_spec
from tui.services.engine_client import Inference

ROUNDS = 50
PROMPT = "w1 w2 w3 w4 w5"


def engine() -> Iterator[Row]:
    """With MiniGPT in a warm process; times include JSON and both pipes."""
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as loop:
        base, adapters = _save_models(Path(folder))
        client, next_adapter = Inference(Path(folder)), itertools.cycle(adapters)

        def run(action: Callable[[], Coroutine[None, None, object]]) -> Callable[[], object]:
            return lambda: loop.run(action())

        loop.run(client.ask("load", name="model", base=base))
        times = in_turns(
            {
                "token": run(lambda: _first_token(client)),
                "swap": run(
                    lambda: client.ask("load", name="model", base=base, adapter=next(next_adapter))
                ),
                "status": run(lambda: client.ask("status")),
            },
            ROUNDS,
        )
        loop.run(client.stop())
    reference = f"a request and its answer, {times['status'] * 1e3:.2f} ms"
    token, swap = times["token"], times["swap"]
    yield Row(
        "first token after a request",
        token,
        reference,
        token / times["status"],
        "under 100 ms",
        token < 0.1,
    )
    yield Row(
        "another adapter on the same base",
        swap,
        reference,
        swap / times["status"],
        "under 20 ms",
        swap < 0.02,
    )


async def _first_token(client: Inference) -> None:
    """Request, receive one token, cancel."""
    async with aclosing(client.stream("generate", model="model", text=PROMPT, limit=20)) as answers:
        assert (await anext(answers))["event"] == "token"


def _save_models(folder: Path) -> tuple[Path, tuple[Path, Path]]:
    """A MiniGPT that never generates the end token, and two adapters for it, with default
    params.
    """
    base, adapters = folder / "base", (folder / "one", folder / "two")
    tokenizer = WordTokenizer.of_words([f"w{i}" for i in range(96)])
    model = MiniGPT(MiniGPTConfig(len(tokenizer), tokenizer.pad_id, tokenizer.end_id))
    with torch.no_grad():
        model.lm_head.weight[tokenizer.end_id] = 0
    base.mkdir()
    save_base(base, Base(model, tokenizer))
    for adapter in adapters:
        adapter.mkdir()
        tuned = load_base(base).model
        spec = lora_spec(tuned, FinetuneLora(), ())
        attach(tuned, spec)
        save_adapter(adapter, tuned, spec, str(base))
        artifact.seal(adapter, {"base": base_fingerprint(base)})  # verified on loading
    return base, adapters
