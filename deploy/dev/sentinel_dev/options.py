"""What sentinel-dev is told, by flags or by the environment: ports, a folder, and which parts are real."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sentinel_shared.settings import HOST, PORT, REDIS_URL

LOOPBACK: Final = "127.0.0.1"
_REACHED_BY: Final = {"0.0.0.0": LOOPBACK, "::": "::1"}  # noqa: S104  only told apart, not bound here

# part: (variable, default, what listens there)
_PORTS: Final = {
    "proxy": ("SENTINEL_DEV_PROXY_PORT", "8080", "the proxy"),
    "usage-worker": ("SENTINEL_DEV_WORKER_PORT", "8081", "the usage worker's health and metrics"),
    "limits-sync": ("SENTINEL_DEV_SYNC_PORT", "8082", "the limits sync's health and metrics"),
    "zion": ("SENTINEL_DEV_ZION_PORT", "8083", "the simulated Zion"),
    "gateway": ("SENTINEL_DEV_GATEWAY_PORT", "8084", "the simulated gateway"),
}
_DATA: Final = ("SENTINEL_DEV_DATA", ".sentinel-dev")


class WrongOption(Exception):
    """One line that names the variable and what it takes."""


@dataclass(frozen=True)
class Options:
    """`ports` are by part; a part that is real has one too, which stays free."""

    ports: Mapping[str, int]
    data: Path
    host: str
    redis_url: str | None
    """None: the embedded one."""
    simulated: frozenset[str]
    """`zion`, `gateway`, both or none."""

    def address(self, part: str) -> tuple[str, int]:
        """Where the part is reached from this machine."""
        if part in {"zion", "gateway"}:
            return LOOPBACK, self.ports[part]
        return _REACHED_BY.get(self.host, self.host), self.ports[part]

    def taken(self) -> list[str]:
        """One line for each port that is needed and cannot be had."""
        lines = []
        tried = []
        for part, port in self.ports.items():
            if part in {"zion", "gateway"} - self.simulated:
                continue
            host = LOOPBACK if part in self.simulated else self.host
            try:
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                tried.append(socket.create_server((host, port), family=family))
            except OSError as error:
                variable, _, what = _PORTS[part]
                lines.append(f"Port {port}, for {what}, cannot be had ({error.strerror}); {variable} sets another.")
        for listener in tried:
            listener.close()
        return lines


def read_options(arguments: Sequence[str], environ: Mapping[str, str]) -> Options:
    """Flags go before variables. Raises WrongOption; exits as argparse does for a wrong flag and for --help."""
    told = _parser().parse_args(arguments)
    ports = {}
    for part, (variable, default, _) in _PORTS.items():
        # SENTINEL_PORT is what sets the proxy's port elsewhere; here it would set three.
        other = environ.get("SENTINEL_PORT", "") if part == "proxy" else ""
        text = getattr(told, _flag(part)) or environ.get(variable, "").strip() or other.strip() or default
        ports[part] = _port(variable, text)
    return Options(
        ports=ports,
        data=Path(told.data or environ.get(_DATA[0], "").strip() or _DATA[1]),
        host=_host(environ.get("SENTINEL_HOST", "").strip() or LOOPBACK),
        redis_url=_redis_url(environ.get("REDIS_URL", "").strip()),
        simulated=_simulated(environ),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sentinel-dev",
        description="The whole of Sentinel on this machine. Zion and the gateway are simulated unless ZION_API_URL and "
        "VERCEL_AI_GATEWAY_API_KEY say where real ones are; Redis is embedded unless REDIS_URL is set. All variables "
        "of the three services apply.",
    )
    for part, (variable, default, what) in _PORTS.items():
        parser.add_argument(f"--{part}-port", dest=_flag(part), metavar="PORT", help=f"{what}; {variable}, {default}")
    parser.add_argument(
        "--data", metavar="FOLDER", help=f"what Redis holds, kept between runs; {_DATA[0]}, {_DATA[1]} in this folder"
    )
    return parser


def _flag(part: str) -> str:
    return part.replace("-", "_") + "_port"


def _port(variable: str, text: str) -> int:
    try:
        return PORT.parse(text)
    except ValueError:
        raise WrongOption(f"{variable} must be {PORT.words}, not {text!r}") from None


def _host(text: str) -> str:
    try:
        return HOST.parse(text)
    except ValueError:
        raise WrongOption(f"SENTINEL_HOST must be {HOST.words}, not {text!r}") from None


def _redis_url(text: str) -> str | None:
    try:
        return REDIS_URL.parse(text) if text else None
    except ValueError:
        raise WrongOption(f"REDIS_URL must be {REDIS_URL.words}") from None


def _simulated(environ: Mapping[str, str]) -> frozenset[str]:
    simulated = set()
    for part, decides, also in (
        ("zion", "ZION_API_URL", "ZION_API_KEY"),
        ("gateway", "VERCEL_AI_GATEWAY_API_KEY", "VERCEL_AI_GATEWAY_URL"),
    ):
        if not environ.get(decides, "").strip():
            if environ.get(also, "").strip():
                raise WrongOption(f"{also} is set, but {decides} is not; set both, or none for a simulated {part}")
            simulated.add(part)
    return frozenset(simulated)
