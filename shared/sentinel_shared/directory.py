"""What replicas remember together beside accounts: proofs of who a token belongs to, unknown users, who asks Zion.

Every method raises `RedisUnavailable`, `RedisFull` or `RedisRefused`; nothing here is needed to be exact, so callers
may go on without it. Tokens are never stored, only their SHA-256.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, cast

import msgspec

from sentinel_shared import keys

if TYPE_CHECKING:
    from sentinel_shared.redis_lane import RedisLane

_FETCH_LOCK_MS: Final = 3_000
_UNKNOWN_FIRST_S: Final = 30
_UNKNOWN_MOST_S: Final = 300
_RATIO_SIDES: Final = ("local", "upstream")


class Proof(msgspec.Struct, frozen=True):
    """A token that Zion has vouched for. Times are Unix seconds; `expires_s` is its own `exp`, None if it has none."""

    user_id: str
    external_id: str | None
    validated_s: float
    expires_s: float | None


_decode_proof: Final = msgspec.json.Decoder(Proof).decode


class Directory:
    """Shared memory of callers and users, through one lane."""

    def __init__(self, lane: RedisLane) -> None:
        self._lane = lane

    async def proof(self, token_sha256: str) -> Proof | None:
        """What Zion last said of this token, if anyone remembers."""
        key = keys.caller(token_sha256)
        reply = await self._lane.submit(key, "GET", key)
        return None if reply is None else _decode_proof(cast("bytes", reply))

    async def remember_proof(self, token_sha256: str, proof: Proof, *, ttl_s: float) -> None:
        """Keep it for `ttl_s`."""
        key = keys.caller(token_sha256)
        await self._lane.submit(key, "SET", key, msgspec.json.encode(proof), "PX", max(1, int(ttl_s * 1000)))

    async def forget_proof(self, token_sha256: str) -> None:
        """Zion has taken its word back."""
        key = keys.caller(token_sha256)
        await self._lane.submit(key, "DEL", key)

    async def take_validation(self, token_sha256: str) -> bool:
        """Whether this replica is the one to ask Zion about the token; the right lapses by itself."""
        return await self._take(keys.validating(token_sha256))

    async def end_validation(self, token_sha256: str) -> None:
        """Others may ask again."""
        key = keys.validating(token_sha256)
        await self._lane.submit(key, "DEL", key)

    async def take_fetch(self, external_id: str) -> bool:
        """Whether this replica is the one to ask Zion for the user's limits; the right lapses by itself."""
        return await self._take(keys.fetching(external_id))

    async def end_fetch(self, external_id: str) -> None:
        """Others may ask again."""
        key = keys.fetching(external_id)
        await self._lane.submit(key, "DEL", key)

    async def is_unknown(self, external_id: str) -> bool:
        """Whether Zion has just said that it does not know this user."""
        key = keys.unknown_user(external_id)
        return cast("bytes | None", await self._lane.submit(key, "GET", key)) is not None

    async def note_unknown(self, external_id: str) -> None:
        """Remember it for 30 s, twice as long each time in a row, 5 min at most."""
        key = keys.unknown_user(external_id)
        strikes_key = key + ":strikes"
        strikes = cast("int", await self._lane.submit(key, "INCR", strikes_key))
        seconds = min(_UNKNOWN_MOST_S, _UNKNOWN_FIRST_S * 2 ** min(strikes - 1, 10))
        await self._lane.submit(key, "EXPIRE", strikes_key, 2 * _UNKNOWN_MOST_S)
        await self._lane.submit(key, "SET", key, "1", "EX", seconds)

    async def forget_unknown(self, external_id: str) -> None:
        """The user may exist by now."""
        key = keys.unknown_user(external_id)
        await self._lane.submit(key, "DEL", key, key + ":strikes")

    async def first_delivery(self, signature: str, *, ttl_s: int) -> bool:
        """Whether this webhook delivery is new; it is remembered while its time stamp is valid."""
        key = keys.webhook_seen(signature)
        return await self._lane.submit(key, "SET", key, "1", "NX", "EX", ttl_s) is not None

    async def share_ratios(self, fresh: dict[str, tuple[int, int]], *, most_tokens: int) -> dict[str, tuple[int, int]]:
        """Add what was observed here, per family (tokens as counted, as reported); returns everybody's sums.

        Sums beyond `most_tokens` are halved, so that older answers weigh ever less.
        """
        key = keys.token_ratios()
        sent = [
            self._lane.submit(key, "HINCRBY", key, f"{family}:{side}", amount)
            for family, amounts in fresh.items()
            for side, amount in zip(_RATIO_SIDES, amounts, strict=True)
        ]
        sent += [self._lane.submit(key, "EXPIRE", key, keys.TOKEN_RATIOS_TTL_S)]
        *_, reply = await asyncio.gather(*sent, self._lane.submit(key, "HGETALL", key))
        sums = _ratio_sums(cast("list[bytes]", reply))
        for family, (local, upstream) in sums.items():
            if local > most_tokens:
                halves = (f"{family}:local", local // 2, f"{family}:upstream", upstream // 2)
                await self._lane.submit(key, "HSET", key, *halves)
        return sums

    async def _take(self, key: str) -> bool:
        return await self._lane.submit(key, "SET", key, "1", "NX", "PX", _FETCH_LOCK_MS) is not None


def _ratio_sums(reply: list[bytes]) -> dict[str, tuple[int, int]]:
    numbers = {reply[i].decode(): int(reply[i + 1]) for i in range(0, len(reply), 2)}
    families = {name.rpartition(":")[0] for name in numbers}
    return {family: (numbers.get(f"{family}:local", 0), numbers.get(f"{family}:upstream", 0)) for family in families}
