"""What one EVALSHA costs this process: the Redis lane beside redis-py. `python -m tests.bench.lane_micro`.

CPU of the client only, in us per call; medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import hiredis
import redis.asyncio
import uvloop

from sentinel_shared.redis_lane import RedisLane, Script
from tests.support.redis_server import plain_redis_url

_SCRIPT = Script.of("null", b"return 1")
_KEY = "sentinel:{s07}:account:user-1"
_ARGS: list[bytes | str | int] = ["01hzy3v7q9k2m4n6p8r0", 120, 4096, 60000]

Call = Callable[[], Awaitable[Any]]


async def _cpu_us_per_call(call: Call, concurrency: int, calls: int) -> float:
    async def caller() -> None:
        for _ in range(calls // concurrency):
            await call()

    began_s = time.process_time()
    await asyncio.gather(*(caller() for _ in range(concurrency)))
    return (time.process_time() - began_s) * 1e6 / calls


async def _measure(url: str, calls: int, rounds: int) -> dict[tuple[str, int], float]:
    lane = await RedisLane.connect(url, client_name="bench", scripts=[_SCRIPT], command_timeout_s=5.0)
    peer = redis.asyncio.Redis.from_url(url)
    contenders: dict[str, Call] = {
        "lane": lambda: lane.call(_SCRIPT, [_KEY], _ARGS),
        "redis-py": lambda: peer.evalsha(_SCRIPT.sha1, 1, _KEY, *map(str, _ARGS)),
    }
    figures: dict[tuple[str, int], list[float]] = {}
    for round_number in range(rounds + 1):
        for name, call in contenders.items():
            for concurrency in (1, 32):
                figure = await _cpu_us_per_call(call, concurrency, calls)
                if round_number:  # the first one warms up
                    figures.setdefault((name, concurrency), []).append(figure)
    await peer.aclose()
    await lane.close()
    return {where: statistics.median(values) for where, values in figures.items()}


def _packing_ns(calls: int = 50_000) -> tuple[float, float]:
    parts: tuple[bytes | str | int, ...] = ("EVALSHA", _SCRIPT.sha1, 1, _KEY, *_ARGS)

    def by_hand() -> bytes:
        out = [b"*%d\r\n" % len(parts)]
        for part in parts:
            raw = part if isinstance(part, bytes) else str(part).encode()
            out.append(b"$%d\r\n%b\r\n" % (len(raw), raw))
        return b"".join(out)

    def by_hiredis() -> bytes:
        return bytes(hiredis.pack_command(parts))  # type: ignore[arg-type] # its stub knows 1-tuples only

    figures = []
    for pack in (by_hand, by_hiredis):
        began_s = time.process_time()
        for _ in range(calls):
            pack()
        figures.append((time.process_time() - began_s) * 1e9 / calls)
    return figures[0], figures[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=6400)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print("client CPU, us per EVALSHA    1 caller   32 callers")
    with tempfile.TemporaryDirectory() as folder, plain_redis_url(Path(folder)) as url:
        for loop_name, factory in (("asyncio", asyncio.new_event_loop), ("uvloop", uvloop.new_event_loop)):
            with asyncio.Runner(loop_factory=factory) as runner:
                figures = runner.run(_measure(url, options.calls, options.rounds))
            for name in ("redis-py", "lane"):
                print(f"{name + ', ' + loop_name:28}{figures[name, 1]:10.1f}{figures[name, 32]:13.1f}")
    by_hand_ns, by_hiredis_ns = _packing_ns()
    print(f"packing one call: {by_hand_ns:.0f} ns by hand, {by_hiredis_ns:.0f} ns by hiredis")


if __name__ == "__main__":
    main()
