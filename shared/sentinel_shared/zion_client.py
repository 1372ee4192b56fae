"""Zion's HTTP API: who a caller is, what a user's limits are, and what was used.

| Zion's answer | raised (None is never returned) |
|---|---|
| refused connection, an open breaker, no free slot in time | ZionUnavailable, nothing was applied |
| 429 | ZionUnavailable with `retry_after_s`; what was sent stays frozen, so its outcome counts as unknown |
| 5xx, time-out, reset, garbage, a result missing or about another item | ZionUnavailable, outcome unknown |
| 400, 413, 422 | ZionRejected, nothing was applied |
| 401, 403 | ZionRefusedToken to a caller's token, ZionRefusedKey to Sentinel's own key |
| 404 | UnknownUser; of an increment's route: ZionRouteMissing, as 405 |

No text of an exception has a token, a key or a URL in it; of a body at most Zion's reason for a rejection.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from datetime import UTC
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Final, Self, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from sentinel_shared.breaker import Breaker, ZionBudget
from sentinel_shared.clock import Clock
from sentinel_shared.contracts import Caller, Increment, IncrementResult, LimitSnapshot
from sentinel_shared.errors import (
    MalformedLimits,
    SentinelError,
    SettingsError,
    UnknownUser,
    ZionRefusedKey,
    ZionRefusedToken,
    ZionRejected,
    ZionRouteMissing,
    ZionUnavailable,
)
from sentinel_shared.zion_answers import (
    error_text,
    is_about_the_user,
    read_caller,
    read_increment,
    read_increments,
    read_limits,
    read_sent,
    refused,
)

T = TypeVar("T")

CONNECT_TIMEOUT_S: Final = 2.0
# Node's servers close an idle connection after 5 s: one that is about to be closed must not carry an increment.
KEEPALIVE_S: Final = 4.0
RETRY_AFTER_MAX_S: Final = 3_600.0


class ZionClient:
    """One per process. Every call goes through the breaker, holds a slot of the budget, and ends within `timeout_s`.

    Proxies and a private certificate authority come from the environment (`HTTPS_PROXY`, `NO_PROXY`,
    `SSL_CERT_FILE`), unless a `transport` is given; a proxy of no use is a SettingsError. `background` calls leave the
    slots that are kept for callers.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        breaker: Breaker,
        budget: ZionBudget,
        clock: Clock,
        timeout_s: float = 10.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._base_url = base_url.rstrip("/") + "/api/v1"
        self._key_header = {"x-api-key": api_key}
        self._breaker = breaker
        self._budget = budget
        self._clock = clock
        self._timeout_s = timeout_s
        try:
            self._http = httpx.AsyncClient(
                headers={"accept": "application/json", "user-agent": "sentinel"},
                # A cookie that Zion sets for one caller must never go along with another's request.
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
                timeout=httpx.Timeout(None, connect=min(CONNECT_TIMEOUT_S, timeout_s)),
                limits=httpx.Limits(
                    max_connections=budget.slots, max_keepalive_connections=budget.slots, keepalive_expiry=KEEPALIVE_S
                ),
                transport=transport,
            )
        except (ImportError, ValueError, httpx.InvalidURL):
            raise SettingsError("HTTPS_PROXY, HTTP_PROXY, ALL_PROXY: take a URL such as http://proxy:3128") from None

    async def aclose(self) -> None:
        """Closes all connections; calls that are still running fail."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def caller(self, jwt: str, *, background: bool = False) -> Caller:
        """Whose token it is. Raises ZionRefusedToken (bad or expired), UnknownUser, ZionUnavailable."""
        if not re.fullmatch(r"[!-~]+", jwt):
            raise ZionRefusedToken("a token that cannot stand in a header is not one of Zion's")

        def read(response: httpx.Response) -> Caller:
            if response.status_code in {401, 403}:
                raise ZionRefusedToken("Zion refused the token")
            self._expect_ok(response, missing=UnknownUser("Zion does not know the token's user"))
            return read_caller(response.content)

        request = self._http.build_request(
            "GET", f"{self._base_url}/users/me", headers={"authorization": f"Bearer {jwt}"}
        )
        return await self._ask(request, read, background=background)

    async def limits(self, external_id: str, *, background: bool = False) -> tuple[LimitSnapshot, ...]:
        """The user's limits as Zion has them now; one that is absent is unlimited.

        Raises UnknownUser, ZionRefusedKey, MalformedLimits, ZionUnavailable, ZionRejected.
        """
        segment = _path_segment(external_id)
        asked_at_s = self._clock.unix_s()

        def read(response: httpx.Response) -> tuple[LimitSnapshot, ...]:
            self._expect_key_accepted(response)
            self._expect_ok(response, missing=UnknownUser("Zion does not know the user"))
            return read_limits(response.content, external_id, asked_at_s=asked_at_s)

        request = self._http.build_request(
            "GET", f"{self._base_url}/limits/external/{segment}", headers=self._key_header
        )
        return await self._ask(request, read, background=background)

    async def increment_batch(self, body: bytes, idempotency_key: str, count: int) -> list[IncrementResult]:
        """Sends exactly these bytes, a batch of `count` increments, under this key; one result an item, in order.

        Raises ZionUnavailable, ZionRejected, ZionRefusedKey (the breaker is then open), ZionRouteMissing.
        """
        sent = read_sent(body, count)

        def read(response: httpx.Response) -> list[IncrementResult]:
            self._expect_key_accepted(response)
            self._expect_ok(response, missing=ZionRouteMissing("Zion has no batch-increment endpoint"))
            return read_increments(response.content, sent)

        return await self._post("batch-increment", body, idempotency_key, read)

    async def increment(self, increment: Increment, idempotency_key: str) -> IncrementResult:
        """Sends one increment under this key. A user or limit unknown to Zion is a permanent result, as in a batch.

        Raises ZionUnavailable, ZionRejected, ZionRefusedKey (the breaker is then open), ZionRouteMissing.
        """

        def read(response: httpx.Response) -> IncrementResult:
            self._expect_key_accepted(response)
            if response.status_code == 404 and is_about_the_user(response.content):
                said = error_text(response.content)
                return refused(f"not found: {said}" if said else "not found")
            self._expect_ok(response, missing=ZionRouteMissing("Zion has no increment endpoint"))
            return read_increment(response.content, increment.limit_name)

        body = msgspec.json.encode(
            {
                "externalId": increment.external_id,
                "limitName": increment.limit_name.value,
                "amount": increment.amount,
            }
        )
        return await self._post("increment", body, idempotency_key, read)

    async def _post(self, endpoint: str, body: bytes, idempotency_key: str, read: Callable[[httpx.Response], T]) -> T:
        request = self._http.build_request(
            "POST",
            f"{self._base_url}/usage/external/{endpoint}",
            headers={**self._key_header, "content-type": "application/json", "idempotency-key": idempotency_key},
            content=body,
        )
        try:
            return await self._ask(request, read, background=False)
        except ZionRefusedKey:
            # Nothing that is sent under this key will be taken before an operator has acted.
            self._breaker.trip()
            raise

    async def _ask(self, request: httpx.Request, read: Callable[[httpx.Response], T], *, background: bool) -> T:
        sent, success = False, None
        try:
            async with asyncio.timeout(self._timeout_s), self._budget.slot(background=background):
                self._refuse_while_open()
                sent = True
                answer = read(await self._send(request))
            success = True
            return answer
        except TimeoutError as error:
            success = False
            raise ZionUnavailable(f"no answer from Zion within {self._timeout_s:g} s", outcome_unknown=sent) from error
        except ZionUnavailable as error:
            # Limits of one user that make no sense are no reason to stop asking for the others'.
            success = isinstance(error, MalformedLimits)
            raise
        except SentinelError:
            success = True
            raise
        finally:
            if sent and success is None:
                self._breaker.abandon()
            elif sent:
                self._breaker.record(success=bool(success))

    def _refuse_while_open(self) -> None:
        if not self._breaker.allow():
            raise ZionUnavailable(
                "Zion is not asked while its breaker is open",
                retry_after_s=self._breaker.retry_after_s,
                outcome_unknown=False,
            )

    async def _send(self, request: httpx.Request) -> httpx.Response:
        try:
            return await self._http.send(request)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError) as error:
            raise ZionUnavailable(f"Zion cannot be reached: {type(error).__name__}", outcome_unknown=False) from error
        except httpx.HTTPError as error:
            raise ZionUnavailable(f"the connection to Zion broke: {type(error).__name__}") from error

    def _expect_key_accepted(self, response: httpx.Response) -> None:
        if response.status_code in {401, 403}:
            raise ZionRefusedKey(f"Zion refused Sentinel's API key ({response.status_code})")

    def _expect_ok(self, response: httpx.Response, *, missing: SentinelError) -> None:
        """Returns for a 2xx; raises what else the status means, `missing` for a 404, or a 405 of a POST."""
        status = response.status_code
        if response.is_success:
            return
        if status == 404 or (status == 405 and response.request.method == "POST"):
            raise missing
        if status in {400, 413, 422}:
            raise ZionRejected(f"Zion rejected the request ({status}){self._reason(response)}", status=status)
        raise ZionUnavailable(f"Zion answered {status}", retry_after_s=self._retry_after_s(response))

    def _reason(self, response: httpx.Response) -> str:
        # Only of increments, which hold no caller's token; and Zion might quote the key that it was sent.
        said = error_text(response.content) if response.request.method == "POST" else ""
        return f": {said.replace(self._key_header['x-api-key'], '***')}" if said else ""

    def _retry_after_s(self, response: httpx.Response) -> float | None:
        told = response.headers.get("retry-after", "").strip()
        if re.fullmatch(r"[0-9]{1,9}", told, re.ASCII):
            return min(float(told), RETRY_AFTER_MAX_S)
        try:
            at = parsedate_to_datetime(told)
        except ValueError:
            return None
        # A date in `-0000` is UTC without a zone of its own.
        at_s = at.replace(tzinfo=at.tzinfo or UTC).timestamp()
        return min(max(0.0, at_s - self._clock.unix_s()), RETRY_AFTER_MAX_S)


def _path_segment(external_id: str) -> str:
    if not external_id:
        raise UnknownUser("Zion knows no user without an external id")
    segment = quote(external_id, safe="")
    # `.` and `..` alone would be taken for steps in the path.
    return segment.replace(".", "%2E") if not segment.strip(".") else segment
