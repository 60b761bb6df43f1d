"""The native part of `comm.group`, as Python calls it: looking for bytes before a thread sleeps, and shared rings.

What it does outside the interpreter's lock, Python could not do without keeping others from it. Where the library is
missing (no compiler was there), nobody looks and no memory is shared: everything works, and takes longer.
"""

from __future__ import annotations

import ctypes
import logging
from ctypes import c_char, c_int, c_int32, c_int64, c_short, c_uint64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

BYTES_VERSION = 1
_LIBRARY = Path(__file__).with_name("libshoal_bytes.so")

log = logging.getLogger(__name__)


class RingSide(ctypes.Structure):
    """`Side` of native/bytes.cpp: one side of a ring, of the process whose side it is."""

    _fields_ = (
        ("ring", c_void_p),
        ("size", c_uint64),
        ("count", c_uint64),
        ("bell", c_int32),
        ("effort", c_int32),
    )


class PolledFile(ctypes.Structure):
    """`struct pollfd` of the system."""

    _fields_ = (("fd", c_int), ("events", c_short), ("revents", c_short))


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "look": (c_int64, (c_int32, c_void_p, c_int64, c_int64, ctypes.POINTER(c_int32))),
    "look_at_all": (c_int32, (c_void_p, c_int32, c_int64, ctypes.POINTER(c_int32))),
    "ring_head": (c_int64, ()),
    "ring_write": (c_int64, (ctypes.POINTER(RingSide), c_void_p, c_int64)),
    "ring_read": (c_int64, (ctypes.POINTER(RingSide), c_void_p, c_int64, c_int64)),
    "ring_listen": (c_int32, (ctypes.POINTER(RingSide), ctypes.POINTER(RingSide), c_int32, c_int32)),
}


class NativeBytes:
    """Its functions. Raises OSError and AttributeError if the library is missing or another one."""

    def __init__(self) -> None:
        library = ctypes.CDLL(str(_LIBRARY))
        if library.shoal_bytes_version() != BYTES_VERSION:
            raise OSError("the library is of another version")
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, f"shoal_{name}")
            function.restype, function.argtypes = result, arguments
        self.look = library.shoal_look
        self.look_at_all = library.shoal_look_at_all
        self.ring_head = int(library.shoal_ring_head())
        self.ring_write = library.shoal_ring_write
        self.ring_read = library.shoal_ring_read
        self.ring_listen = library.shoal_ring_listen


@lru_cache(maxsize=1)
def native_bytes() -> NativeBytes | None:
    """None if there is no library for this version."""
    try:
        return NativeBytes()
    except (OSError, AttributeError) as error:
        log.info("ranks wait for each other by sleeping: %s", error)
        return None


_Memory: Any = c_char * 0  # stubs of Python 3.11 do not know that memory is a buffer


def address_of(memory: memoryview) -> Any:
    """Where writable, contiguous memory lies, as ctypes takes it."""
    return _Memory.from_buffer(memory)
