"""Active users of a Zion that takes 2 s: what they notice, and how often Zion is asked.

`python -m tests.bench.warm` runs the same load twice, with a Zion that answers at once and with a slow one, and prints
both. Limits are fresh for 4 s, so that every user's are refreshed several times meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from tests.support.system import Server, System, User

if TYPE_CHECKING:
    from collections.abc import Sequence

TTL_S: Final = 4
ZION_TAKES_S: Final = 2.0
CONNECTIONS: Final = 8
_USER_RESTS_S: Final = 2.0
"""Between two requests of one user."""


@dataclass(frozen=True)
class Figures:
    """One phase. `waited` counts requests for which Zion had to be asked, `stale` those with limits past freshness."""

    requests: int
    other_than_200: int
    p50_ms: float
    p99_ms: float
    waited: float
    stale: float
    gets_per_user_and_ttl: float

    def line(self, name: str) -> str:
        """For people."""
        return (
            f"{name}: {self.requests} requests ({self.other_than_200} other than 200), p50 {self.p50_ms:.1f} ms, "
            f"p99 {self.p99_ms:.1f} ms; {self.waited:.0f} waited for Zion, {self.stale:.0f} met stale limits; "
            f"{self.gets_per_user_and_ttl:.3f} GETs per user and TTL"
        )


class Warm:
    """As a context manager: a system whose users have all been seen once."""

    def __init__(self, folder: Path, *, users: int, proxies: int = 2, syncs: int = 2) -> None:
        self.system = System(folder, CACHE_TTL_SECONDS=str(TTL_S), LOG_LEVEL="warning")
        self._count = users
        self._services = ("proxy",) * proxies + ("usage-worker",) + ("limits-sync",) * syncs
        self._users: list[User] = []

    def __enter__(self) -> Self:
        self.system.__enter__()
        self.system.start_all(*self._services)
        self._users = [self.system.add_user() for _ in range(self._count)]
        asyncio.run(self._load(seconds=0))
        return self

    def __exit__(self, *error: object) -> None:
        self.system.__exit__(*error)

    def phase(self, *, zion_takes_s: float, seconds: float) -> Figures:
        """Load for `seconds`, after three TTLs of the same that are not counted: the pace of the refreshes settles."""
        rules = [{"route": "limits", "kind": "delay", "seconds": zion_takes_s}] if zion_takes_s else []
        self.system.zion.post("/admin/faults", rules)
        asyncio.run(self._load(seconds=3 * TTL_S))
        gets, waited, stale = self._gets(), self._cache("miss"), self._cache("stale")
        latencies_s, other = asyncio.run(self._load(seconds=seconds))
        latencies_s.sort()
        return Figures(
            requests=len(latencies_s),
            other_than_200=other,
            p50_ms=1000 * latencies_s[len(latencies_s) // 2],
            p99_ms=1000 * latencies_s[len(latencies_s) * 99 // 100],
            waited=self._cache("miss") - waited,
            stale=self._cache("stale") - stale,
            gets_per_user_and_ttl=(self._gets() - gets) / self._count / (seconds / TTL_S),
        )

    def _gets(self) -> int:
        told: int = self.system.zion.get("/admin/calls").json()["limits"]["count"]
        return told

    def _cache(self, result: str) -> float:
        name = "sentinel_cache_hits_total"
        return sum(proxy.metric(name, cache="limits", result=result) for proxy in self.system.proxies)

    async def _load(self, *, seconds: float) -> tuple[list[float], int]:
        """Every user once per rest, for `seconds`, but at least once. Latencies in s, and how many were not 200."""
        proxies = self.system.proxies
        shares = [self._users[n::CONNECTIONS] for n in range(CONNECTIONS)]
        told = await asyncio.gather(
            *(_one_after_the_other(proxies[n % len(proxies)], share, seconds) for n, share in enumerate(shares))
        )
        return [latency for latencies, _ in told for latency in latencies], sum(other for _, other in told)


async def _one_after_the_other(proxy: Server, users: Sequence[User], seconds: float) -> tuple[list[float], int]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.url.rpartition(":")[2]))
    latencies_s, other = [], 0
    began_s = time.monotonic()
    number = 0
    while number < len(users) or time.monotonic() < began_s + seconds:
        due_s = began_s + number * _USER_RESTS_S / len(users)
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        asked_s = time.perf_counter()
        writer.write(_request(users[number % len(users)]))
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]))
        latencies_s.append(time.perf_counter() - asked_s)
        other += not head.startswith(b"HTTP/1.1 200")
        number += 1
    writer.close()
    await writer.wait_closed()
    return latencies_s, other


def _request(user: User) -> bytes:
    body = json.dumps({"model": "openai/gpt-4o", "messages": [{"role": "user", "content": "say 2 tokens"}]})
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: sentinel\r\nauthorization: Bearer {user.token}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}"
    ).encode()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.warm")
    parser.add_argument("--users", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="sentinel-warm-") as folder,
        Warm(Path(folder) / "system", users=options.users) as warm,
    ):
        quick = warm.phase(zion_takes_s=0, seconds=options.seconds)
        slow = warm.phase(zion_takes_s=ZION_TAKES_S, seconds=options.seconds)
    print(quick.line("Zion answers at once"))
    print(slow.line(f"Zion takes {ZION_TAKES_S:g} s"))
    print(f"p99, slow against at once: {slow.p99_ms / quick.p99_ms:.2f} x")


if __name__ == "__main__":
    main()
