"""What Redis answers, and which of Sentinel's errors an error reply is."""

from __future__ import annotations

from typing import Final, TypeAlias

from hiredis import ReplyError

from sentinel_shared.errors import RedisFull, RedisRefused, RedisUnavailable, SentinelError

Reply: TypeAlias = "bytes | int | list[Reply] | None"
"""A RESP2 reply. Status replies (`OK`) are bytes too."""

LEFT_OFFICE: Final = frozenset({"LOADING", "MASTERDOWN", "READONLY"})
"""The server is not, or no longer, a master that can be written to: look for the one that is."""

REDIRECTIONS: Final = frozenset({"MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN"})
"""Cluster: not applied here and now; elsewhere or soon."""

_PASSING: Final = LEFT_OFFICE | REDIRECTIONS | {"BUSY", "MISCONF", "NOREPLICAS"}
"""Nothing was applied and the same command can succeed later. MISCONF: the disk is full or broken."""


def code_of(error: ReplyError) -> str:
    """The first word of an error reply."""
    return str(error).partition(" ")[0]


def translate(error: ReplyError) -> SentinelError:
    """The exception that an error reply becomes."""
    code = code_of(error)
    if code == "OOM":
        return RedisFull(str(error))
    if code in _PASSING:
        return RedisUnavailable(str(error))
    return RedisRefused(str(error))
