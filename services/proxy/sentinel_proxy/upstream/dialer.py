"""How the upstream is reached: by which name, with which certificates, directly or through the environment's proxy."""

from __future__ import annotations

import asyncio
import base64
import re
import socket
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self, cast
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

from aiohappyeyeballs import start_connection

from sentinel_proxy.upstream.failures import UpstreamTimeout, UpstreamUnreachable
from sentinel_shared.errors import SettingsError

if TYPE_CHECKING:
    from pathlib import Path

    from sentinel_proxy.upstream.connection import Connection

_NEXT_ADDRESS_AFTER_S: Final = 0.25
_PROBE_AFTER_S: Final = 30
_PROXY_ANSWER_MAX_BYTES: Final = 16 * 1024
_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy; `authorization` is the value of its header, empty without a user name in its URL."""

    host: str
    port: int
    authorization: str

    @classmethod
    def from_environment(cls, scheme: str, host: str) -> Self | None:
        """By `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY`, small or capital. Raises SettingsError."""
        found = getproxies_environment()
        name = next((name for name in (scheme, "all") if found.get(name)), None)
        if name is None or proxy_bypass_environment(host, found):
            return None
        url, variable = found[name], f"{name.upper()}_PROXY"
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port or 80
        except ValueError:
            parts, port = SplitResult("", "", "", "", ""), 0
        if parts.scheme != "http" or not parts.hostname:
            raise SettingsError(f"{variable}: takes a URL such as http://proxy:3128")
        who = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else ""
        return cls(parts.hostname, port, "Basic " + base64.b64encode(who.encode()).decode() if who else "")


class Dialer:
    """Opens connections to one upstream."""

    def __init__(self, url: str, *, connect_timeout_s: float, ca_file: Path | None) -> None:
        """Raises SettingsError for certificates or a proxy that are of no use."""
        parts = urlsplit(url)
        self.host = parts.hostname or ""
        self.port = parts.port or _PORTS[parts.scheme]
        self._connect_timeout_s = connect_timeout_s
        self._tls = _tls_context(ca_file) if parts.scheme == "https" else None
        self._proxy = Proxy.from_environment(parts.scheme, self.host)
        name = f"[{self.host}]" if ":" in self.host else self.host
        self.authority = name if parts.port in {None, _PORTS[parts.scheme]} else f"{name}:{self.port}"
        self._connect_to = f"{name}:{self.port}"

    @property
    def target_prefix(self) -> str:
        """What stands before the path in a request line: nothing, unless a proxy has to be told where to."""
        return f"http://{self.authority}" if self._proxy and not self._tls else ""

    @property
    def proxy_authorization(self) -> str:
        """What requests must carry for the proxy's sake."""
        return self._proxy.authorization if self._proxy and not self._tls else ""

    async def dial(self, connection: Connection) -> None:
        """Connect within the time-out. Raises UpstreamUnreachable, UpstreamTimeout; by then it may have been made."""
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await self._dial(connection)
        except TimeoutError:
            raise UpstreamTimeout("the upstream could not be connected to in time", reached=False) from None
        except (OSError, RuntimeError, UnicodeError) as error:  # uvloop's, and a name that cannot be looked up
            raise UpstreamUnreachable(f"the upstream cannot be reached: {error}", reached=False) from None

    async def _dial(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        host, port = (self._proxy.host, self._proxy.port) if self._proxy else (self.host, self.port)
        addresses = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        task = cast("asyncio.Task[None]", asyncio.current_task())
        cancelled = task.cancelling()
        sock = await start_connection(addresses, happy_eyeballs_delay=_NEXT_ADDRESS_AFTER_S, interleave=1)
        if task.cancelling() > cancelled:
            sock.close()
            raise asyncio.CancelledError  # it came as the race ended, which swallows it
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_KEEPIDLE"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_AFTER_S)
            if self._proxy and self._tls:
                await _tunnel(sock, self._connect_to, self._proxy.authorization)
            name = self.host if self._tls else None
            await loop.create_connection(lambda: connection, sock=sock, ssl=self._tls, server_hostname=name)
        except BaseException:
            sock.close()
            raise
        if not connection.usable:
            raise ConnectionError("the connection ended as it began")


async def _tunnel(sock: socket.socket, connect_to: str, authorization: str) -> None:
    """Have the proxy connect this socket through. Raises OSError."""
    loop = asyncio.get_running_loop()
    credentials = f"Proxy-Authorization: {authorization}\r\n" if authorization else ""
    asking = f"CONNECT {connect_to} HTTP/1.1\r\nHost: {connect_to}\r\n{credentials}\r\n"
    await loop.sock_sendall(sock, asking.encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        # One by one: what follows the proxy's answer belongs to TLS.
        byte = await loop.sock_recv(sock, 1)
        if not byte or len(answer) > _PROXY_ANSWER_MAX_BYTES:
            raise ConnectionError("the proxy hung up")
        answer += byte
    status = re.match(rb"HTTP/1\.[01] (\d{3})[ \r]", answer)
    if status is None or not status[1].startswith(b"2"):
        raise ConnectionError(f"the proxy answered {status[1].decode() if status else 'no HTTP'}")


def _tls_context(ca_file: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"UPSTREAM_CA_FILE: cannot use {ca_file}: {error}; takes a file of PEM certificates"
            ) from None
    return context
