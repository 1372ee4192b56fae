"""`python -m tests.bench`: what a request costs, beside others, in interleaved rounds; ratios are what to trust.

CPU is read from /proc per process tree; Sentinel has everything on (auth, limits, the window, counting, usage queued,
metrics, a log line a request), and Redis's share is told apart. Prints one table, and writes it to `build/bench.md` and
`build/bench.json`. It reports, it never judges.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from tests.bench import beside, foreign, ledger_cost, peers
from tests.support.redis_server import free_port
from tests.support.system import GATEWAY_KEY, System, bare_environ

USERS: Final = 64
SENTINEL: Final = "Sentinel, everything on"
TWO_WORKERS: Final = "Sentinel, two processes"
TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Scenario:
    """`body` is the request's; `limits` are those of the users who send it."""

    name: str
    connections: int
    body: dict[str, Any]
    refused: bool = False


def _chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "openai/gpt-4o", "messages": [{"role": "user", "content": text}], **more}


SCENARIOS: Final = (
    Scenario("JSON chat, 32 connections", 32, _chat("say 10 tokens about the weather. " * 8)),
    Scenario("JSON chat, 1 connection", 1, _chat("say 10 tokens about the weather. " * 8)),
    Scenario("stream of 50 events, 32 connections", 32, _chat("say 50 tokens", stream=True)),
    Scenario("stream of 10 events, 1 connection", 1, _chat("say 10 tokens", stream=True)),
    Scenario("100 kB prompt, 8 connections", 8, _chat("say 10 tokens. " + "the quick brown fox. " * 4_800)),
    Scenario("refused (429), 32 connections", 32, _chat("say 10 tokens about the weather. " * 8), refused=True),
)


@dataclass(frozen=True)
class Contestant:
    """A gateway under test; `pids` are its processes, `redis_pids` what it keeps its limits in."""

    name: str
    port: int
    pids: tuple[int, ...]
    redis_pids: tuple[int, ...] = ()
    foreign: foreign.Foreign | None = None


def cpu_s(pids: tuple[int, ...]) -> float:
    """CPU seconds of these processes and their children."""
    total = 0.0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / TICKS
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                total += cpu_s((int(child),))
    return total


def memory_mb(pids: tuple[int, ...]) -> float:
    """Resident memory."""
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(contestant: Contestant, scenario: Scenario, tokens: list[str], seconds: float) -> dict[str, Any]:
    """One round: microseconds of CPU per request (and per event), latencies."""
    requests = [_request(contestant, scenario, token, number) for number, token in enumerate(tokens)]
    order = {
        "host": "127.0.0.1",
        "port": contestant.port,
        "requests": requests,
        "connections": scenario.connections,
        "seconds": seconds,
    }
    before, redis_before = cpu_s(contestant.pids), cpu_s(contestant.redis_pids)
    said = subprocess.run(
        [sys.executable, "-m", "tests.bench.load"], input=json.dumps(order), capture_output=True, text=True, check=True
    ).stdout
    told: dict[str, Any] = json.loads(said)
    count = max(1, told["requests"])
    told["cpu_us"] = (cpu_s(contestant.pids) - before) / count * 1e6
    told["redis_us"] = (cpu_s(contestant.redis_pids) - redis_before) / count * 1e6
    told["cpu_us_per_event"] = told["cpu_us"] * count / told["events"] if told["events"] else None
    told["per_s"] = count / seconds
    return told


def _request(contestant: Contestant, scenario: Scenario, token: str, number: int) -> str:
    other = contestant.foreign
    body = json.dumps(scenario.body if other is None else other.body(scenario.body, f"user-{number}"))
    path = "/v1/chat/completions" if other is None else other.path
    token = token if other is None or other.token is None else other.token
    return (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {token}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}"
    )


def contestants(stack: ExitStack, system: System, folder: Path) -> list[Contestant]:
    """All that can run here, started; `stack` ends them."""
    proxy, *_ = system.start_all("proxy", "usage-worker", "limits-sync", RATE_LIMIT_REQUESTS="1000000000")
    redis_pid = system.redis.pid
    fields = [Contestant(SENTINEL, int(proxy.url.rpartition(":")[2]), (proxy.pid,), (redis_pid,))]
    (two,) = system.start_all("proxy", SENTINEL_WORKERS="2", RATE_LIMIT_REQUESTS="1000000000")
    fields.append(Contestant(TWO_WORKERS, int(two.url.rpartition(":")[2]), (two.pid,), (redis_pid,)))
    environ = bare_environ(BENCH_GATEWAY=system.gateway.url, BENCH_GATEWAY_KEY=GATEWAY_KEY)
    for name, app in (("bare uvicorn, no upstream", "bare"), ("FastAPI + httpx relay, no limits", "naive")):
        port = free_port()
        options = ["--factory"] if app == "naive" else []
        command = [sys.executable, "-m", "uvicorn", f"tests.bench.peers:{app}", "--port", str(port), "--no-access-log"]
        process = subprocess.Popen([*command, "--log-level", "warning", *options], env=environ)
        stack.callback(_end, process)
        fields.append(Contestant(name, port, (process.pid,)))
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx:
        port = free_port()
        config = folder / "nginx.conf"
        gateway = system.gateway.url.removeprefix("http://")
        config.write_text(peers.NGINX.format(folder=folder, gateway=gateway, port=port, key=GATEWAY_KEY))
        process = subprocess.Popen([nginx, "-c", str(config), "-e", str(folder / "nginx.log")])
        stack.callback(_end, process)
        fields.append(Contestant("nginx proxy_pass, no limits", port, (process.pid,)))
    return fields


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait()


