"""The training loop: a generator of plain records, and the generator that logs, checkpoints and resumes it."""

import math
from collections.abc import Generator, Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.calc.settings import Method
from pipeline.data import IGNORED
from pipeline.errors import Interrupted, UserError
from pipeline.metrics import Peak, RunLog, Step, in_units
from pipeline.models.minigpt import MiniGPT
from pipeline.params import Training
from pipeline.runner import Event, Job, Note, Progress, discard_checkpoints
from pipeline.training import checkpoint
from pipeline.training.batches import Batch, Batches
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.forecast import forecast
from pipeline.training.live import LiveBytes
from pipeline.training.optimizer import FlatAdam
from pipeline.training.signals import HeldSignals


def loss_of(model: MiniGPT, batch: Batch) -> Tensor:
    """Mean cross-entropy over the labels that count, in nats a token."""
    logits = model(batch.ids, batch.positions)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)


def steps(
    model: MiniGPT, batches: Batches, optimizer: FlatAdam, settings: Training, done: int = 0, tokens: int = 0
) -> Iterator[Step]:
    """Train from after step `done`, with `tokens` learned from, to the last epoch's end: one record a step."""
    for number in range(done, settings.epochs * len(batches)):
        batch = batches[number]
        loss = loss_of(model, batch)
        torch.autograd.backward(loss)
        norm = optimizer.step()
        tokens += batch.tokens
        epoch = number // len(batches) + 1
        yield Step(number + 1, epoch, loss.item(), settings.learning_rate, norm.item(), tokens)


def train(
    job: Job, model: MiniGPT, batches: Batches, settings: Training, method: Method
) -> Generator[Event, None, None]:
    """Train `model`'s trainable parameters in place; killed at any step, the next call goes on where it was.

    `method` says to the calculator what is trainable: its prediction of the memory comes before the first step, what
    was measured after the last.
    Raises Interrupted after a signal, with a checkpoint written, and UserError if the loss is not finite.
    """
    # Products this small gain nothing from a second thread, and two runs side by side, whose threads spin for each
    # other's cores, were measured to take seven times as long.
    torch.set_num_threads(1)
    optimizer = FlatAdam(model, settings.learning_rate)
    start, refused = checkpoint.load(job.run, job.key)
    if refused:
        yield Note(f"{job.stage.name}: the checkpoint is not used and training starts over: {refused}")
    if start:
        optimizer.restore(start.state)
        yield Note(f"{job.stage.name}: resumed after step {start.step}")
    else:
        discard_checkpoints(job.run)  # before their log is overwritten: without it they must never be used
    done, tokens = (start.step, start.tokens) if start else (0, 0)
    total = settings.epochs * len(batches)
    predicted, live = forecast(model.config, method, batches), LiveBytes()
    yield Note(f"{job.stage.name}: {in_units(predicted)} of tensors predicted at the peak of a step")
    log = RunLog(job.run, done, tokens)
    model.train()
    with log, HeldSignals() as signals:
        for record in _watched(live, model, optimizer, steps(model, batches, optimizer, settings, done, tokens)):
            _refuse_divergence(job, record)
            log.append(record, Peak(predicted, live.peak))
            if signals.received or record.step % job.checkpoint_every == 0:
                log.sync()
                checkpoint.save(job.run, job.key, Checkpoint(record.step, record.tokens, optimizer.state()))
            if signals.received:
                raise Interrupted(signals.received, f"{job.stage.name}: stopped after step {record.step} of {total}")
            yield Progress(record.step, total, f"loss {record.loss:.3f}")
        if signals.received:
            raise Interrupted(signals.received, f"{job.stage.name}: stopped after the last step")
    model.eval()
    if live.peak:
        yield Note(f"{job.stage.name}: {in_units(live.peak)} of tensors measured at the peak of a step")


def _watched(live: LiveBytes, model: MiniGPT, optimizer: FlatAdam, records: Iterator[Step]) -> Iterator[Step]:
    """The same records; the second step, the first that finds the optimizer's state, is counted in `live`."""
    yield from islice(records, 1)
    live.watch([*model.parameters(), *model.buffers(), *optimizer.tensors()])
    with live:
        second = list(islice(records, 1))
    yield from second
    yield from records


def _refuse_divergence(job: Job, record: Step) -> None:
    if not math.isfinite(record.loss) or not math.isfinite(record.grad_norm):
        raise UserError(
            f"{job.stage.name}: the loss is {record.loss} and the gradient's norm {record.grad_norm} at step "
            f"{record.step}. Lower {job.stage.name}.learning_rate in params.yaml."
        )
