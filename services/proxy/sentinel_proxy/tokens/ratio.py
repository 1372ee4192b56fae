"""How far the local count of a model family is off: the running ratio of the upstream's count to ours.

For families that are not OpenAI's, whose tokenizers are not at hand: the ratio of what was reported to what was
estimated corrects the next estimate. Pure: where sums are kept and shared is the caller's affair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from sentinel_proxy.tokens.families import ModelFamily

RATIO_MIN: Final = 0.5
RATIO_MAX: Final = 3.0
# So much is believed before anything was observed, at a ratio of 1: the first answers move the ratio only gently.
_PRIOR_TOKENS: Final = 2_000
# Past this the sums are halved, so that older answers weigh ever less and the sums stay small.
_WINDOW_TOKENS: Final = 1_000_000
# No single answer counts for more than this many tokens, nor as further off than the bounds.
_ANSWER_TOKENS_MAX: Final = 20_000


@dataclass(frozen=True, slots=True)
class Sums:
    """Input tokens of one family, as counted here and as the upstream reported them for the same requests."""

    local_tokens: int = 0
    upstream_tokens: int = 0

    @property
    def ratio(self) -> float:
        """Upstream over local, within RATIO_MIN and RATIO_MAX; 1 before anything was observed."""
        return _bounded((self.upstream_tokens + _PRIOR_TOKENS) / (self.local_tokens + _PRIOR_TOKENS))


def observed(local_tokens: int, upstream_tokens: int) -> Sums:
    """One answer as a contribution to the sums: bounded, and nothing at all where either count is missing."""
    if local_tokens <= 0 or upstream_tokens <= 0:
        return Sums()
    weight = min(local_tokens, _ANSWER_TOKENS_MAX)
    return Sums(weight, round(weight * _bounded(upstream_tokens / local_tokens)))


def merge(left: Sums, right: Sums) -> Sums:
    """Both together: a process's new contributions into the shared sums, or two processes' sums."""
    local_tokens = max(0, left.local_tokens) + max(0, right.local_tokens)
    upstream_tokens = max(0, left.upstream_tokens) + max(0, right.upstream_tokens)
    while local_tokens > _WINDOW_TOKENS:
        local_tokens, upstream_tokens = local_tokens // 2, upstream_tokens // 2
    return Sums(local_tokens, upstream_tokens)


def corrected(tokens: int, family: ModelFamily, sums: Sums) -> int:
    """A local count as it should be reserved: OpenAI's families as counted, others times their ratio, rounded up."""
    return tokens if family.openai else math.ceil(tokens * sums.ratio)


class Ratios:
    """The sums of every family in one process: what the others shared, and what is new here since the last exchange.

    Bounded by the number of families. Used from one thread.
    """

    def __init__(self) -> None:
        self._shared: dict[str, Sums] = {}
        self._fresh: dict[str, Sums] = {}

    def observe(self, family: ModelFamily, *, local_tokens: int, upstream_tokens: int) -> None:
        """One answer that carried a usage; `local_tokens` is the count before any correction, never a bound."""
        fresh = self._fresh.get(family.name, Sums())
        self._fresh[family.name] = merge(fresh, observed(local_tokens, upstream_tokens))

    def sums(self, family: ModelFamily) -> Sums:
        """What is known of the family, shared and fresh together."""
        return merge(self._shared.get(family.name, Sums()), self._fresh.get(family.name, Sums()))

    def corrected(self, tokens: int, family: ModelFamily) -> int:
        """A local count as it should be reserved."""
        return tokens if family.openai else corrected(tokens, family, self.sums(family))

    def take_fresh(self) -> dict[str, Sums]:
        """What was observed since the last time, to be added to the shared sums; it counts as shared from now on."""
        taken, self._fresh = self._fresh, {}
        for name, sums in taken.items():
            self._shared[name] = merge(self._shared.get(name, Sums()), sums)
        return taken

    def put_shared(self, shared: dict[str, Sums]) -> None:
        """Replaces the shared sums with what all processes have together."""
        self._shared = dict(shared)


def _bounded(ratio: float) -> float:
    return min(RATIO_MAX, max(RATIO_MIN, ratio))
