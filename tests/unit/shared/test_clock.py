from __future__ import annotations

import time

from sentinel_shared.clock import Clock, SystemClock


async def test_the_system_clock_tells_the_machines_time_and_sleeps():
    clock: Clock = SystemClock()
    assert abs(clock.unix_s() - time.time()) < 60
    before_s = clock.monotonic_s()
    await clock.sleep(0.001)
    assert clock.monotonic_s() > before_s
