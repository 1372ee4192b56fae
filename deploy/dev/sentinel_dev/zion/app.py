"""The simulated Zion as an ASGI app: its wire contract, and behind /admin what tests and people need."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import unquote

import msgspec

from sentinel_dev.asgi import BodyTooLarge, Closing, Exchange, Receive, Scope, Send, serve_lifespan
from sentinel_dev.faults import Armed
from sentinel_dev.zion.admin import Admin
from sentinel_dev.zion.answers import Refused, batch_increment, failure, increment, once, success
from sentinel_dev.zion.books import USER_NOT_FOUND
from sentinel_dev.zion.state import Calls, State
from sentinel_dev.zion.tokens import BadToken, read_token

DEMO_SECRET: Final = "zion-demo-secret"
DEMO_API_KEY: Final = "zion-demo-key"

_BODY_MOST_BYTES: Final = 4 * 1024 * 1024
_LIMITS_PREFIX: Final = "/api/v1/limits/external/"
_ROUTES: Final = {
    "/api/v1/users/me": ("GET", "me"),
    "/api/v1/usage/external/increment": ("POST", "increment"),
    "/api/v1/usage/external/batch-increment": ("POST", "batch"),
}
_MALFORMED: Final = success({"limits": [{"name": "ai_requests", "limit": "plenty", "used": None}]})


class Zion:
    """The app. Tests in process read `state` directly; others go through /admin."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.closing = Closing()
        self._admin = Admin(state)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await serve_lifespan(receive, send)
        elif scope["type"] == "http":
            exchange = Exchange(scope, receive, send, self.closing)
            # Not the decoded path: an external id may have a slash in it.
            raw_path = scope.get("raw_path") or exchange.path.encode()
            path = raw_path.decode("latin-1").partition("?")[0]
            if path == "/admin" or path.startswith("/admin/"):
                await self._admin.serve(exchange, [unquote(part) for part in path.split("/")[2:]])
            else:
                await self._serve(exchange, path)

    async def _serve(self, exchange: Exchange, path: str) -> None:
        route, external_id = _route(exchange.method, path)
        if route is None:
            await _no_route(exchange, path, 404)
            return
        calls = self.state.calls.setdefault(route, Calls())
        calls.count += 1
        calls.at.append(self.state.now())
        try:
            if route == "limits":
                calls.count_user(external_id)
            await self._answer(exchange, path, route, external_id)
        finally:
            calls.statuses[exchange.status] = calls.statuses.get(exchange.status, 0) + 1

    async def _answer(self, exchange: Exchange, path: str, route: str, external_id: str) -> None:
        try:
            body = await exchange.body(_BODY_MOST_BYTES)
        except BodyTooLarge:
            await exchange.answer(413, failure("Request body too large"))
            return
        partial: list[Armed] = []
        ending: Armed | None = None
        for armed in self.state.faults.due(route):
            if armed.rule.kind == "delay":
                # Whoever gives up meanwhile is served all the same, as a real server would: the caller cannot know.
                await exchange.pause(armed.rule.seconds)
            elif armed.rule.kind == "partial":
                partial.append(armed)
            else:
                ending = armed
        if ending is not None and await _fails_at_once(exchange, ending, path):
            return
        try:
            status, answer = self._handle(exchange, route, external_id, body, partial)
        except Refused as refused:
            status, answer = refused.status, failure(str(refused))
        if ending is None or not await _fails_after(exchange, ending, answer):
            await exchange.answer(status, answer)

    def _handle(
        self, exchange: Exchange, route: str, external_id: str, body: bytes, partial: list[Armed]
    ) -> tuple[int, bytes]:
        if route == "me":
            subject = self._subject(exchange)
            self.state.calls.setdefault(route, Calls()).count_user(subject)
            return 200, success(self.state.books.users[subject].shown())
        if exchange.header(b"x-api-key") != self.state.api_key:
            raise Refused(401, "Invalid API key")
        if route == "limits":
            return 200, success(self._limits(external_id))
        key = exchange.header(b"idempotency-key")
        handler = increment if route == "increment" else batch_increment
        return once(self.state.books, key, route, body, lambda: handler(self.state.books, body, key, partial))

    def _subject(self, exchange: Exchange) -> str:
        scheme, _, token = exchange.header(b"authorization").partition(" ")
        if scheme.lower() != "bearer":
            raise Refused(401, "Missing token")
        try:
            subject = read_token(token.strip(), self.state.secret, self.state.now())
        except BadToken as error:
            raise Refused(401, str(error)) from error
        user = self.state.books.users.get(subject)
        if user is None or user.revoked:
            raise Refused(401, "Invalid token")
        return subject

    def _limits(self, external_id: str) -> dict[str, Any]:
        user = self.state.books.by_external_id.get(external_id)
        if user is None:
            raise Refused(404, USER_NOT_FOUND)
        return {
            "userId": f"user-{user.subject}",
            "externalId": external_id,
            "limits": [limit.shown() for limit in user.rolled_over(self.state.now())],
        }


