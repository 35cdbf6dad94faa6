"""Encoding and reconstruction on the caller's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mnemo.erasure.codes import Code
from mnemo.erasure.engines import usable
from mnemo.errors import FragmentError, TooFewFragmentsError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import Buffer

    from mnemo.erasure.engines.base import Engine, Fragment


def codec(code: Code, engine: str | None = None) -> Codec:
    """Return what encodes and reconstructs with ``code``.

    Args:
        code: What is computed.
        engine: What computes it: ``isal``, ``zfec`` or ``numpy``. By default the fastest that
            works here; a warning is logged where that is not ``isal``.

    Raises:
        EngineError: There is no such engine, it is not installed, or it fails its self-test.
    """
    return Codec(code, usable(engine))


class Codec:
    """One code on one engine. Keeps no state between calls, so threads may share it.

    Buffers are anything that gives contiguous bytes: ``bytearray``, ``memoryview``, ``mmap``, numpy
    arrays. None is copied, none is kept, and while the engine works others have the GIL. What is
    written must not overlap anything else given; what is read may. Buffers must not change
    meanwhile. After an error that this class raises, nothing was written.
    """

    def __init__(self, code: Code, engine: Engine) -> None:
        self._code = code
        self._engine = engine

    @property
    def code(self) -> Code:
        """What is computed."""
        return self._code

    @property
    def engine(self) -> str:
        """Name of what computes it."""
        return self._engine.name

    def encode(self, data: Sequence[Buffer], parity_out: Sequence[Buffer]) -> None:
        """Compute all parities.

        Args:
            data: The k data fragments in order, of one length in bytes.
            parity_out: Where the m parities go, of the same length.

        Raises:
            FragmentError: The buffers' number, lengths or kinds are wrong, or they overlap.
        """
        for what, buffers, number in (
            ("data", data, self._code.k),
            ("parity", parity_out, self._code.m),
        ):
            if len(buffers) != number:
                msg = f"{len(buffers)} {what} buffers given, {self._code} has {number}"
                raise FragmentError(msg)
        self.reconstruct(dict(enumerate(data)), dict(enumerate(parity_out, self._code.k)))

    def reconstruct(self, have: Mapping[int, Buffer], out: Mapping[int, Buffer]) -> None:
        """Compute chosen fragments, data or parities, from any k others.

        Args:
            have: Present fragments by number, of one length in bytes. Of more than k, those with
                the lowest numbers are read.
            out: Where the wanted fragments go, by number, of the same length.

        Raises:
            TooFewFragmentsError: Fewer than k fragments are present.
            FragmentError: A number is out of range or both present and wanted, the buffers'
                lengths or kinds are wrong, or they overlap.
        """
        code = self._code
        for number in (*have, *out):
            if not isinstance(number, int) or not 0 <= number < code.n:
                msg = f"fragment {number!r}: {code} has the numbers 0 to {code.n - 1}"
                raise FragmentError(msg)
        if both := sorted(have.keys() & out.keys()):
            msg = f"fragments {both} are given both as present and as wanted"
            raise FragmentError(msg)
        if len(have) < code.k:
            msg = f"{len(have)} fragments are left, {sorted(have)}; {code} needs {code.k}"
            raise TooFewFragmentsError(msg)
        present = {number: _bytes_of(number, have[number]) for number in sorted(have)}
        wanted = {number: _bytes_of(number, out[number], writable=True) for number in sorted(out)}
        _check_lengths({**present, **wanted})
        _check_overlap(present, wanted)
        sources = {number: present[number] for number in list(present)[: code.k]}
        if wanted and next(iter(wanted.values())).size:
            self._engine.compute(code, sources, wanted)


def _bytes_of(number: int, buffer: Buffer, *, writable: bool = False) -> Fragment:
    try:
        view = memoryview(buffer)
    except (TypeError, ValueError) as error:  # a numpy dtype without a buffer is the latter
        msg = f"fragment {number} is a {type(buffer).__name__}, not a buffer of bytes: {error}"
        raise FragmentError(msg) from None
    if not view.c_contiguous:
        msg = f"fragment {number} is not contiguous: strides {view.strides} of shape {view.shape}"
        raise FragmentError(msg)
    if writable and view.readonly:
        msg = f"fragment {number} is to be written, but its {type(buffer).__name__} is read-only"
        raise FragmentError(msg)
    return np.frombuffer(view, np.uint8) if view.nbytes else np.empty(0, np.uint8)


def _check_lengths(fragments: Mapping[int, Fragment]) -> None:
    lengths = {number: fragment.size for number, fragment in fragments.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{number}: {length}" for number, length in sorted(lengths.items()))
        msg = f"fragments differ in length; bytes by number: {shown}"
        raise FragmentError(msg)


def _check_overlap(present: Mapping[int, Fragment], wanted: Mapping[int, Fragment]) -> None:
    """Compare each buffer in the order of addresses with those that reach furthest before it."""
    places = sorted(
        (fragment.__array_interface__["data"][0], fragment.size, number)
        for fragments in (present, wanted)
        for number, fragment in fragments.items()
        if fragment.size
    )
    end = end_written = (0, -1)
    for start, size, number in places:
        reaching, other = end if number in wanted else end_written
        if start < reaching:
            what = "is to be written and" if number in wanted else "is read and"
            msg = f"fragment {number} {what} overlaps fragment {other} by {reaching - start} bytes"
            raise FragmentError(msg)
        end = max(end, (start + size, number))
        if number in wanted:
            end_written = (start + size, number)
