import asyncio
import time
from typing import Any

import httpx
import pytest

from sentinel_dev.zion import DEMO_API_KEY, create_zion, make_token
from tests.unit.dev.conftest import simulator

ME = "/api/v1/users/me"
LIMITS = "/api/v1/limits/external/"
ONE = "/api/v1/usage/external/increment"
BATCH = "/api/v1/usage/external/batch-increment"


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


async def add(zion: httpx.AsyncClient, external_id: str = "u1", **told: Any) -> str:
    answer = await zion.post("/admin/users", json={"externalId": external_id, **told})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["token"])


async def limits(zion: httpx.AsyncClient, external_id: str = "u1") -> dict[str, dict[str, Any]]:
    answer = await zion.get(LIMITS + external_id)
    assert answer.status_code == 200
    return {limit["name"]: limit for limit in answer.json()["data"]["limits"]}


def items(*told: tuple[str, str, int]) -> dict[str, Any]:
    return {"increments": [{"externalId": e, "limitName": n, "amount": a} for e, n, a in told]}


async def arm(zion: httpx.AsyncClient, *rules: dict[str, Any]) -> None:
    assert (await zion.post("/admin/faults", json=list(rules))).status_code == 200


async def applied(zion: httpx.AsyncClient, external_id: str = "u1", name: str = "ai_requests") -> int:
    books = (await zion.get("/admin/books")).json()
    return int(books["users"].get(external_id, {}).get(name, {}).get("applied", 0))


async def test_a_valid_token_names_its_user(zion):
    answer = await zion.get(ME, headers=bearer(await add(zion, "u1", email="a@b.c")))
    assert answer.status_code == 200
    data = answer.json()["data"]
    assert (data["externalId"], data["email"], data["emailVerified"]) == ("u1", "a@b.c", True)


async def test_a_user_without_external_id_has_none_in_the_answer(zion):
    token = (await zion.post("/admin/users", json={"id": "x"})).json()["token"]
    assert "externalId" not in (await zion.get(ME, headers=bearer(token))).json()["data"]


async def test_expired_forged_and_revoked_tokens_are_refused(zion, clock):
    token = await add(zion, tokenSeconds=10)
    forged = make_token("u1", "another secret", clock() + 10)
    header, claims, signature = token.split(".")
    unsigned = f"eyJhbGciOiJub25lIn0.{claims}."
    for bad in ("", "x", "a.b.c", forged, unsigned, f"{header}.{claims}.", f"{header}.{claims}.{signature}x", "é"):
        assert (await zion.get(ME, headers={"authorization": f"Bearer {bad}".encode()})).status_code == 401
    assert (await zion.get(ME)).status_code == 401
    clock.now_s += 10
    assert (await zion.get(ME, headers=bearer(token))).status_code == 401
    clock.now_s -= 10
    assert (await zion.get(ME, headers=bearer(token))).status_code == 200
    await zion.post("/admin/users/u1/revoke")
    assert (await zion.get(ME, headers=bearer(token))).status_code == 401


async def test_a_wrong_api_key_is_refused_everywhere(zion):
    await add(zion)
    wrong = {"x-api-key": "nope"}
    assert (await zion.get(LIMITS + "u1", headers=wrong)).status_code == 401
    assert (await zion.post(ONE, json={}, headers=wrong)).status_code == 401
    assert (await zion.post(BATCH, json={}, headers=wrong)).status_code == 401


async def test_limits_may_be_absent_null_negative_zero_and_unknown_to_sentinel(zion):
    await add(zion, limits={"ai_requests": 0, "ai_input_tokens": None, "storage": -1})
    told = await limits(zion)
    assert {name: limit["limit"] for name, limit in told.items()} == {
        "ai_requests": 0,
        "ai_input_tokens": None,
        "storage": -1,
    }
    assert (await zion.get(LIMITS + "nobody")).status_code == 404


async def test_external_ids_may_have_slashes_and_blanks_in_them(zion):
    await add(zion, "a/b c")
    assert (await zion.get(LIMITS + "a%2Fb%20c")).json()["data"]["externalId"] == "a/b c"


@pytest.mark.parametrize(
    ("period", "start", "end"),
    [
        ("DAILY", "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"),
        ("WEEKLY", "2025-12-29T00:00:00Z", "2026-01-05T00:00:00Z"),
        ("MONTHLY", "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"),
        ("NEVER", None, None),
        (None, None, None),
    ],
)
async def test_periods_follow_the_calendar_in_utc(zion, period, start, end):
    await add(zion, limits={"ai_requests": {"limit": 5, "resetPeriod": period}})
    told = (await limits(zion))["ai_requests"]
    assert (told["resetPeriod"], told["periodStart"], told["periodEnd"]) == (period, start, end)


