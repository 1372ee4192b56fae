"""Who is asking: a Zion token becomes a caller, from memory, from Redis, or from Zion, in this order."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import random
from base64 import urlsafe_b64decode
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Final

from sentinel_proxy.errors import invalid_token, missing_token, unavailable, user_not_metered
from sentinel_shared.contracts import Caller
from sentinel_shared.directory import Directory, Proof
from sentinel_shared.errors import (
    RedisFull,
    RedisRefused,
    RedisUnavailable,
    SentinelError,
    UnknownUser,
    ZionRefusedToken,
    ZionUnavailable,
)

if TYPE_CHECKING:
    from sentinel_proxy.metrics import ProxyMetrics
    from sentinel_shared.clock import Clock
    from sentinel_shared.zion_client import ZionClient

TOKEN_BYTES_MAX: Final = 8_192
_MEMORY_S: Final = 5.0
_MEMORY_ENTRIES: Final = 10_000
_BAD_TOKEN_S: Final = 30.0
_REVALIDATE_AFTER: Final = 0.8
_COLD_WAIT_S: Final = 3.0

_log: Final = logging.getLogger(__name__)


@dataclass(slots=True)
class _Known:
    """What this process remembers of a token; `caller` None: Zion refused it."""

    caller: Caller | None
    until_s: float
    proof: Proof | None


class Authenticator:
    """One per process. Tokens are held as SHA-256 only, 10,000 of them at most.

    With Redis away, what this process remembers serves as long as the proof is valid; else Zion is asked. With Zion
    away, a proof that is past its trust serves on, at most `max_stale_s` and never past the token's own `exp`.
    """

    def __init__(
        self,
        directory: Directory,
        zion: ZionClient,
        *,
        trust_s: float,
        max_stale_s: float,
        clock: Clock,
        metrics: ProxyMetrics,
    ) -> None:
        self._directory = directory
        self._zion = zion
        self._trust_s = trust_s
        self._max_stale_s = max_stale_s
        self._clock = clock
        self._metrics = metrics
        self._memory: OrderedDict[bytes, _Known] = OrderedDict()
        self._resolving: dict[bytes, asyncio.Task[Caller]] = {}
        self._revalidating: set[bytes] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._hit = metrics.cache("caller_memory", "hit")

    def remembered(self, token: bytes) -> Caller | None:
        """The caller, if this process has known for sure within the last seconds; raises ApiError for a bad token."""
        known = self._memory.get(sha256(token).digest())
        if known is None or self._clock.unix_s() >= known.until_s:
            return None
        if known.caller is None:
            raise invalid_token()
        self._hit.inc()
        return known.caller

    async def caller(self, token: bytes) -> Caller:
        """The caller behind the token; one look-up at a time for each token.

        Raises ApiError: 401, 403 for a user who cannot be metered, 503 when nobody can tell.
        """
        digest = sha256(token).digest()
        task = self._resolving.get(digest)
        if task is None:
            task = asyncio.create_task(self._resolve(digest, token.decode("ascii")))
            self._resolving[digest] = task
            task.add_done_callback(lambda done: self._resolved(digest, done))
        return await asyncio.shield(task)

    def _resolved(self, digest: bytes, task: asyncio.Task[Caller]) -> None:
        self._resolving.pop(digest, None)
        if not task.cancelled():
            task.exception()  # whoever still waits gets it; nobody waiting is no error

    async def _resolve(self, digest: bytes, token: str) -> Caller:
        expires_s = expiry_s(token)
        now_s = self._clock.unix_s()
        if expires_s is not None and expires_s <= now_s:
            self._remember(digest, None, now_s + _BAD_TOKEN_S, None)
            raise invalid_token()
        proof = await self._proof(digest)
        if proof is not None and now_s < self._fresh_until_s(proof):
            self._metrics.cache("caller", "hit").inc()
            if now_s >= proof.validated_s + _REVALIDATE_AFTER * self._trust_s:
                self._revalidate_soon(digest, token, expires_s)
            return self._trust(digest, proof, until_s=min(now_s + _MEMORY_S, self._fresh_until_s(proof)))
        self._metrics.cache("caller", "miss").inc()
        try:
            return await self._validate_once(digest, token, expires_s)
        except ZionRefusedToken:
            self._remember(digest, None, self._clock.unix_s() + _BAD_TOKEN_S, None)
            await self._forget(digest)
            raise invalid_token() from None
        except UnknownUser:
            raise user_not_metered() from None
        except ZionUnavailable as error:
            if proof is None or now_s >= self._stale_until_s(proof):
                raise unavailable(
                    "Your token cannot be checked at the moment.",
                    code="authentication_unavailable",
                    retry_after_s=error.retry_after_s or 1.0,
                ) from error
            self._metrics.cache("caller", "stale").inc()
            return self._trust(digest, proof, until_s=min(now_s + _MEMORY_S, self._stale_until_s(proof)))

    async def _proof(self, digest: bytes) -> Proof | None:
        try:
            return await self._directory.proof(digest.hex())
        except (RedisUnavailable, RedisRefused):
            known = self._memory.get(digest)
            return known.proof if known else None

    async def _validate_once(self, digest: bytes, token: str, expires_s: float | None) -> Caller:
        """Ask Zion, unless another replica is just doing so: then wait for what it learns."""
        give_up_s = self._clock.monotonic_s() + _COLD_WAIT_S
        while not await self._may_ask(digest):
            if self._clock.monotonic_s() >= give_up_s:
                raise ZionUnavailable("another replica waits for Zion's answer about this token", retry_after_s=1.0)
            await self._clock.sleep(random.uniform(0.02, 0.1))  # noqa: S311 - jitter
            proof = await self._proof(digest)
            if proof is not None and self._clock.unix_s() < self._fresh_until_s(proof):
                return self._trust(
                    digest, proof, until_s=min(self._clock.unix_s() + _MEMORY_S, self._fresh_until_s(proof))
                )
        try:
            async with asyncio.timeout(_COLD_WAIT_S):
                return await self._validate(digest, token, expires_s, background=False)
        except TimeoutError:
            raise ZionUnavailable(f"no answer from Zion within {_COLD_WAIT_S:g} s", retry_after_s=1.0) from None
        finally:
            await self._end_asking(digest)

    async def _validate(self, digest: bytes, token: str, expires_s: float | None, *, background: bool) -> Caller:
        caller = await self._zion.caller(token, background=background)
        now_s = self._clock.unix_s()
        proof = Proof(caller.user_id, caller.external_id, now_s, expires_s)
        # Without Redis this process remembers; the others ask for themselves.
        with contextlib.suppress(RedisUnavailable, RedisRefused, RedisFull):
            await self._directory.remember_proof(digest.hex(), proof, ttl_s=self._stale_until_s(proof) - now_s)
        return self._trust(digest, proof, until_s=min(now_s + _MEMORY_S, self._fresh_until_s(proof)))

    def _trust(self, digest: bytes, proof: Proof, *, until_s: float) -> Caller:
        caller = Caller(proof.user_id, proof.external_id)
        self._remember(digest, caller, until_s, proof)
        return caller

    def _remember(self, digest: bytes, caller: Caller | None, until_s: float, proof: Proof | None) -> None:
        self._memory[digest] = _Known(caller, until_s, proof)
        self._memory.move_to_end(digest)
        if len(self._memory) > _MEMORY_ENTRIES:
            self._memory.popitem(last=False)

    async def _forget(self, digest: bytes) -> None:
        try:
            await self._directory.forget_proof(digest.hex())
        except (RedisUnavailable, RedisRefused):
            _log.warning("a refused token's proof could not be removed from Redis; it expires by itself")

    async def _may_ask(self, digest: bytes) -> bool:
        try:
            return await self._directory.take_validation(digest.hex())
        except (RedisUnavailable, RedisRefused, RedisFull):
            return True

    async def _end_asking(self, digest: bytes) -> None:
        try:
            await self._directory.end_validation(digest.hex())
        except (RedisUnavailable, RedisRefused):
            return  # the right lapses by itself

    def _revalidate_soon(self, digest: bytes, token: str, expires_s: float | None) -> None:
        """Ahead of expiry and in the background, so that an active caller never waits for Zion."""
        if digest in self._revalidating:
            return
        self._revalidating.add(digest)
        task = asyncio.create_task(self._revalidate(digest, token, expires_s))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _revalidate(self, digest: bytes, token: str, expires_s: float | None) -> None:
        try:
            if await self._may_ask(digest):
                try:
                    await self._validate(digest, token, expires_s, background=True)
                finally:
                    await self._end_asking(digest)
        except ZionRefusedToken:
            self._remember(digest, None, self._clock.unix_s() + _BAD_TOKEN_S, None)
            await self._forget(digest)
        except SentinelError as error:
            _log.info("a caller could not be revalidated ahead of expiry: %s", error)
        finally:
            self._revalidating.discard(digest)

    def _fresh_until_s(self, proof: Proof) -> float:
        until_s = proof.validated_s + self._trust_s
        return until_s if proof.expires_s is None else min(until_s, proof.expires_s)

    def _stale_until_s(self, proof: Proof) -> float:
        until_s = proof.validated_s + self._trust_s + self._max_stale_s
        return until_s if proof.expires_s is None else min(until_s, proof.expires_s)


def bearer_token(authorization: bytes | None) -> bytes:
    """The token of an `Authorization` header. Raises ApiError (401) when there is none that could be one."""
    if not authorization:
        raise missing_token()
    scheme, _, token = authorization.partition(b" ")
    token = token.strip()
    if scheme.lower() != b"bearer" or not token:
        raise missing_token()
    if len(token) > TOKEN_BYTES_MAX or not token.isascii() or b" " in token:
        raise invalid_token()
    return token


def expiry_s(token: str) -> float | None:
    """The `exp` that a JWT claims, Unix seconds, as yet unproven; None when it claims none or is no JWT."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        claims = json.loads(urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (ValueError, RecursionError):
        return None
    claimed = claims.get("exp") if isinstance(claims, dict) else None
    if not isinstance(claimed, int | float) or isinstance(claimed, bool) or math.isnan(claimed):
        return None
    return float(claimed)
