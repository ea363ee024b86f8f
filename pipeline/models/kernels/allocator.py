"""Make the C library's allocator keep freed memory: a training step asks for the same sizes again at once.

glibc returns freed blocks of megabytes to the system, and the next step pays a page fault for each 4 KiB of them: on
two cores that took several times as long as the tensors' operations.
"""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # <malloc.h>
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Returns whether this system's allocator supports it (glibc). Lasts until the process ends."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _NEVER)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
