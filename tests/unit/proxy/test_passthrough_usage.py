"""Tokens are found in whatever answer passes through and tells them, however long it is."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from sentinel_proxy.passthrough import _UsageReader
from sentinel_proxy.sse import Usage

MIB = 1024 * 1024
TOLD = {"input_tokens": 7, "output_tokens": 4_160}


def usage_of(body, *, content_type=b"application/json", piece_bytes=65_536):
    stream: Any = SimpleNamespace(headers=[(b"content-type", content_type)])
    reader = _UsageReader(stream)
    for start in range(0, len(body), piece_bytes):
        reader.feed(body[start : start + piece_bytes])
    return reader.usage()


@pytest.mark.parametrize("picture_bytes", [0, MIB, 17 * MIB])
def test_after_pictures_of_any_size(picture_bytes):
    answer = {"data": [{"b64_json": "A" * picture_bytes}], "usage": TOLD}
    assert usage_of(json.dumps(answer).encode()) == Usage(7, 4_160)


def test_what_only_quotes_a_usage_has_none():
    answer = {"text": json.dumps({"usage": TOLD}), "more": "A" * (17 * MIB), "end": json.dumps({"usage": TOLD})}
    assert usage_of(json.dumps(answer).encode()) is None


def test_nothing_is_looked_for_in_what_is_no_json():
    assert usage_of(json.dumps({"usage": TOLD}).encode(), content_type=b"audio/mpeg") is None


def test_of_a_stream_the_last_one_counts():
    events = b"".join(b"data: %b\n\n" % json.dumps({"usage": {**TOLD, "output_tokens": n}}).encode() for n in (1, 5))
    assert usage_of(events, content_type=b"text/event-stream", piece_bytes=1) == Usage(7, 5)
