"""The simulated gateway as an ASGI app: routes, its key, faults, and behind /admin its books."""

from __future__ import annotations

import hmac
import time
from collections.abc import Awaitable, Callable
from itertools import islice
from typing import Any, Final

import msgspec

from sentinel_dev.asgi import BodyTooLarge, Closing, Exchange, Receive, Scope, Send, serve_lifespan
from sentinel_dev.faults import Faults, Rule
from sentinel_dev.gateway import others
from sentinel_dev.gateway.behaviour import PLAIN, behaviour_of
from sentinel_dev.gateway.books import NOBODY, REQUESTS_MOST, Books, Request
from sentinel_dev.gateway.call import Asked, BadRequest, Call, error_body
from sentinel_dev.gateway.chat import chat, completions
from sentinel_dev.gateway.counting import ByLength, Exact
from sentinel_dev.gateway.responses import responses

_BODY_MOST_BYTES: Final = 64 * 1024 * 1024
_NO_BODY: Final = Asked()
_HANDLERS: Final[dict[str, Callable[[Call], Awaitable[None]]]] = {
    "chat/completions": chat,
    "completions": completions,
    "embeddings": others.embeddings,
    "responses": responses,
    "moderations": others.moderations,
    "images/generations": others.images,
    "audio/speech": others.speech,
}
_ROUTES: Final = (*_HANDLERS, "audio/transcriptions", "files", "models", "other")


