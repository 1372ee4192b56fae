"""A stream reaches its caller byte for byte, each event at once, and what it cost is learnt on the way."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sentinel_proxy.sse import SseRelay, Usage, find_usage
from tests.unit.wire.recordings import DONE, RECORDINGS, USAGE_ONLY, Recording, delta

every_recording = pytest.mark.parametrize("recording", RECORDINGS, ids=lambda recording: recording.name)


def relayed(relay: SseRelay, chunks: Iterable[bytes]) -> bytes:
    return b"".join([*(relay.feed(chunk) for chunk in chunks), relay.flush()])


def check(recording: Recording, chunks: list[bytes]) -> None:
    assert b"".join(chunks) == recording.raw
    for hides_usage in (False, True):
        relay = SseRelay(hides_usage=hides_usage)
        out = relayed(relay, chunks)
        assert out == (recording.shown if hides_usage else recording.raw)
        assert relay.usage == recording.usage
        assert (relay.finished, relay.failed, relay.started) == (
            recording.finished,
            recording.failed,
            recording.started,
        )


@every_recording
def test_in_one_read(recording: Recording) -> None:
    check(recording, [recording.raw])


@every_recording
def test_event_by_event(recording: Recording) -> None:
    check(recording, list(recording.events))


@every_recording
def test_one_byte_at_a_time(recording: Recording) -> None:
    check(recording, [recording.raw[at : at + 1] for at in range(len(recording.raw))])


@every_recording
def test_cut_in_two_at_every_offset(recording: Recording) -> None:
    raw = recording.raw
    for at in range(len(raw) + 1):
        check(recording, [raw[:at], raw[at:]])


@every_recording
def test_cut_in_pieces_anywhere(recording: Recording) -> None:
    rng = random.Random(7)
    raw = recording.raw
    for _ in range(50):
        cuts = sorted(rng.choices(range(len(raw) + 1), k=rng.randint(2, 12)))
        check(recording, [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)])


@every_recording
def test_without_the_last_blank_line(recording: Recording) -> None:
    raw = recording.raw.rstrip(b"\r\n")
    relay = SseRelay(hides_usage=False)
    assert relayed(relay, [raw]) == raw
    assert (relay.usage, relay.finished, relay.failed) == (recording.usage, recording.finished, recording.failed)


@every_recording
def test_each_event_leaves_the_moment_it_is_whole(recording: Recording) -> None:
    relay = SseRelay(hides_usage=True)
    out = b""
    for index, event in enumerate(recording.events):
        # The LF of a CRLF that ends an event adds nothing: at its CR the event is whole.
        for at in range(len(event)):
            out += relay.feed(event[at : at + 1])
        shown = b"".join(e for i, e in enumerate(recording.events[: index + 1]) if i not in recording.hidden)
        assert out.rstrip(b"\r\n") == shown.rstrip(b"\r\n")


def test_a_content_event_goes_on_as_the_very_same_bytes() -> None:
    relay = SseRelay(hides_usage=True)
    relay.feed(delta("first"))
    event = delta("a", ',"usage":null')
    assert relay.feed(event) is event
    two = delta("b") + delta("c")
    assert relay.feed(two) is two


def test_several_events_of_one_read_leave_in_one_piece_without_the_hidden_one() -> None:
    relay = SseRelay(hides_usage=True)
    assert relay.feed(delta("a") + delta("b") + USAGE_ONLY + DONE) == delta("a") + delta("b") + DONE
    assert relay.usage == Usage(11, 7)


def test_of_a_hidden_event_cut_within_its_last_crlf_nothing_is_left() -> None:
    relay = SseRelay(hides_usage=True)
    first, usage_only, last = (event.replace(b"\n", b"\r\n") for event in (delta("a"), USAGE_ONLY, delta("b")))
    assert relay.feed(first + usage_only[:-1]) == first
    assert relay.feed(b"") == b""
    assert relay.feed(usage_only[-1:] + last) == last


def test_of_half_an_event_nothing_leaves_until_it_is_whole() -> None:
    relay = SseRelay(hides_usage=False)
    event = delta("a")
    assert relay.feed(event + event[:-5]) == event
    assert relay.feed(event[-5:-1]) == b""
    assert relay.feed(event[-1:] + event[:3]) == event


@pytest.mark.parametrize("comment", [b": keep-alive\n", b":\n", b": a\r\n: b\r\n", b":\r"])
def test_a_comment_leaves_at_once_though_no_blank_line_follows(comment: bytes) -> None:
    relay = SseRelay(hides_usage=True)
    assert relay.feed(comment) == comment
    assert relay.feed(delta("a")) == delta("a")
    assert relay.feed(comment[:1]) == b""
    assert relay.feed(comment[1:]) == comment
    assert not SseRelay(hides_usage=True).started


def test_announcements_are_no_beginning_but_the_first_content_is() -> None:
    relay = SseRelay(hides_usage=True)
    for event in (
        b": hi\n\n",
        b'data: {"choices":[]}\n\n',
        b'data: {"type":"response.created","response":{}}\n\n',
        b'data: {"type":"response.in_progress","response":{}}\n\n',
        b'data: {"error":{"message":"m"}}\n\n',
    ):
        relay.feed(event)
        assert not relay.started
    relay.feed(delta("a"))
    assert relay.started


@pytest.mark.parametrize(
    "usage",
    [
        *("null", "[]", "5", '"x"', "{}", "true"),
        '{"prompt_tokens":"5","completion_tokens":6}',
        '{"prompt_tokens":-1,"completion_tokens":6}',
        '{"prompt_tokens":5.0,"completion_tokens":6}',
        '{"prompt_tokens":true,"completion_tokens":6}',
        '{"prompt_tokens":null,"completion_tokens":6}',
        '{"prompt_tokens":5}',
        '{"completion_tokens":5,"total_tokens":9}',
        '{"prompt_tokens":5,"completion_tokens":-6}',
        '{"prompt_tokens":5,"completion_tokens":1e3}',
        '{"prompt_tokens":5,"total_tokens":4}',
        '{"prompt_tokens":5,"completion_tokens":9007199254740993}',
        '{"prompt_tokens":5,"completion_tokens":99999999999999999999999999}',
        '{"type":"duration","seconds":5}',
    ],
)
def test_usage_that_makes_no_sense_is_none_and_the_last_good_one_stays(usage: str) -> None:
    assert find_usage(f'{{"id":"c","usage":{usage}}}'.encode()) is None
    relay = SseRelay(hides_usage=False)
    relay.feed(delta("a", f',"usage":{usage}'))
    assert relay.usage is None
    relay.feed(delta("a", ',"usage":{"prompt_tokens":1,"completion_tokens":2}'))
    event = delta("a", f',"usage":{usage}')
    assert relay.feed(event) == event
    assert relay.usage == Usage(1, 2)


def test_a_usage_chunk_is_hidden_even_if_its_usage_makes_no_sense() -> None:
    assert SseRelay(hides_usage=True).feed(b'data: {"choices":[],"usage":{"prompt_tokens":"x"}}\n\n') == b""


def test_an_error_is_shown_even_if_it_looks_like_a_usage_chunk() -> None:
    relay = SseRelay(hides_usage=True)
    event = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":0},"error":{"message":"m"}}\n\n'
    assert relay.feed(event) == event
    assert (relay.failed, relay.usage) == (True, Usage(1, 0))


@pytest.mark.parametrize(
    ("body", "usage"),
    [
        (b'{"choices":[{}],"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}', Usage(3, 4)),
        (b'{"output":[{}],"usage":{"input_tokens":3,"output_tokens":4}}', Usage(3, 4)),
        (b'{"data":[{"embedding":[0.1,-1e-3]}],"usage":{"prompt_tokens":8,"total_tokens":8}}', Usage(8, 0)),
        (b'{"usage":{"prompt_tokens":0,"completion_tokens":0}}', Usage(0, 0)),
        (
            b'{"usage":{"prompt_tokens":1,"completion_tokens":1},"usage":{"prompt_tokens":2,"completion_tokens":2}}',
            Usage(2, 2),
        ),
        (b'{"nested":{"usage":{"prompt_tokens":3,"completion_tokens":4}}}', None),
        (b'{"text":"\\"usage\\":{}"}', None),
        (b'{"usage":{"prompt_tokens":3,', None),
        (b'[{"usage":1}]', None),
        (b'"usage"', None),
        (b'{"usage":' + b"[" * 100_000, None),
        (b'\xff{"usage":1}', None),
        (b"", None),
    ],
)
def test_the_usage_of_a_json_answer(body: bytes, usage: Usage | None) -> None:
    assert find_usage(body) == usage


def test_what_was_held_is_dropped_when_the_upstream_breaks_so_that_an_error_event_stands_alone() -> None:
    relay = SseRelay(hides_usage=False)
    event = delta("a")
    assert relay.feed(event + event[:20]) == event
    assert relay.interrupt() == b""
    assert relay.flush() == b""
    assert len(list(relay.events())) == 1


def test_usage_is_learnt_even_from_an_event_that_lacks_but_its_end() -> None:
    relay = SseRelay(hides_usage=True)
    relay.feed(delta("a") + USAGE_ONLY[:-1])
    relay.interrupt()
    assert relay.usage == Usage(11, 7)


def test_the_events_are_remembered_in_order_with_what_was_hidden_and_without_what_is_no_json() -> None:
    relay = SseRelay(hides_usage=True)
    raw = b": hi\n\n" + delta("a") + b"data: no json\n\n" + delta("\u4f60") + USAGE_ONLY + DONE + delta("b")[:-2]
    for at in range(0, len(raw), 7):
        relay.feed(raw[at : at + 7])
    events = [event for event in relay.events() if isinstance(event, dict)]
    assert [event["choices"] and event["choices"][0]["delta"]["content"] for event in events] == [
        "a",
        "\u4f60",
        [],
        "b",
    ]
    assert (relay.read_bytes, relay.unread_bytes) == (len(raw), 0)


def test_what_is_remembered_is_bounded_and_the_rest_is_known_by_its_length() -> None:
    event = delta("abc")
    relay = SseRelay(hides_usage=True, memo_max_bytes=10 * len(event))
    for _ in range(100):
        assert relay.feed(event) == event
    assert len(list(relay.events())) == 10
    assert relay.unread_bytes == 90 * len(event)


@pytest.mark.parametrize("hides_usage", [False, True])
def test_an_endless_line_is_passed_on_and_memory_stays_flat(hides_usage: bool) -> None:
    relay = SseRelay(hides_usage=hides_usage, memo_max_bytes=0, event_max_bytes=100_000)
    chunk = b"x" * 16_384
    sent = len(relay.feed(b"data: "))
    tracemalloc.start()
    try:
        for _ in range(2_000):
            sent += len(relay.feed(chunk))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sent == 6 + 2_000 * 16_384
    assert peak_bytes < 1_000_000


def test_after_an_endless_line_the_stream_is_read_again() -> None:
    for size in (1, 3, 50, 5_000):
        relay = SseRelay(hides_usage=True, event_max_bytes=200)
        raw = delta("a") + delta("b" * 10_000) + USAGE_ONLY + DONE
        # Neither the ordinary event nor the usage chunk is too long, whatever the reads.
        assert len(USAGE_ONLY) > 200
        relay = SseRelay(hides_usage=True, event_max_bytes=600)
        out = relayed(relay, [raw[at : at + size] for at in range(0, len(raw), size)])
        assert out == raw.replace(USAGE_ONLY, b"")
        assert (relay.usage, relay.finished) == (Usage(11, 7), True)


@pytest.mark.parametrize("size", [1, 100, 4_000, 10**9])
@pytest.mark.parametrize("blank_line", [b"", b"\n\n", b"\r\n\r\n"])
def test_the_usage_at_the_end_of_an_overlong_last_event_is_found(size: int, blank_line: bytes) -> None:
    image = '"output":[{"result":"' + "A" * 9_000 + '"}]'
    usage = '"usage":{"input_tokens":5,"input_tokens_details":{"cached_tokens":1},"output_tokens":6},"user":null'
    raw = f'event: response.completed\ndata: {{"type":"response.completed","response":{{{image},{usage}}}}}'.encode()
    raw += blank_line
    relay = SseRelay(hides_usage=False, event_max_bytes=2_000)
    assert relayed(relay, [raw[at : at + size] for at in range(0, len(raw), size)]) == raw
    assert (relay.usage, relay.finished, relay.started) == (Usage(5, 6), True, True)


def test_an_error_event_after_half_an_overlong_event_stands_on_lines_of_its_own() -> None:
    relay = SseRelay(hides_usage=False, event_max_bytes=100)
    assert relay.feed(b"data: " + b"x" * 200)
    assert relay.interrupt() == b"\n\n"


PIECES = st.sampled_from(
    [
        *(b"\n", b"\r", b"\r\n", b"\n\n", b"data:", b"data: ", b": c", b"event: error", b"id: 1", b"\xef\xbb\xbf"),
        *(b'{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}', b'{"choices":[{}],"usage":{}}'),
        *(b'{"usage":', b'"usage"', b"[DONE]", b'{"error":1}', b'{"response":{"usage":5}}', b"\xe4\xbd", b"[" * 3_000),
        *(b'{"type":"response.completed","response":{"usage":{}}}', b'{"type":["x"],"choices":"usage"}'),
    ]
)
STREAMS = st.lists(PIECES | st.binary(max_size=6), max_size=30).map(b"".join)
SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=30)


def cut(raw: bytes, sizes: list[int]) -> list[bytes]:
    chunks = []
    for size in sizes:
        chunks.append(raw[:size])
        raw = raw[size:]
    return [*chunks, raw]


@settings(max_examples=500, deadline=None)
@given(raw=STREAMS, sizes=SIZES, event_max_bytes=st.sampled_from([1, 30, 10**6]))
def test_any_bytes_in_any_pieces_come_out_as_they_went_in(raw: bytes, sizes: list[int], event_max_bytes: int) -> None:
    relay = SseRelay(hides_usage=False, event_max_bytes=event_max_bytes)
    assert relayed(relay, cut(raw, sizes)) == raw
    assert relay.unread_bytes == 0
    list(relay.events())


@settings(max_examples=500, deadline=None)
@given(raw=STREAMS, sizes=SIZES, interrupted=st.booleans())
def test_of_any_bytes_only_usage_chunks_are_ever_left_out(raw: bytes, sizes: list[int], interrupted: bool) -> None:
    relay = SseRelay(hides_usage=True)
    out = b"".join([relay.feed(chunk) for chunk in cut(raw, sizes)])
    if interrupted:
        assert relay.interrupt() == b""
        assert relay.flush() == b""
    else:
        out += relay.flush()
    rest = iter(raw)
    assert all(byte in rest for byte in out), "what comes out is what went in, in order, less some of it"
    if not interrupted and b'"usage"' not in raw:
        assert out == raw


CHUNKS = st.one_of(
    st.text(max_size=8).map(lambda text: delta(json.dumps(text)[1:-1])),
    st.text(max_size=8).map(lambda text: delta(json.dumps(text, ensure_ascii=False)[1:-1], ',"usage":null')),
    st.just(b": c\n\n"),
    st.tuples(st.integers(0, 99), st.integers(0, 99)).map(
        lambda pair: b'data: {"choices":[],"usage":{"prompt_tokens":%d,"completion_tokens":%d}}\n\n' % pair
    ),
)


@settings(max_examples=300, deadline=None)
@given(events=st.lists(CHUNKS, max_size=12), sizes=SIZES, line_end=st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_of_any_stream_exactly_the_usage_chunks_are_left_out(
    events: list[bytes], sizes: list[int], line_end: bytes
) -> None:
    hidden = [event for event in events if event.startswith(b'data: {"choices":[]')]
    events = [event.replace(b"\n", line_end) for event in events]
    relay = SseRelay(hides_usage=True)
    out = relayed(relay, cut(b"".join(events), sizes))
    assert out == b"".join(event for event in events if not event.startswith(b'data: {"choices":[]'))
    last = find_usage(hidden[-1][6:]) if hidden else None
    assert relay.usage == last
