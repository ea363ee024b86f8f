"""A training step of each method on MiniGPT against transformers and PEFT on the same
checkpoint.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from bench.measure import Row, in_turns
from pipeline.adapters.attach import attach
from pipeline.data.examples import Window, cut_windows
from pipeline.data.tokenizers.word import WordTokenizer
from pipeline.data.windows import InMemoryDataset
from pipeline.models.load import Base, load_base, save_base
from pipeline.models.minigpt import MiniGPT, MiniGPTConfig
from pipeline.project.params.sections import Training
from pipeline.stages.methods.freeze import FinetuneFreeze, freeze
from pipeline.stages.methods.full import COUNTED as FULL
from pipeline.stages.methods.lora import FinetuneLora, lora_spec
from pipeline.training.batches import Batches
from pipeline.training.loop import steps
from pipeline.training.optimizer import FlatOptimizer
from pipeline.training.task import TrainingTask

STEPS, ROUNDS = 50, 15
GOALS = {"full": 1.0, "freeze": 1.0, "lora": 2.0}


def training() -> Iterator[Row]:
    """Steps of 4 windows of 4 tokens, the pipeline's default, with one thread, which is faster for
    both.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        minigpt(Path(folder))
        runs = {}
        for method in GOALS:
            runs[method] = our_steps(Path(folder), method)
            runs[f"{method} reference"] = reference_steps(Path(folder), method)
        times = in_turns(runs, ROUNDS)
    for method, goal in GOALS.items():
        ours, theirs = times[method] / STEPS, times[f"{method} reference"] / STEPS
        name = "PEFT" if method == "lora" else "transformers"
        ratio = theirs / ours
        target = f"at least {goal:g} ×"
        yield Row(
            f"training step, {method}",
            ours,
            f"{name}, {theirs * 1e3:.2f} ms",
            ratio,
            target,
            ratio >= goal,
        )


def minigpt(folder: Path) -> None:
    """Save a MiniGPT of the pipeline's size with random weights."""
    tokenizer = WordTokenizer.of_words([f"w{i}" for i in range(96)])
    model = MiniGPT(MiniGPTConfig(len(tokenizer), tokenizer.pad_id, tokenizer.end_id))
    save_base(folder, Base(model, tokenizer))


def batches(seed: int = 0) -> Batches:
    ids = torch.randint(3, 99, (8, 7), generator=torch.Generator().manual_seed(0)).tolist()
    training_windows = [
        window
        for row in ids
        for window in cut_windows(Window(0, tuple(row[:-1]), tuple(row[1:])), 4)
    ]
    return Batches(InMemoryDataset(training_windows, [""] * len(training_windows)), 4, seed)


def our_steps(folder: Path, method: str) -> Callable[[], None]:
    model, _ = load_base(folder)
    if method == "lora":
        attach(model, lora_spec(model, FinetuneLora(), ()))
    elif method == "freeze":
        freeze(model, FinetuneFreeze())
    task = TrainingTask.of_one(model, batches(), Training(epochs=10**9), FULL)
    records = steps(task, FlatOptimizer(model))

    def run() -> None:
        for _ in range(STEPS):
            next(records)

    return run


def reference_steps(folder: Path, method: str) -> Callable[[], None]:
    """The training loop of the libraries' documentation, reading the loss every step as ours
    does.
    """
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder)
    if method == "lora":
        ends = ["embed_tokens", "lm_head"]
        targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
        config = LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=1, target_modules=targets, modules_to_save=ends
        )
        model = get_peft_model(model, config)
    else:
        _freeze_like_ours(model, method)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batch_list = batches()

    def run() -> None:
        for step in range(STEPS):
            (batch,) = batch_list[step]
            optimizer.zero_grad()
            logits = model(input_ids=batch.ids, position_ids=batch.positions).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch.labels)
            torch.autograd.backward(loss)
            optimizer.step()
            loss.item()

    return run


def _freeze_like_ours(model: nn.Module, method: str) -> None:
    for name, parameter in model.named_parameters():
        ends = "embed_tokens" in name or "lm_head" in name
        trained = method == "full" or ends or ".layers.1." in name
        parameter.requires_grad_(trained and "embed_positions" not in name)
