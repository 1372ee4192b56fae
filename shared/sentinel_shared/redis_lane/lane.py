"""The Redis lane: what the rest of Sentinel calls."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol, Self

from hiredis import ReplyError

from sentinel_shared.redis_lane.cluster import Cluster
from sentinel_shared.redis_lane.connection import Bounds, Command, Connection, LaneStats, Part, now_s, pack
from sentinel_shared.redis_lane.dialer import Dialer, tls_context
from sentinel_shared.redis_lane.node import Node, StateLog
from sentinel_shared.redis_lane.replies import LEFT_OFFICE, REDIRECTIONS, Reply, code_of, translate
from sentinel_shared.redis_lane.script import Script
from sentinel_shared.redis_lane.single import MasterFinder, Single
from sentinel_shared.redis_lane.url import Address, Kind, parse_url

_MIB: Final = 1 << 20


class _Topology(Protocol):
    async def start(self) -> None: ...
    async def close(self) -> None: ...
    def node_for(self, key: bytes | str) -> Node: ...
    def nodes(self) -> list[Node]: ...
    def redirect(self, command: Command, error: ReplyError) -> None: ...


class RedisLane:
    """Commands of one loop tick leave in one write per server, and their replies come back in order.

    Every command ends within `command_timeout_s`, in a reply or in one of these: RedisUnavailable (for certain nothing
    was applied), RedisOutcomeUnknown (sent, no reply in time), RedisFull, RedisRefused. After a time-out the
    connection is replaced. While Redis is away commands fail at once; a reconnect that is just under way is waited
    for. Cancelling an await abandons the reply, not the command. Commands keep their order per key, except one that
    Redis asked to be sent again (a script it forgot, a slot that moved).
    """

    def __init__(
        self,
        dialer: Dialer,
        bounds: Bounds,
        jitter: Callable[[], float],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._bounds = bounds
        self._timeout_s = bounds.command_timeout_s
        self._jitter = jitter
        self._log = StateLog(self._loop)
        self._latency_ms: float | None = None
        self.stats = LaneStats()
        self._topology = self._topology_of(dialer)
        self._node_for = self._topology.node_for

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        client_name: str,
        scripts: Sequence[Script] = (),
        command_timeout_s: float = 0.25,
        connect_timeout_s: float = 1.0,
        tls_ca_file: str | None = None,
        max_outstanding: int = 4096,
        max_unsent_bytes: int = 16 * _MIB,
        jitter: Callable[[], float] = random.random,
    ) -> Self:
        """A lane that is connected, has loaded `scripts` on every master, and has run one.

        Raises SettingsError (a malformed URL), RedisUnavailable (Redis cannot be reached) or RedisRefused (wrong
        password, no right to run scripts, a script that does not compile), each with one line for the operator.
        """
        where = parse_url(url)
        dialer = Dialer(where, tls_context(tls_ca_file) if where.tls else None, client_name, scripts, connect_timeout_s)
        bounds = Bounds(command_timeout_s, max_outstanding, max_unsent_bytes)
        lane = cls(dialer, bounds, jitter)
        try:
            await lane._topology.start()
        except BaseException:
            await lane.close()
            raise
        return lane

    async def close(self) -> None:
        """Outstanding commands fail; nothing of the lane is left."""
        await self._topology.close()

    # --- commands ---

    def submit(self, key: bytes | str, *command: bytes | str | int) -> asyncio.Future[Reply]:
        """Queues `command`, which the node that serves `key` answers; errors come through the future alone."""
        return self._send(key, Command(self._loop.create_future(), self._deadline(), command, key))

    def call(
        self, script: Script, keys: Sequence[bytes | str], args: Sequence[bytes | str | int]
    ) -> asyncio.Future[Reply]:
        """Queues `script`, which the node that serves `keys[0]` runs, known to it or not."""
        parts = (b"EVALSHA", script.sha1, len(keys), *keys, *args)
        return self._send(keys[0], Command(self._loop.create_future(), self._deadline(), parts, keys[0], script))

    async def execute(self, key: bytes | str, *command: bytes | str | int) -> Reply:
        return await self.submit(key, *command)

    def call_on_each(self, *command: bytes | str | int) -> list[asyncio.Future[Reply]]:
        """Queues `command` on every master, for what concerns no key (SCRIPT LOAD, FLUSHALL, INFO)."""
        return [self._send_to(node, command) for node in self._topology.nodes()]

    def wait(self, key: bytes | str, replicas: int, timeout_ms: int) -> asyncio.Future[Reply]:
        """Queues WAIT: how many replicas have the writes that went before it on this connection.

        Submit it together with the write, before awaiting either: were the connection replaced in between, WAIT
        would speak of the new one, which has written nothing. Redis answers nothing else on the connection
        meanwhile, so whoever waits has a lane of its own. `timeout_ms` must be below the lane's own time-out.
        """
        if timeout_ms >= self._timeout_s * 1000:
            raise ValueError(f"timeout_ms must be below the lane's own {self._timeout_s * 1000:.0f}")
        return self.submit(key, b"WAIT", replicas, timeout_ms)

    def _deadline(self) -> float:
        return now_s() + self._timeout_s

    def _send(self, key: bytes | str, command: Command) -> asyncio.Future[Reply]:
        self._node_for(key).connection.send(command)
        return command.future

    def _send_to(self, node: Node, parts: tuple[Part, ...]) -> asyncio.Future[Reply]:
        command = Command(self._loop.create_future(), self._deadline(), parts)
        node.connection.send(command)
        return command.future

    # --- health ---

    @property
    def nodes(self) -> list[str]:
        """The masters' addresses."""
        return [node.name for node in self._topology.nodes()]

    def link_to(self, key: bytes | str) -> object:
        """The connection by which commands for `key` go now; once it was replaced, another object."""
        return self._node_for(key).connection

    @property
    def connected(self) -> bool:
        return all(node.connection.ready for node in self._topology.nodes())

    @property
    def latency_ms(self) -> float | None:
        """The last `ping`'s round trip to the slowest master; None before the first and after a failed one."""
        return self._latency_ms

    async def ping(self) -> float:
        """Asks every master; the slowest one's round trip in ms. Raises RedisUnavailable."""
        began_at = now_s()
        self._latency_ms = None
        await asyncio.gather(*self.call_on_each(b"PING"))
        self._latency_ms = (now_s() - began_at) * 1000
        return self._latency_ms

    # --- replies that are not for the caller ---

    def _on_error(self, connection: Connection, command: Command, error: ReplyError) -> None:
        code = code_of(error)
        if code == "NOSCRIPT" and command.script is not None:
            self.stats.script_misses += 1
            if not command.future.done():
                command.packed = pack((b"EVAL", command.script.source, *command.parts[2:]))
                connection.send(command)
        elif code in REDIRECTIONS and not command.future.done():
            self._topology.redirect(command, error)
        else:
            command.fail(translate(error))
            if code in LEFT_OFFICE:
                connection.retire(str(error))

    # --- assembly ---

    def _topology_of(self, dialer: Dialer) -> _Topology:
        def asker() -> Connection:
            return self._connection(lambda _: None)

        def node(address: Address, on_lost: Callable[[], None]) -> Node:
            return self._node(str(address), lambda connection: dialer.open(connection, address), on_lost)

        if dialer.url.kind is Kind.CLUSTER:
            return Cluster(dialer, asker, node, self.stats, self._timeout_s)
        if dialer.url.kind is Kind.SINGLE:
            return Single(node(dialer.url.addresses[0], lambda: None))
        finder = MasterFinder(dialer, asker)

        async def dial(connection: Connection) -> None:
            await dialer.open(connection, await finder.find(), must_be_master=True)

        return Single(self._node(f"master {dialer.url.service}", dial, lambda: None))

    def _node(self, name: str, dial: Callable[[Connection], Awaitable[None]], on_lost: Callable[[], None]) -> Node:
        return Node(name, self._connection, dial, on_lost=on_lost, log=self._log, stats=self.stats, jitter=self._jitter)

    def _connection(self, on_lost: Callable[[str], None]) -> Connection:
        return Connection(self._loop, self._bounds, self.stats, self._on_error, on_lost)
