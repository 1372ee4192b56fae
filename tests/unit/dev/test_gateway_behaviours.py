"""What the simulated gateway does when a model's name asks it to misbehave, byte for byte."""

import asyncio
import gzip
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import tiktoken

from sentinel_dev.gateway import create_gateway
from sentinel_dev.gateway.counting import Exact
from sentinel_dev.gateway.words import CJK, WORDS, pieces
from sentinel_proxy.tokens.encodings import load_encoding
from tests.unit.dev.conftest import KEY, simulator

CHAT = "/v1/chat/completions"


def body(model: str, **told: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "hello"}], **told}


def streamed(model: str, **told: Any) -> dict[str, Any]:
    return body(model, stream=True, stream_options={"include_usage": True}, **told)


def events(raw: bytes) -> list[dict[str, Any]]:
    """Read as the standard says, and strictly: what an SDK sees."""
    lines = raw.decode().replace("\r\n", "\n").split("\n")
    data = [line[5:].lstrip() for line in lines if line.startswith("data:")]
    return [json.loads(line) for line in data if line != "[DONE]"]


def said(raw: bytes) -> str:
    return "".join(c["delta"].get("content") or "" for event in events(raw) for c in event.get("choices", ()))


async def until_quiet(books: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    deadline = time.monotonic() + 10
    while (told := books())["in_flight"]:
        assert time.monotonic() < deadline, told
        await asyncio.sleep(0.02)
    return told


async def cut_stream(gateway: httpx.AsyncClient, model: str, **told: Any) -> bytes:
    """What came before the connection closed in the middle."""
    parts: list[bytes] = []
    with pytest.raises(httpx.RemoteProtocolError):  # noqa: PT012  the error comes while reading
        async with gateway.stream("POST", CHAT, json=streamed(model, **told)) as answer:
            async for part in answer.aiter_raw():
                parts.append(part)  # noqa: PERF401  what came before the error is wanted
    return b"".join(parts)


@pytest.fixture(scope="module")
def encoding() -> tiktoken.Encoding:
    return Exact().load()


def test_every_word_is_one_token_wherever_it_stands(encoding):
    for words in (WORDS, CJK):
        assert all(len(encoding.encode_ordinary(text)) == 1 for word in words for text in (word, " " + word))
    for cjk in (False, True):
        assert len(encoding.encode_ordinary("".join(pieces(300, cjk=cjk)))) == 300


def test_text_is_cut_as_the_published_encoding_does(encoding):
    text = "It's 12345 O'CLOCK,\r\n\r\n  naïve   日本語 café_x  \t\n fooBar"
    assert encoding.encode_ordinary(text) == load_encoding("o200k_base").encode_ordinary(text)


@pytest.mark.parametrize("framing", ["crlf", "comments", "no-space", "events", "cjk", "many-events-per-write"])
async def test_every_framing_says_the_same(gateway, books, framing):
    answer = await gateway.post(CHAT, json=streamed(f"sim/{framing}+tokens-35"))
    assert said(answer.content) == "".join(pieces(35, cjk=framing == "cjk"))
    assert events(answer.content)[-1]["usage"]["completion_tokens"] == 35
    assert answer.content.rstrip().endswith(b"[DONE]")
    marks = {
        "crlf": b"}\r\n\r\ndata: ",
        "comments": b"}\n\n: keep-alive\n\n",
        "no-space": b"\n\ndata:{",
        "events": b"\n\nevent: chunk\ndata: ",
    }
    assert marks.get(framing, b"data: ") in answer.content
    assert books()["total"]["output_tokens"] == 35


async def test_one_byte_a_write_is_cjk_and_whole(gateway):
    answer = await gateway.post(CHAT, json=streamed("sim/one-byte+tokens-5"))
    assert said(answer.content) == "".join(pieces(5, cjk=True))


async def test_events_come_one_by_one_when_slow(gateway):
    async with gateway.stream("POST", CHAT, json=streamed("sim/slow-20ms+tokens-5")) as answer:
        parts = [part async for part in answer.aiter_raw()]
    assert len(parts) >= 6


@pytest.mark.parametrize(
    ("model", "usages"),
    [
        ("sim/no-usage", set()),
        ("sim/usage-null", {None}),
        ("sim/usage-zero", {None, 0}),
        ("sim/usage-with-choices", {None, 16}),
        ("sim/usage-running", set(range(17))),
    ],
)
async def test_usage_comes_where_the_name_says(gateway, model, usages):
    told = events((await gateway.post(CHAT, json=streamed(model))).content)
    found = {event["usage"] and event["usage"]["completion_tokens"] for event in told if "usage" in event}
    assert found == usages
    if model == "sim/usage-with-choices":
        assert told[-1]["choices"]
        assert told[-1]["usage"]["completion_tokens"] == 16


async def test_json_answers_leave_usage_out_or_null_or_zero(gateway, books):
    assert "usage" not in (await gateway.post(CHAT, json=body("sim/no-usage"))).json()
    assert (await gateway.post(CHAT, json=body("sim/usage-null"))).json()["usage"] is None
    before = books()["total"]
    assert (await gateway.post(CHAT, json=body("sim/usage-zero"))).json()["usage"]["total_tokens"] == 0
    assert books()["total"] == {**before, "requests": before["requests"] + 1}


async def test_a_cut_stream_is_charged_what_was_written(gateway, books):
    raw = await cut_stream(gateway, "sim/cut-6+tokens-20", user="ann")
    assert len(events(raw)) == 6
    told = await until_quiet(books)
    assert told["unfinished"] == told["users"]["ann"]
    assert told["unfinished"]["output_tokens"] == len(said(raw).split()) == 5


async def test_an_endless_line_ends_with_the_connection(gateway, books):
    raw = await cut_stream(gateway, "sim/endless-line")
    assert len(raw) > 64 * 1024 * 1024
    assert b"\n" not in raw[-64 * 1024 * 1024 :]


async def test_an_error_event_comes_in_mid_stream(gateway, books):
    answer = await gateway.post(CHAT, json=streamed("sim/error-mid-stream-4"))
    told = events(answer.content)
    assert (len(told), told[-1]["error"]["type"]) == (5, "server_error")
    assert books()["unfinished"]["output_tokens"] == 3


async def test_a_json_answer_that_is_cut_is_incomplete(gateway):
    with pytest.raises(httpx.RemoteProtocolError):
        await gateway.post(CHAT, json=body("sim/cut"))


async def test_what_hangs_charges_nothing(gateway, books):
    with pytest.raises(httpx.ReadTimeout):
        await gateway.post(CHAT, json=body("sim/hang"), timeout=0.2)
    told = await until_quiet(books)
    assert (told["abandoned"], told["total"]["requests"]) == (1, 0)


async def test_silence_in_mid_stream_is_charged_up_to_it(gateway, books):
    with pytest.raises(httpx.ReadTimeout):
        await gateway.post(CHAT, json=streamed("sim/hang-mid-stream-4"), timeout=0.3)
    assert (await until_quiet(books))["unfinished"]["output_tokens"] == 3


async def test_a_client_that_leaves_is_charged_what_had_been_written(gateway, books):
    async with gateway.stream("POST", CHAT, json=streamed("sim/slow-20ms+tokens-5000")) as answer:
        raw = b""
        async for part in answer.aiter_raw():
            raw += part
            if len(events(raw)) >= 5:
                break
    told = await until_quiet(books)
    assert len(said(raw).split()) <= told["unfinished"]["output_tokens"] < 200


async def test_a_request_that_outlives_a_reset_is_in_the_old_books(gateway, books):
    async with gateway.stream("POST", CHAT, json=streamed("sim/slow-20ms+tokens-10")) as answer:
        assert (await gateway.post("/admin/reset")).status_code == 200
        await answer.aread()
    told = books()
    assert (told["in_flight"], told["total"]["requests"]) == (0, 0)


async def test_status_answers_in_openais_form(gateway):
    answer = await gateway.post(CHAT, json=body("sim/status-429"))
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


async def test_gzip_only_where_it_is_accepted(gateway):
    async with gateway.stream("POST", CHAT, json=body("sim/gzip"), headers={"accept-encoding": "gzip"}) as answer:
        raw = b"".join([part async for part in answer.aiter_raw()])
    assert answer.headers["content-encoding"] == "gzip"
    assert json.loads(gzip.decompress(raw))["choices"]
    plain = await gateway.post(CHAT, json=body("sim/gzip"), headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers


async def test_over_cap_disregards_the_cap(gateway):
    answer = await gateway.post(CHAT, json=body("sim/over-cap+tokens-9", max_tokens=2))
    assert answer.json()["usage"]["completion_tokens"] == 9


async def test_long_streams_have_ten_thousand_tokens(gateway, books):
    await gateway.post(CHAT, json=streamed("sim/long+many-events-per-write"))
    assert books()["total"]["output_tokens"] == 10_000


@pytest.mark.parametrize(
    ("told", "param"),
    [
        ({"messages": []}, "model"),
        ({"model": 5, "messages": []}, "model"),
        ({"model": "m"}, "messages"),
        ({"model": "m", "messages": "x"}, "messages"),
        ({"model": "m", "messages": [], "max_tokens": 0}, "max_tokens"),
        ({"model": "m", "messages": [], "n": 1.5}, "n"),
    ],
)
async def test_bad_requests_name_the_field(gateway, told, param):
    answer = await gateway.post(CHAT, json=told)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


PATHS = [CHAT, "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/files", "/v1/audio/transcriptions", "/x"]


@pytest.mark.parametrize("path", [*PATHS, "/v1/images/generations", "/v1/moderations", "/admin/faults"])
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 50_000,
        b'{"model":"sim/tools","messages":[1,null,[]],"tools":[1],"input":[[[{}]]],"prompt":{"a":1}}',
        b'{"model":"m","messages":[{"role":{},"content":[{"text":1},{"image_url":3}]}],"prompt":[],"input":[null]}',
        b'{"model":"sim/tools","messages":[],"tools":[{"function":{"name":1,"parameters":[]}}],"input":"","prompt":""}',
        b'{"model":"sim/status-999+slow-x+-+","messages":[],"response_format":{"type":"json_schema"},"input":5}',
    ],
)
async def test_no_input_brings_it_down(gateway, path, raw):
    for kind in ("application/json", "multipart/form-data; boundary=x", "text/plain"):
        answer = await gateway.post(path, content=raw, headers={"content-type": kind})
        assert answer.status_code < 500