async def test_an_inclusive_end_lasts_up_to_the_next_midnight(zion, clock):
    await add(zion, limits={"ai_requests": {"limit": 5, "used": 3, "resetPeriod": "DAILY", "inclusiveEnd": True}})
    clock.now_s += 86_399.5
    told = (await limits(zion))["ai_requests"]
    assert (told["used"], told["periodEnd"]) == (3, "2026-01-01T23:59:59Z")
    clock.now_s += 0.5
    told = (await limits(zion))["ai_requests"]
    assert (told["used"], told["periodEnd"]) == (0, "2026-01-02T23:59:59Z")


async def test_a_written_period_is_shown_as_written_then_the_calendar_goes_on(zion, clock):
    spec = {"limit": 5, "used": 2, "resetPeriod": "MONTHLY", "periodEnd": "2026-01-01T23:59:59Z"}
    await add(zion, limits={"ai_requests": spec})
    told = (await limits(zion))["ai_requests"]
    assert (told["periodStart"], told["periodEnd"]) == (None, "2026-01-01T23:59:59Z")
    clock.now_s += 86_399.5
    assert (await limits(zion))["ai_requests"]["used"] == 2
    clock.now_s += 0.5
    told = (await limits(zion))["ai_requests"]
    assert (told["used"], told["periodEnd"]) == (0, "2026-02-01T00:00:00Z")


async def test_a_period_of_seconds_rolls_over_again_and_again(zion, clock):
    await add(zion, limits={"ai_requests": {"limit": 5, "seconds": 5}})
    for _ in range(3):
        await zion.post(BATCH, json=items(("u1", "ai_requests", 2)))
        assert (await limits(zion))["ai_requests"]["used"] == 2
        clock.now_s += 5
        assert (await limits(zion))["ai_requests"]["used"] == 0
    total = (await zion.get("/admin/books")).json()["users"]["u1"]["ai_requests"]
    assert (total["applied"], list(total["periods"].values())) == (6, [2, 2, 2])


async def test_a_single_increment_answers_with_the_limit_after_it(zion):
    await add(zion, limits={"ai_requests": 5})
    answer = await zion.post(ONE, json={"externalId": "u1", "limitName": "ai_requests"})
    assert answer.json()["data"]["used"] == 1
    answer = await zion.post(ONE, json={"externalId": "u1", "limitName": "ai_requests", "amount": 7})
    assert (answer.json()["data"]["used"], answer.json()["data"]["remaining"]) == (8, -3)


async def test_unknown_users_and_limits_fail_alone_and_over_limit_is_recorded(zion):
    await add(zion, limits={"ai_requests": 1})
    told = items(("u1", "ai_requests", 5), ("ghost", "ai_requests", 1), ("u1", "ai_output_tokens", 1))
    data = (await zion.post(BATCH, json=told)).json()["data"]
    assert (data["processed"], data["failed"]) == (1, 2)
    assert [result.get("newValue") for result in data["results"]] == [5, None, None]
    assert [result.get("error") for result in data["results"]] == [None, "User not found", "Limit not found"]
    for item in told["increments"][1:]:
        assert (await zion.post(ONE, json=item)).status_code == 404


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"increments": []}', b'{"increments": [{}]}', b"\xff", b"[" * 100_000]
)
async def test_bodies_that_make_no_sense_are_400(zion, body):
    for route in (ONE, BATCH):
        answer = await zion.post(route, content=body)
        assert (answer.status_code, answer.json()["success"]) == (400, False)


@pytest.mark.parametrize("amount", [0, -1, 1.5, "1", True])
async def test_amounts_that_are_no_positive_whole_number_apply_nothing(zion, amount):
    await add(zion)
    told = items(("u1", "ai_requests", 1))
    told["increments"].append({"externalId": "u1", "limitName": "ai_requests", "amount": amount})
    assert (await zion.post(BATCH, json=told)).status_code == 400
    assert await applied(zion) == 0


async def test_a_thousand_items_pass_and_one_more_is_413(zion):
    await add(zion)
    one = ("u1", "ai_requests", 1)
    assert (await zion.post(BATCH, json=items(*[one] * 1_000))).status_code == 200
    assert (await zion.post(BATCH, json=items(*[one] * 1_001))).status_code == 413
    assert await applied(zion) == 1_000


