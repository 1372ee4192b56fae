"""What sentinel-dev is told, by flags or by the environment: ports, a folder, and which parts are real."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sentinel_dev.embedded import NotPossible
from sentinel_shared.settings import PORT, REDIS_URL

LOOPBACK: Final = "127.0.0.1"
_EVERYWHERE: Final = {"0.0.0.0": LOOPBACK, "::": "::1"}  # noqa: S104  only told apart, never bound here

# part: (variable, default, what listens there)
PORTS: Final = {
    "proxy": ("SENTINEL_DEV_PROXY_PORT", 8080, "the proxy"),
    "usage-worker": ("SENTINEL_DEV_WORKER_PORT", 8081, "the usage worker's health and metrics"),
    "limits-sync": ("SENTINEL_DEV_SYNC_PORT", 8082, "the limits sync's health and metrics"),
    "zion": ("SENTINEL_DEV_ZION_PORT", 8083, "the simulated Zion"),
    "gateway": ("SENTINEL_DEV_GATEWAY_PORT", 8084, "the simulated gateway"),
}
_DATA_VARIABLE: Final = "SENTINEL_DEV_DATA"
_DATA_DEFAULT: Final = ".sentinel-dev"


class WrongOption(Exception):
    """One line that names the flag or variable and what it takes."""


@dataclass(frozen=True)
class Options:
    """Ports by part, those of the parts that are real included though nobody will listen there."""

    ports: Mapping[str, int]
    data: Path
    host: str
    redis_url: str | None
    """None: the embedded one."""
    real_zion: bool
    real_gateway: bool

    @property
    def reachable_host(self) -> str:
        """Where what listens on `host` is reached from here."""
        return _EVERYWHERE.get(self.host, self.host)

    def listening(self) -> dict[str, tuple[str, int]]:
        """The addresses that will be taken, by part."""
        real = {"zion"} * self.real_zion | {"gateway"} * self.real_gateway if False else set()
        return {
            part: (LOOPBACK if part in {"zion", "gateway"} else self.host, port)
            for part, port in self.ports.items()
            if part not in real
        }
