"""The host's heap, in runs on a CPU."""

from __future__ import annotations

import ctypes
import os
import platform

# mallopt's parameters (malloc.h), and what they are set to, in bytes.
SETTINGS = {
    "M_MMAP_THRESHOLD": (-3, 2**30),  # below it a tensor is taken from the heap, and its pages are there already
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),  # freed memory at the heap's end beyond this goes back to the system
    "M_TOP_PAD": (-2, 2**26),  # the heap grows by so much more than it must
}


def keep_freed_memory() -> bool:
    """Let glibc keep the memory of freed tensors for the next ones.

    By itself it takes a large tensor's pages from the system and gives them back with it, so that each of a step's
    tensors is paid for with page faults. Nothing is done on other C libraries, or where the environment sets malloc's
    parameters (``MALLOC_…``, ``GLIBC_TUNABLES``) itself.

    Returns:
        Whether it was set.
    """
    own = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if own or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(parameter, value) for parameter, value in SETTINGS.values())
