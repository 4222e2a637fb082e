"""One wish to the allocator, for work that makes and drops large tensors all the time."""

import ctypes
import sys


def keep_memory() -> None:
    """Ask glibc to keep freed memory: page faults of large buffers cost a third of the time."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another libc
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD in <malloc.h>
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, 2**31 - 1)
