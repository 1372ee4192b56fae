"""REDIS_URL: what it may say, read once, and never printed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final, NamedTuple
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from sentinel_shared.errors import SettingsError

_TAKES: Final = (
    "takes redis://[user:password@]host[:port][/db], rediss:// the same with TLS, unix://[user:password@]/path[?db=n], "
    "redis+sentinel://[user:password@]host[:port][,...]/service[/db] or "
    "redis+cluster://[user:password@]host[:port][,...] (rediss+sentinel, rediss+cluster with TLS); "
    "characters such as / ? # @ : in a password as %2F %3F %23 %40 %3A"
)
_HOST: Final = re.compile(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.%]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::(?P<port>[0-9]{1,5}))?")


class Kind(Enum):
    """What the addresses of a URL are: the server, its Sentinels, or a cluster's seeds."""

    SINGLE = auto()
    SENTINEL = auto()
    CLUSTER = auto()


_KINDS: Final = {
    "redis": Kind.SINGLE,
    "rediss": Kind.SINGLE,
    "unix": Kind.SINGLE,
    "redis+sentinel": Kind.SENTINEL,
    "rediss+sentinel": Kind.SENTINEL,
    "redis+cluster": Kind.CLUSTER,
    "rediss+cluster": Kind.CLUSTER,
}


class Address(NamedTuple):
    """A host and a port; a port of None means that `host` is the path of a Unix socket."""

    host: str
    port: int | None

    def __str__(self) -> str:
        if self.port is None:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """REDIS_URL in parts; `service` is Sentinel's name of the master."""

    kind: Kind
    addresses: tuple[Address, ...]
    tls: bool
    username: str | None
    password: str | None = field(repr=False)
    db: int
    service: str | None


def parse_url(text: str) -> RedisUrl:
    """Raises SettingsError with one line that tells what is wrong and never shows a user or password."""
    try:
        return _parse(text)
    except ValueError as error:
        # `from None`: the cause could carry the URL, and so the password, into a traceback.
        raise SettingsError(f"REDIS_URL: {error}; {_TAKES}") from None


def _parse(text: str) -> RedisUrl:
    try:
        url = urlsplit(text.strip())
    except ValueError:
        raise ValueError("is not a URL") from None
    kind = _KINDS.get(url.scheme)
    if kind is None:
        raise ValueError("starts with no known scheme")
    userinfo, _, hosts = url.netloc.rpartition("@")
    username, password = _credentials(userinfo)
    if url.fragment:
        raise ValueError("has a # in it")
    if url.scheme == "unix":
        return RedisUrl(kind, (_socket(hosts, url.path),), False, username, password, _queried_db(url), None)  # noqa: FBT003 -- `tls`, by position like its neighbours
    if url.query:
        raise ValueError("takes no options after a ?")
    addresses = tuple(_address(host, 26379 if kind is Kind.SENTINEL else 6379) for host in hosts.split(","))
    if kind is Kind.SINGLE and len(addresses) > 1:
        raise ValueError("has more than one host")
    service, db = _path(kind, [part for part in url.path.split("/") if part])
    return RedisUrl(kind, addresses, url.scheme.startswith("rediss"), username, password, db, service)


def _credentials(userinfo: str) -> tuple[str | None, str | None]:
    if not userinfo:
        return None, None
    username, colon, password = userinfo.partition(":")
    if not colon or not password:
        raise ValueError("has a user without a password")
    return unquote(username) or None, unquote(password)


def _address(text: str, default_port: int) -> Address:
    match = _HOST.fullmatch(text)
    if match is None:
        raise ValueError("has a malformed or missing host or port")
    port = int(match["port"] or default_port)
    if not 0 < port < 65536:
        raise ValueError("has a port outside 1 to 65535")
    return Address(match["ipv6"] or match["name"], port)


def _socket(hosts: str, path: str) -> Address:
    if hosts or len(path) < 2:
        raise ValueError("names no absolute path of a socket")
    return Address(unquote(path), None)


def _queried_db(url: SplitResult) -> int:
    options = dict(parse_qsl(url.query, keep_blank_values=True))
    db = options.pop("db", "0")
    if options:
        raise ValueError("takes no option but db after the ?")
    return _db(db)


def _path(kind: Kind, parts: list[str]) -> tuple[str | None, int]:
    service = None
    if kind is Kind.SENTINEL:
        if not parts:
            raise ValueError("names no service for Sentinel to look up")
        service = unquote(parts.pop(0))
    if len(parts) > 1:
        raise ValueError("has too long a path")
    db = _db(parts[0]) if parts else 0
    if db and kind is Kind.CLUSTER:
        raise ValueError("names a database, and a cluster has only database 0")
    return service, db


def _db(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text):
        raise ValueError("has a database that is not a number")
    return int(text)
