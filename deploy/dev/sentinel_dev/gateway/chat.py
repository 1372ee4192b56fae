"""Chat and legacy completions of the simulated gateway, as JSON and as server-sent events."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from sentinel_dev.gateway.call import N_MOST, BadRequest, Call, Event, Output, whole
from sentinel_dev.gateway.catalogue import max_output
from sentinel_dev.gateway.outputs import last_text, make_output, wants_tool_answer

_LEGACY_TOKENS: Final = 16


async def chat(call: Call) -> None:
    """`POST /v1/chat/completions`. Raises BadRequest."""
    asked = call.asked
    if bytes(memoryview(asked.messages)[:1]) != b"[":
        raise BadRequest("Missing required parameter: 'messages'.", "messages")
    most = max_output(call.model)
    cap = whole(asked.max_completion_tokens, "max_completion_tokens", most)
    cap = cap or whole(asked.max_tokens, "max_tokens", most) or most
    n = whole(asked.n, "n", N_MOST) or 1
    input_tokens = await call.count_input(asked.messages, asked.tools, asked.response_format, chat=True)
    with_tools = wants_tool_answer(call)
    output = make_output(call, last_text(asked.messages), cap, with_tools=with_tools)
    usage = _usage(call, input_tokens, output.tokens * n, output.reasoning * n)
    if asked.stream is True:
        asks = isinstance(asked.stream_options, dict) and asked.stream_options.get("include_usage") is True
        events = _chunks(call, output, n, usage, asks=asks)
        await call.answer_stream(events, n * (len(output.pieces) + output.reasoning + 2), done=True)
        return
    choices = [
        {"index": index, "message": _message(output, call.id), "logprobs": None, "finish_reason": output.finish}
        for index in range(n)
    ]
    await call.answer_json(_whole(call, "chat.completion", choices, usage), output.tokens * n)


async def completions(call: Call) -> None:
    """`POST /v1/completions`. Raises BadRequest."""
    asked = call.asked
    prompt = msgspec.json.decode(asked.prompt) if memoryview(asked.prompt) else None
    if prompt is None:
        raise BadRequest("Missing required parameter: 'prompt'.", "prompt")
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    cap = whole(asked.max_tokens, "max_tokens", max_output(call.model)) or _LEGACY_TOKENS
    n = (whole(asked.n, "n", N_MOST) or 1) * (min(len(prompt), N_MOST) if several else 1)
    input_tokens = await call.count_input(asked.prompt, chat=False)
    text = prompt[-1] if several else prompt
    output = make_output(call, text if isinstance(text, str) else "", cap, with_tools=False)
    usage = _usage(call, input_tokens, output.tokens * n, 0)
    if asked.stream is True:
        asks = isinstance(asked.stream_options, dict) and asked.stream_options.get("include_usage") is True
        await call.answer_stream(_texts(call, output, n, usage, asks=asks), n * (len(output.pieces) + 1), done=True)
        return
    choices = [
        {"index": index, "text": output.text, "logprobs": None, "finish_reason": output.finish} for index in range(n)
    ]
    await call.answer_json(_whole(call, "text_completion", choices, usage), output.tokens * n)


def _message(output: Output, call_id: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": output.text, "refusal": None}
    if output.refusal:
        message.update(content=None, refusal=output.text)
    if output.reasoning:
        message["reasoning_content"] = "".join(output.reasons)
    if output.tool is not None:
        function = {"name": output.tool, "arguments": output.text}
        message.update(content=None, tool_calls=[{"id": f"call_{call_id}", "type": "function", "function": function}])
    return message


def _usage(call: Call, input_tokens: int, output_tokens: int, reasoning_tokens: int) -> dict[str, Any] | None:
    if call.behaviour.usage in {"none", "null"}:
        return None
    if call.behaviour.usage == "zero":
        input_tokens = output_tokens = reasoning_tokens = 0
    return {
        "prompt_tokens": input_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": input_tokens + output_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }


def _whole(call: Call, kind: str, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
    told = {"id": call.id, "object": kind, "created": call.created, "model": call.model, "choices": choices}
    return told if call.behaviour.usage == "none" else {**told, "usage": usage}


def _chunks(call: Call, output: Output, n: int, usage: dict[str, Any] | None, *, asks: bool) -> Iterator[Event]:
    """Choices take turns. Usage as asked for, and where the behaviour wants it."""
    chunk = _Chunk(call, "chat.completion.chunk", usage, asks=asks)
    opening: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
    if output.tool is not None:
        function = {"name": output.tool, "arguments": ""}
        start = {"index": 0, "id": f"call_{call.id}", "type": "function", "function": function}
        opening = {"role": "assistant", "content": None, "tool_calls": [start]}
    for index in range(n):
        yield chunk.made(index, b'"delta":' + msgspec.json.encode(opening), None, output.tool_tokens)
    for piece in output.reasons:
        for index in range(n):
            yield chunk.made(index, b'"delta":{"reasoning_content":' + msgspec.json.encode(piece) + b"}", None, 1)
    before, after = b'"delta":{"content":', b"}"
    if output.tool is not None:
        before, after = b'"delta":{"tool_calls":[{"index":0,"function":{"arguments":', b"}}]}"
    elif output.refusal:
        before = b'"delta":{"refusal":'
    for piece in output.pieces:
        delta = before + msgspec.json.encode(piece) + after
        for index in range(n):
            yield chunk.made(index, delta, None, 1)
    for index in range(n):
        yield chunk.made(index, b'"delta":{}', output.finish, 0, last=index == n - 1)
    yield from chunk.usage_alone()


def _texts(call: Call, output: Output, n: int, usage: dict[str, Any] | None, *, asks: bool) -> Iterator[Event]:
    chunk = _Chunk(call, "text_completion", usage, asks=asks)
    for piece in output.pieces:
        text = b'"text":' + msgspec.json.encode(piece)
        for index in range(n):
            yield chunk.made(index, text, None, 1)
    for index in range(n):
        yield chunk.made(index, b'"text":""', output.finish, 0, last=index == n - 1)
    yield from chunk.usage_alone()


class _Chunk:
    """Makes the chunks of one stream out of bytes: an event must cost next to nothing."""

    def __init__(self, call: Call, kind: str, usage: dict[str, Any] | None, *, asks: bool) -> None:
        head = {"id": call.id, "object": kind, "created": call.created, "model": call.model}
        self._head = msgspec.json.encode(head)[:-1] + b',"choices":['
        self._usage = usage
        self._kind = call.behaviour.usage
        self._alone = asks and self._kind in {"normal", "running", "zero"}
        self._null = asks and self._kind not in {"none", "running"}
        self._written = 0

    def made(self, index: int, part: bytes, finish: str | None, tokens: int, *, last: bool = False) -> Event:
        self._written += tokens
        reason = b"null" if finish is None else b'"' + finish.encode() + b'"'
        choice = b'{"index":%d,%b,"logprobs":null,"finish_reason":%b}' % (index, part, reason)
        return None, self._head + choice + b"]" + self._usage_part(last=last) + b"}", tokens

    def _usage_part(self, *, last: bool) -> bytes:
        if self._usage is not None and self._kind == "running":
            prompt = self._usage["prompt_tokens"]
            running = {"completion_tokens": self._written, "total_tokens": prompt + self._written}
            return b',"usage":' + msgspec.json.encode({**self._usage, **running})
        if self._usage is not None and self._kind == "with-choices" and last:
            return b',"usage":' + msgspec.json.encode(self._usage)
        return b',"usage":null' if self._null or self._kind == "null" else b""

    def usage_alone(self) -> Iterator[Event]:
        if self._alone and self._usage is not None:
            yield None, self._head + b'],"usage":' + msgspec.json.encode(self._usage) + b"}", 0
