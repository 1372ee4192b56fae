"""Zion slow, wrong or away, Redis lost, signals: users keep their last good limits, and all goes on by itself."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter

import pytest

from sentinel_dev.zion import DEMO_API_KEY
from tests.integration.limits_sync.conftest import KNOWN_LIMIT
from tests.support.redis_server import RedisServer, free_port
from tests.support.system import eventually

pytestmark = pytest.mark.xdist_group("limits-sync-faults")


def ready(sync):
    return sync.get("/health/ready").status_code


def complaints(sync):
    """Lines above `info`, as (second, logger, first word) with how often."""
    lines = [json.loads(line) for line in sync.said.splitlines() if line.startswith("{")]
    return Counter(
        (line["timestamp"][:19], line["message"].partition(":")[0]) for line in lines if line["level"] != "info"
    )


def asked(place):
    return sum(place.gets().values())


def test_a_zion_that_is_away_is_probed_seldom_and_makes_up_for_it_when_it_is_back(place):
    users = place.users(60)
    place.trouble(kind="status", status=503)
    sync = place.sync()
    eventually(lambda: sync.metric("sentinel_breaker_open", dependency="zion"), within_s=15)
    eventually(lambda: sync.metric("sentinel_limits_refreshes_running") == 0, within_s=15)
    before, began_s = asked(place), time.monotonic()
    eventually(lambda: asked(place) >= before + 2, within_s=20)
    assert asked(place) - before <= 3 + 4 * (time.monotonic() - began_s), "one probe at a time, 250 ms apart at least"
    assert sync.get("/health").json()["status"] == "degraded"
    assert ready(sync) == 200
    assert {place.limit(user) for user in users} == {KNOWN_LIMIT}
    assert max(complaints(sync).values()) <= 2, "one line a second; two may fall into one"
    place.well()
    place.refreshed(users)
    eventually(lambda: sync.metric("sentinel_breaker_open", dependency="zion") == 0, within_s=5)


def test_a_zion_that_refuses_our_key_is_hardly_asked_any_more(place):
    place.users(30)
    sync = place.sync(ZION_API_KEY="not-" + DEMO_API_KEY)
    eventually(lambda: sync.metric("sentinel_breaker_open", dependency="zion"), within_s=15)
    eventually(lambda: sync.metric("sentinel_limits_refreshes_running") == 0, within_s=15)
    before, began_s = asked(place), time.monotonic()
    eventually(lambda: asked(place) > before, within_s=20)
    assert asked(place) - before <= 2 + (time.monotonic() - began_s) / 2.5
    assert "API key" in sync.said
    assert DEMO_API_KEY not in sync.said


def test_limits_that_make_no_sense_leave_the_last_good_ones_and_are_asked_for_again(place):
    (user,) = place.users()
    place.trouble(kind="malformed_limits")
    sync = place.sync()
    eventually(lambda: sync.metric("sentinel_limits_malformed_total"), within_s=10)
    assert place.limit(user) == KNOWN_LIMIT
    place.well()
    place.refreshed([user])
    told = [json.loads(line) for line in sync.said.splitlines() if "make no sense" in line]
    assert {line["external_id"] for line in told} == {user}


def test_a_user_unknown_to_zion_goes_off_the_list(place):
    (stranger,), (user,) = place.users(in_zion=False), place.users()
    sync = place.sync()
    eventually(lambda: place.due_in_s(stranger) is None, within_s=10)
    place.refreshed([user])
    assert place.gets()[stranger] == 1
    assert sync.metric("sentinel_limits_refreshes_total", result="unknown_user") == 1


def test_sigterm_finishes_what_is_under_way_and_leases_nothing_more(place):
    first = place.users(10)
    place.trouble(kind="delay", seconds=2)
    sync = place.sync()
    eventually(lambda: len(place.gets()) == 10, within_s=10)
    sync.signal(signal.SIGTERM)
    eventually(lambda: ready(sync) == 503, within_s=5)
    later = place.users(10)
    assert sync.wait(within_s=20) == 0
    place.refreshed(first, within_s=1)
    assert set(place.gets()) == set(first)
    assert all(place.due_in_s(user) is not None for user in later)


def test_a_second_signal_ends_it_at_once(place):
    (user,) = place.users()
    place.trouble(kind="hang")
    sync = place.sync()
    eventually(lambda: place.gets().get(user), within_s=10)
    sync.signal(signal.SIGTERM)
    eventually(lambda: ready(sync) == 503, within_s=5)
    sync.signal(signal.SIGTERM)
    assert sync.wait(within_s=5) == 1


def test_the_grace_bounds_what_a_hanging_zion_can_hold_up(place):
    (user,) = place.users()
    place.trouble(kind="hang")
    sync = place.sync(SHUTDOWN_GRACE_SECONDS="1")
    eventually(lambda: place.gets().get(user), within_s=10)
    assert sync.stop(within_s=8) == 0
    assert "Traceback" not in sync.said


def test_a_lost_redis_is_waited_for_quietly(place):
    sync = place.sync()
    place.system.redis.kill()
    try:
        eventually(lambda: ready(sync) == 503, within_s=10)
        assert sync.get("/health/live").status_code == 200
        assert sync.code is None
    finally:
        place.system.redis.start()
    eventually(lambda: ready(sync) == 200, within_s=20)
    eventually(place.redis_answers, within_s=20)
    place.refreshed(place.users(5))
    assert max(complaints(sync).values()) <= 2


def test_a_redis_that_wants_a_password_is_one_line_and_exit_1(place, tmp_path):
    with RedisServer(tmp_path / "locked", requirepass="s3cret-word") as locked:
        sync = place.system.start("limits-sync", REDIS_URL=locked.url, SENTINEL_PORT=str(free_port()))
        assert sync.wait(within_s=20) == 1
        assert "Traceback" not in sync.said
        assert len([line for line in sync.said.splitlines() if not line.startswith("{")]) == 1
