"""The counts that OpenAI's API itself reported, as published, must come out to the token."""

from __future__ import annotations

from typing import Any

import pytest

from sentinel_proxy.tokens import TokenCounter
from tests.unit.tokens.bodies import Chat, count_now, user

# OpenAI's cookbook, "How to count tokens with tiktoken": both examples, with the counts the API answered.
COOKBOOK_MESSAGES = [
    {
        "role": "system",
        "content": (
            "You are a helpful, pattern-following assistant that translates corporate jargon into plain English."
        ),
    },
    {"role": "system", "name": "example_user", "content": "New synergies will help drive top-line growth."},
    {
        "role": "system",
        "name": "example_assistant",
        "content": "Things working well together will increase revenue.",
    },
    {
        "role": "system",
        "name": "example_user",
        "content": (
            "Let's circle back when we have more bandwidth to touch base on opportunities for increased leverage."
        ),
    },
    {
        "role": "system",
        "name": "example_assistant",
        "content": "Let's talk later when we're less busy about how to do better.",
    },
    {
        "role": "user",
        "content": "This late pivot means we don't have time to boil the ocean for the client deliverable.",
    },
]
COOKBOOK_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_current_weather",
            "description": "Get the current weather in a given location",
            "parameters": {
                "type": "object",
                "properties": {
                    "location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"},
                    "unit": {
                        "type": "string",
                        "description": "The unit of temperature to return",
                        "enum": ["celsius", "fahrenheit"],
                    },
                },
                "required": ["location"],
            },
        },
    }
]
COOKBOOK_TOOL_MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant that can answer to questions about the weather."},
    {"role": "user", "content": "What's the weather like in San Francisco?"},
]


@pytest.mark.parametrize(
    ("model", "tokens"),
    [("gpt-3.5-turbo", 129), ("gpt-4-0613", 129), ("gpt-4", 129), ("gpt-4o", 124), ("gpt-4o-mini", 124)],
)
def test_the_cookbooks_messages(counter: TokenCounter, model: str, tokens: int) -> None:
    assert count_now(counter, Chat(messages=COOKBOOK_MESSAGES), model) == tokens


@pytest.mark.parametrize(
    ("model", "tokens"), [("gpt-3.5-turbo", 105), ("gpt-4", 105), ("gpt-4o", 101), ("gpt-4o-mini", 101)]
)
def test_the_cookbooks_tools(counter: TokenCounter, model: str, tokens: int) -> None:
    assert count_now(counter, Chat(messages=COOKBOOK_TOOL_MESSAGES, tools=COOKBOOK_TOOLS), model) == tokens


def _function(name: str, properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "parameters": {"type": "object", "properties": properties}, **more}


_HELLO = [{"role": "user", "content": "hello"}]
_WORLD = {"role": "user", "content": "hello world"}
_ARGUMENTS = '{"foo": "bar", "baz": 1.5}'

