"""The models in a process of their own: `python -m pipeline.inference.server`.

It speaks the protocol of `pipeline/files/worker.py`; `requests.py` has what may be asked. An
“error” of kind “memory” is the last answer of all: the process then ends.
docs/decisions/0006-inference-process.md has the answers and the reasons.
"""

import os
import sys
from collections.abc import Iterator
from importlib import import_module

import torch

from pipeline.errors import UserError, first_line, is_out_of_memory
from pipeline.files import worker
from pipeline.inference.handlers import RequestHandler

FAILED_DEVICE = 3  # exit code after a device error, which leaves the device in an undefined state
_DEVICE_ERRORS = ("CUDA error", "CUBLAS_STATUS", "cuDNN error", "MPS backend")


def start() -> worker.Handle:
    handler = RequestHandler()

    def handle(request: worker.Request) -> Iterator[worker.Answer]:
        try:
            yield from handler.answer(request.do, request.fields)
        except OSError as error:
            raise UserError(f"{error.filename or 'file'}: {error.strerror or error}.") from None
        except (RuntimeError, MemoryError) as error:
            reason = device_failure(error)
            if reason is None:
                raise
            request.write(event="error", message=reason, kind="memory")
            os._exit(FAILED_DEVICE)

    return handle


def device_failure(error: BaseException) -> str | None:
    """Message for an error after which the process must end, or None for any other error."""
    if is_out_of_memory(error):
        return (
            f"out of memory ({first_line(error)}); load fewer or smaller models, or use a shorter "
            "prompt"
        )
    if any(sign in str(error) for sign in _DEVICE_ERRORS):
        return f"the device failed ({first_line(error)})"
    return None


def main() -> None:
    """Its arguments are modules that add kinds of adapters."""
    for module in sys.argv[1:]:
        import_module(module)
    torch.set_num_threads(1)  # until a model is loaded, which sets its own number
    # the status is told immediately, even while a model generates
    worker.serve(start, at_once=("status",))


if __name__ == "__main__":
    main()
