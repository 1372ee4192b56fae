from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from random import Random
from typing import Any, Self

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sentinel_shared.breaker import Breaker, BreakerState, ZionBudget
from sentinel_shared.contracts import Caller, Increment, IncrementResult, LimitName, LimitSnapshot, ResetPeriod
from sentinel_shared.errors import (
    MalformedLimits,
    SentinelError,
    SettingsError,
    UnknownUser,
    ZionRefusedKey,
    ZionRefusedToken,
    ZionRejected,
    ZionRouteMissing,
    ZionUnavailable,
)
from sentinel_shared.units import parse_rfc3339
from sentinel_shared.zion_answers import refused
from sentinel_shared.zion_client import ZionClient
from tests.unit.shared.clocks import ManualClock

NOW = "2026-02-10T12:00:00Z"
Answer = httpx.Response | Exception | Callable[[httpx.Request], Any]
BATCH = [
    {"externalId": "u/1", "limitName": "ai_requests", "amount": 2},
    {"externalId": "u2", "limitName": "ai_input_tokens", "amount": 7},
]


class Zion:
    """Answers every request with what the test says, and keeps the requests."""

    def __init__(self, answer: Answer, *, slots: int = 4, kept: int = 1, timeout_s: float = 5.0) -> None:
        self.requests: list[httpx.Request] = []
        self.clock = ManualClock(parse_rfc3339(NOW))
        self.breaker = Breaker(self.clock, Random(1))
        self.budget = ZionBudget(slots, kept=kept)
        self.answer = answer
        self.client = ZionClient(
            "https://zion.example.com/base/",
            "key-canary",
            breaker=self.breaker,
            budget=self.budget,
            clock=self.clock,
            timeout_s=timeout_s,
            transport=httpx.MockTransport(self._respond),
        )

    async def _respond(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answer(request) if callable(self.answer) else self.answer
        if asyncio.iscoroutine(answer):
            answer = await answer
        if isinstance(answer, Exception):
            raise answer
        # A fresh copy: the client closes what it has read.
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)


def ok(data: Any) -> httpx.Response:
    return httpx.Response(200, json={"success": True, "data": data})


def limit(name: str = "ai_requests", **fields: Any) -> dict[str, Any]:
    told = {
        "limitId": "l1",
        "name": name,
        "displayName": "AI",
        "unit": "requests",
        "limit": 100,
        "used": 5,
        "remaining": 95,
    }
    return {**told, "resetPeriod": "MONTHLY", "periodStart": None, "periodEnd": None, **fields}


def limits(*entries: Any) -> httpx.Response:
    return ok({"userId": "1", "externalId": "u1", "limits": list(entries)})


def results(*changes: dict[str, Any]) -> httpx.Response:
    items = [
        {"externalId": item["externalId"], "limitName": item["limitName"], "success": True, **change}
        for item, change in zip(BATCH, changes, strict=True)
    ]
    return ok({"processed": len(items), "failed": 0, "results": items})


async def send_batch(zion: Zion) -> list[IncrementResult]:
    body = json.dumps({"increments": BATCH}).encode()
    return await zion.client.increment_batch(body, "batch-1", len(BATCH))


async def send_one(zion: Zion) -> IncrementResult:
    return await zion.client.increment(Increment("u/1", LimitName.REQUESTS, 3), "batch-1:0")


async def ask_caller(zion: Zion) -> Caller:
    return await zion.client.caller("jwt-canary")


async def ask_limits(zion: Zion) -> tuple[LimitSnapshot, ...]:
    return await zion.client.limits("u1")


EVERY_CALL = [ask_caller, ask_limits, send_batch, send_one]


# --- callers ---


async def test_a_caller_is_who_zion_says_the_token_belongs_to():
    zion = Zion(ok({"id": "7", "email": "a@b.c", "externalId": "ext-7", "emailVerified": True, "createdAt": NOW}))
    assert await ask_caller(zion) == Caller("7", "ext-7")
    request = zion.requests[0]
    assert request.url == "https://zion.example.com/base/api/v1/users/me"
    assert request.headers["authorization"] == "Bearer jwt-canary"
    assert "x-api-key" not in request.headers


@pytest.mark.parametrize("told", [{}, {"externalId": None}, {"externalId": ""}])
async def test_a_caller_without_an_external_id_is_known_but_cannot_be_metered(told):
    assert await ask_caller(Zion(ok({"id": "7", **told}))) == Caller("7", None)


