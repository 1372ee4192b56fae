"""Usage reaches Zion's books once, whatever Zion answers on the way; what it refuses for good is an operator's."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import httpx
import pytest

from tests.support.system import eventually, script

BODY = {"model": "openai/gpt-4o", "messages": [{"role": "user", "content": "say 6 tokens"}]}

TROUBLES: dict[str, dict[str, Any]] = {
    "500": {"kind": "status", "status": 500, "route": "batch"},
    "429 with Retry-After": {"kind": "status", "status": 429, "retry_after": 1, "route": "batch"},
    "400 for the whole batch": {"kind": "status", "status": 400, "route": "batch"},
    "413 for the whole batch": {"kind": "status", "status": 413, "route": "batch"},
    "401 to our key": {"kind": "status", "status": 401, "route": "batch"},
    "a closed connection": {"kind": "refuse", "route": "batch"},
    "garbage": {"kind": "garbage", "route": "batch"},
    "items missing": {"kind": "missing_items", "route": "batch"},
    "items refused for now": {"kind": "partial", "route": "batch"},
    "applied, then silent": {"kind": "applied_then_silent", "route": "batch"},
    "applied, then an error": {"kind": "applied_then_silent", "status": 502, "route": "batch"},
    "slow": {"kind": "delay", "seconds": 1.5, "route": "batch"},
}


@pytest.fixture
def trouble(system):
    """Puts faults into Zion, and takes them out again."""
    yield lambda rule: system.zion.post("/admin/faults", [rule])
    httpx.delete(system.zion.url + "/admin/faults", timeout=5).raise_for_status()


def use(system, user, times=3):
    for number in range(times):
        url = f"{system.proxies[number % len(system.proxies)].url}/v1/chat/completions"
        told = httpx.post(url, json={**BODY, "user": user.external_id}, headers=user.headers, timeout=20)
        assert told.status_code == 200, told.text


def doubled(system):
    return sum(system.zion.get("/admin/books").json()["doubled"].values())


@pytest.mark.parametrize("name", TROUBLES)
def test_zions_books_equal_the_gateways_after(system, trouble, name):
    user = system.add_user()
    trouble({**TROUBLES[name], "times": 2})
    use(system, user)
    eventually(lambda: system.booked(user) == system.charged(user), within_s=25)
    assert doubled(system) == 0


def test_without_a_batch_endpoint_items_go_one_by_one(tmp_path, system):
    user = system.add_user()
    before = system.zion.get("/admin/books").json()["calls"].get("increment", 0)
    system.zion.post("/admin/faults", [{"kind": "no_batch", "route": "batch", "times": 1}])
    use(system, user)
    eventually(lambda: system.booked(user) == system.charged(user), within_s=25)
    assert system.zion.get("/admin/books").json()["calls"]["increment"] > before
    assert doubled(system) == 0


def dead_letters(system, *words):
    command = [script("sentinel-usage-worker"), "dead-letters", *words]
    return subprocess.run(command, env=system.environ, capture_output=True, text=True, timeout=30, check=False)


def letters_of(system, user):
    rows = [json.loads(line) for line in dead_letters(system, "list", "--json").stdout.splitlines()]
    return [row for row in rows if row["external_id"] == user.external_id]


def test_what_zion_refuses_for_good_can_be_listed_replayed_and_dropped(system, trouble):
    user = system.add_user()
    rule = {"kind": "partial", "permanent": True, "external_id": user.external_id, "limit_name": "ai_output_tokens"}
    trouble(rule)
    use(system, user, times=1)
    eventually(lambda: letters_of(system, user), within_s=20)
    (letter,) = letters_of(system, user)
    assert letter["amount"] == 6
    assert system.usage(user)["ai_output_tokens"]["used"] == 6, "still counted against the limit"

    listed = dead_letters(system, "list").stdout
    assert letter["letter_id"] in listed
    assert user.external_id in listed
    assert json.loads(dead_letters(system, "show", letter["letter_id"]).stdout)["reason"]
    missing = dead_letters(system, "show", "no-such-letter")
    assert missing.returncode == 1
    assert missing.stderr == "no such dead letter: no-such-letter\n"

    httpx.delete(system.zion.url + "/admin/faults", timeout=5).raise_for_status()
    assert dead_letters(system, "replay", letter["letter_id"]).returncode == 0
    eventually(lambda: system.booked(user) == system.charged(user), within_s=20)
    assert letters_of(system, user) == []

    trouble(rule)
    use(system, user, times=1)
    eventually(lambda: letters_of(system, user), within_s=20)
    (letter,) = letters_of(system, user)
    assert dead_letters(system, "drop", letter["letter_id"]).returncode == 0
    assert letters_of(system, user) == []
    eventually(lambda: system.usage(user)["ai_output_tokens"]["used"], within_s=10, until=lambda used: used == 6)


def test_while_zion_is_away_cached_users_are_served_and_strangers_get_503_soon(tmp_path_factory):
    from tests.support.system import System  # noqa: PLC0415 - a system of its own: this one's Zion goes away

    with System(tmp_path_factory.mktemp("away") / "system", CACHE_TTL_SECONDS="1", JWT_CACHE_TTL_SECONDS="1") as own:
        own.start_all("proxy", "usage-worker", "limits-sync", USAGE_FLUSH_SECONDS="0.5")
        known, unknown = own.add_user(), own.add_user()
        use(own, known, times=1)
        own.zion.post("/admin/faults", [{"kind": "refuse", "route": "*"}])
        eventually(
            lambda: (
                own.proxies[0].metric("sentinel_cache_hits_total", cache="caller", result="stale") or use(own, known, 1)
            ),
            within_s=20,
        )
        refused = httpx.post(
            f"{own.proxies[0].url}/v1/chat/completions", json=BODY, headers=unknown.headers, timeout=10
        )
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        httpx.delete(own.zion.url + "/admin/faults", timeout=5).raise_for_status()
        eventually(lambda: own.booked(known) == own.charged(known), within_s=20)
