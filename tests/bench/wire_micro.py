"""What reading, editing and relaying bytes costs, in microseconds: `python -m tests.bench.wire_micro`."""

from __future__ import annotations

import json
import timeit
from collections.abc import Callable
from functools import partial

from sentinel_proxy.errors import LimitDetails, over_limit, render
from sentinel_proxy.openai_wire import edit_body, parse_chat
from sentinel_proxy.sse import SseRelay, find_usage

_ROUNDS = 7
_ROUND_S = 0.05
_LOREM = 'Lorem ipsum dolor sit amet, "consectetur" adipiscing elit.\n'
_KANJI = "吾輩は猫である。名前はまだ無い。"


def _body(text: str, size_bytes: int, **more: object) -> bytes:
    text *= size_bytes // len(text.encode())
    body = {"model": "openai/gpt-4o", "messages": [{"role": "user", "content": text}], **more}
    return json.dumps(body, ensure_ascii=False).encode()


def _chunk(**more: object) -> bytes:
    delta = [{"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}]
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o"}
    return b"data: " + json.dumps({**head, "choices": delta, **more}, separators=(",", ":")).encode() + b"\n\n"


def _delta() -> bytes:
    kind = "response.output_text.delta"
    data = {"type": kind, "item_id": "msg_1", "output_index": 0, "content_index": 0, "delta": " word", "seq": 7}
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


def _report(name: str, call: Callable[[], object]) -> None:
    number = max(1, int(_ROUND_S / max(1e-7, timeit.timeit(call, number=3) / 3)))
    best_s = min(timeit.repeat(call, number=number, repeat=_ROUNDS)) / number
    print(f"{name:<58}{best_s * 1e6:>10.2f} us")


def _report_requests() -> None:
    for label, text in (("English", _LOREM), ("Japanese", _KANJI)):
        for size_bytes in (1_000, 100_000):
            size = f"{size_bytes // 1000} kB {label}"
            plain = _body(text, size_bytes, stream=True)
            capped = _body(text, size_bytes, stream=True, max_tokens=4_000, stream_options={"include_usage": False})
            _report(f"parse, {size}", partial(parse_chat, plain))
            _report(f"add stream_options, {size}", partial(parse_chat(plain).for_upstream, plain))
            _report(
                f"edit stream_options and max_tokens in place, {size}",
                partial(parse_chat(capped).for_upstream, capped, cap_tokens=100),
            )
            many = _body(text, size_bytes, max_tokens=1, **{f"unknown_{i}": [i] for i in range(20)})
            _report(f"edit among 24 members, {size}", partial(edit_body, many, {"max_tokens": 2}))


def _report_streams() -> None:
    events = {
        "chat event": _chunk(),
        'chat event with "usage":null': _chunk(usage=None),
        "chat event with usage": _chunk(usage={"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}),
        "responses event": _delta(),
        "CRLF chat event": _chunk().replace(b"\n", b"\r\n"),
        "five chat events in one read": _chunk() * 5,
    }
    for name, event in events.items():
        relay = SseRelay(hides_usage=True, memo_max_bytes=0)
        relay.feed(_chunk())
        _report(f"relay: {name}", partial(relay.feed, event))
    first, second = _chunk()[:100], _chunk()[100:]
    relay = SseRelay(hides_usage=True, memo_max_bytes=0)
    _report("relay: chat event in two reads", lambda: (relay.feed(first), relay.feed(second)))
    memo = SseRelay(hides_usage=True)
    for _ in range(1_000):
        memo.feed(_chunk())
    _report("decode 1,000 remembered events", lambda: list(memo.events()))


def _report_answers() -> None:
    answer = {"choices": [{"message": {"content": _LOREM * 20}}], "usage": {"prompt_tokens": 9, "completion_tokens": 9}}
    body = json.dumps(answer).encode()
    _report("find usage in a 1 kB answer", lambda: find_usage(body))
    details = LimitDetails(limit_name="ai_requests", limit=9, used=9, reserved=0, remaining=0, reset_at=1_900_000_000)
    _report("make and render a 429", lambda: render(over_limit(details, code="insufficient_quota", retry_after_s=9e4)))


if __name__ == "__main__":
    _report_requests()
    _report_streams()
    _report_answers()