async def test_requests_are_kept_as_they_came(gateway, gateway_url):
    raw = b'{ "model":"m" , "messages":[ ], "big":12345678901234567890123 }'
    headers = {"x-request-id": "r-1", "content-type": "application/json", "X-Mine": "yes"}
    answer = await gateway.post(CHAT + "?a=b", content=raw, headers=headers)
    assert answer.headers["x-request-id"] == "r-1"
    async with httpx.AsyncClient(base_url=gateway_url) as admin:
        kept = (await admin.get("/admin/requests?last=1")).json()["requests"][0]
    assert (kept["id"], kept["body"].encode(), kept["query"]) == ("r-1", raw, "a=b")
    assert ["x-mine", "yes"] in kept["headers"]
    assert (kept["status"], kept["finished"], kept["charged"]) == (200, True, True)


async def test_unknown_paths_are_echoed_and_charged_as_a_request(gateway, books):
    told = (await gateway.put("/v1/some/where?x=1", json={"a": 1})).json()
    assert (told["method"], told["path"], told["query"], told["bytes"]) == ("PUT", "/v1/some/where", "x=1", 7)
    assert (await gateway.post("/v1/raw", content=b"\x00\xff", headers={"content-type": "a/b"})).content == b"\x00\xff"
    assert books()["total"] == {"requests": 2, "input_tokens": 0, "output_tokens": 0}


