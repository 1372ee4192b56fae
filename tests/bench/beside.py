"""`python -m tests.bench.beside`: what small requests feel of huge prompts, and of somebody's refused requests.

`/health/live` and small chats are asked for a hundred times a second each, alone and beside a client that sends 2 MB
prompts one after the other, or beside eight connections of a user who is refused. The others are measured twice, in
turn: *here*, through the same process, and *elsewhere*, through a second one on the same Redis and gateway. That one
takes just as much of this machine but shares no event loop: what the small ones feel of it is the machine's doing, and
only what is beyond that is Sentinel's. The others' load is prepared beforehand and nice, the gateway swallows what it
gets, and what the askers themselves wait for a core is taken off.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from tests.bench.load import Order
from tests.support.redis_server import free_port
from tests.support.system import System, User, bare_environ, chat_body

HUGE_BYTES: Final = 2_000_000
_COUNTED_TOKENS: Final = 1_600_000
"""More than any of the texts has, less than the bound on them: each is counted for whoever has so many left."""
_SMALL: Final = "say 10 tokens about the weather. " * 8
_PAUSE_S: Final = 0.01
_HEAD_START_S: Final = 0.5
_NICENESS: Final = 19
_random: Final = random.Random(7)
_ENGLISH: Final = 'The quick brown fox says "no"; nobody knows why, or when.\n'
_EMOJI: Final = "😀👩‍👩‍👧🎉"

TEXTS: Final = {
    "English": _ENGLISH * (HUGE_BYTES // len(_ENGLISH)),
    "one letter": "a" * HUGE_BYTES,
    "random letters": "".join(_random.choices(string.ascii_letters, k=HUGE_BYTES)),
    "whitespace": " " * HUGE_BYTES,
    "emoji": _EMOJI * (HUGE_BYTES // len(_EMOJI.encode())),
    "CJK": "".join(chr(_random.randrange(0x4E00, 0x9FA5)) for _ in range(HUGE_BYTES // 3)),
}
ALONE: Final = "nothing"
PLENTY: Final = "English, its user has plenty left"
REFUSED: Final = "refused requests of 8 connections"


@dataclass(frozen=True)
class Others:
    """What is asked all the time beside the small ones."""

    name: str
    request: str
    connections: int = 1


@dataclass(frozen=True)
class Felt:
    """Of one kind of small requests: the medians of the rounds, but the worst of all."""

    p50_ms: float
    p99_ms: float
    worst_ms: float


@dataclass(frozen=True)
class Row:
    """What both kinds felt of one kind of others; alone, `elsewhere` is what `here` is."""

    others_per_s: float
    here: dict[str, Felt]
    elsewhere: dict[str, Felt]


def measure(*, rounds: int, seconds: float, kinds: Collection[str] = tuple(TEXTS)) -> dict[str, Row]:
    """All rounds, interleaved; by the others' name, the first of which is ALONE."""
    folder = Path(tempfile.mkdtemp(prefix="sentinel-beside-"))
    told: dict[tuple[str, bool], list[list[dict[str, Any]]]] = {}
    with System(folder) as system, _swallowing_gateway() as gateway:
        proxies = system.start_all("proxy", "proxy", RATE_LIMIT_REQUESTS="1000000000", VERCEL_AI_GATEWAY_URL=gateway)
        ports = [int(proxy.url.rpartition(":")[2]) for proxy in proxies]
        asker = system.add_user()
        assert system.post(asker, chat_body(asker), proxy=proxies[0]).status_code == 200
        others = _others(system, kinds)
        for _ in range(rounds):
            told.setdefault((ALONE, True), []).append(_phase(ports[0], asker, seconds))
            for one in others:
                for here in (False, True):
                    port = ports[0] if here else ports[1]
                    order = _order(port, one.request, connections=one.connections, niceness=_NICENESS)
                    told.setdefault((one.name, here), []).append(_phase(ports[0], asker, seconds, order))
    names = [ALONE, *(one.name for one in others)]
    return {name: _row(told[name, True], told.get((name, False), told[name, True]), seconds) for name in names}


