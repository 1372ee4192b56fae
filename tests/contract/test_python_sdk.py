"""The official Python SDK gets the same from Sentinel as from the gateway itself, but for what names the answer."""

from __future__ import annotations

import json
from typing import Any, cast

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.support.system import GATEWAY_KEY, eventually

SAY = [{"role": "user", "content": "say 12 tokens"}]
CHAT = {"model": "openai/gpt-4o", "messages": SAY}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
VARYING = {"id", "created", "created_at", "request_id", "system_fingerprint", "completed_at", "item_id", "_request_id"}


class Weather(BaseModel):
    """A structured answer."""

    city: str
    degrees: int


def plain(answer):
    """Without what differs from one answer to the next, and the same of two equal ones."""
    if isinstance(answer, BaseModel):
        return plain(answer.model_dump(warnings=False))
    if isinstance(answer, dict):
        return {key: plain(value) for key, value in answer.items() if key not in VARYING}
    if isinstance(answer, list | tuple):
        return [plain(value) for value in answer]
    return answer


CALLS = {
    "chat": lambda c: c.chat.completions.create(**CHAT),
    "chat with n": lambda c: c.chat.completions.create(**CHAT, n=3),
    "chat capped": lambda c: c.chat.completions.create(**CHAT, max_completion_tokens=5),
    "chat capped the old way": lambda c: c.chat.completions.create(**CHAT, max_tokens=5),
    "chat stream": lambda c: list(c.chat.completions.create(**CHAT, stream=True)),
    "chat stream with usage": lambda c: list(
        c.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
    ),
    "chat stream of two": lambda c: list(c.chat.completions.create(**CHAT, stream=True, n=2)),
    "chat tools": lambda c: c.chat.completions.create(model="openai/gpt-4o-tools", messages=SAY, tools=TOOLS),
    "chat tools stream": lambda c: list(
        c.chat.completions.create(model="openai/gpt-4o-tools", messages=SAY, tools=TOOLS, stream=True)
    ),
    "chat parse": lambda c: c.chat.completions.parse(**CHAT, response_format=Weather),
    "completions": lambda c: c.completions.create(model="openai/gpt-3.5-turbo-instruct", prompt="say 9 tokens"),
    "completions of a list": lambda c: c.completions.create(
        model="openai/gpt-3.5-turbo-instruct", prompt=["say 3 tokens", "say 4 tokens"]
    ),
    "completions stream": lambda c: list(
        c.completions.create(model="openai/gpt-3.5-turbo-instruct", prompt="say 9 tokens", stream=True)
    ),
    "embeddings": lambda c: c.embeddings.create(model="openai/text-embedding-3-small", input=["one", "two"]),
    "embeddings of tokens": lambda c: c.embeddings.create(model="openai/text-embedding-3-small", input=[[1, 2, 3]]),
    "responses": lambda c: c.responses.create(model="openai/gpt-4o", input="say 8 tokens"),
    "responses stream": lambda c: list(c.responses.create(model="openai/gpt-4o", input="say 8 tokens", stream=True)),
    "models": lambda c: list(c.models.list()),
    "model with a slash": lambda c: c.models.retrieve("openai/gpt-4o"),
    "moderations": lambda c: c.moderations.create(input="hello", model="omni-moderation-latest"),
    "speech": lambda c: c.audio.speech.create(model="tts-1", voice="alloy", input="hello").content,
    "transcription": lambda c: c.audio.transcriptions.create(model="whisper-1", file=("a.wav", b"RIFF" * 300)),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_same_as_from_the_gateway_itself(through, direct, name):
    assert plain(CALLS[name](through)) == plain(CALLS[name](direct))


STREAMS = ("crlf", "comments", "no-space", "events", "one-byte", "many-events-per-write", "usage-with-choices", "cjk")


@pytest.mark.parametrize("style", STREAMS)
def test_every_style_of_stream_reads_the_same(through, direct, style):
    def told(client):
        return plain(list(client.chat.completions.create(model=f"sim/{style}", messages=SAY, stream=True)))

    assert told(through) == told(direct)


def test_bytes_of_a_stream_that_asked_for_usage_are_the_gateways(through, direct):
    def raw(client):
        call = client.chat.completions.with_streaming_response.create
        with call(model="sim/crlf", messages=SAY, stream=True, stream_options={"include_usage": True}) as answer:
            return b"".join(answer.iter_bytes())

    ours, theirs = raw(through), raw(direct)
    assert ours.count(b"data:") == theirs.count(b"data:")
    assert len(ours) == len(theirs)


def test_a_file_goes_up_and_comes_down_again(through):
    content = bytes(range(256)) * 400
    uploaded = through.files.create(file=("all.bin", content), purpose="assistants")
    assert uploaded.bytes == len(content)
    assert through.files.content(uploaded.id).content == content


def test_the_raw_answer_has_limits_and_a_request_id(through):
    answer = through.chat.completions.with_raw_response.create(**CHAT, extra_headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.headers["x-ratelimit-resource"].startswith("ai_")
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) > 0
    assert answer.parse().usage.completion_tokens == 12


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("sim/status-400", openai.BadRequestError),
        ("sim/status-404", openai.NotFoundError),
        ("sim/status-422", openai.UnprocessableEntityError),
        ("sim/status-429", openai.RateLimitError),
        ("sim/status-500", openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_gateway_pass_as_they_are(through, direct, model, error, stream):
    def told(client):
        with pytest.raises(error) as raised:
            client.chat.completions.create(model=model, messages=SAY, stream=stream)
        return raised.value.body

    assert told(through) == told(direct)


@pytest.mark.parametrize("status", [401, 402, 403])
def test_trouble_with_the_gateways_account_is_not_the_callers(through, status):
    with pytest.raises(openai.InternalServerError) as raised:
        through.chat.completions.create(model=f"sim/status-{status}", messages=SAY)
    assert raised.value.status_code == 502
    assert raised.value.code == "upstream_rejected"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_completion_tokens": 2**60}, "max_completion_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 1_000}, "n"),
        ({"n": True}, "n"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"model": ""}, "model"),
        ({"model": 3}, "model"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_a_wrong_field_is_named_and_nothing_is_reserved(system, through, user, body, param):
    before = system.usage(user)
    with pytest.raises(openai.BadRequestError) as raised:
        through.post("/chat/completions", body={**CHAT, **body}, cast_to=object)
    assert raised.value.param == param
    assert system.usage(user) == before


def test_a_lowered_cap_is_told_and_kept(system):
    user = system.add_user({"ai_output_tokens": 30})
    client = system.client(user)
    say = {"model": "openai/gpt-4o", "messages": [{"role": "user", "content": "say 100 tokens"}]}
    answer = client.chat.completions.with_raw_response.create(**say, max_tokens=80)
    assert answer.headers["x-sentinel-max-output-tokens"] == "30"
    told = answer.parse()
    assert told.usage.completion_tokens == 30
    assert told.choices[0].finish_reason == "length"
    with pytest.raises(openai.RateLimitError) as raised:
        client.chat.completions.create(**say, max_tokens=80)
    assert raised.value.code == "insufficient_quota"
    details = cast("dict[str, Any]", raised.value.body)["details"]
    assert details["limit_name"] == "ai_output_tokens"


def test_with_plenty_left_the_body_goes_through_untouched(system, through):
    through.chat.completions.create(**CHAT, seed=7, extra_headers={"x-request-id": "untouched-1"})
    requests = system.gateway.get("/admin/requests").json()["requests"]
    (sent,) = [request for request in requests if request["id"] == "untouched-1"]
    assert json.loads(sent["body"]) == {**CHAT, "seed": 7}
    names = {name for name, _ in sent["headers"]}
    assert ["authorization", f"Bearer {GATEWAY_KEY}"] in sent["headers"]
    assert "cookie" not in names


def test_in_soft_mode_nothing_is_capped_and_the_overshoot_is_measured(system):
    (soft,) = system.start_all("proxy", QUOTA_MODE="soft")
    user = system.add_user({"ai_output_tokens": 30})
    say = {"model": "openai/gpt-4o", "messages": [{"role": "user", "content": "say 100 tokens"}]}
    answer = system.client(user, soft).chat.completions.create(**say)
    assert answer.usage.completion_tokens == 100
    assert soft.metric("sentinel_output_overshoot_tokens_total") == 70
    soft.stop()


def test_clients_that_leave_free_their_connections_and_are_billed(system, user):
    import asyncio  # noqa: PLC0415 - for this one test

    (narrow,) = system.start_all(
        "proxy", UPSTREAM_MAX_CONNECTIONS="10", DISCONNECT_DRAIN_SECONDS="0", UPSTREAM_CONNECT_TIMEOUT_SECONDS="20"
    )

    async def leave_and_ask() -> int:
        body = {"model": "sim/slow-20ms", "stream": True, "messages": [{"role": "user", "content": "say 40 tokens"}]}
        url = f"{narrow.url}/v1/chat/completions"
        async with httpx.AsyncClient(timeout=30, limits=httpx.Limits(max_connections=20)) as http:

            async def leave(number):
                async with http.stream("POST", url, json=body, headers=user.headers) as answer:
                    await anext(answer.aiter_bytes())

            for _ in range(25):
                await asyncio.gather(*(leave(number) for number in range(10)))
            plain = {**CHAT, "user": user.external_id}
            answers = await asyncio.gather(*(http.post(url, json=plain, headers=user.headers) for _ in range(50)))
            return sum(answer.status_code == 200 for answer in answers)

    assert asyncio.run(leave_and_ask()) == 50
    eventually(lambda: system.usage(user)["ai_requests"], within_s=10, until=lambda limit: limit["used"] == 300)
    narrow.stop()


def test_a_stream_that_breaks_off_raises_in_the_sdk(through):
    with pytest.raises(openai.APIError, match="broke off"):
        list(through.chat.completions.create(model="sim/cut", messages=SAY, stream=True))


def test_a_gateway_that_hangs_is_a_timeout(through):
    with pytest.raises(openai.InternalServerError) as raised:
        through.chat.completions.create(model="sim/hang", messages=SAY)
    assert raised.value.status_code == 504
