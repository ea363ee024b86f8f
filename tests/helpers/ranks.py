"""A function in several processes over gloo, each a rank of one group."""

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from tests.helpers.process import SERVER


def run_ranks(
    size: int,
    function: Callable[..., Any],
    *arguments: Any,
    grouped: bool = True,
    seconds: float = 600,
) -> list[Any]:
    """What a module's function returns on each rank; it must be small and picklable. Raises if one
    of them raised.

    Unless `grouped`, the function makes the group itself; a rank without a result after so many
    `seconds` gives None.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, running = [], []
    for rank in range(size):
        ours, theirs = SERVER.Pipe(duplex=False)
        run = _run if grouped else _run_alone
        process = SERVER.Process(
            target=run, args=(theirs, rank, size, port, function, arguments), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        running.append(process)
    try:
        limit = time.monotonic() + seconds
        results = [_received(pipe, limit - time.monotonic()) for pipe in pipes]
    finally:
        for process in running:
            process.join(10)
            process.kill()
    if grouped and None in results:
        raise AssertionError("a rank died")
    for result in results:
        if isinstance(result, str):
            raise AssertionError(result)
    return [result and result[0] for result in results]


def _received(pipe: Connection, seconds: float) -> Any:
    with suppress(EOFError):  # it was killed
        return pipe.recv() if pipe.poll(max(0, seconds)) else None
    return None


def _run(
    pipe: Connection,
    rank: int,
    size: int,
    port: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch.distributed as dist

    def in_group(*given: Any) -> Any:
        dist.init_process_group("gloo")
        return function(*given)

    _run_alone(pipe, rank, size, port, in_group, arguments)
    dist.destroy_process_group()


def _run_alone(
    pipe: Connection,
    rank: int,
    size: int,
    port: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import traceback

    import torch

    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        pipe.send((function(*arguments),))
    except BaseException:  # the test shows it
        pipe.send(traceback.format_exc())
        os._exit(1)  # the other ranks wait for it
