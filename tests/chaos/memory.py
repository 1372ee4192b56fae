"""`python -m tests.chaos.memory --minutes 10`: what each process and Redis hold under steady load, minute by minute.

Exit 1 when a service grows: when it holds in the last quarter over a tenth more than in the second one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Final

import httpx

from tests.support.system import System, User, chat_body

if TYPE_CHECKING:
    from tests.support.system import Server

SERVICES: Final = ("proxy", "usage-worker", "limits-sync")
MODELS: Final = ("openai/gpt-4o", "sim/slow-20ms", "sim/no-usage", "sim/many-events-per-write")
USERS: Final = 200
CLIENTS: Final = 8
SAMPLES: Final = 40
GROWTH_AT_MOST: Final = 1.1
_MIB: Final = 1 << 20
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


def resident_mib(pid: int) -> float:
    """What a process has in memory (Linux)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES / _MIB


async def request(http: httpx.AsyncClient, url: str, user: User) -> None:
    """JSON, a stream, or a stream that is left in its middle; prompts of many sizes."""
    kind = random.choice(("json", "stream", "left"))
    told = chat_body(user, random.choice(MODELS), stream=kind != "json")
    told["messages"][0]["content"] = f"say {random.randint(1, 60)} tokens " + "word " * random.choice((1, 50, 2_000))
    async with http.stream("POST", f"{url}/v1/chat/completions", json=told, headers=user.headers) as answer:
        async for _ in answer.aiter_bytes():
            if kind == "left":
                return


async def load(system: System, users: list[User], until_s: float) -> int:
    """How many requests there were."""

    async def client(http: httpx.AsyncClient) -> int:
        count = 0
        while time.monotonic() < until_s:
            await request(http, system.proxies[0].url, random.choice(users))
            count += 1
        return count

    async with httpx.AsyncClient(timeout=30) as http:
        return sum(await asyncio.gather(*(client(http) for _ in range(CLIENTS))))


async def watch(system: System, services: list[Server], *, seconds: float) -> dict[str, list[float]]:
    """MiB of each, in equal steps of time."""
    seen: dict[str, list[float]] = defaultdict(list)
    for step in range(SAMPLES):
        await asyncio.sleep(seconds / SAMPLES)
        for server in services:
            seen[server.service].append(resident_mib(server.pid))
        memory = await asyncio.to_thread(system.redis.ask, "INFO", "memory")
        seen["redis"].append(int(memory.partition("used_memory:")[2].split()[0]) / _MIB)
        if step % 4 == 3:
            print("  ".join(f"{name} {mib[-1]:.1f}" for name, mib in seen.items()), "MiB", flush=True)
    return seen


async def run(folder: Path, *, seconds: float) -> bool:
    """Whether all services kept their size."""
    with System(folder, LOG_LEVEL="warning") as system:
        services = await asyncio.to_thread(system.start_all, *SERVICES)
        users = [system.add_user() for _ in range(USERS)]
        watching = asyncio.create_task(watch(system, services, seconds=seconds))
        requests = await load(system, users, time.monotonic() + seconds)
        seen = await watching
    print(f"{requests} requests in {seconds / 60:g} min; MiB in the second and in the last quarter:")
    flat = True
    for name, mib in seen.items():
        early, late = mean(mib[SAMPLES // 4 : SAMPLES // 2]), mean(mib[-SAMPLES // 4 :])
        # Redis remembers each settlement for 15 minutes: it grows until then, whatever the services do.
        grown = name != "redis" and late > early * GROWTH_AT_MOST
        print(f"{name}: {early:.1f}, {late:.1f}{' GROWN' if grown else ''}")
        flat = flat and not grown
    return flat


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.memory")
    parser.add_argument("--minutes", type=float, default=10)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="sentinel-memory-"))
    return 0 if asyncio.run(run(folder, seconds=60 * options.minutes)) else 1


if __name__ == "__main__":
    sys.exit(main())
