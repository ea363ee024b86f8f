"""One run in several processes: each learns from a share of every step, the first looks in the cache and writes.

What they tell each other goes over gloo, gradients on GPUs over NCCL: a process that dies is noticed at the next step.
Alone, every function here gives back what it got.
"""

import shutil
import signal
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.dag import Project, Stage
from pipeline.errors import Interrupted, UserError
from pipeline.models.causal import CausalLM
from pipeline.models.quantized import QuantizedLinear
from pipeline.runner import Event, Facts, Job, Work, run
from pipeline.world import world

Item = TypeVar("Item")
PATIENCE = timedelta(days=7)  # the first may wait for another run's lock; a process that is gone is noticed at once


class Agreed(UserError):
    """Every process of the run raises it; the first says it."""


class Lost(Agreed):
    """Another process of the run is gone."""


class Helped(Exception):
    """This process has done its part: what remains is writing, which the first does."""


def first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def mine(items: Sequence[Item]) -> list[Item]:
    """This process's share of what makes a step."""
    return list(items[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else items)


def summed(*numbers: float) -> list[float]:
    """Each number's sum over all processes."""
    if not dist.is_initialized():
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total)
    return [float(number) for number in total]


def sum_up(tensor: Tensor) -> None:
    """The same of a tensor, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)


def largest_of(number: int) -> int:
    """Of all processes' numbers."""
    if not dist.is_initialized():
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def told_by_first(thing: Item) -> Item:
    """What the first process has; what the others have is dropped."""
    if not dist.is_initialized():
        return thing
    box = [thing if first() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def agree(problem: str = "") -> None:
    """Raises Agreed, in every process, if any of them has a problem. Each must call it."""
    if not dist.is_initialized():
        return
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for found in filter(None, problems):
        raise Agreed(found)


def is_lost(error: RuntimeError) -> bool:
    """Whether a process of the run is gone, or the way to it."""
    return dist.is_initialized() and any(name in str(error).lower() for name in ("gloo", "nccl", "connection"))


def needs_shards(model: CausalLM, device: torch.device) -> bool:
    """Whether the weights take more than this device, or another process's, has free."""
    if not dist.is_initialized() or device.type != "cuda":
        return False
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    return bool(largest_of(int(size > torch.cuda.mem_get_info()[0])))


def shard(model: CausalLM, device: torch.device) -> None:
    """Each process keeps 1/N of the blocks' frozen weights and fetches a block's others when it runs (FSDP2).

    What trains, and embeddings and head, stay whole in each. Raises UserError.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise UserError("A base in few bits is kept whole on each device. Train without --shard.")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    inside = {id(p) for p in model.blocks.parameters()}
    whole = {p for p in model.parameters() if p.requires_grad or id(p) not in inside}
    for part in (*model.blocks, model.body):
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    if not model.packs:
        raise UserError(
            "This model reads one sequence at a time: processes would run its blocks unequally often. Train without "
            "--shard."
        )


def together(
    project: Project, stage: Stage, work: Work, *, force: bool = False, checkpoint_every: int = 100
) -> Generator[Event, None, Facts]:
    """`run` in every process of the world; returns the manifest, or nothing where this is not the first process."""
    with _joined():
        if not first():
            with suppress(UserError, Interrupted, Helped):
                _help(project, stage, work, checkpoint_every)
            return {}
        asked = False

        def leading(job: Job) -> Generator[Event, None, Facts]:
            nonlocal asked
            asked = True
            told_by_first(job.key)
            return (yield from _agreeing(work, job))

        try:
            return (yield from run(project, stage, leading, force=force, checkpoint_every=checkpoint_every))
        except Lost:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from torchrun, to all that are left: this one still speaks
            raise
        finally:
            if not asked:
                told_by_first("")


def _help(project: Project, stage: Stage, work: Work, checkpoint_every: int) -> None:
    """The same work, its files thrown away, if the first process has to do it."""
    scratch = project.run_folder(stage.name) / f".rank-{dist.get_rank()}"
    try:
        if key := told_by_first(""):
            shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
            (scratch / "out").mkdir(parents=True)
            for _ in _agreeing(work, Job(project, stage, scratch / "out", scratch, key, checkpoint_every)):
                pass
    except RuntimeError as error:
        if not is_lost(error):
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _agreeing(work: Work, job: Job) -> Generator[Event, None, Facts]:
    try:
        return (yield from work(job))
    except Agreed:
        raise
    except UserError as error:
        _tell(error)
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise lost(job) from None


def _tell(error: UserError) -> NoReturn:
    with suppress(RuntimeError):  # the others are gone already
        agree(str(error))
    raise error


def lost(job: Job, kept: str = "") -> Lost:
    """What to say when a process of the run is gone."""
    return Lost(f"{job.stage.name}: another process of this run ended. {kept}Run the same command to go on.")


@contextmanager
def _joined() -> Iterator[None]:
    here = world()
    if torch.cuda.is_available():
        if here.local_size > torch.cuda.device_count():
            raise UserError(f"{here.local_size} processes need as many GPUs; here are {torch.cuda.device_count()}.")
        torch.cuda.set_device(here.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()
