"""What the ledger costs Redis: CPU of the server per admit + settle, beside two scripts that only read and write.

The yardstick is two `EVALSHA` that do one HMGET and one HSET each, of the account's own two fields with values of the
same size. Measured one call at a time (as at one connection) and with fifty calls in flight (as under load).
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, cast

from sentinel_shared import keys
from sentinel_shared.accounts import Accounts, AccountScripts, Cost, Freshness, Settlement, WindowPolicy
from sentinel_shared.contracts import LIMIT_NAMES, LimitSnapshot, ResetPeriod
from sentinel_shared.redis_lane import RedisLane, Script
from tests.support.redis_server import RedisServer

PAIRS = 4_000
ROUNDS = 5
USERS = 64
YARDSTICK = Script.of(
    "yardstick",
    b"local f = redis.call('HMGET', KEYS[1], 'ledger', ARGV[1]) "
    b"redis.call('HSET', KEYS[1], 'ledger', f[1], 'y', ARGV[2]) return 1",
)


class Bench:
    """One server, 64 accounts with three limits and both windows on."""

    def __init__(self, lane: RedisLane) -> None:
        self.lane = lane
        window = WindowPolicy(60_000, 10**9, 10**12)
        self.accounts = Accounts(lane, AccountScripts.load(), window=window, lease_s=60)
        self.users = [f"user-{number:05d}" for number in range(USERS)]
        self.numbers = itertools.count()

    async def prepare(self) -> None:
        limits = [
            LimitSnapshot(name, 10**12, 12_345, ResetPeriod.MONTHLY, int(time.time()) - 9, int(time.time()) + 86_400)
            for name in LIMIT_NAMES
        ]
        for user in self.users:
            await self.accounts.refresh_commit(
                external_id=user,
                start=await self.accounts.refresh_begin(user),
                limits=limits,
                freshness=Freshness(fresh_ms=600_000, stale_ms=600_000),
                next_refresh_s=500,
                now_s=time.time(),
            )

    async def pair(self) -> None:
        number = next(self.numbers)
        user, rid = self.users[number % USERS], f"rid-{number:016x}"
        await self.accounts.admit(rid=rid, external_id=user, cost=Cost(120, -1, 16_384))
        event = (
            f'{{"rid":"{rid}","external_id":"{user}","model":"openai/gpt-4o","outcome":"charged","input_tokens":118}}'
        )
        await self.accounts.settle(Settlement(rid, user, 1, 118, 50, event))

    async def two_yardsticks(self) -> None:
        key = keys.account(self.users[next(self.numbers) % USERS])
        for _ in range(2):
            await self.lane.call(YARDSTICK, (key,), ("r:none", "x" * 48))

    async def server_cpu_s(self) -> float:
        info = cast("bytes", await self.lane.call_on_each("INFO", "cpu")[0]).decode()
        told = dict(line.split(":", 1) for line in info.split("\r\n") if ":" in line)
        return float(told["used_cpu_user"]) + float(told["used_cpu_sys"])

    async def cost_us(self, work: Any, *, at_once: int, pairs: int) -> float:
        before = await self.server_cpu_s()
        for _ in range(pairs // at_once):
            await asyncio.gather(*(work() for _ in range(at_once)))
        return (await self.server_cpu_s() - before) / (pairs // at_once * at_once) * 1e6


async def measure(*, pairs: int = PAIRS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Medians of interleaved rounds, in us of the server's CPU; bytes of an idle account."""
    with RedisServer(Path(tempfile.mkdtemp(prefix="sentinel-ledger-cost-"))) as server:
        scripts = [*AccountScripts.load().all(), YARDSTICK]
        lane = await RedisLane.connect(server.url, client_name="bench", scripts=scripts, command_timeout_s=10)
        bench = Bench(lane)
        await bench.prepare()
        told: dict[str, Any] = {}
        for at_once in (1, 50):
            costs, yards = [], []
            for _ in range(rounds):
                yards.append(await bench.cost_us(bench.two_yardsticks, at_once=at_once, pairs=pairs))
                costs.append(await bench.cost_us(bench.pair, at_once=at_once, pairs=pairs))
            pair, yard = statistics.median(costs), statistics.median(yards)
            told[f"{at_once} at once"] = {"pair_us": pair, "yardstick_us": yard, "ratio": pair / yard}
        key = keys.account(bench.users[0])
        told["account_bytes"] = await lane.execute(key, "MEMORY", "USAGE", key)
        await lane.close()
        return told


def lines(told: dict[str, Any]) -> list[str]:
    """For people."""
    rows = [
        f"{name}: admit + settle {cost['pair_us']:.1f} us, "
        f"two EVALSHA with HMGET and HSET {cost['yardstick_us']:.1f} us: {cost['ratio']:.2f} x"
        for name, cost in told.items()
        if isinstance(cost, dict)
    ]
    return [*rows, f"an idle account takes {told['account_bytes']} bytes"]


if __name__ == "__main__":
    print("\n".join(lines(asyncio.run(measure()))))
