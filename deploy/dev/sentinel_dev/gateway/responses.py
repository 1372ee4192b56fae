"""The Responses API of the simulated gateway, as JSON and as its named events."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from sentinel_dev.gateway.call import BadRequest, Call, Event, Output, whole
from sentinel_dev.gateway.catalogue import max_output
from sentinel_dev.gateway.outputs import last_text, make_output, wants_tool_answer


async def responses(call: Call) -> None:
    """`POST /v1/responses`. Raises BadRequest."""
    asked = call.asked
    if not memoryview(asked.input):
        raise BadRequest("Missing required parameter: 'input'.", "input")
    most = max_output(call.model)
    cap = whole(asked.max_output_tokens, "max_output_tokens", most) or most
    text = bytes(memoryview(asked.input)[:1]) == b'"'
    role = b'"role":"user","content":'
    told = msgspec.Raw(b"[{" + role + bytes(asked.input) + b"}]") if text else asked.input
    input_tokens = await call.count_input(told, asked.instructions, asked.tools, asked.text, chat=True)
    output = make_output(call, last_text(told), cap, with_tools=wants_tool_answer(call))
    usage = _usage(call, input_tokens, output)
    if asked.stream is True:
        await call.answer_stream(_events(call, output, usage), len(output.pieces) + 8, done=False)
    else:
        await call.answer_json(_response(call, output, usage, _items(call, output)), output.tokens)


def _usage(call: Call, input_tokens: int, output: Output) -> dict[str, Any] | None:
    if call.behaviour.usage in {"none", "null"}:
        return None
    tokens, reasoning = (0, 0) if call.behaviour.usage == "zero" else (output.tokens, output.reasoning)
    return {
        "input_tokens": input_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": input_tokens + tokens,
    }


def _response(
    call: Call, output: Output | None, usage: dict[str, Any] | None, items: list[dict[str, Any]]
) -> dict[str, Any]:
    """`output` None is a response that has just begun."""
    cut = output is not None and output.finish == "length"
    status = "in_progress" if output is None else ("incomplete" if cut else "completed")
    told = {
        "id": f"resp_{call.id}",
        "object": "response",
        "created_at": call.created,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": None,
        "model": call.model,
        "output": items,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": usage,
    }
    if usage is None and call.behaviour.usage == "none":
        del told["usage"]
    return told


def _items(call: Call, output: Output) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    if output.reasoning:
        summary = [{"type": "summary_text", "text": "".join(output.reasons)}]
        items.append({"type": "reasoning", "id": f"rs_{call.id}", "summary": summary})
    items.append(_item(call, output, output.text, "incomplete" if output.finish == "length" else "completed"))
    return items


def _item(call: Call, output: Output, text: str, status: str) -> dict[str, Any]:
    if output.tool is not None:
        return {
            "type": "function_call",
            "id": f"fc_{call.id}",
            "call_id": f"call_{call.id}",
            "name": output.tool,
            "arguments": text,
            "status": status,
        }
    content = [] if status == "in_progress" else [_part(output, text)]
    return {"type": "message", "id": f"msg_{call.id}", "role": "assistant", "status": status, "content": content}


def _part(output: Output, text: str) -> dict[str, Any]:
    if output.refusal:
        return {"type": "refusal", "refusal": text}
    return {"type": "output_text", "text": text, "annotations": []}


def _events(call: Call, output: Output, usage: dict[str, Any] | None) -> Iterator[Event]:
    """From `response.created` to `response.completed`, which carries the usage."""
    number = 0

    def event(kind: str, tokens: int = 0, **fields: Any) -> Event:
        nonlocal number
        told = {"type": kind, "sequence_number": number, **fields}
        number += 1
        return kind, msgspec.json.encode(told), tokens

    begun = _response(call, None, None, [])
    yield event("response.created", response=begun)
    yield event("response.in_progress", response=begun)
    items = _items(call, output)
    at = len(items) - 1
    if output.reasoning:
        yield event("response.output_item.added", output_index=0, item={**items[0], "summary": []})
        yield event("response.output_item.done", tokens=output.reasoning, output_index=0, item=items[0])
    opening = _item(call, output, "", "in_progress")
    item_id = opening["id"]
    yield event("response.output_item.added", tokens=output.tool_tokens, output_index=at, item=opening)
    if output.tool is not None:
        where = {"item_id": item_id, "output_index": at}
        for piece in output.pieces:
            yield event("response.function_call_arguments.delta", tokens=1, delta=piece, **where)
        yield event("response.function_call_arguments.done", arguments=output.text, name=output.tool, **where)
    else:
        where = {"item_id": item_id, "output_index": at, "content_index": 0}
        kind = "refusal" if output.refusal else "output_text"
        extra: dict[str, Any] = {} if output.refusal else {"logprobs": []}
        yield event("response.content_part.added", part=_part(output, ""), **where)
        for piece in output.pieces:
            yield event(f"response.{kind}.delta", tokens=1, delta=piece, **extra, **where)
        final = {"refusal": output.text} if output.refusal else {"text": output.text, **extra}
        yield event(f"response.{kind}.done", **final, **where)
        yield event("response.content_part.done", part=_part(output, output.text), **where)
    yield event("response.output_item.done", output_index=at, item=items[-1])
    ending = "response.incomplete" if output.finish == "length" else "response.completed"
    yield event(ending, response=_response(call, output, usage, items))
