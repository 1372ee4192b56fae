"""What can go wrong on the way to the upstream, and back."""

from __future__ import annotations

from sentinel_shared.errors import SentinelError


class UpstreamError(SentinelError):
    """The upstream gave no answer. `reached` tells whether it may have seen the request."""

    def __init__(self, message: str, *, reached: bool) -> None:
        super().__init__(message)
        self.reached = reached


class UpstreamUnreachable(UpstreamError):
    """No connection could be had, or it broke."""


class UpstreamTimeout(UpstreamError):
    """It kept silent for too long."""


def broke(why: str) -> UpstreamUnreachable:
    """The connection broke after the request had begun to leave."""
    return UpstreamUnreachable(f"the connection to the upstream broke: {why}", reached=True)


def silent() -> UpstreamTimeout:
    """No byte within the idle time-out."""
    return UpstreamTimeout("the upstream kept silent for too long", reached=True)