@pytest.mark.parametrize("kind", ["status", "refuse", "hang", "delay"])
async def test_faults_concern_as_many_requests_as_told(gateway, kind):
    rule = {"kind": kind, "route": "chat/completions", "status": 500, "seconds": 5, "times": 1}
    assert (await gateway.post("/admin/faults", json=rule)).status_code == 200
    if kind == "status":
        assert (await gateway.post(CHAT, json=body("m"))).status_code == 500
    else:
        with pytest.raises((httpx.ReadTimeout, httpx.RemoteProtocolError)):
            await gateway.post(CHAT, json=body("m"), timeout=0.3)
    assert (await gateway.post(CHAT, json=body("m"))).status_code == 200


async def test_memory_of_requests_is_bounded_in_number_and_bytes():
    app = create_gateway(exact=False, keep_requests=5)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as http:
        for _ in range(8):
            await http.post("/v1/raw", content=b"x" * (20 * 1024 * 1024), headers={"content-type": "a/b"})
    assert (len(app.books.requests), app.books.seen) == (3, 8)


async def test_by_length_charges_by_length():
    app = create_gateway(exact=False)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as http:
        answer = (await http.post(CHAT, json=body("m"))).json()
    assert answer["usage"]["prompt_tokens"] == -(-len('[{"role":"user","content":"hello"}]') // 4)


@pytest.fixture
async def hanging() -> AsyncIterator[list[asyncio.Task[httpx.Response]]]:
    tasks: list[asyncio.Task[httpx.Response]] = []
    yield tasks
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_sigterm_ends_what_hangs_and_hurries_what_is_slow(hanging):
    async with httpx.AsyncClient(timeout=30, headers={"authorization": f"Bearer {KEY}"}) as http:
        with simulator("gateway", "--key", KEY) as url:
            hang = asyncio.create_task(http.post(url + CHAT, json=body("sim/hang")))
            slow = asyncio.create_task(http.post(url + CHAT, json=streamed("sim/slow-1000ms+tokens-2000")))
            hanging += [hang, slow]
            deadline = time.monotonic() + 10
            while (await http.get(url + "/admin/books")).json()["in_flight"] < 2:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)
        with pytest.raises(httpx.RemoteProtocolError):
            await hang
        assert len(said((await slow).content).split()) == 2_000
