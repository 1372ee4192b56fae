"""Answers that come packed although nobody asked for it: unpacked, so that their usage can be read."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Final

from sentinel_proxy.upstream.failures import broke

if TYPE_CHECKING:
    from collections.abc import Iterable

_KNOWN: Final = frozenset({b"gzip", b"x-gzip", b"deflate"})
_OF_THE_PACKED: Final = frozenset({b"content-encoding", b"content-length"})


class Unpacking:
    """One body, piece by piece. What cannot be unpacked, or ends too early, is an upstream that broke."""

    def __init__(self) -> None:
        self._is_whole = True  # as long as there is nothing of it: the answer to a HEAD has no body
        self._begin()

    def _begin(self) -> None:
        self._stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # gzip or zlib, as its first bytes say

    def feed(self, piece: bytes) -> bytes:
        """All that can be unpacked so far."""
        try:
            out = self._stream.decompress(piece)
            while rest := self._stream.unused_data:
                self._begin()  # packed in several parts, one after the other
                out += self._stream.decompress(rest)
            self._is_whole = self._stream.eof
            return out
        except zlib.error as error:
            raise broke("its answer cannot be unpacked") from error

    def end(self) -> None:
        """Nothing more comes."""
        if not self._is_whole:
            raise broke("its packed answer is not whole")

    def whole(self, body: bytes) -> bytes:
        """A body that is there at once."""
        out = self.feed(body) if body else b""
        self.end()
        return out


def unpacked(headers: Iterable[tuple[bytes, bytes]], packing: bytes) -> tuple[list[tuple[bytes, bytes]], Unpacking]:
    """The headers of the unpacked answer, and what unpacks it. Raises UpstreamUnreachable for an unknown packing."""
    if packing.lower() not in _KNOWN:
        raise broke(f"it packs its answers by {packing[:32].decode('latin-1')!r}, unasked")
    return [header for header in headers if header[0] not in _OF_THE_PACKED], Unpacking()
