"""Redis Cluster: which node has a key, and what to do when it is another one now."""

from __future__ import annotations

import asyncio
from binascii import crc_hqx
from collections.abc import Callable, Iterator
from typing import Final

from hiredis import ReplyError

from sentinel_shared.errors import RedisUnavailable, SentinelError
from sentinel_shared.redis_lane.connection import ASKING, Command, Connection, LaneStats, now_s
from sentinel_shared.redis_lane.dialer import Dialer
from sentinel_shared.redis_lane.node import Node
from sentinel_shared.redis_lane.replies import Reply, translate
from sentinel_shared.redis_lane.url import Address

SLOTS: Final = 16384
_MAX_HOPS: Final = 32
_TRY_AGAIN_S: Final = 0.02
_MAP_INTERVAL_S: Final = 0.1
_MAP_INTERVAL_WHILE_DOWN_S: Final = 0.5


def slot_of(key: bytes | str) -> int:
    """The slot of a key: of what stands between its first braces, if anything does."""
    raw = key.encode() if isinstance(key, str) else key
    opening = raw.find(b"{")
    if opening >= 0:
        closing = raw.find(b"}", opening + 1)
        if closing > opening + 1:
            raw = raw[opening + 1 : closing]
    return crc_hqx(raw, 0) % SLOTS


class Cluster:
    """Keeps a node per master and the map of slots, which is asked for anew whenever it proves wrong or a node is lost.

    A redirected command follows within its own deadline: its caller never sees MOVED, ASK or TRYAGAIN.
    """

    def __init__(
        self,
        dialer: Dialer,
        make_asker: Callable[[], Connection],
        make_node: Callable[[Address, Callable[[], None]], Node],
        stats: LaneStats,
        command_timeout_s: float,
    ) -> None:
        self._dialer = dialer
        self._make_asker = make_asker
        self._make_node = make_node
        self._stats = stats
        self._command_timeout_s = command_timeout_s
        self._loop = asyncio.get_running_loop()
        self._nodes: dict[Address, Node] = {}
        self._masters: list[Address] = []
        self._slots: list[Node] = []
        self._stale = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._leaving: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Learns the map and connects to every master; raises RedisUnavailable or RedisRefused."""
        ranges = await self._ask_for_map()
        for address in {address for _, _, address in ranges}:
            self._nodes[address] = self._make_node(address, self._stale.set)
        for node in self._nodes.values():
            await node.start()
        self._adopt(ranges)
        self._watcher = self._loop.create_task(self._watch())

    async def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*(node.close() for node in self._nodes.values()))

    def node_for(self, key: bytes | str) -> Node:
        return self._slots[slot_of(key)]

    def nodes(self) -> list[Node]:
        return [self._nodes[address] for address in self._masters]

    # --- redirections ---

    def redirect(self, command: Command, error: ReplyError) -> None:
        """Sends a command again that was not applied, where and when the cluster says."""
        self._stats.redirects += 1
        command.hops += 1
        command.packed = command.packed.removeprefix(ASKING)
        if command.key is None or command.hops > _MAX_HOPS or now_s() >= command.deadline:
            command.fail(translate(error))
            return
        code, *details = str(error).split(" ")
        if code == "MOVED" and not details[1].startswith(":"):
            node = self._node_at(_moved_to(details[1]))
            self._slots[int(details[0])] = node
            self._stale.set()
            node.connection.send(command)
        elif code == "ASK" and not details[1].startswith(":"):
            self._node_at(_moved_to(details[1])).connection.send_asking(command)
        else:
            self._stale.set()
            self._loop.call_later(_TRY_AGAIN_S, self._again, command, error)

    def _again(self, command: Command, error: ReplyError) -> None:
        if now_s() >= command.deadline:
            command.fail(translate(error))
        elif command.key is not None and not command.future.done():
            self.node_for(command.key).connection.send(command)

    def _node_at(self, address: Address) -> Node:
        node = self._nodes.get(address)
        if node is None:
            node = self._nodes[address] = self._make_node(address, self._stale.set)
            node.start_soon()
        return node

    # --- the map ---

    async def _watch(self) -> None:
        while True:
            await self._stale.wait()
            self._stale.clear()
            try:
                self._adopt(await self._ask_for_map())
            except SentinelError:
                self._stale.set()
            if all(node.connection.ready for node in self.nodes()):
                await asyncio.sleep(_MAP_INTERVAL_S)
            else:
                self._stale.set()
                await asyncio.sleep(_MAP_INTERVAL_WHILE_DOWN_S)

    async def _ask_for_map(self) -> list[tuple[int, int, Address]]:
        ready = [address for address in self._masters if self._nodes[address].connection.ready]
        failure: SentinelError = RedisUnavailable("no node of the cluster tells its map")
        for address in dict.fromkeys([*ready, *self._masters, *self._dialer.url.addresses]):
            try:
                ranges = list(
                    _ranges(
                        await self._dialer.ask(self._make_asker(), address, b"CLUSTER", b"SLOTS", sign_in=True), address
                    )
                )
            except SentinelError as error:
                failure = error
                continue
            if ranges:
                return ranges
        raise failure

    def _adopt(self, ranges: list[tuple[int, int, Address]]) -> None:
        nodes = {address: self._node_at(address) for _, _, address in ranges}
        self._masters = list(nodes)
        # A slot that nobody serves goes to any node, which answers CLUSTERDOWN: tried again, then failed.
        slots = self._slots or [next(iter(nodes.values()))] * SLOTS
        for first, last, address in ranges:
            slots[first : last + 1] = [nodes[address]] * (last + 1 - first)
        self._slots = slots
        for address in self._nodes.keys() - nodes.keys():
            task = self._loop.create_task(self._let_go(address))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def _let_go(self, address: Address) -> None:
        """What was sent to a node that left the map still gets its reply."""
        await asyncio.sleep(self._command_timeout_s)
        node = self._nodes.get(address)
        if node is not None and address not in self._masters and node not in self._slots:
            del self._nodes[address]
            await node.close()


def _moved_to(where: str) -> Address:
    host, _, port = where.rpartition(":")
    return Address(host, int(port))


def _ranges(reply: Reply, asked: Address) -> Iterator[tuple[int, int, Address]]:
    """(first slot, last slot, master) of a CLUSTER SLOTS reply; a master without a name is the one we asked."""
    for entry in reply if isinstance(reply, list) else []:
        match entry:
            case [int(first), int(last), [host, int(port), *_], *_]:
                name = host.decode() if isinstance(host, bytes) and host not in {b"", b"?"} else asked.host
                yield first, last, Address(name, port)
            case _:
                continue
