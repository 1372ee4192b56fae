"""`sentinel-usage-worker` as processes: any number of them, killed, stopped and started at any moment."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter

import pytest

from sentinel_dev.zion import DEMO_API_KEY
from sentinel_shared import keys
from sentinel_shared.accounts import Accounts, AccountScripts, Cost, WindowPolicy
from tests.support.redis_server import RedisServer, free_port
from tests.support.system import eventually

pytestmark = pytest.mark.xdist_group("usage-worker-processes")


def ready(worker):
    return worker.get("/health/ready").status_code


def complaints(worker):
    """Lines above `info`, as (second, first words) with how often."""
    lines = [json.loads(line) for line in worker.said.splitlines() if line.startswith("{")]
    return Counter(
        (line["timestamp"][:19], line["message"].partition(":")[0]) for line in lines if line["level"] != "info"
    )


def posting(place, worker):
    """Whether the worker waits for an answer to a batch."""
    return place.calls() and worker.code is None


def test_usage_gathers_as_long_as_it_is_told_to_and_then_goes(place):
    (worker,) = place.workers(USAGE_FLUSH_SECONDS="3")
    (name,) = place.users()
    began_s = time.monotonic()
    place.run(place.use(name, name))
    eventually(lambda: worker.metric("sentinel_usage_queue_depth"), within_s=3)
    place.run(place.use(name))
    place.balances()
    assert time.monotonic() - began_s >= 3
    assert place.calls() == 1


def test_two_workers_share_the_work_one_leaves_in_the_middle_and_nothing_is_doubled(place):
    first, second = place.workers(2)
    users = place.users(40)
    over = threading.Event()
    codes = []

    def scale_in():
        eventually(lambda: place.calls() >= 10, within_s=15)
        codes.append(first.stop())
        over.set()

    leaving = threading.Thread(target=scale_in)
    leaving.start()
    while not over.is_set():
        place.run(place.use(*users))
        time.sleep(0.02)
    leaving.join()
    place.run(place.use(*users))
    place.balances()
    assert codes == [0]
    assert second.metric("sentinel_usage_increments_total", result="applied") > 0
    assert place.system.zion.get("/admin/books").json()["keys"]["doubled"] == 0, "no batch was even sent twice"


def test_a_worker_killed_after_its_post_leaves_the_same_batch_to_the_next(place):
    (worker,) = place.workers()
    (name,) = place.users()
    place.trouble(kind="applied_then_silent", hang=True, times=1)
    place.run(place.use(name))
    eventually(lambda: posting(place, worker), within_s=10)
    worker.kill()
    place.workers()
    place.run(place.use(name))
    assert place.run(place.owed(name))["ai_requests"][1] == 1, "in flight until the lease is over"
    place.lapse_leases()
    place.balances()
    counts = place.system.zion.get("/admin/books").json()["keys"]
    assert (counts["suppressed"], counts["conflicting"]) == (1, 0)


def test_a_batch_claimed_by_a_worker_that_died_before_its_post_is_sent(place):
    (name,) = place.users()
    place.run(place.use(name))
    shard = keys.shard_of(name)
    claiming = place.queue.claim(
        shard, batch_id="orphan", users=100, items=1000, lease_s=0.5, gather_s=0, enough_users=1
    )
    assert place.run(claiming) is not None
    place.workers()
    place.balances()
    assert {entry["key"] for entry in place.system.zion.get("/admin/ledger").json()["entries"]} == {"orphan"}


def test_a_worker_that_stood_still_and_goes_on_doubles_nothing(place):
    first, second = place.workers(2)
    users = place.users(20)
    place.trouble(kind="delay", seconds=0.3)
    place.run(place.use(*users))
    eventually(place.calls, within_s=10)
    first.pause()
    second.pause()
    place.lapse_leases()
    second.resume()
    place.run(place.use(*users))
    place.lapse_leases()
    eventually(lambda: sum(booked["ai_requests"] for booked in place.booked().values()) >= 20, within_s=10)
    first.resume()
    place.balances()


def test_sigterm_finishes_the_post_books_it_and_claims_nothing_more(place):
    (worker,) = place.workers()
    first, second = place.users(2)
    place.trouble(kind="delay", seconds=1.2)
    place.run(place.use(first))
    eventually(lambda: posting(place, worker), within_s=10)
    worker.signal(signal.SIGTERM)
    eventually(lambda: ready(worker) == 503, within_s=5)
    place.run(place.use(second))
    assert worker.wait(within_s=10) == 0
    assert place.booked()[first] == dict(place.settled[first])
    assert place.run(place.waits()) == (1, 0)
    assert "Traceback" not in worker.said
    assert "Warning" not in worker.said
    place.well()
    place.workers()
    place.balances()


def test_the_grace_bounds_what_a_silent_zion_can_hold_up_and_a_second_signal_ends_at_once(place):
    short, patient = place.workers(SHUTDOWN_GRACE_SECONDS="0")[0], place.workers()[0]
    users = place.users(30)
    place.trouble(kind="applied_then_silent", hang=True)
    place.run(place.use(*users))
    eventually(lambda: place.calls() >= 4, within_s=10)
    assert short.stop(within_s=6) == 0
    patient.signal(signal.SIGTERM)
    eventually(lambda: ready(patient) == 503, within_s=5)
    began_s = time.monotonic()
    patient.signal(signal.SIGTERM)
    assert patient.wait(within_s=5) in {0, 1}
    assert time.monotonic() - began_s < 5
    place.well()
    place.lapse_leases()
    place.workers()
    place.balances()


def test_lost_connections_and_a_restart_of_redis_are_lived_through(place):
    (worker,) = place.workers()
    (name,) = place.users()
    pid = worker.pid
    for _ in range(2):
        place.redis.ask("CLIENT", "KILL", "TYPE", "normal")
        eventually(place.redis_answers, within_s=10)
        place.run(place.use(name))
        place.balances()
    place.redis.kill()
    eventually(lambda: ready(worker) == 503, within_s=10)
    assert worker.get("/health/live").status_code == 200
    place.redis.start()
    eventually(lambda: ready(worker) == 200, within_s=20)
    eventually(place.redis_answers, within_s=10)
    place.run(place.use(name))
    place.balances()
    assert (worker.code, worker.pid) == (None, pid)
    assert max(complaints(worker).values(), default=0) <= 2, "one line a second; two may fall into one"


def test_arqs_own_redis_may_be_away_and_come_back(place, tmp_path):
    with RedisServer(tmp_path / "arq") as arq:
        (worker,) = place.workers(ARQ_REDIS_URL=arq.url)
        (name,) = place.users()
        arq.kill()
        eventually(lambda: ready(worker) == 503, within_s=10)
        assert worker.get("/health").json()["checks"]["redis"]["status"] == "healthy"
        place.run(place.use(name))
        arq.start()
        eventually(lambda: ready(worker) == 200, within_s=20)
        place.balances()
        assert worker.code is None
        assert place.redis.ask("KEYS", "*arq*") == []
        kept = {key: arq.ask("TTL", key) for key in arq.ask("KEYS", "*")}
        assert all(ttl > 0 for key, ttl in kept.items() if key != "sentinel:arq:usage")
        assert sum("health" in key for key in kept) == 1


def test_what_arq_keeps_is_json(place):
    place.workers()

    def jobs():
        found = [place.redis.ask("GET", key) for key in place.redis.ask("KEYS", "arq:job:*")]
        return [json.loads(job) for job in found if job]

    assert eventually(jobs, within_s=10)[0]["f"].startswith("sentinel:usage:")


def test_a_zion_that_is_away_is_told_once_a_second_and_leaves_the_worker_ready(place):
    (worker,) = place.workers()
    users = place.users(60)
    place.trouble(kind="refuse")
    place.run(place.use(*users))
    eventually(lambda: worker.metric("sentinel_breaker_open", dependency="zion"), within_s=15)
    assert ready(worker) == 200
    eventually(lambda: worker.get("/health").json()["status"] == "degraded", within_s=5)
    assert worker.metric("sentinel_usage_open_batches") > 0
    before, began_s = place.calls(), time.monotonic()
    eventually(lambda: place.calls() >= before + 2, within_s=15)
    assert place.calls() - before <= 2 + 4 * (time.monotonic() - began_s)
    assert max(complaints(worker).values()) <= 2
    place.well()
    place.balances(within_s=10)


def test_a_refused_key_is_an_error_in_the_log_that_does_not_show_it(place):
    (worker,) = place.workers(ZION_API_KEY="not-" + DEMO_API_KEY)
    (name,) = place.users()
    place.run(place.use(name))
    eventually(lambda: worker.metric("sentinel_zion_key_refused_total"), within_s=10)
    assert '"level":"error"' in worker.said
    assert DEMO_API_KEY not in worker.said
    worker.kill()
    place.lapse_leases()
    place.workers()
    place.balances()


def test_reservations_of_a_proxy_that_died_are_charged(place):
    (worker,) = place.workers()
    (name,) = place.users()
    short = Accounts(place.lane, AccountScripts.load(), window=WindowPolicy(0, 0, 0), lease_s=0.2)
    place.run(short.admit(rid="dead", external_id=name, cost=Cost(5, 0, 100)))
    eventually(lambda: worker.metric("sentinel_usage_reaped_total"), within_s=10)
    place.settled[name].update({"ai_requests": 1, "ai_input_tokens": 5, "ai_output_tokens": 0})
    place.balances()


def test_tokens_that_are_nowhere_show_in_the_metric(place):
    (worker,) = place.workers()
    (name,) = place.users()
    place.run(place.use(name))
    place.balances()
    assert worker.metric("sentinel_usage_unaccounted_tokens") == 0
    place.redis.ask("HINCRBY", keys.tallies(keys.shard_of(name)), "sent_tokens", -3)
    eventually(lambda: worker.metric("sentinel_usage_unaccounted_tokens") == 3, within_s=15)


def test_a_redis_that_wants_a_password_is_one_line_and_exit_1(place, tmp_path):
    with RedisServer(tmp_path / "locked", requirepass="s3cret-word") as locked:
        worker = place.system.start("usage-worker", REDIS_URL=locked.url, SENTINEL_PORT=str(free_port()))
        assert worker.wait(within_s=20) == 1
        assert "Traceback" not in worker.said
        assert len([line for line in worker.said.splitlines() if not line.startswith("{")]) == 1
