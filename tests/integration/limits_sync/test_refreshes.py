"""Who is due is refreshed, once, by whichever replica comes first; nobody else is."""

from __future__ import annotations

import time

import pytest

from tests.integration.limits_sync.conftest import KNOWN_LIMIT, ZIONS_LIMIT
from tests.support.system import eventually

pytestmark = pytest.mark.xdist_group("limits-sync-refreshes")


def test_a_user_is_refreshed_when_due_and_not_before(place):
    (due,), (not_due,) = place.users(), place.users(due_in_s=200)
    place.sync()
    place.refreshed([due])
    assert place.limit(not_due) == KNOWN_LIMIT
    assert place.gets() == {due: 1}
    assert 200 < place.due_in_s(due) < 275, "at 80 % of 300 s, give or take a tenth"


def test_a_mark_of_the_webhook_is_acted_upon(place):
    (user,) = place.users(due_in_s=200)
    place.sync()
    place.mark_due(user)
    place.refreshed([user])


def test_a_mark_that_comes_while_zion_is_being_asked_is_not_lost(place):
    (user,) = place.users()
    place.trouble(kind="delay", seconds=1.5, times=1)
    sync = place.sync()
    eventually(lambda: place.gets().get(user), within_s=10)
    place.mark_due(user)
    eventually(lambda: place.gets()[user] == 2, within_s=10)
    eventually(lambda: sync.metric("sentinel_limits_refreshes_total", result="committed") == 2, within_s=10)
    assert place.due_in_s(user) > 200


def test_two_replicas_share_the_work_and_ask_about_nobody_twice(place):
    place.trouble(kind="delay", seconds=0.4)
    syncs = place.system.start_all("limits-sync", "limits-sync", CACHE_TTL_SECONDS="300", ZION_MAX_CONCURRENCY="20")
    users = place.users(150)
    place.refreshed(users)
    assert sum(place.gets().values()) < 1.2 * 150, "a replica that stood still for seconds may have lost a lease"
    done = [sync.metric("sentinel_limits_refreshes_total", result="committed") for sync in syncs]
    assert all(done), "each of them did some"
    assert sum(done) >= 150


def test_a_refresh_that_takes_longer_than_its_lease_stays_one(place):
    place.trouble(kind="delay", seconds=2.8)
    users = place.users(20)
    place.system.start_all("limits-sync", "limits-sync", CACHE_TTL_SECONDS="20")  # leases of 2 s
    place.refreshed(users)
    assert sum(place.gets().values()) < 1.5 * 20


def test_nobody_goes_stale_when_a_replica_is_killed_in_the_middle_of_its_refreshes(place):
    place.trouble(kind="delay", seconds=1)
    syncs = place.system.start_all("limits-sync", "limits-sync", CACHE_TTL_SECONDS="20", ZION_MAX_CONCURRENCY="32")
    users = place.users(60, fresh_s=15)
    stale_at_ms = {user: place.view(user).fresh_until_ms for user in users}
    eventually(lambda: syncs[0].metric("sentinel_limits_refreshes_running"), within_s=10)
    syncs[0].kill()
    assert any(place.limit(user) == KNOWN_LIMIT for user in users), "it was killed in the middle"
    place.refreshed(users)
    assert all(place.view(user).committed_ms < stale_at_ms[user] for user in users)


def test_a_user_who_is_idle_for_two_ttls_is_left_alone(place):
    place.sync(CACHE_TTL_SECONDS="2")
    idle, active = place.users(2)

    def only_the_idle_one_is_gone():
        place.use([active])
        return place.due_in_s(idle) is None

    eventually(only_the_idle_one_is_gone, within_s=15)
    assert place.due_in_s(active) is not None
    before = place.gets()
    eventually(lambda: place.use([active]) and place.gets()[active] > before[active], within_s=15)
    assert place.gets()[idle] == before[idle]


def test_limits_are_asked_for_again_when_their_period_ends(place):
    end_s = int(time.time()) + 3
    (user,) = place.users(due_in_s=200, period_end_s=end_s)
    place.sync()
    place.refreshed([user])
    assert place.view(user).committed_ms >= end_s * 1000
    assert place.limit(user) == ZIONS_LIMIT


def test_active_users_of_a_slow_zion_cost_one_get_a_ttl(place):
    ttl_s, users = 3, place.users(40, fresh_s=3)
    place.trouble(kind="delay", seconds=1)
    syncs = place.system.start_all("limits-sync", "limits-sync", CACHE_TTL_SECONDS=str(ttl_s))
    place.refreshed(users)
    before, began_s = sum(place.gets().values()), time.monotonic()
    while time.monotonic() < began_s + 3.5:
        place.use(users)
        time.sleep(0.3)
    per_user = (sum(place.gets().values()) - before) / len(users)
    ttls = (time.monotonic() - began_s) / ttl_s
    assert 0 < per_user <= 1.1 * ttls + 1
    assert all(sync.metric("sentinel_limits_refreshes_total", result="overtaken") == 0 for sync in syncs)