async def test_a_bad_token_is_refused_and_counts_as_an_answer():
    zion = Zion(httpx.Response(401, json={"success": False}))
    for _ in range(30):
        with pytest.raises(ZionRefusedToken):
            await ask_caller(zion)
    assert zion.breaker.state is BreakerState.CLOSED


@pytest.mark.parametrize("jwt", ["", "a b", "naïve", "line\r\nx-api-key: stolen", "\ud800"])
async def test_a_token_that_no_header_can_carry_is_refused_without_asking(jwt):
    zion = Zion(ok({"id": "7"}))
    with pytest.raises(ZionRefusedToken):
        await zion.client.caller(jwt)
    assert zion.requests == []


async def test_a_cookie_set_for_one_caller_never_goes_along_with_the_next():
    answer = ok({"id": "7"})
    answer.headers["set-cookie"] = "session=first-caller; Path=/"
    zion = Zion(answer)
    await ask_caller(zion)
    await ask_caller(zion)
    assert "cookie" not in zion.requests[1].headers


# --- limits ---


async def test_limits_are_read_in_their_one_order_and_foreign_ones_are_ignored():
    zion = Zion(limits(limit("ai_output_tokens"), {"name": "seats", "limit": "many"}, limit("ai_requests", used=6)))
    snapshots = await ask_limits(zion)
    assert [snapshot.name for snapshot in snapshots] == [LimitName.REQUESTS, LimitName.OUTPUT_TOKENS]
    assert snapshots[0] == LimitSnapshot(
        name=LimitName.REQUESTS,
        limit=100,
        used=6,
        reset_period=ResetPeriod.MONTHLY,
        period_start_s=int(parse_rfc3339("2026-02-01T00:00:00Z")),
        period_end_s=int(parse_rfc3339("2026-03-01T00:00:00Z")),
    )
    assert zion.requests[0].headers["x-api-key"] == "key-canary"


async def test_zions_own_period_goes_before_the_calendars():
    told = limit(periodStart="2026-02-03T00:00:00Z", periodEnd="2026-02-20T23:59:59Z")
    (snapshot,) = await ask_limits(Zion(limits(told)))
    assert snapshot.period_start_s == parse_rfc3339("2026-02-03T00:00:00Z")
    assert snapshot.period_end_s == parse_rfc3339("2026-02-21T00:00:00Z")


async def test_an_unknown_kind_of_period_resets_by_its_own_end():
    (snapshot,) = await ask_limits(Zion(limits(limit(resetPeriod="HOURLY", periodEnd="2026-02-10T13:00:00Z"))))
    assert snapshot.reset_period is None
    assert snapshot.period_end_s == parse_rfc3339("2026-02-10T13:00:00Z")


@pytest.mark.parametrize("told", [{"resetPeriod": "NEVER"}, {"resetPeriod": None}])
async def test_what_never_resets_has_no_end(told):
    (snapshot,) = await ask_limits(Zion(limits(limit(**told))))
    assert (snapshot.period_start_s, snapshot.period_end_s) == (None, None)


@pytest.mark.parametrize(
    ("told", "known"), [(None, None), (-1, None), (-0.5, None), (0, 0), (10.0, 10), (1e3, 1000), (2**63, 2**53 - 1)]
)
async def test_null_and_negative_are_unlimited_and_whole_floats_are_numbers(told, known):
    (snapshot,) = await ask_limits(Zion(limits(limit(limit=told))))
    assert snapshot.limit == known


async def test_used_may_be_a_whole_float_and_below_zero_is_zero():
    first, second = await ask_limits(Zion(limits(limit(used=12.0), limit("ai_input_tokens", used=-4))))
    assert (first.used, second.used) == (12, 0)


async def test_absent_optional_fields_do_no_harm():
    (snapshot,) = await ask_limits(Zion(limits({"name": "ai_requests", "limit": 3, "used": 1})))
    assert (snapshot.limit, snapshot.used, snapshot.reset_period, snapshot.period_end_s) == (3, 1, None, None)


