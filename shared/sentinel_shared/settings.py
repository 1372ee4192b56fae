"""Settings from the environment: one table that is read, checked and documented from the same lines."""

# ruff: noqa: RUF009 -- the table calls `required` and `optional`, which return dataclass fields
from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Generic, NoReturn, Self, TypeVar, cast
from urllib.parse import SplitResult, urlsplit

from sentinel_shared.errors import SentinelError, SettingsError

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)

_VARIABLE: Final = "variable"
_REDIS_SCHEMES: Final = ("redis", "rediss", "unix", "redis+sentinel", "redis+cluster")


class LogLevel(StrEnum):
    """The least severe record that is still written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Secret:
    """A string that prints as stars; `reveal` is the one way to it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The secret itself, for the header or the signature it is meant for."""
        return self._value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return "Secret('***')"


@dataclass(frozen=True)
class Takes(Generic[T]):
    """What a variable takes: in words, and as a parser that raises ValueError. A secret's value is never quoted."""

    words: str
    parse: Callable[[str], T]
    secret: bool = False


@dataclass(frozen=True)
class Variable:
    """One line of the configuration table. `default` is as one would write it, "" where there is none."""

    name: str
    required: bool
    default: str
    takes: str


@dataclass(frozen=True)
class _Entry:
    variable: Variable
    takes: Takes[Any]


def required(name: str, takes: Takes[T]) -> T:
    """A field of a settings class that `name` must be set for."""
    entry = _Entry(Variable(name, required=True, default="", takes=takes.words), takes)
    return cast("T", field(metadata={_VARIABLE: entry}, repr=not takes.secret))


def optional(name: str, takes: Takes[T], default: str = "") -> T:
    """A field of a settings class with a default, written as it would be in the environment; "" stands for None."""
    entry = _Entry(Variable(name, required=False, default=default, takes=takes.words), takes)
    value = takes.parse(default) if default else None
    return cast("T", field(default=value, metadata={_VARIABLE: entry}, repr=not takes.secret))


def computed(name: str, takes: Takes[T], default: Callable[[], T], words: str) -> T:
    """A field of a settings class whose default depends on the machine; `words` describe it."""
    entry = _Entry(Variable(name, required=False, default=words, takes=takes.words), takes)
    return field(default_factory=default, metadata={_VARIABLE: entry}, repr=not takes.secret)


def whole(unit: str, least: int, most: int) -> Takes[int]:
    """A whole number of `unit` within bounds, both included."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text) or not least <= int(text) <= most:
            raise ValueError
        return int(text)

    return Takes(f"a whole number of {unit} from {least} to {most}", parse)


def decimal(unit: str, least: float, most: float) -> Takes[float]:
    """A number of `unit` within bounds, both included; a decimal point is allowed."""

    def parse(text: str) -> float:
        if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,6})?", text) or not least <= float(text) <= most:
            raise ValueError
        return float(text)

    return Takes(f"a number of {unit} from {least:g} to {most:g}", parse)


def one_of(words: type[E]) -> Takes[E]:
    """One of an enumeration's words, in any case."""
    return Takes("one of " + ", ".join(words), lambda text: words(text.lower()))


def _on_or_off(text: str) -> bool:
    return {"on": True, "off": False}[text.lower()]


def _printable(text: str) -> str:
    # What goes into an HTTP header: a stray line break or quote mark from a copied file shows here, not as a 401.
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError
    return text


def _host(text: str) -> str:
    if not re.fullmatch(r"[0-9A-Za-z_.:\-]+", text):
        raise ValueError
    return text


def _has_host(url: SplitResult) -> bool:
    return bool(url.hostname) and url.port != 0  # `port` raises ValueError when it is no port


def _http_url(text: str) -> str:
    url = urlsplit(_printable(text))
    if url.scheme not in {"http", "https"} or not _has_host(url) or url.query or url.fragment:
        raise ValueError
    return text.rstrip("/")


def _redis_url(text: str) -> str:
    url = urlsplit(_printable(text))
    if url.scheme not in _REDIS_SCHEMES:
        raise ValueError
    if url.scheme == "unix":
        if not url.path.startswith("/"):
            raise ValueError
        return text
    hosts = url.netloc.rpartition("@")[2].split(",")
    if not all(_has_host(urlsplit(f"//{host}")) for host in hosts):
        raise ValueError
    if url.scheme in {"redis", "rediss"} and len(hosts) != 1:
        raise ValueError
    return text


def _origin(text: str) -> str:
    url = urlsplit(_printable(text))
    if text != "*" and (url.scheme not in {"http", "https"} or not _has_host(url) or url.path or url.query):
        raise ValueError
    return text


