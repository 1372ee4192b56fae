"""Pictures: their size from the first bytes, their tokens by the family's formula."""

from __future__ import annotations

import base64
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sentinel_proxy.tokens import TokenCounter, lookup
from sentinel_proxy.tokens.images import size_of_data_url
from tests.unit.tokens.bodies import Responses, count_now, user


def png(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + struct.pack(">II", width, height) + b"\x08\x02" + bytes(40)


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + bytes(40)


def jpeg(width: int, height: int, *, exif_bytes: int = 0, frame: int = 0xC0) -> bytes:
    exif = b"\xff\xe1" + struct.pack(">H", exif_bytes + 2) + bytes(exif_bytes)
    tables = b"\xff\xdb" + struct.pack(">H", 4) + b"\xff\xc0"  # a false marker inside a segment
    fill = b"\xff"
    return (
        b"\xff\xd8"
        + exif
        + tables
        + fill
        + bytes((0xFF, frame))
        + struct.pack(">HBHH", 11, 8, height, width)
        + bytes(9)
    )


def webp_lossy(width: int, height: int) -> bytes:
    return b"RIFF\0\0\0\0WEBPVP8 " + bytes(4) + b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height) + bytes(20)


def webp_lossless(width: int, height: int) -> bytes:
    bits = (width - 1) | (height - 1) << 14
    return b"RIFF\0\0\0\0WEBPVP8L" + bytes(4) + b"\x2f" + struct.pack("<I", bits) + bytes(20)


def webp_extended(width: int, height: int) -> bytes:
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF\0\0\0\0WEBPVP8X" + bytes(4) + bytes(4) + size + bytes(20)


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize(
    "data",
    [
        png(1023, 767),
        gif(1023, 767),
        jpeg(1023, 767),
        jpeg(1023, 767, exif_bytes=65_001),
        jpeg(1023, 767, frame=0xC2),
        webp_lossy(1023, 767),
        webp_lossless(1023, 767),
        webp_extended(1023, 767),
    ],
)
def test_the_size_stands_in_the_header(data: bytes) -> None:
    assert size_of_data_url(data_url(data)) == (1023, 767)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/cat.png",
        "data:image/png;base64,",
        "data:image/png;base64,iVBORw0KGgo=",
        "data:image/png,notbase64",
        "data:image/png;base64,ééé",
        data_url(b"BM" + bytes(60)),
        data_url(png(0, 10)),
        data_url(jpeg(5, 5)[:12]),
    ],
)
def test_a_size_that_cannot_be_told_is_none(url: str) -> None:
    assert size_of_data_url(url) is None


@given(st.one_of(st.text(), st.binary(max_size=200).map(data_url)))
def test_no_header_makes_it_raise(url: str) -> None:
    size_of_data_url(url)


@given(st.sampled_from([b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBPVP8", b"\x89PNG\r\n\x1a\n"]), st.binary(max_size=200))
def test_no_broken_picture_makes_it_raise(magic: bytes, rest: bytes) -> None:
    size_of_data_url(data_url(magic + rest))


# OpenAI's and Google's and Anthropic's documentation, and (with a comment) counts reported by the API.
@pytest.mark.parametrize(
    ("model", "size", "detail", "tokens"),
    [
        ("gpt-4o", (1024, 1024), "high", 765),
        ("gpt-4o", (1024, 1024), "auto", 765),
        ("gpt-4o", (2048, 4096), "high", 1105),
        ("gpt-4o", (4096, 8192), "low", 85),
        ("gpt-4o", (128, 64), "high", 255),  # reported
        ("gpt-4.1", (2049, 513), "high", 1445),  # reported
        ("gpt-4.1", (2050, 513), "high", 765),  # reported
        ("gpt-4o-mini", (128, 64), "low", 2833),  # reported
        ("gpt-4o-mini", (128, 64), "high", 8500),  # reported
        ("o3", (128, 64), "high", 225),  # reported
        ("gpt-5", (1024, 1024), "high", 630),
        ("gpt-4.1-mini", (1024, 1024), "high", 1659),
        ("gpt-4.1-mini", (1800, 2400), "high", 2353),
        ("gpt-4.1-nano", (128, 64), "high", 20),  # reported
        ("o4-mini", (1800, 2400), "low", 331),
        ("claude-sonnet-4", (1000, 1000), "auto", 1334),
        ("claude-sonnet-4", (8000, 8000), "auto", 1600),
        ("gemini-2.5-pro", (300, 300), "auto", 258),
        ("gemini-2.5-pro", (1536, 700), "auto", 516),
        ("gpt-4o", (1, 100_000), "high", 85 + 4 * 170),
    ],
)
def test_the_formula_of_the_family(model: str, size: tuple[int, int], detail: str, tokens: int) -> None:
    assert lookup(model).image.tokens(*size, detail) == tokens


@given(st.integers(1, 70_000), st.integers(1, 70_000), st.sampled_from(["gpt-4o", "o4-mini", "claude-x", "gemini"]))
def test_any_size_costs_something_within_the_familys_bound(width: int, height: int, model: str) -> None:
    tokens = lookup(model).image.tokens(width, height, "high")
    assert tokens >= 1
    if model != "gemini":  # crops are not bounded
        assert tokens <= 3_000


def test_the_picture_in_a_message_is_counted_by_its_size(counter: TokenCounter) -> None:
    def cost(url: str, **more: str) -> int:
        picture = {"type": "image_url", "image_url": {"url": url, **more}}
        return count_now(counter, user([picture])) - count_now(counter, user([]))

    assert cost(data_url(png(512, 512))) == 255
    assert cost(data_url(png(512, 512)), detail="low") == 85
    assert cost(data_url(b"who knows")) == 765
    assert cost("https://example.com/cat.png") == 765


def test_the_picture_of_a_responses_item_is_counted_by_its_size(counter: TokenCounter) -> None:
    picture = {"type": "input_image", "image_url": data_url(png(512, 512)), "detail": "high"}
    with_it = Responses(input=[{"role": "user", "content": [picture]}])
    assert count_now(counter, with_it) - count_now(counter, Responses(input="")) == 255
