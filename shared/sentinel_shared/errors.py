"""Everything Sentinel raises on purpose. Foreign exceptions become one of these where they are met."""

from __future__ import annotations


class SentinelError(Exception):
    """The root: whoever catches this catches all that was foreseen."""


class SettingsError(SentinelError):
    """A setting is missing or malformed; the message names the variable and what it takes."""


class RedisUnavailable(SentinelError):
    """Redis could not be asked; for certain nothing was applied."""


class RedisOutcomeUnknown(RedisUnavailable):
    """The command was sent and no reply came in time: it may or may not have been applied."""


class RedisFull(SentinelError):
    """Redis refuses writes for want of memory (`OOM`)."""


class RedisRefused(SentinelError):
    """Redis answered with an error that a retry will not cure; the message is Redis's."""


class ZionUnavailable(SentinelError):
    """Zion gave no usable answer: refused connection, time-out, 5xx, 429, garbage, or an open breaker.

    `retry_after_s` is what Zion or the breaker asks for; `outcome_unknown` tells whether what was sent
    may have been applied.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None, outcome_unknown: bool = True) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.outcome_unknown = outcome_unknown


class ZionRefusedToken(SentinelError):
    """Zion answered 401 to a caller's token: bad, revoked or expired."""


class ZionRefusedKey(SentinelError):
    """Zion answered 401 or 403 to Sentinel's own API key: an operator has to act."""


class UnknownUser(SentinelError):
    """Zion knows no such user (404)."""


class ZionRejected(SentinelError):
    """Zion refused the request itself and for certain applied nothing (400, 413); `status` says which."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class ZionRouteMissing(SentinelError):
    """Zion has no such route (404 or 405): an older deployment without the batch endpoint."""


class MalformedLimits(ZionUnavailable):
    """Zion answered, but not with limits that make sense; the message says what is wrong. The last good ones stay."""