class Gateway:
    """The app. Tests in process read `books` and `faults` directly; others go through /admin."""

    def __init__(
        self, *, key: str | None, base_path: str, exact: bool, keep_requests: int, now: Callable[[], float]
    ) -> None:
        self.closing = Closing()
        self.faults = Faults(_ROUTES, ("delay", "status", "refuse", "hang"))
        self.books = Books(keep=keep_requests)
        self._authorization = None if key is None else f"Bearer {key}".encode()
        self._prefix = "/" + base_path.strip("/") + "/" if base_path.strip("/") else "/"
        self._counter = Exact() if exact else ByLength()
        self._files = others.Files()
        self._now = now

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            if isinstance(self._counter, Exact):
                self._counter.load()
            await serve_lifespan(receive, send)
        elif scope["type"] == "http":
            exchange = Exchange(scope, receive, send, self.closing)
            try:
                body = await exchange.body(_BODY_MOST_BYTES)
            except BodyTooLarge:
                await exchange.answer_json(413, error_body(413, "Request too large."))
                return
            if exchange.path.startswith("/admin/"):
                await self._administer(exchange, body)
            else:
                await self._serve(exchange, body)

    async def _serve(self, exchange: Exchange, body: bytes) -> None:
        books = self.books
        request = books.open(exchange, body, self._now())
        try:
            await self._answer(exchange, request)
        except BadRequest as bad:
            await exchange.answer_json(bad.status, error_body(bad.status, str(bad), bad.param, bad.code))
        finally:
            books.close(request, exchange.status)

    async def _answer(self, exchange: Exchange, request: Request) -> None:
        if not exchange.path.startswith(self._prefix):
            raise BadRequest(f"Unknown request URL: {exchange.method} {exchange.path}.", status=404)
        if self._authorization is not None and not hmac.compare_digest(
            exchange.header(b"authorization").encode("latin-1"), self._authorization
        ):
            raise BadRequest("Incorrect API key provided.", status=401, code="invalid_api_key")
        route, rest = _route(exchange.path[len(self._prefix) :])
        if self.faults.armed and await self._fails(exchange, route):
            return
        call = self._call(exchange, request, route)
        if call.behaviour.status != 200:
            await _answer_status(exchange, call.behaviour.status, 1.0)
        elif "hang" in call.behaviour.flags:
            await exchange.hang()
        elif route in _HANDLERS and exchange.method == "POST":
            await _HANDLERS[route](call)
        elif route == "audio/transcriptions" and exchange.method == "POST":
            await others.transcriptions(call)
        elif route == "models" and exchange.method in {"GET", "HEAD"}:
            await others.models(call, "/".join(rest) or None)
        elif route == "files":
            await self._files.serve(call, rest)
        else:
            await others.echo(call)

    def _call(self, exchange: Exchange, request: Request, route: str) -> Call:
        asked = _NO_BODY
        if request.body and route != "files" and exchange.header(b"content-type").startswith("application/json"):
            asked = _asked(request.body)
        if route in _HANDLERS and exchange.method == "POST":
            if not isinstance(asked.model, str) or not asked.model:
                raise BadRequest("You must provide a model parameter.", "model")
            request.model = asked.model
            request.user = asked.user if isinstance(asked.user, str) and asked.user else NOBODY
        behaviour = behaviour_of(asked.model) if isinstance(asked.model, str) else PLAIN
        call_id = f"sim{request.number:08x}"
        return Call(exchange, request, asked, behaviour, self._counter, call_id, int(request.at))

    async def _fails(self, exchange: Exchange, route: str) -> bool:
        for armed in self.faults.due(route):
            rule: Rule = armed.rule
            if rule.kind == "delay":
                if await exchange.pause(rule.seconds):
                    return True
                continue
            if rule.kind == "status":
                await _answer_status(exchange, rule.status or 503, rule.retry_after)
            elif rule.kind == "refuse":
                await exchange.hang_up()
            else:
                await exchange.hang()
            return True
        return False

    async def _administer(self, exchange: Exchange, body: bytes) -> None:
        try:
            answer = self._administered(exchange, body)
        except ValueError as error:
            await exchange.answer_json(400, {"error": str(error)})
            return
        if answer is None:
            await exchange.answer_json(404, {"error": "no such thing"})
        else:
            await exchange.answer_json(200, answer)

    def _administered(self, exchange: Exchange, body: bytes) -> Any:
        match exchange.method, exchange.path:
            case "GET", "/admin/books":
                return self.books.shown()
            case "GET", "/admin/requests":
                return self._requests(exchange.query)
            case "POST", "/admin/reset":
                # Requests that still run are charged to the books that they began in.
                self.books = Books(keep=self.books.keep)
                self._files = others.Files()
                self.faults.clear()
            case "POST", "/admin/faults":
                self.faults.add(body)
            case "DELETE", "/admin/faults":
                self.faults.clear()
            case method, path if (method, path) != ("GET", "/admin/faults"):
                return None
        return {"faults": self.faults.listed()}

    def _requests(self, query: bytes) -> dict[str, Any]:
        told = dict(part.partition(b"=")[::2] for part in query.split(b"&"))
        last = int(told.get(b"last", b"0")) or len(self.books.requests)
        skipped = max(len(self.books.requests) - last, 0)
        return {"requests": [request.shown() for request in islice(self.books.requests, skipped, None)]}


def create_gateway(
    *,
    key: str | None = None,
    base_path: str = "/v1",
    exact: bool = True,
    keep_requests: int = REQUESTS_MOST,
    now: Callable[[], float] = time.time,
) -> Gateway:
    """A gateway that asks for `key`, if there is one. `exact` False charges input by length: for benchmarks."""
    return Gateway(key=key, base_path=base_path, exact=exact, keep_requests=keep_requests, now=now)


def _route(path: str) -> tuple[str, list[str]]:
    if path in _HANDLERS or path == "audio/transcriptions":
        return path, []
    first, *rest = path.rstrip("/").split("/")
    return (first, rest) if first in {"models", "files"} else ("other", [])


def _asked(body: bytes) -> Asked:
    try:
        return msgspec.json.decode(body, type=Asked)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadRequest(f"We could not parse the JSON body of your request: {error}") from error


async def _answer_status(exchange: Exchange, status: int, retry_after_s: float | None) -> None:
    code = {429: "rate_limit_exceeded", 402: "insufficient_funds"}.get(status, "simulated")
    headers = [(b"retry-after", f"{retry_after_s:g}".encode())] if status in {429, 503} and retry_after_s else []
    told = error_body(status, f"Simulated error {status}.", code=code)
    await exchange.answer_json(status, told, headers=headers)
