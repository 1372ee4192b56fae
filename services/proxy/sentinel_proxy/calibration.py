"""How the token counts' error is learnt: from which prompts, and by all proxies, through Redis every ten seconds."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sentinel_proxy.tokens import Sums
from sentinel_shared.errors import RedisFull, RedisRefused, RedisUnavailable

if TYPE_CHECKING:
    from sentinel_proxy.tokens import Ratios
    from sentinel_shared.clock import Clock
    from sentinel_shared.directory import Directory

_EVERY_S: Final = 10.0
_MOST_TOKENS: Final = 1_000_000
_SAMPLED_EVERY: Final = 16
_SAMPLED_BYTES: Final = 256
_SAMPLE_MAX_BYTES: Final = 256 * 1024
"""The ratios weigh no prompt for more than 20,000 tokens."""


@dataclass(slots=True)
class Samples:
    """Which prompts are counted exactly, however much their caller has left, so that the estimate stays calibrated.

    Every 16th at most, and on average no more than 256 bytes a request: a count costs 30 ns a byte.
    """

    since: int = _SAMPLED_EVERY
    spare_bytes: int = 64 * 1024

    def take(self, prompt_bytes: int) -> bool:
        """Whether this one is."""
        self.since += 1
        self.spare_bytes = min(self.spare_bytes + _SAMPLED_BYTES, _SAMPLE_MAX_BYTES)
        if self.since < _SAMPLED_EVERY or prompt_bytes > self.spare_bytes:
            return False
        self.since = 0
        self.spare_bytes -= prompt_bytes
        return True


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