async def test_no_limits_at_all_is_an_answer():
    assert await ask_limits(Zion(limits())) == ()


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (limit(limit="100"), "ai_requests"),
        (limit(limit=10.5), "limit is not a whole number"),
        (limit(used=None), "used"),
        (limit(used=True), "used"),
        (limit(resetPeriod="HOURLY"), "unknown resetPeriod 'HOURLY' without a periodEnd"),
        (limit(periodEnd="2026-02-20"), "not an RFC 3339 date-time"),
        (limit(periodStart="2026-02-20T00:00:00Z", periodEnd="2026-02-10T00:00:00Z"), "ends before it starts"),
        ({"name": "ai_requests", "used": 1}, "missing required field `limit`"),
        ({"limit": 1, "used": 1}, "without a name"),
        (None, "without a name"),
    ],
)
async def test_limits_that_make_no_sense_say_in_one_line_what_is_wrong_and_leave_the_breaker_alone(entry, says):
    zion = Zion(limits(limit("ai_input_tokens"), entry))
    for _ in range(30):
        with pytest.raises(MalformedLimits, match=says) as refused_:
            await ask_limits(zion)
        assert "\n" not in str(refused_.value)
    assert zion.breaker.state is BreakerState.CLOSED


async def test_a_limit_told_twice_is_malformed():
    with pytest.raises(MalformedLimits, match="twice"):
        await ask_limits(Zion(limits(limit(), limit())))


async def test_another_users_limits_are_malformed():
    with pytest.raises(MalformedLimits, match="another user"):
        await Zion(limits(limit())).client.limits("u2")


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"null", b'{"success": true}', b'{"success": false}', b"[" * 9999]
)
async def test_garbage_instead_of_limits_is_malformed(body):
    with pytest.raises(MalformedLimits):
        await ask_limits(Zion(httpx.Response(200, content=body)))


async def test_an_unknown_user_is_told_apart_from_trouble():
    zion = Zion(httpx.Response(404, json={"success": False}))
    with pytest.raises(UnknownUser):
        await ask_limits(zion)
    with pytest.raises(UnknownUser):
        await zion.client.limits("")
    assert len(zion.requests) == 1


@pytest.mark.parametrize(
    ("external_id", "segment"),
    [
        ("a/b", "a%2Fb"),
        ("a?b#c", "a%3Fb%23c"),
        ("..", "%2E%2E"),
        ("../../users/me", "..%2F..%2Fusers%2Fme"),
        ("100%", "100%25"),
        ("ü ", "%C3%BC%20"),
        ("a.b@c", "a.b%40c"),
    ],
)
async def test_an_external_id_is_one_step_of_the_path_whatever_is_in_it(external_id, segment):
    zion = Zion(ok({"externalId": external_id, "limits": []}))
    await zion.client.limits(external_id)
    assert zion.requests[0].url.raw_path.decode() == f"/base/api/v1/limits/external/{segment}"


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=9),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["success", "data", "limits", "name", "limit", "used", "results", "periodEnd"]),
                inner,
                max_size=4,
            )
        ),
    )
)
async def test_no_answer_whatever_raises_anything_unforeseen(answer):
    body = json.dumps(answer, allow_nan=True).encode()
    for wrapped in (body, b'{"success": true, "data": ' + body + b"}"):
        for call in EVERY_CALL:
            try:
                await call(Zion(httpx.Response(200, content=wrapped)))
            except SentinelError as error:
                assert "\n" not in str(error)  # noqa: PT017 -- that nothing else comes is what is tested


# --- increments ---


async def test_a_batch_goes_out_byte_by_byte_under_its_key_and_each_item_has_its_result():
    zion = Zion(results({"newValue": 12.0}, {"success": False, "error": "User not found"}))
    assert await send_batch(zion) == [
        IncrementResult(applied=True, permanent=False, new_value=12, error=None),
        IncrementResult(applied=False, permanent=True, new_value=None, error="User not found"),
    ]
    request = zion.requests[0]
    assert request.url.path == "/base/api/v1/usage/external/batch-increment"
    assert request.content == json.dumps({"increments": BATCH}).encode()
    assert request.headers["idempotency-key"] == "batch-1"
    assert request.headers["x-api-key"] == "key-canary"
    assert request.headers["content-type"] == "application/json"


