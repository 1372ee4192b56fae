"""The way of usage from the accounts to Zion: claimed into frozen batches, sent, acknowledged, or kept as dead letters.

Losing the process between any two of these calls loses nothing: a batch stays, leased, until it is acknowledged, and
whoever leases it next sends the same bytes under the same id. Errors as in `accounts`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, cast

import msgspec

from sentinel_shared import keys
from sentinel_shared.contracts import LIMIT_NAMES, Increment, IncrementResult, LimitName
from sentinel_shared.errors import RedisUnavailable
from sentinel_shared.replication import Replication
from sentinel_shared.scripts import load

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sentinel_shared.redis_lane import RedisLane, Reply, Script

APPLIED: Final = "1"
NOT_APPLIED: Final = "0"
NEVER: Final = "-1"


class _Item(msgspec.Struct, rename="camel"):
    external_id: str
    limit_name: LimitName
    amount: int


class _Body(msgspec.Struct):
    increments: list[_Item]


_decode_body: Final = msgspec.json.Decoder(_Body).decode


@dataclass(frozen=True, slots=True)
class Batch:
    """Usage frozen under an id: `body` is exactly what Zion is sent, every time.

    `maybe_applied`: an earlier attempt's fate is unknown, so nothing but the same bytes by the same way is safe.
    `singles`: it is being sent item by item; `done` has the items known already.
    """

    batch_id: str
    shard: int
    body: bytes
    claimed_ms: int
    attempts: int
    maybe_applied: bool = False
    singles: bool = False
    done: dict[int, IncrementResult] = field(default_factory=dict)

    def increments(self) -> list[Increment]:
        """What the body says, in its order."""
        return [Increment(i.external_id, i.limit_name, i.amount) for i in _decode_body(self.body).increments]


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """Usage that Zion refused for good. `since_ms` is Unix time."""

    letter_id: str
    external_id: str
    limit_name: LimitName
    amount: int
    since_ms: int
    reason: str


class _Letter(msgspec.Struct):
    external_id: str
    limit_name: LimitName
    amount: int
    since_ms: int
    reason: str


_decode_letter: Final = msgspec.json.Decoder(_Letter).decode


@dataclass(frozen=True, slots=True)
class Backlog:
    """A shard's state: users waiting, since when (Unix ms), open batches, dead letters, requests running, tallies."""

    users: int
    oldest_ms: int | None
    batches: int
    dead_letters: int
    leases: int
    settled_tokens: int
    sent_tokens: int
    dropped_tokens: int


