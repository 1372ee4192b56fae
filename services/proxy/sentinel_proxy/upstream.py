"""The way to the OpenAI-compatible gateway. pyreqwest stays behind this module: another client can take its place."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import urlsplit

from pyreqwest.client import ClientBuilder
from pyreqwest.exceptions import (
    ConnectError,
    ConnectTimeoutError,
    PoolTimeoutError,
    PyreqwestError,
    RequestTimeoutError,
)

from sentinel_shared.errors import SentinelError

if TYPE_CHECKING:
    from collections.abc import AsyncIterable
    from pathlib import Path

    from pyreqwest.client import Client
    from pyreqwest.request import RequestBuilder, StreamRequest
    from pyreqwest.response import Response

RawHeaders = list[tuple[bytes, bytes]]

_HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_NEVER_SENT: Final = _HOP_BY_HOP | {
    b"authorization",
    b"cookie",
    b"host",
    b"content-length",
    b"accept-encoding",
    b"expect",
    b"x-request-id",
    b"api-key",
    b"x-api-key",
}
"""The caller's credentials and what concerns the caller's connection alone."""
_NEVER_RETURNED: Final = _HOP_BY_HOP | {b"set-cookie", b"x-request-id", b"date", b"server", b"x-accel-buffering"}
_OWN_PREFIXES: Final = (b"x-ratelimit-", b"access-control-")
"""The gateway's account limits are not the caller's; whom a browser may talk to is Sentinel's to say."""


class UpstreamError(SentinelError):
    """The upstream gave no answer. `reached` tells whether it may have seen the request."""

    def __init__(self, message: str, *, reached: bool) -> None:
        super().__init__(message)
        self.reached = reached


class UpstreamUnreachable(UpstreamError):
    """No connection could be had, or it broke."""


class UpstreamTimeout(UpstreamError):
    """It kept silent for too long."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer: `headers` without those of the connection, names in lower case."""

    status: int
    headers: RawHeaders
    body: bytes


class Stream:
    """An answer whose body is still coming. As a context manager: leaving it frees the connection at once."""

    __slots__ = ("_reader", "_request", "_response", "headers", "status")

    def __init__(self, request: StreamRequest) -> None:
        self._request = request
        self._response: Response | None = None

    async def __aenter__(self) -> Self:
        try:
            response = await self._request.__aenter__()
        except PyreqwestError as error:
            raise _translate(error) from error
        try:
            await _heed_cancellation()
        except asyncio.CancelledError:
            await self._request.__aexit__(None, None, None)  # whoever could not enter does not leave
            raise
        self._response = response
        self._reader = response.body_reader
        self.status = response.status
        self.headers = _returned(response)
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._response is not None:
            await self._request.__aexit__(None, None, None)

    async def read(self) -> bytes | None:
        """The next bytes as they come; None at the end. Raises UpstreamTimeout, UpstreamUnreachable."""
        try:
            chunk = await self._reader.read_chunk()
        except PyreqwestError as error:
            raise _translate(error) from error
        await _heed_cancellation()
        return None if chunk is None else bytes(chunk)

    async def read_all(self) -> bytes:
        """The rest of the body."""
        try:
            rest = await self._reader.bytes()
        except PyreqwestError as error:
            raise _translate(error) from error
        await _heed_cancellation()
        return bytes(rest)


