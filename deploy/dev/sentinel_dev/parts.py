"""Which processes make up the system, with what environment, and how each is asked whether it is ready."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import http.client
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from sentinel_dev.options import LOOPBACK, Options
from sentinel_dev.supervisor import Part

ZION_KEY: Final = "zion-demo-key"
GATEWAY_KEY: Final = "gateway-demo-key"
WEBHOOK_SECRET: Final = "webhook-demo-secret"
SERVICES: Final = ("proxy", "usage-worker", "limits-sync")
_ASK_TIMEOUT_S: Final = 5.0


def service_environ(options: Options, environ: Mapping[str, str], redis_url: str) -> dict[str, str]:
    """The environment of the three services: the person's own, and what sentinel-dev knows better."""
    told = {
        "SPOOL_DIR": str(options.data / "spool"),
        "WEBHOOK_SECRET": WEBHOOK_SECRET,
        **{name: value for name, value in environ.items() if value.strip()},
        "REDIS_URL": redis_url,
        "SENTINEL_HOST": options.host,
    }
    if "zion" in options.simulated:
        told |= {"ZION_API_URL": f"http://{LOOPBACK}:{options.ports['zion']}", "ZION_API_KEY": ZION_KEY}
    if "gateway" in options.simulated:
        told |= {
            "VERCEL_AI_GATEWAY_URL": f"http://{LOOPBACK}:{options.ports['gateway']}/v1",
            "VERCEL_AI_GATEWAY_API_KEY": GATEWAY_KEY,
        }
    return told


def simulator_parts(options: Options, environ: Mapping[str, str]) -> list[Part]:
    """Those of Zion and the gateway that are not real."""
    keys = {"zion": ("--api-key", ZION_KEY), "gateway": ("--key", GATEWAY_KEY)}
    return [
        Part(
            name=name,
            command=[
                *(sys.executable, "-m", "sentinel_dev.simulate", name),
                *("--port", str(options.ports[name])),
                *keys[name],
            ],
            environ=environ,
            ready=_ready(options.address(name), "/admin/books"),
            where=f"http://{LOOPBACK}:{options.ports[name]}, simulated",
        )
        for name in ("zion", "gateway")
        if name in options.simulated
    ]


def service_parts(options: Options, environ: Mapping[str, str]) -> list[Part]:
    """The three services, as the console scripts beside this Python run them; the proxy is the last one."""
    scripts = Path(sys.executable).parent
    return [
        Part(
            name=name,
            command=[str(scripts / f"sentinel-{name}")],
            environ={**environ, "SENTINEL_PORT": str(options.ports[name])},
            ready=_ready(options.address(name), "/health/ready"),
            where=_url(options.address(name)) + ("/v1" if name == "proxy" else "/health"),
        )
        for name in reversed(SERVICES)
    ]


async def add_user(options: Options, external_id: str, limits: Mapping[str, int]) -> str:
    """Makes a user of the simulated Zion, or makes one anew; its token."""
    told = {"externalId": external_id, "limits": limits, "tokenSeconds": 30 * 86_400}
    _, answer = await ask(options.address("zion"), "POST", "/admin/users", msgspec.json.encode(told))
    return str(msgspec.json.decode(answer)["token"])


async def announce_change(options: Options, external_id: str, *, secret: str, now_s: float) -> None:
    """Zion's webhook: what Redis remembers of this user from an earlier run is no longer true."""
    body = msgspec.json.encode({"externalId": external_id})
    timestamp = str(int(now_s))
    signature = hmac.digest(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hex()
    headers = {"X-Zion-Timestamp": timestamp, "X-Zion-Signature": f"sha256={signature}"}
    await ask(options.address("proxy"), "POST", "/internal/invalidate", body, headers)


async def ask(
    address: tuple[str, int],
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, bytes]:
    """One HTTP request to a part: status and body. Raises OSError when there is no answer."""

    def asked() -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(*address, timeout=_ASK_TIMEOUT_S)
        try:
            connection.request(method, path, body or None, dict(headers or {}))
            response = connection.getresponse()
            return response.status, response.read()
        except http.client.HTTPException as error:
            raise ConnectionError("no HTTP answer") from error
        finally:
            connection.close()

    return await asyncio.to_thread(asked)


def _ready(address: tuple[str, int], path: str) -> Callable[[], Awaitable[bool]]:
    async def ready() -> bool:
        status, _ = await ask(address, "GET", path)
        return status == 200

    return ready


def _url(address: tuple[str, int]) -> str:
    host, port = address
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def base_url(options: Options) -> str:
    """Where an OpenAI SDK points to."""
    return _url(options.address("proxy")) + "/v1"