@pytest.mark.parametrize("new_value", [None, "12", -1, 1.5, True, {}])
async def test_a_new_value_that_makes_no_sense_does_not_hold_up_the_batch(new_value):
    first, _ = await send_batch(Zion(results({"newValue": new_value}, {})))
    assert first == IncrementResult(applied=True, permanent=False, new_value=None, error=None)


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, content=b""),
        httpx.Response(200, content=b"<html>maintenance</html>"),
        httpx.Response(200, json={"success": False, "data": None}),
        ok({"processed": 2, "failed": 0}),
        ok({"results": []}),
        ok({"results": [{**BATCH[0], "success": True}]}),
        ok({"results": [{**BATCH[1], "success": True}, {**BATCH[0], "success": True}]}),
        ok({"results": [{**BATCH[0], "success": True}, {**BATCH[1], "externalId": "u3", "success": True}]}),
        ok({"results": [{**item, "success": True} for item in (*BATCH, BATCH[0])]}),
        ok({"results": [{**BATCH[0], "success": "yes"}, {**BATCH[1], "success": True}]}),
        httpx.Response(302, headers={"location": "https://elsewhere.example.com"}),
        httpx.Response(409),
        httpx.Response(500),
        httpx.Response(502, content=b"<html>"),
        httpx.ReadTimeout("late"),
        httpx.ReadError("reset"),
        httpx.WriteError("reset"),
        httpx.RemoteProtocolError("Server disconnected"),
    ],
)
async def test_the_fate_of_a_batch_without_a_whole_answer_is_unknown(answer):
    with pytest.raises(ZionUnavailable) as raised:
        await send_batch(Zion(answer))
    assert raised.value.outcome_unknown


@pytest.mark.parametrize(
    "error", [httpx.ConnectError("refused"), httpx.ConnectTimeout("late"), httpx.ProxyError("403")]
)
@pytest.mark.parametrize("call", EVERY_CALL)
async def test_what_never_reached_zion_was_not_applied(call, error):
    with pytest.raises(ZionUnavailable) as raised:
        await call(Zion(error))
    assert not raised.value.outcome_unknown


@pytest.mark.parametrize(
    ("told", "retry_after_s"),
    [
        ("7", 7),
        ("999999", 3600),
        ("Tue, 10 Feb 2026 12:00:30 GMT", 30),
        ("Tue, 10 Feb 2026 11:00:00 GMT", 0),
        ("soon", None),
        ("", None),
        ("-3", None),
        ("1e9", None),
    ],
)
async def test_429_says_when_to_come_back_and_keeps_the_batch_frozen(told, retry_after_s):
    with pytest.raises(ZionUnavailable) as raised:
        await send_batch(Zion(httpx.Response(429, headers={"retry-after": told})))
    assert raised.value.retry_after_s == retry_after_s
    assert raised.value.outcome_unknown


@pytest.mark.parametrize("status", [400, 413, 422])
@pytest.mark.parametrize("call", [send_batch, send_one])
async def test_a_rejected_request_says_its_status_and_zions_reason(call, status):
    answer = httpx.Response(status, json={"success": False, "error": {"message": "amount\nmust be " + "x" * 999}})
    with pytest.raises(ZionRejected, match="amount must be") as raised:
        await call(Zion(answer))
    assert raised.value.status == status
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("call", [send_batch, send_one])
async def test_a_refused_key_opens_the_breaker_at_once(call, status):
    zion = Zion(httpx.Response(status, json={"success": False}))
    with pytest.raises(ZionRefusedKey):
        await call(zion)
    assert zion.breaker.state is BreakerState.OPEN


async def test_a_key_refused_for_limits_leaves_callers_their_way():
    zion = Zion(httpx.Response(401))
    for _ in range(30):
        with pytest.raises(ZionRefusedKey):
            await ask_limits(zion)
    assert zion.breaker.state is BreakerState.CLOSED


@pytest.mark.parametrize("status", [404, 405])
@pytest.mark.parametrize("body", [b"", b"<html>Not Found</html>", b'{"detail": "Not Found"}'])
@pytest.mark.parametrize("call", [send_batch, send_one])
async def test_an_older_deployment_without_the_route_is_told_apart(call, status, body):
    with pytest.raises(ZionRouteMissing):
        await call(Zion(httpx.Response(status, content=body)))


async def test_a_404_of_the_batch_is_about_its_route_even_in_zions_envelope():
    with pytest.raises(ZionRouteMissing):
        await send_batch(Zion(httpx.Response(404, json={"success": False, "error": "Not found"})))


