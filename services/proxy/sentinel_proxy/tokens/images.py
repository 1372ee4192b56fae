"""What a picture costs: its size from a data URL, without decoding it, and the formula of the model's family."""

from __future__ import annotations

import binascii
import math
from dataclasses import dataclass
from typing import Final, Protocol

# What is assumed of a picture that cannot be seen: a remote URL, a file id, an unknown format.
UNKNOWN_SIZE_PX: Final = (1024, 1024)
_JPEG_SEGMENTS_MAX: Final = 200
_JPEG_NOT_FRAMES: Final = frozenset({0xC4, 0xC8, 0xCC})


class ImageFormula(Protocol):
    """The tokens of one picture; `detail` is OpenAI's `low`, `high` or `auto` (counted as high)."""

    def tokens(self, width_px: int, height_px: int, detail: str, /) -> int: ...


@dataclass(frozen=True, slots=True)
class Tiles:
    """OpenAI's tiles: into 2048 px, short side to 768 px, then `base` + `tile` per 512 px square; low: `base`."""

    base: int
    tile: int

    def tokens(self, width_px: int, height_px: int, detail: str) -> int:
        if detail == "low":
            return self.base
        width, height = _fit(width_px, height_px, long_side_px=2048)
        if min(width, height) > 768:
            width, height = _scaled(width, height, 768 / min(width, height))
        return self.base + self.tile * math.ceil(width / 512) * math.ceil(height / 512)


@dataclass(frozen=True, slots=True)
class Patches:
    """OpenAI's 32 px patches, the picture shrunk until `patches_max` cover it, times the model's multiplier."""

    multiplier: float
    patches_max: int

    def tokens(self, width_px: int, height_px: int, detail: str) -> int:
        if detail == "low":
            width_px, height_px = _fit(width_px, height_px, long_side_px=512)
        patches = math.ceil(width_px / 32) * math.ceil(height_px / 32)
        if patches > self.patches_max:
            shrink = math.sqrt(32 * 32 * self.patches_max / (width_px * height_px))
            across, down = width_px * shrink / 32, height_px * shrink / 32
            # Then so far that one side is covered by whole patches, as OpenAI documents it.
            shrink *= min(_whole(across) / across, _whole(down) / down)
            patches = math.ceil(round(width_px * shrink / 32, 6)) * math.ceil(round(height_px * shrink / 32, 6))
        return math.ceil(min(patches, self.patches_max) * self.multiplier)


@dataclass(frozen=True, slots=True)
class Area:
    """Anthropic's: pixels over `pixels_per_token` after scaling into 1568 px, at most `tokens_max`."""

    pixels_per_token: int
    tokens_max: int

    def tokens(self, width_px: int, height_px: int, _detail: str) -> int:
        width, height = _fit(width_px, height_px, long_side_px=1568)
        return min(self.tokens_max, math.ceil(width * height / self.pixels_per_token))


@dataclass(frozen=True, slots=True)
class Crops:
    """Google's: one `crop` for a picture within 384 px, else one per 768 px square."""

    crop: int

    def tokens(self, width_px: int, height_px: int, _detail: str) -> int:
        if max(width_px, height_px) <= 384:
            return self.crop
        return self.crop * math.ceil(width_px / 768) * math.ceil(height_px / 768)


def size_of_data_url(url: str) -> tuple[int, int] | None:
    """Width and height in pixels of a PNG, JPEG, GIF or WebP in a base64 data URL; None when they cannot be told.

    Reads only the few bytes of the header, wherever in the text they stand; never raises.
    """
    comma = url.find(",", 0, 256)
    if comma < 0 or not url.startswith("data:") or ";base64" not in url[:comma]:
        return None
    try:
        size = _size(_Base64(url, comma + 1))
    except (ValueError, IndexError):  # binascii.Error is a ValueError; IndexError: the picture ends too soon
        return None
    return size if size is not None and min(size) > 0 else None


class _Base64:
    """Bytes of a base64 text by their position: only the quads that cover them are decoded."""

    def __init__(self, text: str, start: int) -> None:
        self._text = text
        self._start = start

    def read(self, offset: int, length: int) -> bytes:
        first, last = offset // 3, -(-(offset + length) // 3)
        quads = self._text[self._start + 4 * first : self._start + 4 * last]
        data = binascii.a2b_base64(quads)[offset - 3 * first :][:length]
        if len(data) < length:
            raise IndexError(offset)
        return data


def _size(data: _Base64) -> tuple[int, int] | None:
    magic = data.read(0, 12)
    if magic.startswith(b"\x89PNG\r\n\x1a\n"):
        return _big(data.read(16, 4)), _big(data.read(20, 4))
    if magic.startswith((b"GIF87a", b"GIF89a")):
        return _little(data.read(6, 2)), _little(data.read(8, 2))
    if magic.startswith(b"\xff\xd8"):
        return _jpeg_size(data)
    if magic.startswith(b"RIFF") and magic.endswith(b"WEBP"):
        return _webp_size(data.read(12, 18))
    return None


def _jpeg_size(data: _Base64) -> tuple[int, int] | None:
    offset = 2
    for _ in range(_JPEG_SEGMENTS_MAX):
        mark, kind = data.read(offset, 2)
        if mark != 0xFF:
            return None
        if kind == 0xFF:  # a fill byte before the marker
            offset += 1
        elif 0xC0 <= kind <= 0xCF and kind not in _JPEG_NOT_FRAMES:
            return _big(data.read(offset + 7, 2)), _big(data.read(offset + 5, 2))
        else:
            offset += 2 + _big(data.read(offset + 2, 2))
    return None


def _webp_size(chunk: bytes) -> tuple[int, int] | None:
    kind = chunk[:4]
    if kind == b"VP8X":
        return 1 + _little(chunk[12:15]), 1 + _little(chunk[15:18])
    if kind == b"VP8L":
        bits = _little(chunk[9:13])
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return _little(chunk[14:16]) & 0x3FFF, _little(chunk[16:18]) & 0x3FFF
    return None


def _big(data: bytes) -> int:
    return int.from_bytes(data, "big")


def _little(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _fit(width_px: int, height_px: int, *, long_side_px: int) -> tuple[int, int]:
    long_side = max(width_px, height_px)
    return (
        (width_px, height_px) if long_side <= long_side_px else _scaled(width_px, height_px, long_side_px / long_side)
    )


def _scaled(width_px: int, height_px: int, factor: float) -> tuple[int, int]:
    return max(1, round(width_px * factor)), max(1, round(height_px * factor))


def _whole(patches: float) -> int:
    return max(1, math.floor(patches))