class Upstream:
    """One per process; connections are kept alive and bounded in number."""

    def __init__(self, client: Client, base_url: str, api_key: str) -> None:
        self._client = client
        self._base_url = base_url.rstrip("/")
        self._authorization = f"Bearer {api_key}"
        url = urlsplit(self._base_url)
        self.host = url.hostname or ""
        self.port = url.port or (443 if url.scheme == "https" else 80)

    @classmethod
    def open(
        cls,
        *,
        base_url: str,
        api_key: str,
        connect_timeout_s: float,
        idle_timeout_s: float,
        max_connections: int,
        ca_file: Path | None,
    ) -> Self:
        """Builds the client; connects nowhere yet."""
        builder = (
            ClientBuilder()
            .user_agent("sentinel")
            .max_connections(max_connections)
            .pool_timeout(timedelta(seconds=connect_timeout_s))
            .pool_max_idle_per_host(max_connections)
            .pool_idle_timeout(timedelta(seconds=50))
            .connect_timeout(timedelta(seconds=connect_timeout_s))
            .read_timeout(timedelta(seconds=idle_timeout_s))
            .follow_redirects(enable=False)
            # Never asked for, so that usage can be read; what comes packed all the same is unpacked.
            .gzip(enable=True)
            .brotli(enable=True)
            .zstd(enable=True)
            .deflate(enable=True)
            .http1_lower_case_headers()
        )
        if ca_file is not None:
            builder = builder.add_root_certificate_pem(ca_file.read_bytes())
        return cls(builder.build(), base_url, api_key)

    async def close(self) -> None:
        """Ends all connections."""
        await self._client.close()

    async def send(self, method: str, path: str, headers: RawHeaders, body: bytes, *, request_id: str) -> Answer:
        """Send a request and read its whole answer. Raises UpstreamTimeout, UpstreamUnreachable."""
        request = self._request(method, path, headers, request_id).body_bytes(body).build()
        try:
            response = await request.send()
            await _heed_cancellation()
            content = await response.bytes()
        except PyreqwestError as error:
            raise _translate(error) from error
        await _heed_cancellation()
        return Answer(response.status, _returned(response), bytes(content))

    def stream(
        self,
        method: str,
        path: str,
        headers: RawHeaders,
        body: bytes | AsyncIterable[bytes] | None,
        *,
        request_id: str,
    ) -> Stream:
        """The same, its answer read as it comes."""
        return Stream(self._streamed(method, path, headers, body, request_id=request_id))

    def _streamed(
        self,
        method: str,
        path: str,
        headers: RawHeaders,
        body: bytes | AsyncIterable[bytes] | None,
        *,
        request_id: str,
    ) -> StreamRequest:
        builder = self._request(method, path, headers, request_id)
        if isinstance(body, bytes):
            builder = builder.body_bytes(body)
        elif body is not None:
            builder = builder.body_stream(body)
        # 1: hand every read on as it comes; by default the first 64 kB are held back.
        return builder.streamed_read_buffer_limit(1).build_streamed()

    def _request(self, method: str, path: str, headers: RawHeaders, request_id: str) -> RequestBuilder:
        sent = [("authorization", self._authorization), ("x-request-id", request_id), ("accept-encoding", "identity")]
        sent += [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in headers
            if name not in _NEVER_SENT and value.isascii()
        ]
        return self._client.request(method, self._base_url + path).headers(sent)


async def _heed_cancellation() -> None:
    # pyreqwest now and then loses a cancellation that meets a result which is just ready.
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _returned(response: Response) -> RawHeaders:
    headers: Any = response.headers
    returned: RawHeaders = []
    for name, value in headers.items():
        raw = name.encode("latin-1")
        if raw not in _NEVER_RETURNED and not raw.startswith(_OWN_PREFIXES):
            returned.append((raw, value.encode("latin-1", "replace")))
    return returned


def _translate(error: PyreqwestError) -> UpstreamError:
    if isinstance(error, PoolTimeoutError):
        return UpstreamUnreachable("no free connection to the upstream", reached=False)
    if isinstance(error, ConnectTimeoutError) and _while_connecting(error):
        return UpstreamTimeout("the upstream could not be connected to in time", reached=False)
    if isinstance(error, ConnectError):
        return UpstreamUnreachable("the upstream cannot be reached", reached=False)
    if isinstance(error, RequestTimeoutError):
        return UpstreamTimeout("the upstream kept silent for too long", reached=True)
    return UpstreamUnreachable("the connection to the upstream broke", reached=True)


def _while_connecting(error: ConnectTimeoutError) -> bool:
    # pyreqwest gives this name to every time-out before the answer's head; only its causes tell which it was.
    return any("(Connect)" in cause["message"] for cause in error.details["causes"] or ())
