"""The system as real processes, for tests: any number of each service on free ports, a Redis, the simulators.

Everything is waited for by asking it, never by time alone. All processes are in one group with sentinel-dev's keeper,
so that they end with the tests even when these are killed. What a process says is in `<folder>/<name>.log`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, TypeVar
from uuid import uuid4

import httpx
import openai

from sentinel_dev import keeper
from sentinel_dev.zion import DEMO_API_KEY, DEMO_SECRET, make_token
from tests.support.redis_server import RedisServer, free_port

T = TypeVar("T")

GATEWAY_KEY: Final = "the-gateways-own-key"
WEBHOOK_SECRET: Final = "the-webhooks-secret"
LIMITS: Final = ("ai_requests", "ai_input_tokens", "ai_output_tokens")
_READY_WITHIN_S: Final = 30.0
_POLL_S: Final = 0.03


def eventually(ask: Callable[[], T], *, within_s: float, until: Callable[[T], bool] = bool) -> T:
    """The first answer that is good; fails with the last one that was not."""
    deadline = time.monotonic() + within_s
    while True:
        answer = ask()
        if until(answer):
            return answer
        assert time.monotonic() < deadline, f"not within {within_s} s; at last: {answer!r}"
        time.sleep(_POLL_S)


def script(name: str) -> str:
    """A console script of the environment that the tests run in."""
    return str(Path(sys.executable).parent / name)


def bare_environ(**variables: str) -> dict[str, str]:
    """What every process needs, nothing of what this machine is told about services, and `variables`."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    return {**kept, "PYTHONWARNINGS": "default", **variables}


def runs(pid: int) -> bool:
    """Whether there is such a process, a zombie counting as none."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    with contextlib.suppress(OSError):
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    return not status.parent.parent.exists() or status.exists()


class Process:
    """One process, started at once; its output goes to a file."""

    def __init__(self, name: str, command: list[str], environ: Mapping[str, str], folder: Path, group: int = 0) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._said_from = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=dict(environ),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=group,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        """The exit code, None while it runs."""
        return self._process.poll()

    @property
    def said(self) -> str:
        """All of its output, none of an earlier process's of that name."""
        return self.log.read_bytes()[self._said_from :].decode(errors="replace")

    def signal(self, number: int) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and waits."""
        self.signal(signal.SIGKILL)
        self._process.wait(timeout=10)

    def stop(self, *, within_s: float = 20) -> int:
        """SIGTERM; the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(within_s=within_s)

    def wait(self, *, within_s: float) -> int:
        """The exit code; fails with its last lines when it does not end."""
        try:
            return self._process.wait(timeout=within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} runs on after {within_s} s:\n{self.said[-3000:]}") from None

    def pause(self) -> None:
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)


class Server(Process):
    """A process that answers HTTP on 127.0.0.1."""

    def __init__(
        self,
        name: str,
        command: list[str],
        environ: Mapping[str, str],
        folder: Path,
        *,
        port: int,
        ready_path: str,
        group: int,
        http: httpx.Client,
    ) -> None:
        super().__init__(name, command, environ, folder, group)
        self.url = f"http://127.0.0.1:{port}"
        self._http = http
        self._ready_path = ready_path

    @property
    def service(self) -> str:
        return self.name.rpartition("-")[0]

    @property
    def ready(self) -> bool:
        try:
            return self.get(self._ready_path).status_code == 200
        except httpx.TransportError:
            return False

    def until_ready(self) -> None:
        deadline = time.monotonic() + _READY_WITHIN_S
        while not self.ready:
            if self.code is not None or time.monotonic() > deadline:
                raise AssertionError(f"{self.name} did not become ready (exit code {self.code}):\n{self.said[-3000:]}")
            time.sleep(_POLL_S)

    def get(self, path: str) -> httpx.Response:
        return self._http.get(self.url + path, timeout=5)

    def post(self, path: str, told: Any = None) -> Any:
        """The answer to an order to a simulator; raises when it is refused."""
        return self._http.post(self.url + path, json={} if told is None else told, timeout=5).raise_for_status().json()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples with these labels, 0.0 when there is none."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        total = 0.0
        for line in self.get("/metrics").text.splitlines():
            sample, _, value = line.rpartition(" ")
            if sample.partition("{")[0] == name and all(label in sample for label in wanted):
                total += float(value)
        return total


@dataclass(frozen=True)
class User:
    """Somebody whom the simulated Zion knows."""

    external_id: str
    token: str

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token}"}


def chat_body(user: User, model: str = "openai/gpt-4o", **fields: Any) -> dict[str, Any]:
    """A chat request that the gateway's books show under the user's name."""
    return {"model": model, "messages": [{"role": "user", "content": "hello"}], "user": user.external_id, **fields}


