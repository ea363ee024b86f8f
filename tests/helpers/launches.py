"""How many kernels a training step or an answer's token launches, and how often the host waits, on
the CUDA device of cuda_device.py.

`python -m tests.helpers.launches`, started by `run_with_cuda`, prints them as JSON: of Qwen3's shapes
with two blocks and with three, from which those of any depth follow. A call of torch on the device
that computes anything counts as one kernel, and so does a launch of Triton's; bitsandbytes' product
as what it launches.
"""

import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers.cuda_device import CudaDevice, is_on_device

ANSWERS = ("base", "adapter", "two adapters", "nf4")
METHODS = ("lora", "qlora", "dora", "full")
CHECKPOINTING = ("none", "full")
MOVES = ("_to_copy", "copy_")
NOTHING = {"detach", "lift_fresh", "_unsafe_view", "resize_", "set_", "is_pinned", "_pin_memory"}
NOTHING |= {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
DEVICE = torch.device("cuda", 0)
LENGTHS = [512] * 16  # of a batch
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Count(NamedTuple):
    """Of one micro-batch, or of the rest of a step."""

    kernels: int
    copies: int  # to the device
    waits: int


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is launched inside the block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted = Counter[str]()  # by kind
        self.kernels = Counter[str]()  # by name

    def total(self) -> Count:
        return Count(self.kernels.total(), self.counted["copies"], self.counted["waits"])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.removeprefix("aten::")
        out = func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        if name.startswith("prim::") or not any(map(_is_there, leaves)):
            return out
        is_view = any(
            result.alias_info is not None and not result.alias_info.is_write
            for result in func._schema.returns
        )
        if name in MOVES:
            source = args[0] if name == "_to_copy" else args[1]
            kind = (is_on_device(source), is_on_device(out))
            name = {(True, False): "waits", (False, True): "copies"}.get(kind, name)
        if name in ("_local_scalar_dense", "waits"):
            self.counted["waits"] += 1
        elif name == "copies":
            self.counted["copies"] += 1
        elif not is_view and name not in NOTHING:
            self.kernels[name] += _launched(name, args[0])
        return out


def _launched(name: str, x: Any) -> int:
    """bitsandbytes 0.50: of up to 4 rows one, of more than 1,536 scales, weight and product."""
    return 4 if name == "bitsandbytes::gemm_4bit" and x.numel() > 4 * x.shape[-1] else 1


def _is_there(leaf: Any) -> bool:
    return is_on_device(leaf) or (isinstance(leaf, torch.device) and leaf.type == "cuda")


@contextmanager
def patched(launches: Launches, liger: bool) -> Iterator[None]:
    """Triton's kernels are counted instead of compiled; what is tried once works unless it raises."""
    from triton.runtime.jit import JITFunction

    from pipeline.models.kernels import accelerator, accelerator_attention
    from pipeline.models.kernels.accelerator import weights

    def run(self: Any, *_: Any, **__: Any) -> None:
        launches.kernels[f"triton::{self.fn.__name__}"] += 1

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(weights, "_works", lambda *_: True),
        mock.patch.object(accelerator_attention, "AGREEMENT", math.inf),
    ):
        if liger:
            yield
        else:
            with mock.patch.object(accelerator, "liger", lambda _: None):
                yield