def _others(system: System, kinds: Collection[str]) -> list[Others]:
    counted = system.add_user({"ai_input_tokens": _COUNTED_TOKENS})
    unlimited = system.add_user({"ai_input_tokens": None})
    refused = system.add_user({"ai_requests": 0})
    return [
        *(Others(f"2 MB of {kind}", _chat(counted, TEXTS[kind])) for kind in kinds),
        Others(PLENTY, _chat(unlimited, TEXTS["English"])),
        Others(REFUSED, _chat(refused, _SMALL), connections=8),
    ]


def _chat(user: User, text: str) -> str:
    body = json.dumps({"model": "gpt-4o", "messages": [{"role": "user", "content": text}]}, ensure_ascii=False)
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {user.token}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body.encode())}\r\n\r\n{body}"
    )


def _order(port: int, request: str, **more: Any) -> dict[str, Any]:
    return {"host": "127.0.0.1", "port": port, "requests": [request], "connections": 1, **more}


def _phase(port: int, asker: User, seconds: float, others: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """What the loads told: `/health/live`, small chats, the others."""
    live = "GET /health/live HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
    begin_s = time.monotonic() + _HEAD_START_S
    small = [_order(port, request, pause_s=_PAUSE_S) for request in (live, _chat(asker, _SMALL))]
    loads = [_start(Order(**order, seconds=seconds, begin_s=begin_s)) for order in small]
    if others is not None:
        loads.append(_start(Order(**others, seconds=seconds + 0.2, begin_s=begin_s - 0.1)))
    told = [_told(load) for load in loads]
    assert all(set(one["statuses"]) == {"200"} for one in told[:2]), told
    return told


def _start(order: Order) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.bench.load"]
    load = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert load.stdin is not None
    with load.stdin as said:
        json.dump(asdict(order), said)
    return load


def _told(load: subprocess.Popen[str]) -> dict[str, Any]:
    assert load.stdout is not None
    with load.stdout as said:
        told: dict[str, Any] = json.loads(said.read())
    load.wait()
    return told


def _row(here: list[list[dict[str, Any]]], elsewhere: list[list[dict[str, Any]]], seconds: float) -> Row:
    per_s = statistics.median(told[2]["requests"] / seconds if len(told) > 2 else 0.0 for told in here)
    return Row(per_s, *({"live": _felt(side, 0), "chat": _felt(side, 1)} for side in (here, elsewhere)))


def _felt(rounds: list[list[dict[str, Any]]], asked: int) -> Felt:
    p50_ms, p99_ms = (statistics.median(told[asked][key] for told in rounds) for key in ("p50_ms", "p99_ms"))
    return Felt(p50_ms, p99_ms, max(told[asked]["max_ms"] for told in rounds))


@contextmanager
def _swallowing_gateway() -> Iterator[str]:
    """Its base URL."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "tests.bench.peers:swallowing", "--port", str(port), "--no-access-log"]
    process = subprocess.Popen([*command, "--log-level", "warning"], env=bare_environ())
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def lines(rows: Mapping[str, Row]) -> list[str]:
    """Markdown; `x` is a ratio of p99."""
    table = [
        "| beside | a second | asked for | p50 / p99 / worst ms | x alone | elsewhere p50 / p99 / worst ms | x alone |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        for kind, here in row.here.items():
            elsewhere, alone_ms = row.elsewhere[kind], rows[ALONE].here[kind].p99_ms
            asked = "`/health/live`" if kind == "live" else "small chats"
            table.append(
                f"| {name} | {row.others_per_s:.0f} | {asked} | {_times(here)} | {here.p99_ms / alone_ms:.1f} "
                f"| {_times(elsewhere)} | {elsewhere.p99_ms / alone_ms:.1f} |"
            )
    return table


def _times(felt: Felt) -> str:
    return f"{felt.p50_ms:.2f} / {felt.p99_ms:.2f} / {felt.worst_ms:.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.beside")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    print("\n".join(lines(measure(rounds=options.rounds, seconds=options.seconds))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
