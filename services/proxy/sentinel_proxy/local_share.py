"""Admission while Redis is away, from a bounded share of what each user was last seen to have left.

Worst overspend: each process admits at most a tenth of what it last saw remaining of each limit, per user and
outage. Ten processes that saw the same figures cannot overspend; more, or older figures, overspend by what the
tenths add up to beyond what was really left. `RATE_LIMIT_*` windows are shared out in the same way.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sentinel_shared.accounts import Cost, Decision, WindowPolicy

SHARE: Final = 0.1
_USERS_MAX: Final = 10_000
_UNLIMITED: Final = -1


@dataclass(slots=True)
class _Left:
    """What this process may still admit for one user; None is unlimited."""

    requests: int | None
    input_tokens: int | None
    output_tokens: int | None
    window_began_s: float
    window_requests: int
    spent_tokens: int


class LocalShare:
    """One per process; remembers the 10,000 users seen last."""

    def __init__(self, window: WindowPolicy) -> None:
        self._window = window
        self._seen: OrderedDict[str, Decision] = OrderedDict()
        self._left: dict[str, _Left] = {}

    def see(self, external_id: str, decision: Decision) -> None:
        """Redis has decided: what it says replaces what was admitted without it."""
        self._seen[external_id] = decision
        self._seen.move_to_end(external_id)
        self._left.pop(external_id, None)
        if len(self._seen) > _USERS_MAX:
            self._seen.popitem(last=False)

    def spare_input_tokens(self, external_id: str) -> int:
        """Input tokens that the user has left so amply that a bound may stand in for a count; 0 when not known."""
        decision = self._seen.get(external_id)
        if decision is None or self._window.tokens:
            return 0
        limit, used, reserved, _ = decision.limit(1)
        return 1_000_000_000 if limit < 0 else max(0, limit - used - reserved) // 64

    def admit(self, external_id: str, cost: Cost, *, now_s: float) -> int | None:
        """Output tokens granted (-1 uncapped), or None when the share is used up or the user was never seen."""
        left = self._left.get(external_id) or self._open(external_id, now_s)
        if left is None or not self._window_allows(left, now_s):
            return None
        if left.requests == 0 or (left.input_tokens is not None and left.input_tokens < cost.input_tokens):
            return None
        granted = _grant(left.output_tokens, cost)
        if granted is None:
            return None
        left.window_requests += 1
        left.requests = None if left.requests is None else left.requests - 1
        self._spend(left, cost.input_tokens, max(0, granted))
        return granted

    def correct(self, external_id: str, *, input_tokens: int, output_tokens: int) -> None:
        """What a request admitted here cost more (or, negative, less) than was set aside for it."""
        left = self._left.get(external_id)
        if left is not None:
            self._spend(left, input_tokens, output_tokens)

    @property
    def spent_tokens(self) -> int:
        """Tokens admitted without Redis that it has not yet confirmed: the bound on this process's overspend."""
        return sum(left.spent_tokens for left in self._left.values())

    def _open(self, external_id: str, now_s: float) -> _Left | None:
        decision = self._seen.get(external_id)
        if decision is None:
            return None
        shares = []
        for index in range(3):
            limit, used, reserved, _ = decision.limit(index)
            shares.append(None if limit < 0 else int(max(0, limit - used - reserved) * SHARE))
        left = _Left(shares[0], shares[1], shares[2], window_began_s=now_s, window_requests=0, spent_tokens=0)
        self._left[external_id] = left
        return left

    def _window_allows(self, left: _Left, now_s: float) -> bool:
        if not self._window.requests:
            return True
        if now_s - left.window_began_s >= self._window.window_ms / 1000:
            left.window_began_s, left.window_requests = now_s, 0
        return left.window_requests < max(1, int(self._window.requests * SHARE))

    @staticmethod
    def _spend(left: _Left, input_tokens: int, output_tokens: int) -> None:
        if left.input_tokens is not None:
            left.input_tokens = max(0, left.input_tokens - input_tokens)
        if left.output_tokens is not None:
            left.output_tokens = max(0, left.output_tokens - output_tokens)
        left.spent_tokens = max(0, left.spent_tokens + input_tokens + output_tokens)


def _grant(available: int | None, cost: Cost) -> int | None:
    """As `admit.lua` grants."""
    if cost.output_wanted_tokens == 0:
        return 0
    if available is None:
        return _UNLIMITED
    if available < cost.choices:
        return None
    if cost.output_wanted_tokens > 0:
        granted = min(cost.output_wanted_tokens, available)
    elif available >= cost.model_max_output_tokens:
        granted = cost.model_max_output_tokens
    else:
        granted = max(available // 2, min(256, available))
    return max(granted - granted % cost.choices, cost.choices)