async def test_a_key_that_comes_again_is_answered_again_and_applied_once(zion):
    await add(zion)
    told, key = items(("u1", "ai_requests", 3)), {"idempotency-key": "b1"}
    first = await zion.post(BATCH, json=told, headers=key)
    again = await zion.post(BATCH, json=told, headers=key)
    assert first.content == again.content
    assert await applied(zion) == 3
    other = await zion.post(BATCH, json=items(("u1", "ai_requests", 4)), headers=key)
    assert (other.status_code, await applied(zion)) == (422, 3)
    counts = (await zion.get("/admin/books")).json()["keys"]
    assert counts == {"distinct": 1, "doubled": 2, "suppressed": 1, "conflicting": 1, "missing": 0}


async def test_without_idempotency_the_books_tell_what_was_doubled(clock):
    transport = httpx.ASGITransport(create_zion(api_key="k", now=clock, honour_keys=False))
    async with httpx.AsyncClient(transport=transport, base_url="http://zion", headers={"x-api-key": "k"}) as zion:
        await add(zion)
        for _ in range(2):
            await zion.post(BATCH, json=items(("u1", "ai_requests", 3)), headers={"idempotency-key": "b1"})
        books = (await zion.get("/admin/books")).json()
    assert (books["applied"], books["doubled"]) == ({"ai_requests": 6}, {"ai_requests": 3})


async def test_the_ledger_has_every_increment_with_its_key_and_period(zion):
    await add(zion)
    await zion.post(BATCH, json=items(("u1", "ai_requests", 3)), headers={"idempotency-key": "b1"})
    entry = (await zion.get("/admin/ledger")).json()["entries"][0]
    assert (entry["key"], entry["amount"], entry["newValue"]) == ("b1", 3, 3)
    assert entry["period"] == "2026-01-01T00:00:00Z"
    assert (await zion.get("/admin/ledger?from=1")).json()["entries"] == []


async def test_single_limits_change_and_the_rest_of_them_stays(zion):
    await add(zion, limits={"ai_requests": {"limit": 5, "used": 2, "resetPeriod": "WEEKLY"}, "ai_input_tokens": 9})
    change = {"limits": {"ai_requests": 1}, "remove": ["ai_input_tokens"]}
    assert (await zion.patch("/admin/users/u1", json=change)).status_code == 200
    told = await limits(zion)
    assert list(told) == ["ai_requests"]
    assert (told["ai_requests"]["limit"], told["ai_requests"]["used"]) == (1, 2)
    assert told["ai_requests"]["resetPeriod"] == "WEEKLY"


async def test_calls_are_counted_by_route_and_user(zion):
    token = await add(zion)
    await zion.get(ME, headers=bearer(token))
    await zion.get(LIMITS + "u1")
    await zion.get(LIMITS + "ghost")
    calls = (await zion.get("/admin/calls")).json()
    assert calls["me"]["users"] == {"u1": 1}
    assert calls["limits"]["users"] == {"u1": 1, "ghost": 1}
    assert calls["limits"]["statuses"] == {"200": 1, "404": 1}
    assert len(calls["limits"]["at"]) == 2


async def test_a_status_fault_applies_nothing_and_ends_after_its_times(zion):
    await add(zion)
    await arm(zion, {"route": "batch", "kind": "status", "status": 429, "retry_after": 2, "times": 1})
    answer = await zion.post(BATCH, json=items(("u1", "ai_requests", 1)))
    assert (answer.status_code, answer.headers["retry-after"], await applied(zion)) == (429, "2", 0)
    assert (await zion.post(BATCH, json=items(("u1", "ai_requests", 1)))).status_code == 200


async def test_applied_then_silent_has_applied_and_the_key_saves_it(zion):
    await add(zion)
    await arm(zion, {"route": "batch", "kind": "applied_then_silent", "times": 1})
    told, key = items(("u1", "ai_requests", 3)), {"idempotency-key": "b1"}
    with pytest.raises(httpx.RemoteProtocolError):
        await zion.post(BATCH, json=told, headers=key)
    assert await applied(zion) == 3
    assert (await zion.post(BATCH, json=told, headers=key)).json()["data"]["processed"] == 1
    assert await applied(zion) == 3


