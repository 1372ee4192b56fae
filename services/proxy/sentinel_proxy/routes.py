"""The door: which path goes where. `/v1` is served by raw ASGI endpoints, all else by routes of the FastAPI app."""

from __future__ import annotations

import hmac
import logging
import re
import time
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

import msgspec
from fastapi import APIRouter, Request, Response

from sentinel_proxy import metered, passthrough
from sentinel_proxy.denials import Denied
from sentinel_proxy.errors import (
    as_api_error,
    internal_error,
    invalid_request,
    method_not_allowed,
    render,
    unavailable,
    unknown_url,
)
from sentinel_proxy.exchange import ClientGone, Exchange, Served
from sentinel_proxy.reports import support_report, usage_report
from sentinel_proxy.toolbox import ACCOUNT_STATUSES, account_refused, as_answer, authenticate
from sentinel_proxy.upstream import UpstreamError
from sentinel_shared.errors import SentinelError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sentinel_proxy.errors import ApiError
    from sentinel_proxy.exchange import Headers, Receive, Scope, Send
    from sentinel_proxy.toolbox import Toolbox
    from sentinel_shared.accounts import Accounts, WindowPolicy
    from sentinel_shared.directory import Directory
    from sentinel_shared.status_server import StatusPages

WEBHOOK_MAX_AGE_S: Final = 300
_WEBHOOK_MAX_BYTES: Final = 4_096
_CLIENT_CLOSED_REQUEST: Final = 499
_REPEATED_SLASHES: Final = re.compile("/{2,}")

_log: Final = logging.getLogger("sentinel_proxy.requests")


