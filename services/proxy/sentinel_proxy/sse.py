"""Streams of events on their way to the caller: relayed as they came, read only for what they cost.

Why events are held until they are whole, and which bytes are ever left out, stands in
docs/decisions/0004-bytes-pass-through.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import msgspec

MIB: Final = 1024 * 1024
EVENT_MAX_BYTES: Final = MIB
"""An event that is longer is passed on as it comes."""
MEMO_MAX_BYTES: Final = 8 * MIB
"""What is remembered of one stream, to count from if it brings no usage."""

_TOKENS_MAX: Final = 2**53
_BOM: Final = b"\xef\xbb\xbf"
_EVENT_ENDS: Final = (b"\n\n", b"\r\n\r\n")
# Atomic, or one CRLF would be taken for two ends of a line.
_EVENT_END: Final = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_EVENT_END_BYTES: Final = 4
# Comments and blank lines ahead of an event's first field are no part of it.
_AHEAD_STARTS: Final = (b":", b"\n", b"\r")
_AHEAD: Final = re.compile(rb"(?:(?::[^\r\n]*+)?(?>\r\n|\n|\r))*")
# Of an event too long to be held, these parts say what it was and what it took.
_HEAD_BYTES: Final = 256
USAGE_TAIL_BYTES: Final = 4_096
_USAGE_IN_TAIL: Final = re.compile(rb'"usage"\s*+:\s*+(\{(?:[^{}]|\{[^{}]*+\})*+\})')
_LAST_TYPES: Final = frozenset({"response.completed", "response.incomplete", "response.failed"})
_LAST_MARKS: Final = tuple(kind.encode() for kind in _LAST_TYPES)
# Events that come before anything is generated.
_PRELUDE_TYPES: Final = frozenset({"response.created", "response.queued", "response.in_progress", "ping"})
_ERROR_NAME: Final = re.compile(rb"^event: ?error$", re.MULTILINE)
_NULL: Final = b"null"
_NO_ERROR: Final = frozenset({_NULL, b"false", b"{}", b'""'})


class Usage(msgspec.Struct, frozen=True, gc=False):
    """What the upstream says an answer took."""

    input_tokens: int
    output_tokens: int


class _Counts(msgspec.Struct, gc=False):
    prompt_tokens: object = None
    completion_tokens: object = None
    input_tokens: object = None
    output_tokens: object = None
    total_tokens: object = None


class _Event(msgspec.Struct, gc=False):
    choices: msgspec.Raw = msgspec.Raw(_NULL)
    usage: msgspec.Raw = msgspec.Raw(_NULL)
    error: msgspec.Raw = msgspec.Raw(_NULL)
    response: msgspec.Raw = msgspec.Raw(_NULL)
    message: msgspec.Raw = msgspec.Raw(_NULL)
    type: object = None


class _Answer(msgspec.Struct, gc=False):
    usage: msgspec.Raw = msgspec.Raw(_NULL)
    error: msgspec.Raw = msgspec.Raw(_NULL)


_COUNTS: Final = msgspec.json.Decoder(_Counts)
_EVENT: Final = msgspec.json.Decoder(_Event)
_ANSWER: Final = msgspec.json.Decoder(_Answer)
_UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def find_usage(json_body: bytes) -> Usage | None:
    """The usage in a JSON answer; None where there is none, or none that makes sense."""
    if b'"usage"' not in json_body:
        return None
    try:
        return _usage(bytes(_ANSWER.decode(json_body).usage))
    except _UNREADABLE:
        return None


def find_usage_in_tail(tail: bytes) -> Usage | None:
    """The last usage in the end of something too long to be read whole."""
    found = [usage for match in _USAGE_IN_TAIL.finditer(tail) if (usage := _usage(match[1])) is not None]
    return found[-1] if found else None


class SseRelay:
    """Takes a stream as the upstream sends it, returns what the caller is to be sent, and keeps the books.

    With `hides_usage` the chunk that has nothing but usage is left out. Bytes are otherwise never changed, nor lost.
    Memory is bounded by `memo_max_bytes` and `event_max_bytes`; nothing in a stream makes it raise.
    """

    def __init__(
        self, *, hides_usage: bool, memo_max_bytes: int = MEMO_MAX_BYTES, event_max_bytes: int = EVENT_MAX_BYTES
    ) -> None:
        self.usage: Usage | None = None
        """The last one that made sense."""
        self.started = False
        """Something was generated: an event has come that is neither an error nor a mere announcement."""
        self.failed = False
        """An error has come as an event."""
        self.finished = False
        """The stream has said itself that it is complete: `[DONE]`, or a last event of the responses API."""
        self.read_bytes = 0
        self._hides_usage = hides_usage
        self._memo: list[bytes] = []
        self._memo_spare_bytes = memo_max_bytes
        self._event_max_bytes = event_max_bytes
        self._held = bytearray()
        self._drops_lf = False
        # The head of an event too long to be held, until it ends.
        self._overlong = b""

    def feed(self, chunk: bytes) -> bytes:
        """What may go out now: all events that are whole, in one piece."""
        self.read_bytes += len(chunk)
        if self._memo_spare_bytes > 0:
            self._memo_spare_bytes -= len(chunk)
            self._memo.append(chunk)
        # Nearly every chunk is a whole event, or several, with nothing to be learnt from it.
        if self.started and not (self._held or self._drops_lf) and chunk.endswith(_EVENT_ENDS) and not _tells(chunk):
            return chunk
        return self._split(chunk)

    def flush(self) -> bytes:
        """At the upstream's orderly end: what was held, though no blank line came after it."""
        held = bytes(self._held)
        self._held.clear()
        if self._overlong:
            self._observe_overlong(held)
            return b""
        return held if self._observe(held) else _ahead(held)

    def interrupt(self) -> bytes:
        """When the upstream broke: what must precede an event of our own, so that it stands alone.

        Half an event is dropped: no client can read it, and most would fail on it rather than on the error.
        """
        held = bytes(self._held)
        self._held.clear()
        if self._overlong:
            self._observe_overlong(held)
            return b"\n\n"
        if b'"usage"' in held:
            self._observe(held)
        return b""

    @property
    def unread_bytes(self) -> int:
        """How much of the stream is not in `events()`."""
        return self.read_bytes - sum(map(len, self._memo))

    def events(self) -> Iterator[object]:
        """The JSON of the events remembered, decoded one by one; what is none is skipped."""
        stream = b"".join(self._memo)
        start = 0
        while start < len(stream):
            match = _EVENT_END.search(stream, start)
            end = match.end() if match else len(stream)
            data = _data(stream[start:end])
            start = end
            try:
                event = msgspec.json.decode(data)
            except _UNREADABLE:
                continue
            yield event

    def _split(self, chunk: bytes) -> bytes:
        if self._overlong:
            return self._pass_overlong(chunk)
        if self._drops_lf and chunk:
            self._drops_lf = False
            chunk = chunk.removeprefix(b"\n")
        held = self._held
        # The end of an event may lie across two reads; what was searched before is not searched again.
        searched = max(0, len(held) - _EVENT_END_BYTES + 1)
        held += chunk
        out = []
        start = 0
        for match in _EVENT_END.finditer(held, searched):
            event = bytes(held[start : match.end()])
            start = match.end()
            if (self.started and not _tells(event)) or self._observe(event):
                out.append(event)
            else:
                out.append(_ahead(event))
                # A CRLF cut in two by the read: its second half belongs to what is left out.
                self._drops_lf = start == len(held) and event.endswith(b"\r")
        del held[:start]
        if bytes(held[:1]) in _AHEAD_STARTS and (b"\n" in chunk or b"\r" in chunk):
            # Comments keep connections alive, and some upstreams send them without a blank line.
            out.append(ahead := _ahead(held))
            del held[: len(ahead)]
        if len(held) > self._event_max_bytes:
            out.append(bytes(held))
            self.started = True
            self._overlong = bytes(held[:_HEAD_BYTES])
            del held[:-USAGE_TAIL_BYTES]
        return b"".join(out)

    def _pass_overlong(self, chunk: bytes) -> bytes:
        # What is held has gone out already; it is kept to find where the event ends, and its usage.
        held = self._held
        known = len(held)
        held += chunk
        match = _EVENT_END.search(held, max(0, known - _EVENT_END_BYTES + 1))
        if not match:
            del held[:-USAGE_TAIL_BYTES]
            return chunk
        self._observe_overlong(bytes(held[: match.end()]))
        held.clear()
        rest = match.end() - known
        return chunk[:rest] + self._split(chunk[rest:])

    def _observe_overlong(self, tail: bytes) -> None:
        self.finished = self.finished or any(mark in self._overlong for mark in _LAST_MARKS)
        self._overlong = b""
        self.usage = find_usage_in_tail(tail) or self.usage

    def _observe(self, event: bytes) -> bool:
        """Learns from a whole event; False if it must not reach the caller."""
        data = _data(event).strip()
        if not data:
            return True
        if data.startswith(b"[DONE]"):
            self.finished = True
            return True
        named_error = b"error" in event and _ERROR_NAME.search(event.replace(b"\r", b"\n")) is not None
        try:
            read = _EVENT.decode(data)
            # Where the responses API has it, and where Anthropic's messages have the first part of it.
            inner = next((raw for raw in map(bytes, (read.response, read.message)) if raw.startswith(b"{")), b"{}")
            nested = _ANSWER.decode(inner)
        except _UNREADABLE:
            self.failed = self.failed or named_error
            self.started = self.started or not named_error
            return True
        kind = read.type if isinstance(read.type, str) else ""
        usage = bytes(read.usage)
        # Anthropic's last part has the output alone.
        known = self.usage.input_tokens if self.usage and kind == "message_delta" else None
        self.usage = _usage(usage, input_tokens=known) or _usage(bytes(nested.usage)) or self.usage
        self.finished = self.finished or kind in _LAST_TYPES
        if named_error or kind == "error" or bytes(read.error) not in _NO_ERROR or bytes(nested.error) not in _NO_ERROR:
            self.failed = True
            return True
        choices = bytes(read.choices)
        empty = choices.startswith(b"[") and not choices[1:-1].strip()
        self.started = self.started or not (empty or kind in _PRELUDE_TYPES)
        nothing_else = empty or (choices == _NULL and not kind)
        return not (self._hides_usage and nothing_else and usage.startswith(b"{"))


