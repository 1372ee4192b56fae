"""What was generated is counted per choice when the upstream told no usage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sentinel_proxy.tokens import Kind, TokenCounter
from tests.unit.tokens.test_prompts import JSON, NEAR_REQUESTS

TEXT = "Tokens do not end where chunks do, naïve as that may sound: 你好世界。 😀"


async def output(
    counter: TokenCounter, kind: Kind, *events: Any, model: str = "gpt-4o", events_bytes: int = 100
) -> int:
    return await counter.count_output(kind, events, model, events_bytes=events_bytes)


def delta(index: int = 0, **fields: Any) -> dict[str, Any]:
    return {"object": "chat.completion.chunk", "choices": [{"index": index, "delta": fields}]}


def tokens_of(counter: TokenCounter, text: str) -> int:
    return len(counter._encoding("o200k_base").encode_ordinary(text))


async def test_a_stream_counts_as_its_whole_text_however_it_was_cut(counter: TokenCounter) -> None:
    whole = tokens_of(counter, TEXT)
    one_by_one = [delta(role="assistant", content=""), *(delta(content=letter) for letter in TEXT), delta()]
    assert len(TEXT) > whole
    assert await output(counter, "chat", *one_by_one) == whole
    assert await output(counter, "chat", {"choices": [{"message": {"content": TEXT}}]}) == whole


async def test_interleaved_choices_are_counted_each_for_itself(counter: TokenCounter) -> None:
    events = [delta(index, content=letter) for letter in TEXT for index in (0, 1, 2)]
    assert await output(counter, "chat", *events) == 3 * tokens_of(counter, TEXT)


async def test_refusals_reasoning_and_transcripts_count(counter: TokenCounter) -> None:
    for fields in (
        {"refusal": TEXT},
        {"reasoning": TEXT},
        {"reasoning_content": TEXT},
        {"audio": {"transcript": TEXT}},
    ):
        assert await output(counter, "chat", delta(**fields)) == tokens_of(counter, TEXT)
    # The same reasoning under both names is one reasoning.
    assert await output(counter, "chat", delta(reasoning=TEXT, reasoning_content=TEXT)) == tokens_of(counter, TEXT)


async def test_tool_calls_count_with_name_and_arguments(counter: TokenCounter) -> None:
    def call(index: int, **function: str) -> dict[str, Any]:
        return delta(tool_calls=[{"index": index, "function": function}])

    arguments = '{"city": "Paris"}'
    events = [call(0, name="get_weather", arguments="")]
    events += [call(0, arguments=letter) for letter in arguments]
    events += [call(1, name="get_weather", arguments=arguments)]
    one = 3 + tokens_of(counter, "get_weather") + tokens_of(counter, arguments)
    assert await output(counter, "chat", *events) == 2 * one
    whole = {"tool_calls": [{"function": {"name": "get_weather", "arguments": arguments}}] * 2}
    assert await output(counter, "chat", {"choices": [{"message": whole}]}) == 2 * one
    legacy = delta(function_call={"name": "get_weather", "arguments": arguments})
    assert await output(counter, "chat", legacy) == one


async def test_legacy_completions_count_their_text(counter: TokenCounter) -> None:
    events = [{"choices": [{"index": 0, "text": letter}]} for letter in TEXT]
    assert await output(counter, "completions", *events) == tokens_of(counter, TEXT)


async def test_responses_count_deltas_and_not_their_repetition(counter: TokenCounter) -> None:
    arguments = '{"city": "Paris"}'
    item = {"type": "function_call", "name": "get_weather", "arguments": arguments}
    message = {"type": "message", "content": [{"type": "output_text", "text": TEXT}]}
    one = 3 + tokens_of(counter, "get_weather") + tokens_of(counter, arguments)
    text = [{"type": "response.output_text.delta", "output_index": 0, "delta": letter} for letter in TEXT]
    calls = [
        {"type": "response.output_item.added", "output_index": 1, "item": {**item, "arguments": ""}},
        {"type": "response.function_call_arguments.delta", "output_index": 1, "delta": arguments},
        {"type": "response.function_call_arguments.done", "output_index": 1, "arguments": arguments},
    ]
    end = {"type": "response.completed", "response": {"output": [message, item]}}
    done = {"type": "response.output_text.done", "text": TEXT}
    assert await output(counter, "responses", *text, done, *calls, end) == tokens_of(counter, TEXT) + one
    assert await output(counter, "responses", *text[:9]) == tokens_of(counter, TEXT[:9])
    assert await output(counter, "responses", end) == tokens_of(counter, TEXT) + one
    assert await output(counter, "responses", {"output": [message, item]}) == tokens_of(counter, TEXT) + one


async def test_embeddings_produce_nothing(counter: TokenCounter) -> None:
    assert await output(counter, "embeddings", {"data": [{"embedding": [0.1]}]}) == 0


async def test_long_answers_are_read_and_counted_in_a_thread_alike(counter: TokenCounter) -> None:
    def lazily() -> Iterator[Any]:
        for _ in range(2_000):
            yield delta(content=TEXT)

    there = await counter.count_output("chat", lazily(), "gpt-4o", events_bytes=2_000_000)
    here = await counter.count_output("chat", lazily(), "gpt-4o", events_bytes=1)
    assert there == here > 2_000
    assert counter.queued_bytes == 0


@pytest.mark.parametrize("kind", ["chat", "completions", "embeddings", "responses"])
@settings(max_examples=100, deadline=None)
@given(value=st.one_of(JSON, NEAR_REQUESTS))
async def test_no_event_makes_it_raise(counter: TokenCounter, kind: Kind, value: Any) -> None:
    broken = (value, {"choices": value}, {"choices": [value, {"delta": value}, {"message": {"tool_calls": [value]}}]})
    typed = ({"type": "response.x.delta", "output_index": value, "delta": value}, {"type": value, "output": [value]})
    added = {"type": "response.output_item.added", "item": value}
    assert await output(counter, kind, *broken, *typed, added) >= 0