def create_zion(
    *,
    secret: str = DEMO_SECRET,
    api_key: str = DEMO_API_KEY,
    now: Callable[[], float] = time.time,
    honour_keys: bool = True,
) -> Zion:
    """A Zion that knows nobody yet. `honour_keys` False applies a repeated Idempotency-Key again, and counts it."""
    return Zion(State(secret=secret, api_key=api_key, now=now, honour_keys=honour_keys))


def _route(method: str, path: str) -> tuple[str | None, str]:
    if path.startswith(_LIMITS_PREFIX) and len(path) > len(_LIMITS_PREFIX):
        return ("limits" if method == "GET" else None), unquote(path[len(_LIMITS_PREFIX) :])
    wanted, route = _ROUTES.get(path, ("", ""))
    return (route if method == wanted else None), ""


async def _no_route(exchange: Exchange, path: str, status: int) -> None:
    # As a web framework answers, without Zion's envelope.
    name = "Not Found" if status == 404 else "Method Not Allowed"
    message = f"Cannot {exchange.method} {path}"
    await exchange.answer_json(status, {"message": message, "error": name, "statusCode": status})


async def _fails_at_once(exchange: Exchange, armed: Armed, path: str) -> bool:
    """Fails before anything is applied; whether it did."""
    rule = armed.rule
    if rule.kind == "status":
        headers = [] if rule.retry_after is None else [(b"retry-after", f"{rule.retry_after:g}".encode())]
        await exchange.answer(rule.status or 503, failure("Simulated fault"), headers=headers)
    elif rule.kind == "refuse":
        await exchange.hang_up()
    elif rule.kind == "hang":
        await exchange.hang()
    elif rule.kind == "no_batch" and path.endswith("/batch-increment"):
        await _no_route(exchange, path, rule.status or 404)
    elif rule.kind == "malformed_limits" and path.startswith(_LIMITS_PREFIX):
        await exchange.answer(200, _MALFORMED)
    else:
        return False
    return True


async def _fails_after(exchange: Exchange, armed: Armed, answer: bytes) -> bool:
    """Fails when all is applied; whether it did."""
    rule = armed.rule
    if rule.kind == "garbage":
        await exchange.answer(200, b"<html>Simulated fault", b"text/html")
    elif rule.kind == "missing_items":
        told = msgspec.json.decode(answer)
        data = told.get("data")
        if not isinstance(data, dict) or "results" not in data:
            return False
        data["results"] = data["results"][: len(data["results"]) // 2]
        await exchange.answer_json(200, told)
    elif rule.kind != "applied_then_silent":
        return False
    elif rule.status is not None:
        await exchange.answer(rule.status, failure("Simulated fault"))
    elif rule.hang:
        await exchange.hang()
    else:
        await exchange.hang_up()
    return True
