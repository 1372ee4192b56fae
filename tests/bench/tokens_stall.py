"""Does counting a huge text hold up small requests? Prints one table; asserts nothing.

A small ASGI app on uvicorn does what the proxy does with tokens: `/live` answers at once, `/chat` decodes a body and
counts it. A separate process asks for `/live` and for small chats; meanwhile 2 MB prompts arrive all the time.
Stall = how much later than asked a 2 ms timer of the serving loop fires.

    python tests/bench/tokens_stall.py [--seconds 4]
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import multiprocessing
import random
import resource
import socket
import statistics
import string
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import httpx
import uvicorn

from sentinel_proxy.tokens import TokenCounter

MEGABYTES = 2_000_000
_random = random.Random(7)
TEXTS = {
    "nothing": "",
    "English": "The quick brown fox jumps over the lazy dog; nobody knows why. " * 32_000,
    "one letter": "a" * MEGABYTES,
    "random letters": "".join(_random.choices(string.ascii_letters, k=MEGABYTES)),
    "whitespace": " " * MEGABYTES,
    "emoji": "😀👩‍👩‍👧🎉" * 70_000,
    "CJK": "".join(chr(_random.randrange(0x4E00, 0x9FA5)) for _ in range(670_000)),
    "60,000 messages": "*",
}


@dataclass
class Body:
    messages: Any
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None


class Served:
    """The app, the flood and the stall meter in one process: the flood itself costs the loop nothing but counting."""

    def __init__(self, text: str) -> None:
        self.counter = TokenCounter.load()
        self.prompts_counted = 0
        self.late_ms: list[float] = []
        self._messages = [{"role": "user", "content": text}]
        if text == "*":
            self._messages = [{"role": "user", "content": "hello world"}] * 60_000

    async def app(
        self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        tokens = 0
        if scope["path"] == "/chat":
            raw = (await receive())["body"]
            tokens = await self._count(json.loads(raw), len(raw))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"%d" % tokens})

    async def flood(self) -> None:
        while self._messages[0]["content"]:
            await self._count(self._messages, MEGABYTES)
            self.prompts_counted += 1

    async def measure_stalls(self) -> None:
        while True:
            asked = time.perf_counter()
            await asyncio.sleep(0.002)
            self.late_ms.append((time.perf_counter() - asked - 0.002) * 1e3)

    async def _count(self, messages: Any, body_bytes: int) -> int:
        counted = self.counter.input_tokens("chat", Body(messages), "gpt-4o", body_bytes=body_bytes)
        return await counted if inspect.isawaitable(counted) else counted


async def serve(port: int, results: Connection, text: str) -> None:
    served = Served(text)
    server = uvicorn.Server(uvicorn.Config(served.app, interface="asgi3", port=port, log_level="error", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    others = [asyncio.create_task(task) for task in (served.flood(), served.flood(), served.measure_stalls())]
    while not server.started:
        await asyncio.sleep(0.01)
    served.late_ms.clear()
    results.send("ready")
    while not results.poll():
        await asyncio.sleep(0.05)
    late_ms = sorted(served.late_ms)
    results.send((p99(late_ms), late_ms[-1], served.prompts_counted))
    for task in others:
        task.cancel()
    server.should_exit = True
    await serving
    served.counter.close()


def run_server(port: int, results: Connection, text: str) -> None:
    asyncio.run(serve(port, results, text))


def ask(port: int, seconds: float) -> tuple[list[float], list[float]]:
    """Latencies in ms of `/live` and of small chats, asked in turn."""
    small = json.dumps([{"role": "user", "content": "Tell me a story about a fox and a dog. " * 25}])
    live_ms: list[float] = []
    chat_ms: list[float] = []
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
        client.get("/live")
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            client.get("/live").raise_for_status()
            middle = time.perf_counter()
            client.post("/chat", content=small).raise_for_status()
            live_ms.append((middle - start) * 1e3)
            chat_ms.append((time.perf_counter() - middle) * 1e3)
            time.sleep(0.005)
    return live_ms, chat_ms


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


def main() -> None:
    """One row per kind of text."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seconds", type=float, default=4.0, help="of asking per kind of text")
    seconds: float = arguments.parse_args().seconds
    spawn = multiprocessing.get_context("spawn")
    print("| 2 MB prompts of | counted | live p50 / p99 ms | small chat p50 / p99 ms | loop stall p99 / worst ms |")
    print("|---|---|---|---|---|")
    for name, text in TEXTS.items():
        ours, theirs = spawn.Pipe()
        port = free_port()
        server = spawn.Process(target=run_server, args=(port, theirs, text))
        server.start()
        ours.recv()
        live_ms, chat_ms = ask(port, seconds)
        ours.send("stop")
        stall_p99_ms, stall_ms, counted = ours.recv()
        server.join()
        print(
            f"| {name} | {counted} | {statistics.median(live_ms):.2f} / {p99(live_ms):.2f} "
            f"| {statistics.median(chat_ms):.2f} / {p99(chat_ms):.2f} | {stall_p99_ms:.1f} / {stall_ms:.1f} |"
        )
    children_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"\nMost memory of a serving process, its 2 MB texts included: {children_mb:.0f} MB")


if __name__ == "__main__":
    main()
