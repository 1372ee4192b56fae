"""Decides what the simulated gateway says to a request, and how much of it."""

from __future__ import annotations

from typing import Any

import msgspec

from sentinel_dev.gateway.call import Call, Output
from sentinel_dev.gateway.words import example, pieces, slices, wanted_tokens


def last_text(messages: msgspec.Raw) -> str:
    """The end of a raw list of messages: where "say 50 tokens" stands, if anywhere."""
    return bytes(memoryview(messages)[-500:]).decode("utf-8", "replace")


def wants_tool_answer(call: Call) -> bool:
    """A tool is called when the model is one for that, tools are offered, and none has just answered."""
    if "tools" not in call.behaviour.flags or not memoryview(call.asked.tools) or call.asked.tool_choice == "none":
        return False
    messages = memoryview(call.asked.messages) or memoryview(call.asked.input)
    told = msgspec.json.decode(messages)
    last = told[-1] if isinstance(told, list) and told else None
    return not (isinstance(last, dict) and (last.get("role") == "tool" or last.get("type") == "function_call_output"))


def make_output(call: Call, text: str, cap: int, *, with_tools: bool) -> Output:
    """What each choice says, never more than `cap` tokens unless the behaviour is to disregard it."""
    flags = call.behaviour.flags
    if with_tools:
        output = _tool_call(call)
    else:
        said = _json_text(call)
        wanted = call.behaviour.tokens if call.behaviour.tokens is not None else wanted_tokens(text)
        reasoning = wanted // 2 if "reason" in flags else 0
        told = pieces(wanted - reasoning, cjk="cjk" in flags) if said is None else _counted(call, said)
        output = Output(told, reasoning=reasoning, refusal="refusal" in flags)
    if output.tokens <= cap or "over-cap" in flags:
        return output
    output.finish = "length"
    output.tool_tokens = min(output.tool_tokens, cap)
    output.reasoning = min(output.reasoning, cap - output.tool_tokens)
    output.pieces = output.pieces[: cap - output.tool_tokens - output.reasoning]
    return output


def _tool_call(call: Call) -> Output:
    tools = msgspec.json.decode(call.asked.tools)
    functions = [_function(tool) for tool in tools] if isinstance(tools, list) else []
    chosen = _function(call.asked.tool_choice).get("name")
    function = next((f for f in functions if f.get("name") == chosen), functions[0] if functions else {})
    name = str(function.get("name") or "unnamed")
    arguments = msgspec.json.encode(example(function.get("parameters") or {"type": "object"})).decode()
    return Output(_counted(call, arguments), "tool_calls", tool=name, tool_tokens=call.counter.text(name))


def _function(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict):
        return {}
    inner = tool.get("function")
    return inner if isinstance(inner, dict) else tool


def _counted(call: Call, text: str) -> list[str]:
    return slices(text, max(1, call.counter.text(text)))


def _json_text(call: Call) -> str | None:
    """A JSON text, where the format asked for or the behaviour wants one."""
    told: Any = None
    if memoryview(call.asked.response_format):
        told = msgspec.json.decode(call.asked.response_format)
    elif memoryview(call.asked.text):
        text = msgspec.json.decode(call.asked.text)
        told = text.get("format") if isinstance(text, dict) else None
    kind = told.get("type") if isinstance(told, dict) else None
    if kind == "json_schema":
        named = told.get("json_schema")
        schema = named.get("schema") if isinstance(named, dict) else told.get("schema")
        return msgspec.json.encode(example(schema)).decode()
    return '{"answer":"quick light"}' if kind == "json_object" or "json" in call.behaviour.flags else None