def count(config: dict[str, Any], method: str, checkpointing: str, liger: bool) -> list[Count]:
    """Of a micro-batch of 16 sequences of 512 tokens, half of them labelled; and of the step."""
    from pipeline.adapters.attach import attach
    from pipeline.adapters.config import AdapterSpec
    from pipeline.models.base import CausalLM
    from pipeline.models.quantized_linear import quantize
    from pipeline.models.transformers_model import from_config
    from pipeline.project.params.sections import Training
    from pipeline.stages.methods.lora import FinetuneLora
    from pipeline.training import step
    from pipeline.training.batches import Batches
    from pipeline.training.loop import steps
    from pipeline.training.task import TrainingTask, build_optimizer, prepare_model
    from tests.helpers.real import listed, windows_of

    launches, of_batches = Launches(), list[Count]()
    backward = step._backward

    def counted(*inputs: Any, **options: Any) -> Any:
        before = launches.total()
        out = backward(*inputs, **options)
        pairs = zip(launches.total(), before, strict=True)
        of_batches.append(Count(*(after - earlier for after, earlier in pairs)))
        return out

    settings = Training if method == "full" else FinetuneLora
    made = settings(
        epochs=9,
        batch_size=len(LENGTHS),
        precision="bf16",
        gradient_checkpointing=checkpointing,  # type: ignore[arg-type]
        max_grad_norm=1.0,
    )
    with (
        CudaDevice(),
        patched(launches, liger),
        mock.patch.object(CausalLM, "supports_packing", True),
        mock.patch.object(step, "_backward", counted),
    ):
        with DEVICE:
            model = from_config(config, torch.bfloat16)
        if method == "qlora":
            quantize(model, "nf4-dq", None, DEVICE)
        if method != "full":
            attach(model, AdapterSpec(16, 32.0, TARGETS, dora=method == "dora"), torch.float32)
        batches = Batches(listed(windows_of(LENGTHS, lambda length: length // 2)), len(LENGTHS), 0)
        task = TrainingTask.of_one(model, batches, made, None)
        prepare_model(model, made.gradient_checkpointing)
        records = steps(task, build_optimizer(model, made))
        model.train()
        next(records)  # which makes the optimizer's state
        of_batches.clear()
        launches.counted.clear()
        launches.kernels.clear()
        with launches:
            next(records)
    pairs = zip(launches.total(), of_batches[0], strict=True)
    return [of_batches[0], Count(*(total - batch for total, batch in pairs))]


def count_token(config: dict[str, Any], case: str) -> Count:
    """Of the next token of each of four sequences, with the reading of what was drawn."""
    from pipeline.adapters.attach import attach
    from pipeline.adapters.config import AdapterSpec
    from pipeline.adapters.mixed import MixedAdapter, changed_layers
    from pipeline.inference.batched_model import BatchedModel, Part
    from pipeline.inference.model_pool import view
    from pipeline.models.generate import next_tokens, read_side_by_side
    from pipeline.models.pages import PagePool, SequenceCache
    from pipeline.models.quantized_linear import quantize
    from pipeline.models.transformers_model import from_config

    launches, spec = Launches(), AdapterSpec(16, 32.0, TARGETS)
    with CudaDevice(), patched(launches, True), torch.no_grad():
        with DEVICE:
            model = from_config(config, torch.bfloat16).eval()
        if case == "nf4":
            quantize(model, "nf4-dq", None, DEVICE)
        model.prepare_for_accelerator(DEVICE)
        pool, adapters = PagePool(), list[MixedAdapter | None]([None] * 4)
        if case == "two adapters":
            base: Any = SimpleNamespace(loaded=SimpleNamespace(model=model))
            with mock.patch.object(BatchedModel, "_agrees", lambda *_: True):
                batched = BatchedModel(base)
            for n in (0, 2):
                adapted = view(model)
                attach(adapted, spec, torch.bfloat16)
                layers = changed_layers(adapted, model)
                assert layers is not None
                batched._install(layers)
                adapters[n : n + 2] = [MixedAdapter(layers)] * 2
        elif case != "base":
            attach(model, spec, torch.bfloat16)
        caches = [SequenceCache(pool, 4096) for _ in adapters]
        for ids in ([1] * 300, [1], [1]):  # the prompts, and what the first token prepares
            launches.counted.clear()
            launches.kernels.clear()
            with launches:
                if case == "two adapters":
                    parts = zip(adapters, caches, [ids] * 4, strict=True)
                    next_tokens(batched.logits([Part(*part) for part in parts]))
                else:
                    next_tokens(read_side_by_side(model, caches, [ids] * 4))
    return launches.total()


def with_blocks(model: str, blocks: int) -> dict[str, Any]:
    """A built-in model's config with so many blocks."""
    from pipeline.calc.sources.open_model import entry

    config = {**entry(model)["config"], "num_hidden_layers": blocks, "max_window_layers": blocks}
    config.pop("layer_types", None)
    return config


def main() -> None:
    found = dict[str, Any]()
    for liger in (True, False):
        for method in METHODS:
            for checkpointing in CHECKPOINTING:
                for blocks in (2, 3):
                    key = f"{method} {checkpointing} {'liger' if liger else 'plain'} {blocks}"
                    config = with_blocks("qwen3-0.6b", blocks)
                    found[key] = count(config, method, checkpointing, liger)
        for case in ANSWERS:
            for blocks in (2, 3):
                config = with_blocks("qwen3-0.6b", blocks)
                found[f"{case} {blocks}"] = count_token(config, case)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