class System:
    """As a context manager: Redis and the simulators run within it, services as they are started; none is left over.

    `environ` goes to all services. Users are separate, so tests can share a system as long as each makes its own.
    """

    def __init__(self, folder: Path, **environ: str) -> None:
        self.folder = folder
        self.redis = RedisServer(folder / "redis", appendonly="yes", appendfsync="everysec")
        self.processes: list[Process] = []
        self.http = httpx.Client(timeout=20)
        self._environ = environ
        self._keeper: subprocess.Popen[bytes] | None = None
        self._zion_port, self._gateway_port = free_port(), free_port()
        self.zion: Server
        self.gateway: Server

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-I", "-S", str(keeper.__file__)]
        self._keeper = subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0)
        try:
            self.redis.start()
            self.zion = self._simulator("zion", self._zion_port, "--api-key", DEMO_API_KEY)
            self.gateway = self._simulator("gateway", self._gateway_port, "--key", GATEWAY_KEY)
            self.zion.until_ready()
            self.gateway.until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._keeper is not None and self._keeper.stdin is not None:
            self._keeper.stdin.close()
            self._keeper.wait(timeout=10)
        for process in self.processes:
            process.kill()
        self.redis.kill()
        self.http.close()

    @property
    def proxies(self) -> list[Server]:
        """Those that run, in the order in which they were started."""
        return [
            one for one in self.processes if isinstance(one, Server) and one.service == "proxy" and one.code is None
        ]

    @property
    def environ(self) -> dict[str, str]:
        """What services are told, but for their ports."""
        return bare_environ(
            ZION_API_URL=self.zion.url,
            ZION_API_KEY=DEMO_API_KEY,
            VERCEL_AI_GATEWAY_URL=f"{self.gateway.url}/v1",
            VERCEL_AI_GATEWAY_API_KEY=GATEWAY_KEY,
            REDIS_URL=self.redis.url,
            SENTINEL_HOST="127.0.0.1",
            RATE_LIMIT_REQUESTS="0",
            RESERVATION_LEASE_SECONDS="2",
            SPOOL_DIR=str(self.folder / "spool"),
            WEBHOOK_SECRET=WEBHOOK_SECRET,
            **self._environ,
        )

    def start(self, service: str, **environ: str) -> Server:
        """`proxy`, `usage-worker` or `limits-sync`, on a free port; not waited for, so that several start at once."""
        port = free_port()
        number = sum(process.name.startswith(service) for process in self.processes) + 1
        told = {**self.environ, "SENTINEL_PORT": str(port), **environ}
        return self._server(f"{service}-{number}", [script(f"sentinel-{service}")], told, port, "/health/ready")

    def start_all(self, *services: str, **environ: str) -> list[Server]:
        """The same for several, until all are ready."""
        started = [self.start(service, **environ) for service in services]
        for server in started:
            server.until_ready()
        return started

    def add_user(self, limits: Mapping[str, Any] | None = None, *, external_id: str | None = None) -> User:
        """Somebody new; what `limits` leaves out is plenty."""
        name = external_id or f"user-{uuid4().hex[:12]}"
        plenty = dict.fromkeys(LIMITS, 100_000_000)
        told = self.zion.post("/admin/users", {"externalId": name, "limits": {**plenty, **(limits or {})}})
        return User(name, told["token"])

    def client(self, user: User, proxy: Server | None = None, **options: Any) -> openai.OpenAI:
        """The official SDK for this user, without its retries."""
        told = {"max_retries": 0, "http_client": self.http, **options}
        return openai.OpenAI(base_url=f"{(proxy or self.proxies[0]).url}/v1", api_key=user.token, **told)

    def post(
        self, user: User, body: Any, path: str = "chat/completions", proxy: Server | None = None
    ) -> httpx.Response:
        """A request of this user's; give it `user=user.external_id` to find it in the gateway's books."""
        return self.http.post(f"{(proxy or self.proxies[0]).url}/v1/{path}", json=body, headers=user.headers)

    def charged(self, user: User) -> dict[str, int]:
        """What the gateway charged for requests that named this user."""
        told = self.gateway.get("/admin/books").json()["users"].get(user.external_id, {})
        return {
            "ai_requests": told.get("requests", 0),
            "ai_input_tokens": told.get("input_tokens", 0),
            "ai_output_tokens": told.get("output_tokens", 0),
        }

    def booked(self, user: User) -> dict[str, int]:
        """What Zion was told."""
        told = self.zion.get("/admin/books").json()["users"].get(user.external_id, {})
        return {name: told.get(name, {}).get("applied", 0) for name in LIMITS}

    def usage(self, user: User, proxy: Server | None = None) -> dict[str, dict[str, Any]]:
        """`GET /v1/usage`: the limits by name."""
        answer = self.http.get(f"{(proxy or self.proxies[0]).url}/v1/usage", headers=user.headers)
        return {limit["name"]: limit for limit in answer.raise_for_status().json()["limits"]}

    def _simulator(self, name: str, port: int, *options: str) -> Server:
        command = [sys.executable, "-m", "sentinel_dev.simulate", name, "--port", str(port), *options]
        return self._server(name, command, bare_environ(), port, "/admin/books")

    def _server(self, name: str, command: list[str], environ: Mapping[str, str], port: int, ready_path: str) -> Server:
        assert self._keeper is not None
        group = self._keeper.pid
        server = Server(
            name, command, environ, self.folder, port=port, ready_path=ready_path, group=group, http=self.http
        )
        self.processes.append(server)
        return server


def stranger(external_id: str = "nobody") -> User:
    """Somebody whose token is genuine, and of whom Zion knows nothing."""
    return User(external_id, make_token(external_id, DEMO_SECRET, time.time() + 600))
