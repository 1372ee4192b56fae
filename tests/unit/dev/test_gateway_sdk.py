"""The official SDK against the simulated gateway, as its users would."""

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from tests.unit.dev.conftest import KEY

SAY: list[Any] = [{"role": "user", "content": "please say 20 tokens"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["c", "f"]}, "days": {"type": "integer"}},
            "required": ["city", "unit", "days"],
        },
    },
}


@pytest.fixture
async def sdk(gateway_url, books) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{gateway_url}/v1", api_key=KEY, max_retries=0, timeout=10) as client:
        yield client


async def test_chat_says_as_much_as_asked_for(sdk, books):
    answer = await sdk.chat.completions.create(model="openai/gpt-4o", messages=SAY, user="ann")
    assert len(answer.choices[0].message.content.split()) == 20
    assert answer.choices[0].finish_reason == "stop"
    # 3 a message, "user", the five words, 3 for the reply; "20" is a token of its own, and so is the space before it.
    assert answer.usage.prompt_tokens == 3 + 1 + 5 + 3
    assert answer.usage.completion_tokens == 20
    assert books()["users"] == {"ann": {"requests": 1, "input_tokens": 12, "output_tokens": 20}}


@pytest.mark.parametrize("cap", [{"max_tokens": 7}, {"max_completion_tokens": 7}])
async def test_a_cap_is_hard_and_per_choice(sdk, books, cap):
    answer = await sdk.chat.completions.create(model="openai/gpt-4o", messages=SAY, n=3, **cap)
    assert [choice.finish_reason for choice in answer.choices] == ["length"] * 3
    assert [len(choice.message.content.split()) for choice in answer.choices] == [7] * 3
    assert answer.usage.completion_tokens == books()["total"]["output_tokens"] == 21


async def test_a_stream_carries_usage_on_a_chunk_of_its_own_when_asked(sdk, books):
    chunks = [
        chunk
        async for chunk in await sdk.chat.completions.create(
            model="openai/gpt-4o", messages=SAY, n=2, stream=True, stream_options={"include_usage": True}
        )
    ]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == books()["total"]["output_tokens"] == 40
    assert all(chunk.usage is None for chunk in chunks[:-1])
    said = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices if choice.index == 1)
    assert len(said.split()) == 20