@pytest.mark.parametrize(
    ("rule", "permanent"), [({}, False), ({"permanent": True}, True), ({"external_id": "u1"}, False)]
)
async def test_partial_failures_spare_the_other_items(zion, rule, permanent):
    await add(zion)
    await add(zion, "u2")
    await arm(zion, {"kind": "partial", "limit_name": "ai_requests", **rule})
    told = items(("u1", "ai_requests", 1), ("u1", "ai_input_tokens", 1))
    results = (await zion.post(BATCH, json=told)).json()["data"]["results"]
    assert [result["success"] for result in results] == [False, True]
    assert (results[0]["error"] == "User not found") is permanent
    assert await applied(zion) == 0


async def test_a_seed_makes_the_same_items_fail_again(zion):
    await add(zion)
    told = items(*[("u1", "ai_requests", 1)] * 50)
    runs = []
    for _ in range(2):
        await zion.delete("/admin/faults")
        await arm(zion, {"kind": "partial", "probability": 0.5, "seed": 7})
        results = (await zion.post(BATCH, json=told)).json()["data"]["results"]
        runs.append([result["success"] for result in results])
    assert runs[0] == runs[1]
    assert 0 < sum(runs[0]) < 50


async def test_garbage_and_missing_items_hide_what_was_applied(zion):
    await add(zion)
    told = items(*[("u1", "ai_requests", 1)] * 4)
    await arm(zion, {"kind": "garbage", "times": 1})
    assert (await zion.post(BATCH, json=told)).text.startswith("<html>")
    await arm(zion, {"kind": "missing_items", "times": 1})
    assert len((await zion.post(BATCH, json=told)).json()["data"]["results"]) == 2
    assert await applied(zion) == 8


@pytest.mark.parametrize("status", [404, 405])
async def test_without_a_batch_endpoint_the_single_one_works(zion, status):
    await add(zion)
    await arm(zion, {"kind": "no_batch", "status": status})
    answer = await zion.post(BATCH, json=items(("u1", "ai_requests", 1)))
    assert (answer.status_code, "success" in answer.json()) == (status, False)
    assert (await zion.post(ONE, json={"externalId": "u1", "limitName": "ai_requests"})).status_code == 200


async def test_malformed_limits_are_malformed(zion):
    await add(zion)
    await arm(zion, {"route": "limits", "kind": "malformed_limits"})
    assert (await limits(zion))["ai_requests"]["limit"] == "plenty"


@pytest.mark.parametrize(
    "rule", [{"kind": "fire"}, {"kind": "status", "route": "nowhere"}, {"kind": "status", "time": 1}, [1], "x", None]
)
async def test_a_rule_that_makes_no_sense_is_400(zion, rule):
    assert (await zion.post("/admin/faults", json=rule)).status_code == 400


@pytest.mark.parametrize("told", [{}, {"externalId": 5}, {"externalId": "u", "limits": {"x": {"periodEnd": "soon"}}}])
async def test_a_user_that_makes_no_sense_is_400(zion, told):
    assert (await zion.post("/admin/users", json=told)).status_code == 400


async def test_reset_forgets_everything(zion):
    await add(zion)
    await zion.post(BATCH, json=items(("u1", "ai_requests", 1)))
    await arm(zion, {"kind": "status"})
    await zion.post("/admin/reset")
    assert (await zion.get(LIMITS + "u1")).status_code == 404
    assert (await zion.get("/admin/books")).json()["users"] == {}


@pytest.mark.parametrize(
    ("rule", "raised", "applies"),
    [
        ({"kind": "refuse"}, httpx.RemoteProtocolError, 0),
        ({"kind": "hang"}, httpx.ReadTimeout, 0),
        ({"kind": "delay", "seconds": 0.6}, httpx.ReadTimeout, 3),
        ({"kind": "applied_then_silent"}, httpx.RemoteProtocolError, 3),
        ({"kind": "applied_then_silent", "hang": True}, httpx.ReadTimeout, 3),
    ],
)
async def test_over_the_network_silence_is_silence_and_stopping_is_clean(rule, raised, applies):
    with simulator("zion") as url:
        async with httpx.AsyncClient(base_url=url, headers={"x-api-key": DEMO_API_KEY}) as zion:
            await add(zion)
            await arm(zion, {"route": "batch", "times": 1, **rule})
            with pytest.raises(raised):
                await zion.post(BATCH, json=items(("u1", "ai_requests", 3)), timeout=0.3)
            deadline = time.monotonic() + 5
            while await applied(zion) != applies:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)
            statuses = (await zion.get("/admin/calls")).json()["batch"]["statuses"]
    assert set(statuses) <= {"0", "200"}