# Counts that gpt-3.5-turbo answered, published with the tests of the npm package openai-chat-tokens.
GPT_35_COUNTS: list[tuple[Chat, int]] = [
    (Chat(messages=_HELLO), 8),
    (Chat(messages=[_WORLD]), 9),
    (Chat(messages=[{"role": "system", "content": "hello:"}]), 9),
    (
        Chat(
            messages=[
                {"role": "system", "content": "# Important: you're the best robot"},
                {"role": "user", "content": "hello robot"},
                {"role": "assistant", "content": "hello world"},
            ]
        ),
        27,
    ),
    (Chat(messages=_HELLO, functions=[_function("foo", {})]), 31),
    (Chat(messages=_HELLO, functions=[_function("foo", {}, description="Do a foo")]), 36),
    (
        Chat(
            messages=_HELLO,
            functions=[_function("bing_bong", {"foo": {"type": "string"}}, description="Do a bing bong")],
        ),
        49,
    ),
    (
        Chat(
            messages=_HELLO,
            functions=[
                _function(
                    "bing_bong",
                    {"foo": {"type": "string"}, "bar": {"type": "number", "description": "A number"}},
                    description="Do a bing bong",
                )
            ],
        ),
        57,
    ),
    (
        Chat(
            messages=_HELLO,
            functions=[
                _function(
                    "bing_bong",
                    {
                        "foo": {
                            "type": "object",
                            "properties": {
                                "bar": {"type": "string", "enum": ["a", "b", "c"]},
                                "baz": {"type": "boolean"},
                            },
                        }
                    },
                    description="Do a bing bong",
                )
            ],
        ),
        68,
    ),
    (Chat(messages=[_WORLD, {"role": "function", "name": "do_stuff", "content": "{}"}]), 15),
    (Chat(messages=[_WORLD, {"role": "function", "name": "do_stuff", "content": _ARGUMENTS}]), 28),
    (
        Chat(
            messages=[
                {"role": "function", "name": "dance_the_tango", "content": '{"a": { "b" : { "c": false}}}'},
            ]
        ),
        24,
    ),
    (
        Chat(
            messages=[
                {"role": "assistant", "content": "", "function_call": {"name": "do_stuff", "arguments": _ARGUMENTS}}
            ]
        ),
        26,
    ),
    (
        Chat(
            messages=[{"role": "system", "content": "Hello"}, {"role": "user", "content": "Hi there"}],
            functions=[_function("do_stuff", {})],
        ),
        35,
    ),
    (
        Chat(
            messages=[{"role": "system", "content": "Hello:"}, {"role": "user", "content": "Hi there"}],
            functions=[_function("do_stuff", {})],
        ),
        35,
    ),
    (
        Chat(
            messages=[
                {"role": "system", "content": "Hello:"},
                {"role": "system", "content": "Hello"},
                {"role": "user", "content": "Hi there"},
            ],
            functions=[_function("do_stuff", {})],
        ),
        40,
    ),
    (
        Chat(
            messages=_HELLO,
            functions=[
                {
                    "name": "get_recipe",
                    "parameters": {
                        "type": "object",
                        "required": ["ingredients", "instructions", "time_to_cook"],
                        "properties": {
                            "ingredients": {
                                "type": "array",
                                "items": {
                                    "type": "object",
                                    "required": ["name", "unit", "amount"],
                                    "properties": {
                                        "name": {"type": "string"},
                                        "unit": {
                                            "enum": ["grams", "ml", "cups", "pieces", "teaspoons"],
                                            "type": "string",
                                        },
                                        "amount": {"type": "number"},
                                    },
                                },
                            },
                            "instructions": {
                                "type": "array",
                                "items": {"type": "string"},
                                "description": "Steps to prepare the recipe (no numbering)",
                            },
                            "time_to_cook": {
                                "type": "number",
                                "description": "Total time to prepare the recipe in minutes",
                            },
                        },
                    },
                }
            ],
        ),
        106,
    ),
]


@pytest.mark.parametrize(("body", "tokens"), GPT_35_COUNTS)
def test_what_gpt_35_counted(counter: TokenCounter, body: Chat, tokens: int) -> None:
    assert count_now(counter, body, "gpt-3.5-turbo") == tokens


def _search(**more: Any) -> dict[str, Any]:
    function = {"name": "search_sources", "description": "Retrieve sources from the Azure AI Search index", **more}
    return {"type": "function", "function": function}


_QUERY = {
    "type": "object",
    "properties": {
        "search_query": {
            "type": "string",
            "description": "Query string to retrieve documents from azure search eg: 'Health care plan'",
        }
    },
    "required": ["search_query"],
}
_NAMED = {"type": "function", "function": {"name": "search_sources"}}


@pytest.mark.parametrize(
    ("tool", "choice", "tokens"),
    [
        (_search(parameters=_QUERY), "auto", 66),
        (_search(parameters=_QUERY), "none", 67),
        (_search(parameters=_QUERY), _NAMED, 75),
        (_search(), "auto", 42),
        (_search(), _NAMED, 51),
    ],
)
def test_what_gpt_35_counted_for_a_tool_choice(counter: TokenCounter, tool: Any, choice: Any, tokens: int) -> None:
    # Published with the tests of the PyPI package openai-messages-token-helper.
    body = Chat(messages=[{"role": "system", "content": "You are a bot."}], tools=[tool], tool_choice=choice)
    assert count_now(counter, body, "gpt-3.5-turbo") == tokens


_PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ"
    "AAAADUlEQVR42mP8z/C/HgAGgwJ/lK3Q6wAAAABJRU5ErkJggg=="
)


def test_a_text_with_a_picture(counter: TokenCounter) -> None:
    # The same package, asked of gpt-4o.
    parts = [
        {"type": "text", "text": "Describe this picture:"},
        {"type": "image_url", "image_url": {"url": _PIXEL, "detail": "auto"}},
    ]
    assert count_now(counter, user(parts), "gpt-4o") == 266
