"""Behind /admin of a simulated Zion, without a key: users, books, faults. What tests and people need, Zion has not."""

from __future__ import annotations

from itertools import islice
from typing import Any, Final, TypeVar

import msgspec

from sentinel_dev.asgi import BodyTooLarge, Exchange
from sentinel_dev.zion.periods import rfc3339
from sentinel_dev.zion.state import State
from sentinel_dev.zion.tokens import make_token
from sentinel_dev.zion.users import LimitSpec, User

T = TypeVar("T")

TOKEN_S: Final = 86_400.0
_BODY_MOST_BYTES: Final = 4 * 1024 * 1024
_USERS_MOST: Final = 200_000
_TOKEN_MOST_S: Final = 1e10

Specs = dict[str, LimitSpec | int | None]
DEMO_LIMITS: Final[Specs] = {"ai_requests": 1_000, "ai_input_tokens": 1_000_000, "ai_output_tokens": 1_000_000}


class _NewUser(msgspec.Struct, kw_only=True, rename="camel", forbid_unknown_fields=True):
    external_id: str | None = None
    id: str | None = None
    """The token's subject; the external id if left out. For users who have none."""
    email: str | None = None
    name: str | None = None
    limits: Specs | None = None
    """By name; a number is short for `{"limit": number}`. Left out: the demo's. {}: none, all unlimited."""
    token_seconds: float = TOKEN_S


class _Change(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    limits: Specs = {}
    remove: list[str] = []
    """Names of limits that the user has no longer."""


class _Token(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    seconds: float = TOKEN_S


class _Reset(msgspec.Struct, kw_only=True, rename="camel", forbid_unknown_fields=True):
    honour_keys: bool | None = None


class Admin:
    """Answers what comes to /admin.

    | method and path under /admin | does |
    |---|---|
    | POST users | makes or replaces a user, answers `{"externalId", "token", ...}`; GET lists them |
    | GET, PATCH, DELETE users/{id} | shows; changes or removes single limits; forgets |
    | POST users/{id}/revoke, POST users/{id}/token | its tokens are refused from now on; a new one of `seconds` |
    | GET books, GET ledger?from=N, GET calls | what was applied, entry by entry, and what was called when |
    | GET, POST, DELETE faults | `sentinel_dev.faults.Rule` |
    | POST reset | forgets everything; `{"honourKeys": false}` also turns idempotency off |
    """

    def __init__(self, state: State) -> None:
        self._state = state

    async def serve(self, exchange: Exchange, parts: list[str]) -> None:
        """Answers a request for /admin/<parts>, 400 with what is wrong with it."""
        try:
            body = await exchange.body(_BODY_MOST_BYTES)
            answer = self._handle(exchange, parts, body)
        except (BodyTooLarge, ValueError) as error:
            await exchange.answer_json(400, {"error": str(error) or "too large"})
            return
        if answer is None:
            await exchange.answer_json(404, {"error": "no such thing"})
        else:
            await exchange.answer_json(200, answer)

    def _handle(self, exchange: Exchange, parts: list[str], body: bytes) -> Any:
        if parts[:1] == ["users"]:
            return self._users(exchange.method, parts[1:], body)
        if parts == ["faults"]:
            return self._faults(exchange.method, body)
        if (exchange.method, parts) == ("POST", ["reset"]):
            self._state.reset(honour_keys=_read(body, _Reset).honour_keys)
            return {}
        return self._read_out(parts, exchange.query) if exchange.method == "GET" else None

    def _read_out(self, parts: list[str], query: bytes) -> Any:
        match parts:
            case ["books"]:
                counts = {route: calls.count for route, calls in self._state.calls.items()}
                return {**self._state.books.shown(), "calls": counts}
            case ["ledger"]:
                return self._ledger(query)
            case ["calls"]:
                return {route: calls.shown() for route, calls in self._state.calls.items()}
        return None

    def _users(self, method: str, parts: list[str], body: bytes) -> Any:
        books = self._state.books
        match method, parts:
            case "POST", []:
                return self.add_user(_read(body, _NewUser))
            case "GET", []:
                return {"users": [self._shown(user) for user in books.users.values()]}
        user = books.users.get(parts[0]) if parts else None
        if user is None:
            return None
        match method, parts[1:]:
            case "PATCH", []:
                change = _read(body, _Change)
                user.rolled_over(self._state.now())
                user.set_limits(change.limits, self._state.now())
                for name in change.remove:
                    user.limits.pop(name, None)
            case "DELETE", []:
                books.drop(user.subject)
            case "POST", ["revoke"]:
                user.revoked = True
            case "POST", ["token"]:
                return {"token": self._token(user.subject, _read(body, _Token).seconds)}
            case method, rest if method != "GET" or rest:
                return None
        return self._shown(user)

    def add_user(self, told: _NewUser) -> dict[str, Any]:
        """Makes or replaces a user; raises ValueError."""
        subject = told.id or told.external_id
        if not subject:
            raise ValueError("externalId or id is needed")
        if len(self._state.books.users) >= _USERS_MOST:
            raise ValueError(f"more than {_USERS_MOST} users")
        now_s = self._state.now()
        email = told.email or f"{subject}@example.com"
        user = User(subject, told.external_id or None, email, told.name, rfc3339(int(now_s)))
        user.set_limits(DEMO_LIMITS if told.limits is None else told.limits, now_s)
        token = self._token(subject, told.token_seconds)
        self._state.books.put(user)
        return {**self._shown(user), "token": token}

    def _token(self, subject: str, seconds: float) -> str:
        if abs(seconds) > _TOKEN_MOST_S:
            raise ValueError("a token cannot be valid for so long")
        return make_token(subject, self._state.secret, self._state.now() + seconds)

    def _shown(self, user: User) -> dict[str, Any]:
        limits = [limit.shown() for limit in user.rolled_over(self._state.now())]
        return {**user.shown(), "externalId": user.external_id, "revoked": user.revoked, "limits": limits}

    def _faults(self, method: str, body: bytes) -> Any:
        faults = self._state.faults
        if method == "POST":
            faults.add(body)
        elif method == "DELETE":
            faults.clear()
        elif method != "GET":
            return None
        return {"faults": faults.listed()}

    def _ledger(self, query: bytes) -> dict[str, Any]:
        """Entries from the N-th ever on; `next` is where to go on. Those that memory has no room for are gone."""
        books = self._state.books
        told = dict(part.partition(b"=")[::2] for part in query.split(b"&"))
        wanted = int(told.get(b"from", b"0"))
        forgotten = books.entries_ever - len(books.entries)
        entries = list(islice(books.entries, max(wanted - forgotten, 0), None))
        return {"entries": entries, "next": books.entries_ever, "forgotten": forgotten}


def _read(body: bytes, shape: type[T]) -> T:
    return msgspec.json.decode(body or b"{}", type=shape)
