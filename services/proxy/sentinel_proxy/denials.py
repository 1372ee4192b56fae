"""Who has just been refused is refused again without asking: a flood of refusals must cost others next to nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from sentinel_shared.accounts import Binding
from sentinel_shared.errors import SentinelError

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from sentinel_proxy.errors import ApiError
    from sentinel_proxy.rate_limits import Headers
    from sentinel_shared.accounts import Decision
    from sentinel_shared.clock import Clock

_LAST_S: Final = 0.1
_KEPT_MAX: Final = 10_000
_OF_THE_SUBSCRIPTION: Final = (Binding.REQUESTS, Binding.INPUT_TOKENS, Binding.OUTPUT_TOKENS)

ANY_REQUEST: Final = frozenset({Binding.REQUESTS, Binding.WINDOW_REQUESTS})
"""The limits that every request needs something of."""
WITH_INPUT: Final = ANY_REQUEST | {Binding.INPUT_TOKENS}
WITH_OUTPUT: Final = WITH_INPUT | {Binding.OUTPUT_TOKENS}


class Denied(SentinelError):
    """The 429 to be sent, with its rate-limit headers."""

    def __init__(self, error: ApiError, headers: Headers, binding: Binding) -> None:
        super().__init__(str(error))
        self.error = error
        self.headers = headers
        self.binding = binding


class _Known(NamedTuple):
    """What was said, and until when it holds by the monotonic clock."""

    until_s: float
    error: ApiError
    headers: Headers
    binding: Binding


class Denials:
    """One per process. A denial is remembered for a tenth of a second, if nothing at all is left of the limit.

    What can end it sooner, time apart, is Zion raising a limit, a refund, or a correction: they count that much later.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._known: dict[str, _Known] = {}

    def check(self, external_id: str, needs: AbstractSet[Binding]) -> None:
        """Raises Denied for a user who has just been refused for want of something that this request `needs`."""
        known = self._known.get(external_id)
        if known is None:
            return
        if self._clock.monotonic_s() >= known.until_s:
            del self._known[external_id]
        elif known.binding in needs:
            raise Denied(known.error, known.headers, known.binding)

    def remember(self, external_id: str, decision: Decision, denied: Denied) -> None:
        """The account has refused a request of this user's."""
        if not _nothing_left(decision):
            return
        if len(self._known) >= _KEPT_MAX:
            self._known.clear()
        wait_s = decision.wait_ms / 1000 if decision.wait_ms >= 0 else _LAST_S
        until_s = self._clock.monotonic_s() + min(_LAST_S, wait_s)
        self._known[external_id] = _Known(until_s, denied.error, denied.headers, denied.binding)

    def forget(self, external_id: str) -> None:
        """Something about this user has changed."""
        self._known.pop(external_id, None)


def _nothing_left(decision: Decision) -> bool:
    """Not even for the smallest request. What is only promised to others may come free at any moment."""
    binding = decision.binding
    if binding in _OF_THE_SUBSCRIPTION:
        limit, used, _, _ = decision.limit(binding - 1)
        return used >= limit
    return binding is Binding.WINDOW_REQUESTS
