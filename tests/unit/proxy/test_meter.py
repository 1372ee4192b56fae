"""Whatever becomes of Redis and the disk, a settlement is made as soon as Redis takes it."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest

from sentinel_proxy.meter import Meter
from sentinel_proxy.metrics import ProxyMetrics
from sentinel_proxy.spool import Spool
from sentinel_shared.errors import RedisOutcomeUnknown, RedisRefused, RedisUnavailable
from sentinel_shared.metrics import new_registry


class Clock:
    """Stands still until it is told."""

    def __init__(self):
        self.now_s = 1_000.0

    def unix_s(self):
        return self.now_s

    monotonic_s = unix_s


class Accounts:
    """Answers with `error`, or settles."""

    def __init__(self):
        self.error = None
        self.settled = []

    def send_settlement(self, settlement):
        sent = asyncio.get_running_loop().create_future()
        if self.error is None:
            self.settled.append(settlement)
            sent.set_result(1)
        else:
            sent.set_exception(self.error)
        return sent

    async def settle(self, settlement):
        return await self.send_settlement(settlement)

    async def reach(self):
        if self.error is not None:
            raise RedisUnavailable("away")


class FullDisk(Spool):
    """Takes nothing."""

    def put(self, _settlement, *, attempted_s):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def meter_on(tmp_path):
    def make(kind=Spool):
        accounts: Any = Accounts()
        clock = Clock()
        parts: dict[str, Any] = {"lease_s": 60, "clock": clock, "metrics": ProxyMetrics(new_registry(), models=())}
        return Meter(accounts, kind(tmp_path), **parts), accounts, clock

    return make


async def charge(meter):
    running = meter.begin(rid="r1", external_id="ali", request_id="q1", model="m", endpoint="chat")
    meter.charge(running, input_tokens=2, output_tokens=3)
    await asyncio.sleep(0.01)


@pytest.mark.parametrize("kind", [Spool, FullDisk])
@pytest.mark.parametrize(
    ("error", "age_ms"),
    [(RedisUnavailable("away"), 0), (RedisOutcomeUnknown("no reply"), 60_000), (RedisRefused("WRONGTYPE"), 60_000)],
)
async def test_what_failed_is_settled_once_redis_takes_it_with_the_age_of_its_first_attempt(
    meter_on, kind, error, age_ms
):
    meter, accounts, clock = meter_on(kind)
    accounts.error = error
    await charge(meter)
    for _ in range(3):
        clock.now_s += 15
        await meter.replay()
        await asyncio.sleep(0.01)
    clock.now_s += 15
    accounts.error = None
    await meter.replay()
    (settled,) = accounts.settled
    assert (settled.rid, settled.input_tokens, settled.attempt_age_ms) == ("r1", 2, age_ms)
    await meter.replay()
    assert len(accounts.settled) == 1


async def test_a_disk_that_cannot_be_forced_holds_up_no_replay(meter_on, monkeypatch):
    meter, accounts, _ = meter_on()
    accounts.error = RedisUnavailable("away")
    await charge(meter)
    accounts.error = None

    async def broken():
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(meter._spool, "sync", broken)
    await meter.replay()
    assert len(accounts.settled) == 1
