"""What every proxy has learnt of the token counts' error, shared through Redis every ten seconds."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from sentinel_proxy.tokens import Sums
from sentinel_shared.errors import RedisFull, RedisRefused, RedisUnavailable

if TYPE_CHECKING:
    from sentinel_proxy.tokens import Ratios
    from sentinel_shared.clock import Clock
    from sentinel_shared.directory import Directory

_EVERY_S: Final = 10.0
_MOST_TOKENS: Final = 1_000_000


async def share(ratios: Ratios, directory: Directory, clock: Clock) -> None:
    """Until cancelled. With Redis away each process goes by what it has seen itself."""
    while True:
        with contextlib.suppress(RedisUnavailable, RedisRefused, RedisFull):
            await share_once(ratios, directory)
        await clock.sleep(_EVERY_S)


async def share_once(ratios: Ratios, directory: Directory) -> None:
    """One exchange. What was taken and not delivered is lost: it is a statistic."""
    fresh = {family: (sums.local_tokens, sums.upstream_tokens) for family, sums in ratios.take_fresh().items()}
    shared = await directory.share_ratios(fresh, most_tokens=_MOST_TOKENS)
    ratios.put_shared({family: Sums(*sums) for family, sums in shared.items()})