class UsageQueue:
    """All shards' queues, through one lane."""

    def __init__(self, lane: RedisLane, scripts: QueueScripts, *, wait_replicas: int = 0) -> None:
        self._lane = lane
        self._scripts = scripts
        self._replication = Replication(lane, wait_replicas)

    async def claim(
        self, shard: int, *, batch_id: str, users: int, items: int, lease_s: float, gather_s: float, enough_users: int
    ) -> Batch | None:
        """Freeze what the shard owes, oldest first; None when nothing has gathered long enough (or enough of it).

        With `wait_replicas`, raises RedisUnavailable where too few of them have the batch: it waits for a later lease.
        """
        claiming = self._lane.call(
            self._scripts.claim,
            (keys.queue(shard), keys.batches(shard), keys.batch_prefix(shard) + batch_id),
            (
                batch_id,
                keys.account_prefix(shard),
                users,
                items,
                int(lease_s * 1000),
                int(gather_s * 1000),
                enough_users,
            ),
        )
        reply = await self._replicated(shard, claiming)
        if not reply:
            return None
        body, _, claimed_ms = cast("tuple[bytes, int, int]", reply)
        return Batch(batch_id, shard, body, int(claimed_ms), attempts=1)

    async def lease(self, shard: int, *, lease_s: float) -> Batch | None:
        """A batch whose sender died or whose back-off is over, leased to the caller; None when there is none."""
        args = (keys.batch_prefix(shard), int(lease_s * 1000))
        leasing = self._lane.call(self._scripts.lease_batch, (keys.batches(shard),), args)
        reply = cast("list[bytes]", await self._replicated(shard, leasing))
        if not reply:
            return None
        batch_id, body, claimed_ms, attempts, cleared, singles, *known = reply
        done = {int(known[i]): msgspec.json.decode(known[i + 1], type=IncrementResult) for i in range(0, len(known), 2)}
        return Batch(
            batch_id.decode(),
            shard,
            body,
            int(claimed_ms),
            int(attempts),
            maybe_applied=int(attempts) - 1 != int(cleared),
            singles=singles == b"1",
            done=done,
        )

    async def _replicated(self, shard: int, writing: asyncio.Future[Reply]) -> Reply:
        """The reply to a write, once enough replicas have it: a fail-over must not forget what Zion is sent next."""
        reply, replicas = await self._replication.of(shard, writing, wrote=bool)
        if reply and replicas < self._replication.replicas:
            raise RedisUnavailable(f"only {replicas} of {self._replication.replicas} replicas have the batch")
        return reply

    async def postpone(self, batch: Batch, *, until_ms: int) -> None:
        """Nobody sends this batch before `until_ms` (Unix ms): its lease renewed, or its back-off."""
        key = keys.batches(batch.shard)
        await self._lane.submit(key, "ZADD", key, "XX", until_ms, batch.batch_id)

    async def note_not_applied(self, batch: Batch) -> None:
        """The attempt surely was not applied; if none before it may have been, the next is free to choose its way."""
        if not batch.maybe_applied:
            await self._note(batch, "cleared", batch.attempts)

    async def note_singles(self, batch: Batch) -> bool:
        """From now on this batch is sent item by item, whoever sends it; False: somebody acknowledged or split it."""
        return await self._note(batch, "singles", 1)

    async def note_done(self, batch: Batch, index: int, result: IncrementResult) -> None:
        """Remember the fate of one item of a batch that is sent item by item."""
        await self._note(batch, f"done:{index}", msgspec.json.encode(result))

    async def _note(self, batch: Batch, name: str, value: bytes | int) -> bool:
        key = keys.batch_prefix(batch.shard) + batch.batch_id
        return await self._lane.call(self._scripts.note, (key,), (name, value)) == 1

    async def ack(self, batch: Batch, results: Sequence[IncrementResult]) -> bool:
        """Book Zion's word on each item, in the batch's order; False when it was booked before (no effect)."""
        args: list[str | int] = [batch.batch_id, keys.account_prefix(batch.shard)]
        for item, result in zip(batch.increments(), results, strict=True):
            outcome = APPLIED if result.applied else NEVER if result.permanent else NOT_APPLIED
            args += [
                item.external_id,
                LIMIT_NAMES.index(item.limit_name) + 1,
                item.amount,
                outcome,
                "" if result.new_value is None else result.new_value,
                result.error or "",
            ]
        shard = batch.shard
        reply = await self._lane.call(
            self._scripts.ack,
            (
                keys.queue(shard),
                keys.batches(shard),
                keys.batch_prefix(shard) + batch.batch_id,
                keys.dead_letters(shard),
                keys.tallies(shard),
            ),
            args,
        )
        return reply == 1

    async def split(self, batch: Batch, *, first_id: str, second_id: str) -> bool:
        """Two halves by users in place of a batch that Zion refused as a whole; False: too late, or one user only."""
        items = _decode_body(batch.body).increments
        users = list(dict.fromkeys(item.external_id for item in items))
        if len(users) < 2:
            return False
        first = set(users[: len(users) // 2])
        halves = ([i for i in items if i.external_id in first], [i for i in items if i.external_id not in first])
        shard = batch.shard
        prefix = keys.batch_prefix(shard)
        args: list[str | int | bytes] = [batch.batch_id, first_id, second_id, keys.account_prefix(shard)]
        args += [len(halves[0]), *(msgspec.json.encode(_Body(half)) for half in halves), len(halves[1])]
        for user in users:
            args += [user, 2 if user in first else 3]
        key_names = (keys.batches(shard), prefix + batch.batch_id, prefix + first_id, prefix + second_id)
        return await self._lane.call(self._scripts.split, key_names, args) == 1

    async def reap(self, shard: int, *, at_most: int) -> int:
        """Charge requests whose proxy died, as far as they are known; how many there were."""
        reply = await self._lane.call(
            self._scripts.reap,
            (keys.leases(shard), keys.queue(shard), keys.audit(shard), keys.tallies(shard)),
            (
                keys.account_prefix(shard),
                keys.reaped_prefix(shard),
                keys.REAPED_TTL_S,
                at_most,
                keys.AUDIT_EVENTS_PER_SHARD,
                keys.settled_prefix(shard),
            ),
        )
        return cast("int", reply)

    async def backlog(self, shard: int) -> Backlog:
        """What waits in this shard."""
        queue, batches, dead, leases = (
            keys.queue(shard),
            keys.batches(shard),
            keys.dead_letters(shard),
            keys.leases(shard),
        )
        tallies = keys.tallies(shard)
        submit = self._lane.submit
        replies = (
            submit(queue, "ZCARD", queue),
            submit(queue, "ZRANGE", queue, 0, 0, "WITHSCORES"),
            submit(queue, "ZCARD", batches),
            submit(queue, "HLEN", dead),
            submit(queue, "ZCARD", leases),
            submit(queue, "HMGET", tallies, "settled_tokens", "sent_tokens", "dropped_tokens"),
        )
        users, oldest, open_batches, letters, running, tally = await asyncio.gather(*replies)
        settled, sent, dropped = (int(text or 0) for text in cast("list[bytes | None]", tally))
        return Backlog(
            users=cast("int", users),
            oldest_ms=_oldest_ms(cast("list[bytes]", oldest)),
            batches=cast("int", open_batches),
            dead_letters=cast("int", letters),
            leases=cast("int", running),
            settled_tokens=settled,
            sent_tokens=sent,
            dropped_tokens=dropped,
        )

    async def unaccounted_tokens(self, shard: int, *, accounts_at_most: int) -> int | None:
        """Tokens of a shard that were settled but neither sent, dropped nor owed; None when too many accounts owe.

        Steadily above 0 they were lost, below 0 doubled; a credit that waits for new usage counts below 0, too.
        """
        key_names = (keys.queue(shard), keys.batches(shard), keys.dead_letters(shard), keys.tallies(shard))
        args = (keys.account_prefix(shard), keys.batch_prefix(shard), accounts_at_most)
        looked, tokens = cast("list[int]", await self._lane.call(self._scripts.conserve, key_names, args))
        return tokens if looked else None

    async def dead_letters(self) -> list[DeadLetter]:
        """All of them, oldest first."""
        letters: list[DeadLetter] = []
        for shard in range(keys.SHARDS):
            key = keys.dead_letters(shard)
            reply = cast("list[bytes]", await self._lane.submit(key, "HGETALL", key))
            for i in range(0, len(reply), 2):
                letter = _decode_letter(reply[i + 1])
                letters.append(
                    DeadLetter(
                        reply[i].decode(),
                        letter.external_id,
                        letter.limit_name,
                        letter.amount,
                        letter.since_ms,
                        letter.reason,
                    )
                )
        return sorted(letters, key=lambda letter: letter.since_ms)

    async def replay(self, letter: DeadLetter) -> bool:
        """Owed again, to go out in a new batch; False when it is not there any more."""
        return await self._bury(letter, "replay")

    async def drop(self, letter: DeadLetter) -> bool:
        """Forgotten, by an operator's decision; False when it is not there any more."""
        return await self._bury(letter, "drop")

    async def _bury(self, letter: DeadLetter, decision: str) -> bool:
        shard = keys.shard_of(letter.external_id)
        reply = await self._lane.call(
            self._scripts.bury,
            (
                keys.dead_letters(shard),
                keys.account(letter.external_id),
                keys.queue(shard),
                keys.audit(shard),
                keys.tallies(shard),
            ),
            (letter.letter_id, decision, keys.AUDIT_EVENTS_PER_SHARD),
        )
        return reply == 1


@dataclass(frozen=True, slots=True)
class QueueScripts:
    """The scripts behind `UsageQueue`, loaded once per process."""

    claim: Script
    lease_batch: Script
    note: Script
    ack: Script
    split: Script
    reap: Script
    bury: Script
    conserve: Script

    @classmethod
    def load(cls) -> QueueScripts:
        """Read them from the package."""
        return cls(**{name: load(name) for name in cls.__slots__})

    def all(self) -> tuple[Script, ...]:
        """For the lane, which loads them at connect."""
        return tuple(getattr(self, name) for name in self.__slots__)


def _oldest_ms(member_and_score: list[bytes]) -> int | None:
    return int(float(member_and_score[1])) if member_and_score else None
