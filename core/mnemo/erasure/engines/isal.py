"""Erasure coding with ISA-L, as fast as memory is read.

The library is the one inside the pyeclib wheel, called by ctypes: it takes addresses, so nothing is
copied, and ctypes releases the GIL. pyeclib's own interface copies and keeps the GIL.
"""

from __future__ import annotations

import ctypes
from importlib.metadata import PackageNotFoundError, distribution
from typing import TYPE_CHECKING, Final

import numpy as np

from mnemo.erasure.codes import CodeKind, coefficients
from mnemo.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mnemo.erasure.codes import Code
    from mnemo.erasure.engines.base import Fragment

_SYSTEM_LIBRARY: Final = "libisal.so.2"
_FUNCTIONS: Final = ("ec_init_tables", "ec_encode_data", "xor_gen")
_TABLE_BYTES: Final = 32
"""What ISA-L makes of one coefficient."""
_FEW: Final = 4
"""Outputs that ISA-L computes while it reads the sources once; for more it reads them again."""
_CHUNK: Final = 1 << 20
"""Bytes of each fragment per call for more outputs, so that they are read again from the cache."""
_LONGEST: Final = 1 << 30
"""Bytes per call otherwise: lengths are C ints. After every call the GIL is waited for, so fewer
are better: 5 ms each where another thread is busy."""
_ALIGNED: Final = 64
"""Addresses that ``xor_gen`` takes are multiples of it; it writes past the cache then."""


class IsalEngine:
    """Calls functions that check nothing, and tells them nothing unchecked."""

    name = "isal"

    def __init__(self) -> None:
        library = _library()
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        self._init_tables = library.ec_init_tables
        self._init_tables.argtypes = [integer, integer, pointer, pointer]
        self._init_tables.restype = None
        self._encode = library.ec_encode_data
        self._encode.argtypes = [integer, integer, integer, pointer, pointer, pointer]
        self._encode.restype = None
        self._xor = library.xor_gen
        self._xor.argtypes = [integer, integer, pointer]
        self._xor.restype = integer

    def compute(
        self, code: Code, sources: Mapping[int, Fragment], outputs: Mapping[int, Fragment]
    ) -> None:
        """See `mnemo.erasure.engines.base.Engine.compute`."""
        length = next(iter(sources.values())).size
        read, write = (
            np.array([part.__array_interface__["data"][0] for part in parts.values()], np.uintp)
            for parts in (sources, outputs)
        )
        if code.kind is CodeKind.XOR and code.k > 1:
            both = np.concatenate([read, write])
            if not (both % _ALIGNED).any():
                self._add(length, both)
                return
        matrix = coefficients(code, tuple(sources), tuple(outputs))
        rows, k = matrix.shape
        tables = np.empty(_TABLE_BYTES * matrix.size, np.uint8)
        self._init_tables(k, rows, matrix.ctypes.data, tables.ctypes.data)
        arguments = (tables.ctypes.data, read.ctypes.data, write.ctypes.data)
        chunk = _LONGEST if rows <= _FEW else _CHUNK
        for start in range(0, length, chunk):
            self._encode(min(chunk, length - start), k, rows, *arguments)
            read += np.uintp(chunk)
            write += np.uintp(chunk)

    def _add(self, length: int, addresses: np.ndarray) -> None:
        """Write the XOR of what is at all addresses but the last to that one."""
        for start in range(0, length, _LONGEST):
            part = min(_LONGEST, length - start)
            if self._xor(addresses.size, part, addresses.ctypes.data) != 0:
                msg = f"ISA-L refuses the XOR of {addresses.size - 1} fragments of {part} bytes"
                raise EngineError(msg)
            addresses += np.uintp(_LONGEST)


def _library() -> ctypes.CDLL:
    """Open the wheel's library, or the system's.

    Raises:
        EngineError: There is none, or not with the functions needed.
    """
    failures = []
    for path in (*_bundled(), _SYSTEM_LIBRARY):
        try:
            library = ctypes.CDLL(path)
            for function in _FUNCTIONS:
                getattr(library, function)
        except (OSError, AttributeError) as error:
            failures.append(str(error))
        else:
            return library
    failed = "; ".join(failures)
    msg = f"ISA-L cannot be loaded ({failed}); pip install pyeclib, or install libisal2"
    raise EngineError(msg)


def _bundled() -> list[str]:
    try:
        files = distribution("pyeclib").files or []
    except PackageNotFoundError:
        return []
    return [str(file.locate()) for file in files if file.name.startswith("libisal")]
