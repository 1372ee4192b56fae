"""Streams as upstreams send them, each as the list of its events, with what the relay must make of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sentinel_proxy.sse import Usage


@dataclass(frozen=True, kw_only=True)
class Recording:
    """`hidden` are the indexes of the events that a caller who did not ask for usage must not see."""

    name: str
    events: tuple[bytes, ...]
    usage: Usage | None
    hidden: frozenset[int] = frozenset()
    finished: bool = True
    failed: bool = False
    started: bool = True

    @property
    def raw(self) -> bytes:
        return b"".join(self.events)

    @property
    def shown(self) -> bytes:
        return b"".join(event for index, event in enumerate(self.events) if index not in self.hidden)


def delta(text: str, more: str = "") -> bytes:
    return (
        'data: {"id":"c1","object":"chat.completion.chunk","model":"m","choices":[{"index":0,"delta":{"content":"'
        + text
        + '"},"finish_reason":null}]'
        + more
        + "}\n\n"
    ).encode()


USAGE_ONLY: Final = (
    b'data: {"id":"c1","object":"chat.completion.chunk","model":"m","choices":[],'
    b'"usage":{"prompt_tokens":11,"completion_tokens":7,"total_tokens":18,'
    b'"prompt_tokens_details":{"cached_tokens":3},"completion_tokens_details":{"reasoning_tokens":2}}}\n\n'
)
DONE: Final = b"data: [DONE]\n\n"
_OPENAI: Final = (
    delta("", ',"usage":null'),
    delta("Hello", ',"usage":null'),
    delta(" \u4f60\u597d \U0001f600 caf\u00e9", ',"usage":null'),
    delta('say \\"usage\\": {\\"prompt_tokens\\": 1} [DONE] data: \\n\\n error', ',"usage":null'),
    USAGE_ONLY,
    DONE,
)
_RESPONSES: Final = (
    b'event: response.created\ndata: {"type":"response.created","response":{"id":"r","error":null,"usage":null}}\n\n',
    b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"Hi \xe4\xbd\xa0"}\n\n',
    b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":" [DONE]"}\n\n',
)


def _response_end(kind: str, usage: bytes, error: bytes = b"null") -> bytes:
    name = f"response.{kind}".encode()
    return (
        b'event: %b\ndata: {"type":"%b","response":{"id":"r","error":%b,"output":[{}],"usage":%b,"user":null}}\n\n'
        % (
            name,
            name,
            error,
            usage,
        )
    )


_RESPONSES_USAGE: Final = b'{"input_tokens":5,"output_tokens":6,"output_tokens_details":{"reasoning_tokens":1}}'


def _with_ends(events: tuple[bytes, ...], line_end: bytes) -> tuple[bytes, ...]:
    return tuple(event.replace(b"\n", line_end) for event in events)


_SPREAD_OUT: Final = (
    b'id: 7\ndata:{"choices" : [ ] ,\ndata: "usage": {"prompt_tokens":1,\n'
    b'data:"completion_tokens":2}\ndata:}\nretry: 5\n\n'
)


RECORDINGS: Final = (
    Recording(name="openai", events=_OPENAI, usage=Usage(11, 7), hidden=frozenset({4})),
    Recording(name="openai, crlf", events=_with_ends(_OPENAI, b"\r\n"), usage=Usage(11, 7), hidden=frozenset({4})),
    Recording(name="openai, cr", events=_with_ends(_OPENAI, b"\r"), usage=Usage(11, 7), hidden=frozenset({4})),
    Recording(
        name="usage-only chunk spread out over lines, without a space, with an id and a comment",
        events=(
            b'data:{"choices":[{"delta":{"content":"a"}}]}\n\n',
            b": usage follows\n",
            _SPREAD_OUT,
            b"data:[DONE]\n\n",
        ),
        usage=Usage(1, 2),
        hidden=frozenset({2}),
    ),
    Recording(
        name="usage-only chunk without choices",
        events=(delta("a"), b'data: {"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n', DONE),
        usage=Usage(1, 2),
        hidden=frozenset({1}),
    ),
    Recording(
        name="usage with the last choice",
        events=(delta("a"), delta("b", ',"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}'), DONE),
        usage=Usage(3, 2),
    ),
    Recording(
        name="running usage, the last one wins",
        events=(
            delta("a", ',"usage": {"prompt_tokens":3,"completion_tokens":1}'),
            delta("b", ',"usage": {"prompt_tokens":3,"completion_tokens":2}'),
            delta("c", ',"usage": null'),
            DONE,
        ),
        usage=Usage(3, 2),
    ),
    Recording(
        name="explicit zeros",
        events=(
            delta("a", ',"usage":{"prompt_tokens":9,"completion_tokens":9}'),
            b'data: {"choices":[],"usage":{"prompt_tokens":0,"completion_tokens":0}}\n\n',
            DONE,
        ),
        usage=Usage(0, 0),
        hidden=frozenset({1}),
    ),
    Recording(
        name="no usage, no [DONE]",
        events=(b"\xef\xbb\xbf" + delta("a"), b": keep-alive\n\n", delta("b")),
        usage=None,
        finished=False,
    ),
    Recording(
        name="azure's filter results have no choices and no usage",
        events=(b'data: {"choices":[],"usage":null,"prompt_filter_results":[{}]}\n\n', delta("a"), DONE),
        usage=None,
    ),
    Recording(
        name="an error in mid-stream",
        events=(delta("a"), b'data: {"error":{"message":"overloaded","type":"server_error"}}\n\n'),
        usage=None,
        finished=False,
        failed=True,
    ),
    Recording(
        name="an error before anything",
        events=(b": hello\n\n", b'event: error\ndata: {"message":"overloaded"}\n\n'),
        usage=None,
        finished=False,
        failed=True,
        started=False,
    ),
    Recording(
        name="an error that is no json",
        events=(b"event:error\ndata: overloaded\n\n",),
        usage=None,
        finished=False,
        failed=True,
        started=False,
    ),
    Recording(
        name="responses, completed",
        events=(*_RESPONSES, _response_end("completed", _RESPONSES_USAGE)),
        usage=Usage(5, 6),
    ),
    Recording(
        name="responses, incomplete, crlf",
        events=_with_ends((*_RESPONSES, _response_end("incomplete", _RESPONSES_USAGE)), b"\r\n"),
        usage=Usage(5, 6),
    ),
    Recording(
        name="responses, failed at once",
        events=(_RESPONSES[0], _response_end("failed", b"null", b'{"code":"server_error","message":"m"}')),
        usage=None,
        failed=True,
        started=False,
    ),
    Recording(
        name="responses, failed late, with usage",
        events=(*_RESPONSES, _response_end("failed", _RESPONSES_USAGE, b'{"code":"server_error","message":"m"}')),
        usage=Usage(5, 6),
        failed=True,
    ),
    Recording(
        name="responses, completed without usage",
        events=(*_RESPONSES, _response_end("completed", b"null")),
        usage=None,
    ),
    Recording(
        name="responses, an error event",
        events=(*_RESPONSES, b'event: error\ndata: {"type":"error","code":"x","message":"m","param":null}\n\n'),
        usage=None,
        finished=False,
        failed=True,
    ),
    Recording(
        name="anthropic's messages: input first, output last",
        events=(
            b'data: {"type":"message_start","message":{"usage":{"input_tokens":25,"output_tokens":1}}}\n\n',
            b'event: ping\ndata: {"type": "ping"}\n\n',
            b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"Hi"}}\n\n',
            b'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":15}}\n\n',
            b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
        ),
        usage=Usage(25, 15),
        finished=False,
    ),
)
