"""Every part of a request that a model reads is counted; nothing a caller sends makes the counting raise."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sentinel_proxy.tokens import TokenCounter, lookup, upper_bound
from tests.unit.tokens.bodies import Chat, Completions, Embeddings, Responses, count, count_now, user

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=10), inner, max_size=4)),
    max_leaves=12,
)
_KEYS = (
    *("role", "content", "name", "tool_calls", "function", "arguments", "type", "text", "image_url", "url", "detail"),
    *("input_audio", "data", "format", "file", "file_data", "properties", "required", "enum", "items", "anyOf"),
    *("parameters", "description", "json_schema", "schema", "output", "summary", "input", "refusal", "index"),
)
_TYPES = (
    *("function", "image_url", "input_image", "input_audio", "file", "message", "function_call", "reasoning", "object"),
    *("array", "string", "json_schema", "none", "user", "system", "function_call_output", "custom", "integer"),
)
NEAR_REQUESTS = st.recursive(
    st.one_of(st.none(), st.integers(), st.sampled_from(_TYPES), st.text(max_size=10), st.booleans()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(_KEYS), inner, min_size=1, max_size=6)
    ),
    max_leaves=25,
)
_settings = settings(max_examples=200, deadline=None)


@_settings
@given(value=st.one_of(JSON, NEAR_REQUESTS), other=st.one_of(JSON, NEAR_REQUESTS))
def test_nothing_a_caller_sends_raises_and_the_bound_holds(counter: TokenCounter, value: Any, other: Any) -> None:
    for body in (
        Chat(messages=value, tools=other, tool_choice=value, functions=value, response_format=other),
        Chat(messages=[value, {"role": "user", "content": other}], tools=[other], function_call=other),
        Completions(prompt=value, suffix=other),
        Embeddings(input=value),
        Responses(input=value, tools=other, text=other, instructions=value),
        Responses(input=[value, other], tools=[value], text={"format": other}),
    ):
        tokens = count_now(counter, body)
        assert 0 <= tokens <= count_now(counter, body, spare_tokens=10**9)


@pytest.mark.parametrize(
    "text", ["\ud800", "a\udfffb", "\ud83d\ude00", "\x00" * 50, "<|endoftext|><|im_end|>", "\ufeff"]
)
def test_nasty_texts_are_counted_as_text(counter: TokenCounter, text: str) -> None:
    assert 7 < count_now(counter, user(text)) <= 7 + upper_bound(text)


def test_an_empty_conversation_is_not_free_of_overhead(counter: TokenCounter) -> None:
    assert count_now(counter, user("")) == 7


def test_completions_sum_their_prompts_as_text_or_ids(counter: TokenCounter) -> None:
    one = count_now(counter, Completions(prompt="Say this is a test"))
    assert one == 5
    assert count_now(counter, Completions(prompt=["Say this is a test"] * 3)) == 15
    assert count_now(counter, Completions(prompt=[1, 2, 3, 4])) == 4
    assert count_now(counter, Completions(prompt=[[1, 2], [3]])) == 3
    assert count_now(counter, Completions(prompt="Say this", suffix=" is a test")) == 5
    assert count_now(counter, Completions()) == 0


def test_embeddings_sum_their_inputs(counter: TokenCounter) -> None:
    assert count_now(counter, Embeddings(input="hello world"), "text-embedding-3-small") == 2
    assert count_now(counter, Embeddings(input=["hello world", "hello"]), "text-embedding-3-small") == 3
    assert count_now(counter, Embeddings(input=[[5, 6, 7], [8]]), "text-embedding-3-small") == 4


def test_a_text_and_the_same_text_as_a_part_count_alike(counter: TokenCounter) -> None:
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "world"}]
    assert count_now(counter, user(parts)) == count_now(counter, user("hello")) + 1


def test_tool_calls_and_their_results_are_counted(counter: TokenCounter) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Paris"}'}}
    result = {"role": "tool", "content": "sunny", "tool_call_id": "c1"}
    plain: list[dict[str, Any]] = [{"role": "assistant", "content": None}, result]
    calling = [{**plain[0], "tool_calls": [call, call]}, plain[1]]
    per_call = 3 + 2 + 5  # overhead, name, arguments
    assert count_now(counter, Chat(messages=calling)) == count_now(counter, Chat(messages=plain)) + 2 * per_call


def test_the_schema_of_the_answer_is_counted_in_chat_and_in_responses(counter: TokenCounter) -> None:
    schema = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
    nested = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}}
    flat = {"type": "json_schema", "name": "reply", "schema": schema}
    chat = count_now(counter, Chat(messages=user("hi").messages, response_format=nested)) - count_now(
        counter, user("hi")
    )
    responses = count_now(counter, Responses(input="hi", text={"format": flat})) - count_now(
        counter, Responses(input="hi")
    )
    assert chat == responses > 20
    assert count_now(counter, Chat(messages=[], response_format={"type": "json_object"})) == 3


def test_instructions_items_and_tools_of_responses_are_counted(counter: TokenCounter) -> None:
    assert count_now(counter, Responses(input="hello")) == count_now(counter, user("hello")) == 8
    message = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]}
    assert count_now(counter, Responses(input=[message])) == 8
    assert count_now(counter, Responses(input=[message], instructions="Be kind.")) == 8 + 4 + 3
    function = {"type": "function", "name": "foo", "parameters": {"type": "object", "properties": {}}}
    nested = {"type": "function", "function": {"name": "foo", "parameters": {"type": "object", "properties": {}}}}
    assert count_now(counter, Responses(input="hello", tools=[function])) == count_now(
        counter, Chat(messages=user("hello").messages, tools=[nested])
    )
    call = {"type": "function_call", "name": "foo", "arguments": "{}", "call_id": "x"}
    result = {"type": "function_call_output", "output": "done", "call_id": "x"}
    assert count_now(counter, Responses(input=[message, call, result])) > 8 + 6


@pytest.mark.parametrize(
    ("part", "tokens"),
    [
        # two seconds of 24 kHz 16-bit mono
        (
            {"type": "input_audio", "input_audio": {"data": base64.b64encode(bytes(96_000)).decode(), "format": "wav"}},
            20,
        ),
        (
            {"type": "input_audio", "input_audio": {"data": base64.b64encode(bytes(24_000)).decode(), "format": "mp3"}},
            30,
        ),
        ({"type": "input_audio"}, 300),
        ({"type": "file", "file": {"file_id": "file-1"}}, 2_000),
        ({"type": "input_file", "file_data": "data:application/pdf;base64," + "A" * 128_000}, 3_001),
        ({"type": "input_file", "file_data": "data:text/plain;base64," + "A" * 128_000}, 24_005),
    ],
)
def test_audio_and_files_cost_what_the_documentation_approximates(
    counter: TokenCounter, part: dict[str, Any], tokens: int
) -> None:
    assert count_now(counter, user([part])) - count_now(counter, user([])) == tokens


async def test_a_schema_nested_beyond_reason_is_survived(counter: TokenCounter) -> None:
    deep: dict[str, Any] = {"type": "object"}
    for _ in range(400):
        deep = {"type": "object", "properties": {"a": deep}, "anyOf": []}
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    body = Chat(messages=[], tools=[tool, {"type": "web"}], response_format={"type": "json_schema", "schema": deep})
    assert await count(counter, body) > 100


def test_roles_that_are_taken_for_one_token_are_one(counter: TokenCounter) -> None:
    for model in ("gpt-4o", "gpt-4"):  # no model of the older encodings chats
        encoding = counter._encoding(lookup(model).encoding)
        for role in ("user", "assistant", "system", "developer", "tool", "function"):
            assert len(encoding.encode_ordinary(role)) == 1
