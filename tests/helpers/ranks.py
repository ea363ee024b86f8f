"""A function in several processes over gloo, each a rank of one group."""

import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tests.helpers.process import SERVER


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a module's function returns on each rank; it must be small and picklable. Raises if one of them raised."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, running = [], []
    for rank in range(size):
        ours, theirs = SERVER.Pipe(duplex=False)
        process = SERVER.Process(target=_run, args=(theirs, rank, size, port, function, arguments), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        running.append(process)
    try:
        results = [pipe.recv() for pipe in pipes]
    except EOFError:
        raise AssertionError("a rank died") from None
    finally:
        for process in running:
            process.join(10)
            process.kill()
    for result in results:
        if isinstance(result, str):
            raise AssertionError(result)
    return [result[0] for result in results]


def _run(
    pipe: Connection, rank: int, size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import traceback

    import torch
    import torch.distributed as dist

    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        pipe.send((function(*arguments),))
    except BaseException:  # the test shows it
        pipe.send(traceback.format_exc())
        os._exit(1)  # the other ranks wait for it
    dist.destroy_process_group()