def run(*, rounds: int, seconds: float, peers_too: bool = False) -> dict[str, Any]:
    """All scenarios over all contestants, interleaved; medians."""
    folder = Path(tempfile.mkdtemp(prefix="sentinel-bench-"))
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with System(folder / "system") as system, ExitStack() as stack:
        plenty = [system.add_user({"ai_requests": None}).token for _ in range(USERS)]
        nothing = [system.add_user({"ai_requests": 0}).token for _ in range(USERS)]
        fields = contestants(stack, system, folder)
        if peers_too:
            others = foreign.start_all(stack, folder, system.gateway.url)
            fields += [Contestant(one.name, one.port, one.pids, one.redis_pids, one) for one in others]
        for contestant in fields:
            _until_answering(contestant, plenty[0])
        for _ in range(rounds):
            for scenario in SCENARIOS:
                for contestant in fields:
                    if not _takes_part(contestant, scenario):
                        continue
                    tokens = nothing if scenario.refused else plenty
                    told = measure(contestant, scenario, tokens, seconds)
                    results.setdefault(scenario.name, {}).setdefault(contestant.name, []).append(told)
        memory = memory_mb(fields[0].pids)
    medians = {
        scenario: {name: _median(told) for name, told in by_name.items()} for scenario, by_name in results.items()
    }
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return {"machine": machine, "rounds": rounds, "seconds": seconds, "memory_mb": memory, "results": medians}


def _takes_part(contestant: Contestant, scenario: Scenario) -> bool:
    if contestant.name == TWO_WORKERS:
        return scenario is SCENARIOS[0]
    return contestant.name == SENTINEL or not scenario.refused


def _median(told: list[dict[str, Any]]) -> dict[str, Any]:
    numbers = [key for key, value in told[0].items() if isinstance(value, int | float)]
    median = {key: statistics.median(one[key] for one in told) for key in numbers}
    return median | {"statuses": told[-1]["statuses"]}


def _until_answering(contestant: Contestant, token: str) -> None:
    for attempt in range(50):
        try:
            measure(contestant, SCENARIOS[1], [token], 0.1)
        except subprocess.CalledProcessError:
            if attempt == 49:
                raise
        else:
            return


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        (
            f"Machine: {report['machine']}; {report['rounds']} interleaved rounds of {report['seconds']:g} s, medians. "
            f"Sentinel's memory at the end: {report['memory_mb']:.0f} MB."
        ),
        "",
        "| scenario | who | CPU us/request | x Sentinel | + Redis us | us/event | p50 ms | p99 ms | TTFT ms | per s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for scenario, by_name in report["results"].items():
        own = next(iter(by_name.values()))["cpu_us"]
        for name, told in by_name.items():
            event = f"{told['cpu_us_per_event']:.0f}" if told.get("cpu_us_per_event") else "-"
            first = f"{told['ttft_p50_ms']:.2f}" if told["ttft_p50_ms"] else "-"
            lines.append(
                f"| {scenario} | {name} | {told['cpu_us']:.0f} | {told['cpu_us'] / own:.2f} | {told['redis_us']:.0f} "
                f"| {event} | {told['p50_ms']:.2f} | {told['p99_ms']:.2f} | {first} | {told['per_s']:.0f} |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--peers", action="store_true", help="TensorZero and LiteLLM, too")
    options = parser.parse_args()
    report = run(rounds=options.rounds, seconds=options.seconds, peers_too=options.peers)
    ledger = asyncio.run(ledger_cost.measure())
    report["ledger"] = ledger
    costs = [f"- {row}" for row in ledger_cost.lines(ledger)]
    felt = beside.measure(rounds=options.rounds, seconds=options.seconds)
    report["beside"] = {name: asdict(row) for name, row in felt.items()}
    text = "\n".join([table(report), "", "What the ledger costs Redis:", *costs, "", *beside.lines(felt)])
    print(text)
    build = Path("build")
    build.mkdir(exist_ok=True)
    (build / "bench.md").write_text(text + "\n")
    (build / "bench.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