def _origins(text: str) -> tuple[str, ...]:
    return tuple(_origin(origin.strip()) for origin in text.split(","))


def _file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise ValueError
    return path


ON_OR_OFF: Final = Takes("on or off", _on_or_off)
HOST: Final = Takes("a host name or an IP address", _host)
PORT: Final = whole("a TCP port", 1, 65_535)
HTTP_URL: Final = Takes("an http:// or https:// URL with a host and without a query", _http_url, secret=True)
REDIS_URL: Final = Takes(
    "a Redis URL: redis://host:port, rediss://host:port, unix:///path, redis+sentinel://host:port,.../name "
    "or redis+cluster://host:port,...",
    _redis_url,
    secret=True,
)
SECRET: Final = Takes("a key: printable ASCII without spaces", lambda text: Secret(_printable(text)), secret=True)
FOLDER: Final = Takes("the path of a folder", Path)
FILE: Final = Takes("the path of an existing file", _file)
ORIGINS: Final = Takes("web origins such as https://app.example.com, comma separated, or *", _origins)


@dataclass(frozen=True, kw_only=True)
class CommonSettings:
    """What every service is told. A service's own class adds its lines and overrides the port's default."""

    zion_api_url: str = required("ZION_API_URL", HTTP_URL)
    zion_api_key: Secret = required("ZION_API_KEY", SECRET)
    zion_max_concurrency: int = optional("ZION_MAX_CONCURRENCY", whole("requests", 2, 1_000), "16")
    redis_url: str = optional("REDIS_URL", REDIS_URL, "redis://localhost:6379")
    redis_ca_file: Path | None = optional("REDIS_CA_FILE", FILE)
    redis_wait_replicas: int = optional("REDIS_WAIT_REPLICAS", whole("replicas", 0, 10), "0")
    host: str = optional("SENTINEL_HOST", HOST, "0.0.0.0")  # noqa: S104 -- a pod is reached from outside
    port: int = optional("SENTINEL_PORT", PORT, "8080")
    log_level: LogLevel = optional("LOG_LEVEL", one_of(LogLevel), "info")
    cache_ttl_s: int = optional("CACHE_TTL_SECONDS", whole("seconds", 1, 86_400), "300")
    limits_max_stale_s: int = optional("LIMITS_MAX_STALE_SECONDS", whole("seconds", 0, 2_592_000), "86400")
    shutdown_grace_s: int = optional("SHUTDOWN_GRACE_SECONDS", whole("seconds", 0, 3_600), "30")

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Self:
        """The settings that `environ` asks for; an empty or blank value counts as not set.

        Raises SettingsError: one line naming the first wrong variable and what it takes, and then all the others.
        """
        values: dict[str, Any] = {}
        problems: dict[str, str] = {}
        for a_field, entry in _entries(cls):
            variable, text = entry.variable, environ.get(entry.variable.name, "").strip()
            if text:
                try:
                    values[a_field.name] = entry.takes.parse(text)
                except (ValueError, KeyError):
                    seen = "" if entry.takes.secret else f", not {_shortened(text)}"
                    problems[variable.name] = f"{variable.name} must be {variable.takes}{seen}"
            elif variable.required:
                problems[variable.name] = f"{variable.name} is not set; it must be {variable.takes}"
        if not problems:
            settings = cls(**values)
            problems = settings.contradictions()
            if not problems:
                return settings
        raise SettingsError(_in_one_line(problems))

    @classmethod
    def describe(cls) -> list[Variable]:
        """The configuration table of this service, in the order of its fields."""
        return [entry.variable for _, entry in _entries(cls)]

    def contradictions(self) -> dict[str, str]:
        """What is wrong between variables that are each right: variable -> the line that says so."""
        return {}


def run_service(main: Callable[[], int | None]) -> NoReturn:
    """Runs a service's `main` and exits with what it returns.

    A wrong setting is one line on stderr and exit 2; whatever else keeps a service from starting (a taken port, a
    Redis without scripts) is one line and exit 1. Never a traceback for what was foreseen.
    """
    try:
        code = main() or 0
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        code = 2
    except SentinelError as error:
        sys.stderr.write(f"{str(error) or type(error).__name__}\n")
        code = 1
    sys.exit(code)


def _entries(cls: type[CommonSettings]) -> list[tuple[Field[Any], _Entry]]:
    return [(a_field, a_field.metadata[_VARIABLE]) for a_field in fields(cls) if _VARIABLE in a_field.metadata]


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")


def _in_one_line(problems: Mapping[str, str]) -> str:
    first, *others = problems
    if not others:
        return problems[first]
    return f"{problems[first]} (and {len(others)} more to put right: {', '.join(others)})"
