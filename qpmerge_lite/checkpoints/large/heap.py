"""Memory that is the system's again as soon as it is let go of."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as of glibc's malloc.h
LARGE, SMALL = 2**20, 2**17  # bytes: what is quick to take anew, and what glibc begins with


def give_back(tight: bool) -> None:
    """From now on the process gives large pieces of memory back when it lets go of them, and small
    ones too where memory is tight, which takes longer.

    By itself glibc keeps pieces of up to 32 MiB for later, and layers of one width leave gaps that
    those of another do not fill: a process then has much more memory than it uses. Other C
    libraries are left as they are.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, SMALL if tight else LARGE)
        library.mallopt(M_TRIM_THRESHOLD, SMALL)
        library.malloc_trim(0)
