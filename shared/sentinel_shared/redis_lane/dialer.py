"""Making a connection usable: socket, TLS, AUTH, SELECT, a name, the scripts."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sentinel_shared.errors import RedisRefused, RedisUnavailable, SentinelError, SettingsError
from sentinel_shared.redis_lane.connection import Connection, Part
from sentinel_shared.redis_lane.replies import Reply
from sentinel_shared.redis_lane.script import Script
from sentinel_shared.redis_lane.url import Address, RedisUrl

_PROBE: Final = Script.of("probe", b"return 1")


def tls_context(ca_file: str | None) -> ssl.SSLContext:
    """Verifies certificate and host name, against the system's authorities or those in `ca_file`."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ValueError) as error:
        takes = "takes a file of PEM certificates"
        raise SettingsError(f"REDIS_CA_FILE: cannot use {ca_file}: {error}; {takes}") from None


@dataclass(frozen=True, slots=True)
class Dialer:
    """Knows who we are, and what every connection must have before its first command."""

    url: RedisUrl
    tls: ssl.SSLContext | None
    client_name: str
    scripts: Sequence[Script]
    connect_timeout_s: float

    async def open(self, connection: Connection, address: Address, *, must_be_master: bool = False) -> None:
        """Connects, signs in, loads the scripts and opens `connection`, all within `connect_timeout_s`.

        Raises RedisUnavailable, or RedisRefused where the server will have none of it; the connection is lost then.
        """
        try:
            async with asyncio.timeout(self.connect_timeout_s):
                await self._connect(connection, address)
                await self._greet(connection, address, must_be_master=must_be_master)
        except BaseException as error:
            reason = _reason(error, address)
            connection.lose(reason)
            if isinstance(error, (OSError, ValueError, RedisUnavailable)):
                raise RedisUnavailable(reason) from None
            raise

    async def ask(self, connection: Connection, address: Address, *command: Part, sign_in: bool) -> Reply:
        """What the server at `address` says to one command, on a connection of its own. Raises as `open`."""
        commands = [*(self._auth() if sign_in else []), command]
        try:
            async with asyncio.timeout(self.connect_timeout_s):
                await self._connect(connection, address)
                *_, answer = await asyncio.gather(*connection.ask_now(commands))
                return answer
        except (OSError, ValueError, RedisUnavailable) as error:
            raise RedisUnavailable(_reason(error, address)) from None
        finally:
            connection.lose("asked and answered")

    async def _connect(self, connection: Connection, address: Address) -> None:
        loop = asyncio.get_running_loop()
        if address.port is None:
            await loop.create_unix_connection(lambda: connection, address.host)
        else:
            await loop.create_connection(lambda: connection, address.host, address.port, ssl=self.tls)

    def _auth(self) -> list[tuple[Part, ...]]:
        if self.url.password is None:
            return []
        return [(b"AUTH", *([self.url.username] if self.url.username else []), self.url.password)]

    async def _greet(self, connection: Connection, address: Address, *, must_be_master: bool) -> None:
        """All in one write; the first error that matters is raised with what it means to the operator."""
        sign_in = [*self._auth(), *([(b"SELECT", self.url.db)] if self.url.db else [])]
        loads = [(b"SCRIPT", b"LOAD", script.source) for script in self.scripts]
        runs: list[tuple[Part, ...]] = [(b"EVAL", _PROBE.source, 0), (b"EVALSHA", _PROBE.sha1, 0)]
        asked = connection.ask_now([*sign_in, (b"ROLE",), (b"CLIENT", b"SETNAME", self.client_name), *runs, *loads])
        replies = await asyncio.gather(*asked, return_exceptions=True)
        signed_in, (role, _named), ran = (
            replies[: len(sign_in)],
            replies[len(sign_in) : len(sign_in) + 2],  # a user without the rights to these two may do without
            replies[len(sign_in) + 2 :],
        )
        _raise_first(signed_in, f"Redis at {address} refuses the user, password or database of REDIS_URL")
        _raise_first(
            ran[: len(runs)],
            f"Redis at {address} does not let this user run scripts (EVAL, EVALSHA), which all limits need",
        )
        for script, loaded in zip(self.scripts, ran[len(runs) :], strict=True):
            _raise_first([loaded], f"Redis at {address} does not take the script {script.name} (SCRIPT LOAD)")
        if must_be_master and isinstance(role, list) and role[0] != b"master":
            raise RedisUnavailable("it is not a master")
        if not connection.open():
            raise RedisUnavailable("it hung up at once")


def _raise_first(replies: Sequence[object], meaning: str) -> None:
    for reply in replies:
        if isinstance(reply, RedisRefused):
            raise RedisRefused(f"{meaning}: {reply}") from None
        if isinstance(reply, BaseException):
            raise reply


def _reason(error: BaseException, address: Address) -> str:
    if isinstance(error, SentinelError):
        detail = str(error)
    elif isinstance(error, TimeoutError):
        detail = "no answer in time"
    else:
        detail = str(error) or type(error).__name__
    return f"cannot connect to Redis at {address}: {detail}"