@pytest.mark.parametrize("error", ["User not found", {"code": "USER_NOT_FOUND"}, "Unknown limit ai_requests", None])
async def test_a_404_in_zions_envelope_to_a_single_increment_is_about_its_user_or_limit(error):
    result = await send_one(Zion(httpx.Response(404, json={"success": False, "error": error})))
    assert (result.applied, result.permanent) == (False, True)


async def test_a_404_in_zions_envelope_that_speaks_of_the_route_is_about_the_route():
    answer = httpx.Response(404, json={"success": False, "error": "Route POST:/api/v1/usage not found"})
    with pytest.raises(ZionRouteMissing):
        await send_one(Zion(answer))


async def test_a_single_increment_names_user_limit_and_amount_and_learns_what_is_used_now():
    zion = Zion(ok(limit(used=8)))
    assert await send_one(zion) == IncrementResult(applied=True, permanent=False, new_value=8, error=None)
    assert json.loads(zion.requests[0].content) == {"externalId": "u/1", "limitName": "ai_requests", "amount": 3}
    assert zion.requests[0].headers["idempotency-key"] == "batch-1:0"
    assert zion.requests[0].url.path == "/base/api/v1/usage/external/increment"


async def test_a_single_increment_without_a_limit_in_the_answer_is_applied_all_the_same():
    for data in (None, {}, limit("ai_input_tokens"), "done"):
        result = await send_one(Zion(ok(data)))
        assert (result.applied, result.new_value) == (True, None)


@pytest.mark.parametrize("body", [b"", b"{}", b'{"increments": []}', b'{"increments": [{"externalId": "u"}]}'])
async def test_a_batch_that_is_itself_malformed_is_rejected_without_sending(body):
    zion = Zion(results({}, {}))
    with pytest.raises(ZionRejected, match="not sent"):
        await zion.client.increment_batch(body, "batch-1", 2)
    assert zion.requests == []


@pytest.mark.parametrize(
    "error",
    [
        "User not found",
        "user u1 does not exist",
        "Unknown limit",
        "LIMIT_NOT_FOUND",
        "invalidLimitName",
        "No such user",
        "Not found",
        "Invalid externalId",
        "amount is invalid",
    ],
)
def test_what_is_not_there_never_will_be(error):
    assert refused(error).permanent


@pytest.mark.parametrize(
    "error",
    [
        "",
        "Unknown error",
        "Internal error",
        "limit service timed out",
        "database row for user not found, try again",
        "Rate limit exceeded",
        "Invalid response from cache",
        "conflict",
        "User lock timeout",
    ],
)
def test_what_may_pass_is_sent_again(error):
    assert not refused(error).permanent


# --- breaker, budget, time ---


@pytest.mark.parametrize("answer", [httpx.Response(503), httpx.Response(429), httpx.ConnectError("refused")])
@pytest.mark.parametrize("call", EVERY_CALL)
async def test_a_zion_in_trouble_is_left_alone_after_twenty_calls(call, answer):
    zion = Zion(answer)
    for _ in range(25):
        with pytest.raises(ZionUnavailable):
            await call(zion)
    assert len(zion.requests) == 20
    with pytest.raises(ZionUnavailable) as raised:
        await call(zion)
    assert not raised.value.outcome_unknown
    assert raised.value.retry_after_s == zion.breaker.retry_after_s > 0


async def test_one_probe_finds_out_that_zion_is_back():
    zion = Zion(httpx.Response(503))
    for _ in range(20):
        with pytest.raises(ZionUnavailable):
            await ask_limits(zion)
    zion.answer = limits(limit())
    zion.clock.advance(1)
    assert len(await ask_limits(zion)) == 1
    assert zion.breaker.state is BreakerState.CLOSED


async def hang(_: httpx.Request) -> httpx.Response:
    await asyncio.Event().wait()
    raise AssertionError


@pytest.mark.parametrize("call", EVERY_CALL)
async def test_an_answer_that_never_comes_is_given_up_with_an_unknown_outcome(call):
    with pytest.raises(ZionUnavailable, match="within") as raised:
        await call(Zion(hang, timeout_s=0.02))
    assert raised.value.outcome_unknown


async def test_who_got_no_slot_in_time_has_sent_nothing():
    zion = Zion(results({}, {}), slots=2, timeout_s=0.02)
    async with zion.budget.slot(), zion.budget.slot():
        with pytest.raises(ZionUnavailable) as raised:
            await send_batch(zion)
    assert not raised.value.outcome_unknown
    assert zion.requests == []
    assert len(await send_batch(zion)) == 2


