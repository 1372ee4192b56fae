"""May this request run? Asks the account, fetches it when it is not known; without Redis, `REDIS_FAIL_MODE` decides."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import TYPE_CHECKING, Final

import msgspec

from sentinel_proxy.denials import Denials, Denied
from sentinel_proxy.errors import unavailable, user_not_metered
from sentinel_proxy.rate_limits import Headers, binding_name, denial, limit_headers
from sentinel_proxy.settings import RedisFailMode
from sentinel_shared.errors import (
    RedisFull,
    RedisOutcomeUnknown,
    RedisRefused,
    RedisUnavailable,
    SentinelError,
    UnknownUser,
    ZionUnavailable,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Set as AbstractSet

    from sentinel_proxy.local_share import LocalShare
    from sentinel_proxy.metrics import ProxyMetrics
    from sentinel_shared.accounts import Accounts, AccountView, Binding, Cost, Decision, WindowPolicy
    from sentinel_shared.clock import Clock
    from sentinel_shared.directory import Directory
    from sentinel_shared.refresh import LimitsRefresher

_COLD_WAIT_S: Final = 3.0
_REFRESH_PAUSE_S: Final = 1.0
_REFRESHES_MAX: Final = 1_000

_log: Final = logging.getLogger(__name__)


class Admission(msgspec.Struct, frozen=True):
    """A promise: `granted_output_tokens` over all choices, -1 when nothing limits them; `local`: made without Redis."""

    granted_output_tokens: int
    headers: Headers
    local: bool


class Limiter:
    """One per process. `give_back(rid, external_id)` takes back an admission that Redis may have made unheard."""

    def __init__(
        self,
        accounts: Accounts,
        directory: Directory,
        refresher: LimitsRefresher,
        share: LocalShare,
        give_back: Callable[[str, str], None],
        *,
        window: WindowPolicy,
        fail_mode: RedisFailMode,
        clock: Clock,
        metrics: ProxyMetrics,
    ) -> None:
        self._accounts = accounts
        self._directory = directory
        self._refresher = refresher
        self._share = share
        self._give_back = give_back
        self._window = window
        self._fail_mode = fail_mode
        self._clock = clock
        self._metrics = metrics
        self._denials = Denials(clock)
        self._fetching: dict[str, asyncio.Task[None]] = {}
        self._refreshing: dict[str, float] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._hit = metrics.cache("limits", "hit")
        self._stale = metrics.cache("limits", "stale")
        self._allowed = metrics.decision("allow", "")

    def spare_input_tokens(self, external_id: str) -> int:
        """See LocalShare."""
        return self._share.spare_input_tokens(external_id)

    def check_denials(self, external_id: str, needs: AbstractSet[Binding]) -> None:
        """Before anything is spent on it: raises Denied for a request that would be refused as the one before was."""
        try:
            self._denials.check(external_id, needs)
        except Denied as denied:
            self._count(denied)
            raise

    def _count(self, denied: Denied) -> None:
        self._metrics.decision("deny", binding_name(denied.binding)).inc()

    async def admit(self, *, rid: str, external_id: str, cost: Cost) -> Admission:
        """Reserve the cost. Raises Denied, or ApiError: 403 unknown to Zion, 503 when nobody can decide."""
        try:
            decision = await self._decide(rid, external_id, cost)
        except RedisFull:
            raise unavailable("No new requests can be admitted at the moment.", code="store_full") from None
        except RedisUnavailable as error:
            admission = self._without_redis(external_id, cost)
            if admission is None:
                if isinstance(error, RedisOutcomeUnknown):
                    self._give_back(rid, external_id)
                raise unavailable("Your limits cannot be checked at the moment.", code="limits_unavailable") from None
            return admission
        if decision.refresh_due:
            self._stale.inc()
            self._refresh_soon(external_id)
        else:
            self._hit.inc()
        if not decision.admitted:
            headers = limit_headers(decision, self._window)
            denied = Denied(denial(decision, self._window), headers, decision.binding)
            self._denials.remember(external_id, decision, denied)
            self._count(denied)
            raise denied
        self._share.see(external_id, decision)
        self._allowed.inc()
        return Admission(decision.granted_output_tokens, limit_headers(decision, self._window), local=False)

    async def view(self, external_id: str) -> AccountView:
        """The account as the next decision will see it. Raises as admit does."""
        self._denials.forget(external_id)
        view = await self._accounts.read(external_id)
        if view is None or view.now_ms >= view.stale_until_ms:
            await self._fetch_once(external_id)
            view = await self._accounts.read(external_id)
        if view is None:
            raise unavailable("Your limits cannot be read at the moment.", code="limits_unavailable")
        return view

    def correct_local(self, external_id: str, *, input_tokens: int, output_tokens: int) -> None:
        """See LocalShare.correct."""
        self._share.correct(external_id, input_tokens=input_tokens, output_tokens=output_tokens)
        self._metrics.overspend_bound_tokens.set(self._share.spent_tokens)

    async def _decide(self, rid: str, external_id: str, cost: Cost) -> Decision:
        decision = await self._accounts.admit(rid=rid, external_id=external_id, cost=cost)
        if decision is None:
            self._metrics.cache("limits", "miss").inc()
            await self._fetch_once(external_id)
            decision = await self._accounts.admit(rid=rid, external_id=external_id, cost=cost)
        if decision is None:
            raise unavailable("Your limits cannot be checked at the moment.", code="limits_unavailable")
        return decision

    def _without_redis(self, external_id: str, cost: Cost) -> Admission | None:
        mode = self._fail_mode
        granted = None
        if mode is RedisFailMode.OPEN:
            granted = -1
        elif mode is RedisFailMode.LOCAL:
            granted = self._share.admit(external_id, cost, now_s=self._clock.monotonic_s())
        if granted is None:
            return None
        self._metrics.local_admissions.labels(mode.value).inc()
        self._metrics.overspend_bound_tokens.set(self._share.spent_tokens)
        return Admission(granted, [], local=True)

    # --- limits from Zion ---

    async def _fetch_once(self, external_id: str) -> None:
        """One fetch per user in this process, and, by a lock that lapses, one across all replicas."""
        task = self._fetching.get(external_id)
        if task is None:
            task = asyncio.create_task(self._fetch(external_id))
            self._fetching[external_id] = task
            task.add_done_callback(lambda done: self._fetched(external_id, done))
        try:
            await asyncio.shield(task)
        except UnknownUser:
            raise user_not_metered() from None

    def _fetched(self, external_id: str, task: asyncio.Task[None]) -> None:
        self._fetching.pop(external_id, None)
        if not task.cancelled():
            task.exception()  # whoever still waits gets it

    async def _fetch(self, external_id: str) -> None:
        if await self._directory.is_unknown(external_id):
            raise UnknownUser("Zion has just said that it does not know this user")
        epoch = (await self._accounts.refresh_begin(external_id)).epoch
        give_up_s = self._clock.monotonic_s() + _COLD_WAIT_S
        while not await self._directory.take_fetch(external_id):
            if self._clock.monotonic_s() >= give_up_s:
                raise ZionUnavailable("another replica waits for Zion's answer about this user", retry_after_s=1.0)
            await self._clock.sleep(random.uniform(0.02, 0.1))  # noqa: S311 - jitter
            if (await self._accounts.refresh_begin(external_id)).epoch != epoch:
                return
            if await self._directory.is_unknown(external_id):
                raise UnknownUser("Zion has just said that it does not know this user")
        try:
            if (await self._accounts.refresh_begin(external_id)).epoch == epoch:
                async with asyncio.timeout(_COLD_WAIT_S):
                    await self._refresher.refresh(external_id, background=False)
        except TimeoutError:
            raise ZionUnavailable(f"no answer from Zion within {_COLD_WAIT_S:g} s", retry_after_s=1.0) from None
        finally:
            await self._end_fetch(external_id)

    async def _end_fetch(self, external_id: str) -> None:
        try:
            await self._directory.end_fetch(external_id)
        except (RedisUnavailable, RedisRefused):
            return  # the right lapses by itself

    def refresh_now(self, external_id: str) -> None:
        """Zion has said that something changed: ask it, in the background."""
        self._refreshing.pop(external_id, None)
        self._denials.forget(external_id)
        self._refresh_soon(external_id)

    def _refresh_soon(self, external_id: str) -> None:
        """limits-sync should have been here before: make up for it, once a second and user at most."""
        now_s = self._clock.monotonic_s()
        if now_s < self._refreshing.get(external_id, 0.0):
            return
        if len(self._refreshing) >= _REFRESHES_MAX:
            self._refreshing = {user: until_s for user, until_s in self._refreshing.items() if until_s > now_s}
            if len(self._refreshing) >= _REFRESHES_MAX:
                return
        self._refreshing[external_id] = now_s + _REFRESH_PAUSE_S
        task = asyncio.create_task(self._refresh(external_id))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _refresh(self, external_id: str) -> None:
        result = "failed"
        try:
            if not await self._directory.take_fetch(external_id):
                return
            try:
                await self._refresher.refresh(external_id, background=True)
                result = "ok"
            finally:
                await self._end_fetch(external_id)
        except SentinelError as error:
            _log.info("limits could not be refreshed: %s", error, extra={"external_id": external_id})
        self._metrics.limits_refreshes.labels(result).inc()