def _tells(events: bytes) -> bool:
    """Whether there may be more in `events` than content. Within JSON strings no quote stands without a backslash."""
    return (
        (b'"usage"' in events and events.count(b'"usage"') != events.count(b'"usage":null'))
        or b"error" in events
        or b'"response"' in events  # the whole of it, in the first and last events of the responses API
        or b"[DONE]" in events
    )


def _ahead(event: bytes | bytearray) -> bytes:
    match = _AHEAD.match(event)
    return match[0] if match else b""


def _data(event: bytes) -> bytes:
    lines = event.removeprefix(_BOM).splitlines()
    return b"\n".join([line[5:] for line in lines if line.startswith(b"data:")])


def _usage(raw: bytes, *, input_tokens: int | None = None) -> Usage | None:
    """The usage object `raw`; `input_tokens` stands in where it says nothing of the input."""
    if not raw.startswith(b"{"):
        return None
    try:
        counts = _COUNTS.decode(raw)
    except _UNREADABLE:
        return None
    input_tokens = _first_count(counts.prompt_tokens, counts.input_tokens, input_tokens)
    if input_tokens is None:
        return None
    output_tokens = _first_count(counts.completion_tokens, counts.output_tokens)
    if output_tokens is None and (total_tokens := _first_count(counts.total_tokens)) is not None:
        # Embeddings have a total and no output.
        output_tokens = _first_count(total_tokens - input_tokens)
    return None if output_tokens is None else Usage(input_tokens, output_tokens)


def _first_count(*values: object) -> int | None:
    # A bool is an int to isinstance.
    return next((value for value in values if type(value) is int and 0 <= value <= _TOKENS_MAX), None)
