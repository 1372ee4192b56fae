"""Every Redis key that Sentinel makes, and how long each may live.

All of a user's keys carry the hash tag of the user's shard, so that every script touches one Redis Cluster slot.
`{s21}` is one of 16 fixed shards, chosen by CRC-32 of the external id.
"""

from __future__ import annotations

from binascii import crc32
from functools import lru_cache
from typing import Final

SHARDS: Final = 16
_TAGS: Final = (3, 21, 61, 43, 2, 20, 60, 42, 1, 23, 63, 41, 0, 22, 62, 40)
"""Of s00 to s99 those whose slots lie one in each sixteenth of a cluster's: masters of equal ranges share evenly."""

SETTLED_TTL_S: Final = 900
"""How long a settlement is remembered; a replay that is younger than this is recognised for certain."""

REAPED_TTL_S: Final = 7 * 86_400
"""How long a reaped reservation waits for the late settlement that corrects it."""

TOKEN_RATIOS_TTL_S: Final = 30 * 86_400
"""How long the calibration of token counts outlives its last use."""

AUDIT_EVENTS_PER_SHARD: Final = 10_000
"""The audit stream's cap (approximate, as `XADD MAXLEN ~` counts)."""


REPLICATION_TTL_S: Final = 60


@lru_cache(maxsize=8_192)
def shard_of(external_id: str) -> int:
    """The shard of a user, 0 to 15."""
    return crc32(external_id.encode()) % SHARDS


@lru_cache(maxsize=SHARDS)
def shard_prefix(shard: int) -> str:
    """What every key of a shard begins with."""
    return f"sentinel:{{s{_TAGS[shard]:02d}}}:"


def account_prefix(shard: int) -> str:
    """What every account of a shard begins with; the external id follows."""
    return shard_prefix(shard) + "account:"


@lru_cache(maxsize=8_192)
def account(external_id: str) -> str:
    """Hash, the account. Expires when idle with nothing owed; never while anything is pending, reserved or dead."""
    return account_prefix(shard_of(external_id)) + external_id


def queue(shard: int) -> str:
    """Sorted set, external id -> when it became dirty (ms). Bound: one entry per active user."""
    return shard_prefix(shard) + "queue"


def replication(shard: int) -> str:
    """String, written to learn how far the shard's replicas are; expires after `REPLICATION_TTL_S`."""
    return shard_prefix(shard) + "replication"


def leases(shard: int) -> str:
    """Sorted set, `<rid> <external id>` -> when the lease ends (ms). Bound: one entry per request in flight."""
    return shard_prefix(shard) + "leases"


def due(shard: int) -> str:
    """Sorted set, external id -> when its limits are due for a refresh (ms). Bound: one entry per active user."""
    return shard_prefix(shard) + "due"


def audit(shard: int) -> str:
    """Stream of settled requests, capped at `AUDIT_EVENTS_PER_SHARD`."""
    return shard_prefix(shard) + "audit"


def batches(shard: int) -> str:
    """Sorted set, batch id -> when it may be sent (again) (ms). Bound: one entry per batch whose fate is open."""
    return shard_prefix(shard) + "batches"


def batch_prefix(shard: int) -> str:
    """What every batch of a shard begins with; the batch id follows. A batch lives until it is acknowledged."""
    return shard_prefix(shard) + "batch:"


def dead_letters(shard: int) -> str:
    """Hash, dead-letter id -> JSON. Bound: what Zion refused for good and nobody has replayed or dropped."""
    return shard_prefix(shard) + "dead_letters"


def tallies(shard: int) -> str:
    """Hash, conservation counters of the shard: units settled, sent, dropped. Bound: its fields are fixed."""
    return shard_prefix(shard) + "tallies"


def settled_prefix(shard: int) -> str:
    """String per settled reservation, the rid follows; lives `SETTLED_TTL_S`, an hour more if none was found."""
    return shard_prefix(shard) + "settled:"


def reaped_prefix(shard: int) -> str:
    """String per reaped reservation, expires after `REAPED_TTL_S`; the rid follows."""
    return shard_prefix(shard) + "reaped:"


def fetching(external_id: str) -> str:
    """String, the single-flight lock of a cold fetch; expires in seconds."""
    return shard_prefix(shard_of(external_id)) + "fetching:" + external_id


def unknown_user(external_id: str) -> str:
    """String, how often in a row Zion did not know this user; expires in 30 s, later in up to 5 min."""
    return shard_prefix(shard_of(external_id)) + "unknown:" + external_id


def caller(token_sha256: str) -> str:
    """String, the profile behind a valid token; expires with the trust in it."""
    return "sentinel:caller:" + token_sha256


def validating(token_sha256: str) -> str:
    """String, the single-flight lock of a token's validation; expires in seconds."""
    return "sentinel:validating:" + token_sha256


def webhook_seen(signature: str) -> str:
    """String, a webhook delivery already acted upon; expires with its time stamp's validity."""
    return "sentinel:webhook:" + signature


def token_ratios() -> str:
    """Hash, per model family the tokens counted here and reported upstream. Bound: two fields a family, and a TTL."""
    return "sentinel:token_ratios"