async def test_a_stream_has_no_usage_when_not_asked(sdk):
    stream = await sdk.chat.completions.create(model="openai/gpt-4o", messages=SAY, stream=True)
    chunks = [chunk async for chunk in stream]
    assert all(chunk.choices and "usage" not in chunk.model_fields_set for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_is_called_with_arguments_that_fit_its_schema(sdk, books, stream):
    asked = {"model": "sim/tools", "messages": SAY, "tools": [TOOL]}
    if stream:
        async with sdk.chat.completions.stream(**asked) as events:
            answer = await events.get_final_completion()
    else:
        answer = await sdk.chat.completions.create(**asked)
    call = answer.choices[0].message.tool_calls[0]
    assert (call.function.name, answer.choices[0].finish_reason) == ("get_weather", "tool_calls")
    assert json.loads(call.function.arguments) == {"city": "quick light", "unit": "c", "days": 7}
    assert books()["total"]["output_tokens"] > 5


async def test_after_a_tools_result_words_are_said(sdk):
    messages = [*SAY, {"role": "tool", "tool_call_id": "x", "content": "sunny"}]
    answer = await sdk.chat.completions.create(model="sim/tools", messages=messages, tools=[TOOL])
    assert answer.choices[0].message.tool_calls is None


async def test_a_json_schema_is_kept_to(sdk):
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"$ref": "#/$defs/n"}}}}
    schema["$defs"] = {"n": {"type": "integer"}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = await sdk.chat.completions.create(model="openai/gpt-4o", messages=SAY, response_format=form)
    assert json.loads(answer.choices[0].message.content) == {"a": [7]}


async def test_refusals_and_reasoning_come_in_their_own_fields(sdk):
    refused = await sdk.chat.completions.create(model="sim/refusal", messages=SAY)
    assert refused.choices[0].message.content is None
    assert len(refused.choices[0].message.refusal.split()) == 20
    reasoned = await sdk.chat.completions.create(model="some/reason", messages=SAY)
    assert reasoned.usage.completion_tokens == 20
    assert reasoned.usage.completion_tokens_details.reasoning_tokens == 10
    assert len(reasoned.choices[0].message.reasoning_content.split()) == 10


@pytest.mark.parametrize(
    ("prompt", "choices", "tokens"), [("a b c", 1, 3), (["a b", "c"], 2, 3), ([1, 2, 3], 1, 3), ([[1], [2, 3]], 2, 3)]
)
async def test_legacy_completions_take_every_kind_of_prompt(sdk, prompt, choices, tokens):
    answer = await sdk.completions.create(model="m", prompt=prompt, max_tokens=4, n=2)
    assert len(answer.choices) == 2 * choices
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (tokens, 8 * choices)
    stream = await sdk.completions.create(model="m", prompt=prompt, max_tokens=4, stream=True)
    assert sum([len(chunk.choices[0].text.split()) async for chunk in stream]) == 4 * choices


async def test_embeddings_have_the_size_asked_for(sdk, books):
    answer = await sdk.embeddings.create(model="openai/text-embedding-3-small", input=["a b", "c"], dimensions=5)
    assert [len(item.embedding) for item in answer.data] == [5, 5]
    assert answer.usage.prompt_tokens == books()["total"]["input_tokens"] == 3


async def test_responses_as_json_and_as_events_charge_the_same(sdk, books):
    asked = {"model": "openai/gpt-4o", "input": "please say 20 tokens"}
    answer = await sdk.responses.create(**asked)
    assert len(answer.output_text.split()) == answer.usage.output_tokens == 20
    async with sdk.responses.stream(**asked) as events:
        kinds = [event.type async for event in events]
        streamed = await events.get_final_response()
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    assert kinds.count("response.output_text.delta") == 20
    assert streamed.output_text == answer.output_text
    assert streamed.usage == answer.usage
    assert books()["total"] == {"requests": 2, "input_tokens": 24, "output_tokens": 40}


async def test_a_capped_response_is_incomplete(sdk):
    answer = await sdk.responses.create(model="openai/gpt-4o", input="x", max_output_tokens=3)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.usage.output_tokens == 3


async def test_responses_call_functions(sdk):
    tool = {"type": "function", **TOOL["function"], "strict": False}
    async with sdk.responses.stream(model="sim/tools", input="x", tools=[tool]) as events:
        answer = await events.get_final_response()
    call = answer.output[0]
    assert (call.type, call.name, json.loads(call.arguments)["days"]) == ("function_call", "get_weather", 7)


async def test_models_are_listed_with_their_maxima_and_cost_nothing(sdk, books):
    ids = [model.id async for model in await sdk.models.list()]
    assert "openai/gpt-4o" in ids
    told = await sdk.models.retrieve("openai/gpt-4o")
    assert (told.max_tokens, told.context_window) == (16_384, 128_000)
    with pytest.raises(openai.NotFoundError):
        await sdk.models.retrieve("no/such")
    assert books()["total"]["requests"] == 0


async def test_files_come_back_byte_for_byte(sdk):
    data = bytes(range(256)) * 40 + b"\r\n--x\r\n\r\n"
    sent = await sdk.files.create(file=("a.bin", data), purpose="user_data")
    assert (sent.bytes, sent.filename, sent.purpose) == (len(data), "a.bin", "user_data")
    assert (await sdk.files.content(sent.id)).content == data
    assert [file.id async for file in await sdk.files.list()] == [sent.id]
    assert (await sdk.files.delete(sent.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await sdk.files.retrieve(sent.id)


async def test_audio_images_and_moderations_answer(sdk, books):
    spoken = await sdk.audio.speech.create(model="tts", voice="alloy", input="hello")
    assert spoken.content == bytes(range(256)) * 256
    heard = await sdk.audio.transcriptions.create(model="whisper", file=("a.mp3", b"x" * 5_000))
    assert heard.usage.input_tokens == 5
    image = await sdk.images.generate(model="img", prompt="a b c")
    assert image.usage.input_tokens == 3
    assert not (await sdk.moderations.create(model="m", input="hello")).results[0].flagged
    assert books()["total"] == {"requests": 4, "input_tokens": 8, "output_tokens": 1_059}


@pytest.mark.parametrize(
    ("status", "raised"),
    [(400, openai.BadRequestError), (429, openai.RateLimitError), (503, openai.InternalServerError)],
)
async def test_errors_raise_the_sdks_own_classes(sdk, books, status, raised):
    with pytest.raises(raised) as caught:
        await sdk.chat.completions.create(model=f"sim/status-{status}", messages=SAY)
    assert caught.value.status_code == status
    assert books()["total"]["requests"] == 0


async def test_a_wrong_key_is_401(gateway_url):
    async with openai.AsyncOpenAI(base_url=f"{gateway_url}/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            await stranger.chat.completions.create(model="m", messages=SAY)
