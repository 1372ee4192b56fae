"""Requests with only what a test cares about."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from sentinel_proxy.tokens import Kind, TokenCounter


@dataclass
class Chat:
    messages: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None


@dataclass
class Completions:
    prompt: Any = None
    suffix: Any = None


@dataclass
class Embeddings:
    input: Any = None


@dataclass
class Responses:
    input: Any = None
    instructions: Any = None
    tools: Any = None
    text: Any = None


KINDS: dict[type, Kind] = {
    Chat: "chat",
    Completions: "completions",
    Embeddings: "embeddings",
    Responses: "responses",
}


def user(content: Any) -> Chat:
    return Chat(messages=[{"role": "user", "content": content}])


def count_now(counter: TokenCounter, body: Any, model: str = "gpt-4o", **options: Any) -> int:
    """For bodies that are short enough to be counted at once."""
    tokens = counter.input_tokens(KINDS[type(body)], body, model, body_bytes=1_000, **options)
    assert isinstance(tokens, int)
    return tokens


async def count(counter: TokenCounter, body: Any, model: str = "gpt-4o", *, body_bytes: int = 1_000) -> int:
    tokens = counter.input_tokens(KINDS[type(body)], body, model, body_bytes=body_bytes)
    return await tokens if inspect.isawaitable(tokens) else tokens