@dataclass(frozen=True, slots=True)
class Gate:
    """The `/v1` paths; the number of requests in flight bounds what is let in.

    `reports` are told of each request, within it, when it is over: one after the other, the same fields.
    """

    tools: Toolbox
    window: WindowPolicy
    reports: Sequence[Callable[[dict[str, Any]], None]]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request under /v1 and account for it."""
        began_s = time.perf_counter()
        exchange = Exchange(scope, receive, send, fallback_id=self.tools.new_rid())
        exchange.path = _REPEATED_SLASHES.sub("/", exchange.path).rstrip("/")
        if self.tools.settings.cors_allow_origins is not None and await self._cors(exchange):
            return
        load = self.tools.load
        served = Served(_label(exchange.path))
        if load.count >= self.tools.settings.max_inflight_requests:
            await exchange.refuse(unavailable("Too many requests are running.", code="overloaded"))
            self._account(exchange, served, began_s)
            return
        load.count += 1
        try:
            await self._serve(exchange, served)
        except Denied as denied:
            served.decision = "deny"
            await exchange.refuse(denied.error, denied.headers)
        except ClientGone:
            exchange.status = _CLIENT_CLOSED_REQUEST
        except SentinelError as error:
            await exchange.refuse(_answer_to(error))
        except Exception:  # noqa: BLE001 - a defect is a 500 in the right form, with its traceback in the log
            _log.exception("a request failed in an unforeseen way", extra={"request_id": exchange.request_id})
            await exchange.refuse(internal_error())
        finally:
            load.count -= 1
            self._account(exchange, served, began_s)

    async def _serve(self, exchange: Exchange, served: Served) -> None:
        path = exchange.path
        endpoint = metered.ENDPOINTS.get(path)
        if endpoint is not None:
            if exchange.method != "POST":
                raise method_not_allowed(exchange.method, path, allowed=["POST"])
            await metered.serve(self.tools, endpoint, exchange, served)
        elif path == "/v1/usage":
            await self._usage(exchange)
        elif path == "/v1/models" or path.startswith("/v1/models/"):
            await self._models(exchange)
        else:
            await passthrough.serve(self.tools, exchange, served)

    def _account(self, exchange: Exchange, served: Served, began_s: float) -> None:
        label = self.tools.metrics.model_label(served.model) if served.model else ""
        self.tools.metrics.request(exchange.status, label, served.endpoint).inc()
        if not self.reports:
            return
        fields = {
            "message": "request",
            "request_id": exchange.request_id,
            "external_id": served.external_id,
            "method": exchange.method,
            "path": exchange.path,
            "status": exchange.status,
            "decision": served.decision,
            "error": exchange.error,
            "model": served.model,
            "duration_ms": round((time.perf_counter() - began_s) * 1000, 2),
            "own_ms": round(served.own_s * 1000, 2),
            "input_tokens": served.input_tokens,
            "output_tokens": served.output_tokens,
        }
        for report in self.reports:
            report(fields)

    async def _usage(self, exchange: Exchange) -> None:
        _only_get(exchange)
        _, external_id = await authenticate(self.tools, exchange)
        view = await self.tools.limiter.view(external_id)
        body = msgspec.json.encode(usage_report(view, self.window))
        await exchange.answer(200, [(b"content-type", b"application/json")], body)

    async def _models(self, exchange: Exchange) -> None:
        _only_get(exchange)
        await authenticate(self.tools, exchange)
        upstream_path = passthrough.upstream_path(exchange.path)
        if upstream_path is None:
            raise unknown_url(exchange.method, exchange.path)
        try:
            answer = await self.tools.models.get(upstream_path, request_id=exchange.request_id)
        except UpstreamError as error:
            raise as_answer(error) from error
        if answer.status in ACCOUNT_STATUSES:
            raise account_refused(self.tools, answer.status)
        await exchange.answer(answer.status, answer.headers, answer.body)

    async def _cors(self, exchange: Exchange) -> bool:
        """Answers a preflight request; to others the headers are added. True when nothing is left to do."""
        origin = exchange.header(b"origin")
        allowed = self.tools.settings.cors_allow_origins or ()
        if origin is None or ("*" not in allowed and origin.decode("latin-1") not in allowed):
            return False
        headers: Headers = [(b"access-control-allow-origin", origin), (b"vary", b"origin")]
        if exchange.method == "OPTIONS" and exchange.header(b"access-control-request-method") is not None:
            asked = exchange.header(b"access-control-request-headers") or b"authorization, content-type"
            headers += [
                (b"access-control-allow-methods", b"GET, POST, DELETE, PATCH, PUT"),
                (b"access-control-allow-headers", asked),
                (b"access-control-max-age", b"600"),
            ]
            await exchange.answer(204, headers, b"")
            return True
        exchange.extra_headers = [*headers, (b"access-control-expose-headers", b"*")]
        return False


def _label(path: str) -> str:
    """The metric label `endpoint`, one of few."""
    if path in metered.ENDPOINTS or path in {"/v1/usage", "/v1/models"}:
        return path.removeprefix("/v1")
    return "/models" if path.startswith("/v1/models/") else "other"


def _only_get(exchange: Exchange) -> None:
    if exchange.method not in {"GET", "HEAD"}:
        raise method_not_allowed(exchange.method, exchange.path, allowed=["GET", "HEAD"])


def _answer_to(error: SentinelError) -> ApiError:
    answer = as_api_error(error)
    if answer.status >= 500:
        _log.warning("a request was not served: %s", error)
    return answer


def status_routes(pages: StatusPages) -> APIRouter:
    """`/health`, `/health/live`, `/health/ready`, `/metrics`."""
    router = APIRouter(include_in_schema=False)

    async def page(request: Request) -> Response:
        answer = await pages.answer(request.method, request.url.path)
        headers = {"cache-control": "no-store", **answer.headers}
        return Response(answer.body, answer.status, headers=headers, media_type=answer.content_type)

    for path in ("/health", "/health/live", "/health/ready", "/metrics"):
        router.add_api_route(path, page, methods=["GET", "HEAD"])
    return router


def webhook_routes(secret: str, tools: Toolbox, directory: Directory, accounts: Accounts) -> APIRouter:
    """`POST /internal/invalidate`: Zion says that something about a user has changed."""
    router = APIRouter(include_in_schema=False)

    @router.post("/internal/invalidate")
    async def invalidate(request: Request) -> Response:
        body = await _bounded_body(request)
        now_s = time.time()
        signature = request.headers.get("x-zion-signature", "")
        if not signed(body, request.headers.get("x-zion-timestamp", ""), signature, secret=secret, now_s=now_s):
            return _refusal(401, "The signature is missing, wrong or too old.")
        external_id = _external_id(body)
        if external_id is None:
            return _refusal(400, 'The body must be {"externalId": "..."}.')
        try:
            if not await directory.first_delivery(signature.lower(), ttl_s=2 * WEBHOOK_MAX_AGE_S):
                return _refusal(401, "This delivery has been seen before.")
            await directory.forget_unknown(external_id)
            await accounts.mark_due(external_id, now_s=now_s)
        except SentinelError as error:
            return _rendered(as_api_error(error))
        tools.limiter.refresh_now(external_id)
        return Response(b'{"accepted":true}', 202, media_type="application/json")

    return router


def support_routes(key: str, accounts: Accounts, window: WindowPolicy) -> APIRouter:
    """`GET /internal/accounts/{external_id}`: what support may see, behind the admin key."""
    router = APIRouter(include_in_schema=False)

    @router.get("/internal/accounts/{external_id:path}")
    async def account(external_id: str, request: Request) -> Response:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if not hmac.compare_digest(given, key.encode()):
            return _refusal(401, "The admin key is missing or wrong.")
        try:
            view = await accounts.read(external_id)
        except SentinelError as error:
            return _rendered(as_api_error(error))
        if view is None:
            return _refusal(404, "No such account.")
        body = msgspec.json.encode(support_report(external_id, view, window))
        return Response(body, media_type="application/json")

    return router


def signed(body: bytes, timestamp: str, signature: str, *, secret: str, now_s: float) -> bool:
    """Whether `signature` is `sha256=<hex HMAC-SHA256 of "<timestamp>.<body>">` and the time stamp is within 300 s."""
    if not timestamp.isascii() or not timestamp.isdigit() or len(timestamp) > 15:
        return False
    expected = "sha256=" + hmac.new(secret.encode(), timestamp.encode() + b"." + body, sha256).hexdigest()
    genuine = hmac.compare_digest(expected.encode(), signature.lower().encode())
    return genuine and abs(now_s - int(timestamp)) <= WEBHOOK_MAX_AGE_S


class _Invalidation(msgspec.Struct, rename="camel"):
    external_id: str


def _external_id(body: bytes) -> str | None:
    try:
        return msgspec.json.decode(body, type=_Invalidation).external_id or None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


async def _bounded_body(request: Request) -> bytes:
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > _WEBHOOK_MAX_BYTES:
            return b""
    return body


def _refusal(status: int, message: str) -> Response:
    error = invalid_request(message)
    error.status = status
    return _rendered(error)


def _rendered(error: ApiError) -> Response:
    status, headers, body = render(error)
    return Response(body, status, headers={k.decode(): v.decode() for k, v in headers if k != b"content-length"})


async def not_found(scope: Scope, _receive: Receive, send: Send) -> None:
    """Any path that is not there, in OpenAI's envelope."""
    status, headers, body = render(unknown_url(scope["method"], scope["path"]))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def wrong_method(request: Request, error: Exception) -> Response:
    """A path of the app that is there for other methods, in OpenAI's envelope."""
    allowed = (getattr(error, "headers", None) or {}).get("Allow", "")
    return _rendered(method_not_allowed(request.method, request.url.path, allowed=[allowed]))


__all__ = ["Gate", "not_found", "signed", "status_routes", "support_routes", "webhook_routes", "wrong_method"]