async def test_a_cancelled_probe_lets_the_next_one_go():
    zion = Zion(httpx.Response(503))
    for _ in range(20):
        with pytest.raises(ZionUnavailable):
            await ask_limits(zion)
    zion.clock.advance(1)
    zion.answer = hang
    probe = asyncio.create_task(ask_limits(zion))
    while len(zion.requests) < 21:
        await asyncio.sleep(0)
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    zion.answer = limits()
    assert await ask_limits(zion) == ()


async def test_background_refreshes_leave_a_slot_for_callers():
    zion = Zion(lambda request: hang(request) if "limits" in request.url.path else ok({"id": "7"}), slots=3, kept=1)
    refreshes = [asyncio.create_task(zion.client.limits("u1", background=True)) for _ in range(5)]
    while len(zion.requests) < 2:
        await asyncio.sleep(0)
    assert (await ask_caller(zion)).user_id == "7"
    assert len(zion.requests) == 3
    for refresh in refreshes:
        refresh.cancel()
    await asyncio.gather(*refreshes, return_exceptions=True)


@pytest.mark.parametrize("status", [302, 400, 401, 404, 429, 500])
@pytest.mark.parametrize("call", EVERY_CALL)
async def test_no_error_has_a_token_a_key_or_a_url_in_its_text(call, status):
    zion = Zion(lambda r: httpx.Response(status, json={"error": str(dict(r.headers)), "url": str(r.url)}))
    with pytest.raises(SentinelError) as raised:
        await call(zion)
    text = f"{raised.value!s} {raised.value!r} {raised.value.__cause__!r}"
    assert "canary" not in text
    assert "https://" not in text


# --- over real connections ---


class Wire:
    """A bare HTTP server on a free port: one answer for all, connections counted, request heads kept."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self.connections = 0
        self.heads: list[bytes] = []
        self._serving: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await asyncio.gather(*self._serving)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._serving.append(asyncio.create_task(self._converse(reader, writer)))

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                self.heads.append(await reader.readuntil(b"\r\n\r\n"))
                writer.write(self._answer)
                if not self._answer.startswith(b"HTTP"):
                    break
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


ME = b'{"success": true, "data": {"id": "7"}}'
ME_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(ME), ME)


def client_of(url: str) -> ZionClient:
    clock = ManualClock()
    return ZionClient(url, "key", breaker=Breaker(clock, Random(1)), budget=ZionBudget(4, kept=1), clock=clock)


async def test_one_connection_carries_many_requests():
    async with Wire(ME_ANSWER) as wire, client_of(f"http://127.0.0.1:{wire.port}") as client:
        for _ in range(3):
            assert (await client.caller("jwt")).user_id == "7"
    assert (wire.connections, len(wire.heads)) == (1, 3)


async def test_a_port_where_nobody_listens_was_certainly_told_nothing():
    async with Wire(ME_ANSWER) as wire:
        port = wire.port
    async with client_of(f"http://127.0.0.1:{port}") as client:
        with pytest.raises(ZionUnavailable) as raised:
            await client.caller("jwt")
    assert not raised.value.outcome_unknown


async def test_a_connection_that_closes_without_an_answer_leaves_the_outcome_open():
    async with Wire(b"") as wire, client_of(f"http://127.0.0.1:{wire.port}") as client:
        with pytest.raises(ZionUnavailable) as raised:
            await client.increment(Increment("u", LimitName.REQUESTS, 1), "key")
    assert raised.value.outcome_unknown


async def test_a_proxy_of_the_environment_is_used(monkeypatch):
    async with Wire(ME_ANSWER) as wire:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{wire.port}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        async with client_of("http://zion.invalid") as client:
            assert (await client.caller("jwt")).user_id == "7"
    assert wire.heads[0].startswith(b"GET http://zion.invalid/api/v1/users/me HTTP/1.1")


@pytest.mark.parametrize("url", ["socks5://proxy:1080", "ftp://proxy"])
def test_a_proxy_that_is_of_no_use_is_named_at_once(monkeypatch, url):
    monkeypatch.setenv("HTTPS_PROXY", url)
    with pytest.raises(SettingsError, match="HTTPS_PROXY"):
        client_of("https://zion.invalid")
