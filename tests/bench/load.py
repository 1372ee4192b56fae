"""The load: raw HTTP/1.1 over kept-alive connections, as cheap as Python can, in a process of its own.

`python -m tests.bench.load` reads one JSON order from stdin and prints one JSON line. Nothing is parsed but where an
answer ends; for streams also when its first event came.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Order:
    """`requests` are whole HTTP requests as text, taken in turn by all connections.

    A connection pauses for `pause_s` after each answer; its latencies are then without what this process itself waited
    for a core. With `begin_s`, by the machine's monotonic clock, several loads begin together. `niceness` is towards
    others.
    """

    host: str
    port: int
    requests: list[str]
    connections: int
    seconds: float
    pause_s: float = 0.0
    begin_s: float = 0.0
    niceness: int = 0


@dataclass
class Tally:
    """Latencies in seconds; `events` counts `data:` lines."""

    latencies: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    statuses: dict[str, int] = field(default_factory=dict)
    events: int = 0


async def _answer(reader: asyncio.StreamReader, tally: Tally, began_s: float) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    status = head[9:12].decode()
    tally.statuses[status] = tally.statuses.get(status, 0) + 1
    lower = head.lower()
    if b"chunked" not in lower:
        length = int(lower.split(b"content-length:")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        return
    first = True
    while size := int(await reader.readuntil(b"\r\n"), 16):
        chunk = await reader.readexactly(size + 2)
        tally.events += chunk.count(b"data:")
        if first:
            tally.first.append(time.perf_counter() - began_s)
            first = False
    await reader.readexactly(2)


async def _connection(order: Order, texts: itertools.cycle[bytes], until_s: float, tally: Tally) -> None:
    reader, writer = await asyncio.open_connection(order.host, order.port, limit=1 << 22)
    while time.perf_counter() < until_s:
        waited_s = _waited_for_a_core_s() if order.pause_s else 0.0
        began_s = time.perf_counter()
        writer.write(next(texts))
        await _answer(reader, tally, began_s)
        took_s = time.perf_counter() - began_s
        if order.pause_s:
            took_s -= _waited_for_a_core_s() - waited_s
            await asyncio.sleep(order.pause_s)
        tally.latencies.append(took_s)
    writer.close()


def _waited_for_a_core_s() -> float:
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


async def _run(order: Order) -> Tally:
    tally = Tally()
    texts = itertools.cycle([text.encode() for text in order.requests])
    os.nice(order.niceness)
    await asyncio.sleep(max(0.0, order.begin_s - time.monotonic()))
    until_s = time.perf_counter() + order.seconds
    await asyncio.gather(*(_connection(order, texts, until_s, tally) for _ in range(order.connections)))
    return tally


def _quantile_ms(sorted_s: list[float], share: float) -> float:
    return sorted_s[min(len(sorted_s) - 1, int(share * len(sorted_s)))] * 1000 if sorted_s else 0.0


def main() -> None:
    order = Order(**json.load(sys.stdin))
    tally = asyncio.run(_run(order))
    latencies, first = sorted(tally.latencies), sorted(tally.first)
    print(
        json.dumps(
            {
                "requests": len(latencies),
                "events": tally.events,
                "p50_ms": _quantile_ms(latencies, 0.5),
                "p99_ms": _quantile_ms(latencies, 0.99),
                "max_ms": _quantile_ms(latencies, 1.0),
                "ttft_p50_ms": _quantile_ms(first, 0.5),
                "statuses": tally.statuses,
            }
        )
    )


if __name__ == "__main__":
    main()
