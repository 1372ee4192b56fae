"""Other gateways, from the package registry, each in a virtual environment of its own under `build/peers`.

Both have their limits on, in a Valkey of their own, and the same simulated upstream as everybody. They are installed at
the first `make bench PEERS=1` and kept.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx

from tests.support.redis_server import RedisServer, free_port
from tests.support.system import GATEWAY_KEY, bare_environ

if TYPE_CHECKING:
    from contextlib import ExitStack

VENVS: Final = Path("build/peers").absolute()
TENSORZERO: Final = "tensorzero==2026.6.0"
LITELLM: Final = "litellm[proxy]==1.106.2"
_START_WITHIN_S: Final = 90.0

# Per user, requests and tokens of a minute. (Sentinel: that, and requests, input and output of a month.) A month beside
# the minute it answers with 502: "Duplicate keys are not allowed in the input array".
_TENSORZERO_CONFIG: Final = """
gateway.observability.enabled = false
[models.chat]
routing = ["upstream"]
[models.chat.providers.upstream]
type = "openai"
model_name = "openai/gpt-4o"
api_base = "{gateway}/v1/"
api_key_location = "env::BENCH_GATEWAY_KEY"
[rate_limiting]
enabled = true
[[rate_limiting.rules]]
model_inferences_per_minute = 1000000000
tokens_per_minute = 1000000000000
always = true
scope = [{{ tag_key = "user", tag_value = "tensorzero::each" }}]
"""
# The wheel has the whole gateway in it; it says where it listens.
_TENSORZERO_RUN: Final = """
import sys, threading
from tensorzero.tensorzero import _start_http_gateway
gateway = _start_http_gateway(
    config_file=sys.argv[1], clickhouse_url=None, postgres_url=None, valkey_url=sys.argv[2], async_setup=False
)
print(gateway.base_url, flush=True)
threading.Event().wait()
"""
_LITELLM_CONFIG: Final = """
model_list:
  - model_name: openai/gpt-4o
    litellm_params:
      {{model: openai/gpt-4o, api_base: "{gateway}/v1", api_key: "{key}", rpm: 1000000000, tpm: 100000000000}}
router_settings:
  routing_strategy: usage-based-routing-v2
  enable_pre_call_checks: true
  redis_host: 127.0.0.1
  redis_port: {redis_port}
general_settings: {{master_key: sk-bench}}
"""


class Foreign:
    """A gateway that runs: where, as which processes, and how it wants to be asked."""

    def __init__(
        self, name: str, process: subprocess.Popen[bytes], redis: RedisServer, *, port: int, path: str
    ) -> None:
        self.name = name
        self.port = port
        self.path = path
        self.pids = (process.pid,)
        self.redis_pids = (redis.pid,)

    def body(self, body: dict[str, Any], user: str) -> dict[str, Any]:
        """The same request in its words."""
        if self.name != "TensorZero":
            return body
        # It limits tokens only of requests that say how many they may produce.
        return body | {"model": "tensorzero::model_name::chat", "max_tokens": 1_000, "tensorzero::tags": {"user": user}}

    @property
    def token(self) -> str | None:
        """Its own key, in the place of the caller's."""
        return "sk-bench" if self.name == "LiteLLM" else None


def start_all(stack: ExitStack, folder: Path, gateway_url: str) -> list[Foreign]:
    """TensorZero and LiteLLM, until they answer; `stack` ends them."""
    started = []
    for name, requirement, start in (("TensorZero", TENSORZERO, _tensorzero), ("LiteLLM", LITELLM, _litellm)):
        binaries = _installed(name.lower(), requirement)
        redis = stack.enter_context(RedisServer(folder / f"{name}-redis"))
        process, port, path = start(binaries, folder, gateway_url, redis)
        stack.callback(_end, process)
        started.append(Foreign(name, process, redis, port=port, path=path))
    return started


def _installed(name: str, requirement: str) -> Path:
    venv = VENVS / name
    stamp = venv / requirement.replace("/", "-")
    if not stamp.exists():
        print(f"installing {requirement} ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        subprocess.run([str(venv / "bin" / "pip"), "install", "--quiet", requirement], check=True)
        stamp.touch()
    return venv / "bin"


def _tensorzero(binaries: Path, folder: Path, gateway_url: str, redis: RedisServer) -> tuple[Any, int, str]:
    config, log = folder / "tensorzero.toml", folder / "tensorzero.log"
    config.write_text(_TENSORZERO_CONFIG.format(gateway=gateway_url))
    environ = {**bare_environ(), "BENCH_GATEWAY_KEY": GATEWAY_KEY}
    command = [str(binaries / "python"), "-c", _TENSORZERO_RUN, str(config), redis.url]
    process = subprocess.Popen(command, env=environ, stdout=log.open("wb"), stderr=subprocess.STDOUT)

    def base() -> str | None:
        return next((line for line in log.read_text().splitlines() if line.startswith("http://")), None)

    url = _until(base, process, log).removeprefix("http://127.0.0.1:")
    port, _, path = url.partition("/")
    return process, int(port), f"/{path}/chat/completions"


def _litellm(binaries: Path, folder: Path, gateway_url: str, redis: RedisServer) -> tuple[Any, int, str]:
    config, log, port = folder / "litellm.yaml", folder / "litellm.log", free_port()
    config.write_text(_LITELLM_CONFIG.format(gateway=gateway_url, key=GATEWAY_KEY, redis_port=redis.port))
    environ = {**bare_environ(), "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    command = [str(binaries / "litellm"), "--config", str(config), "--port", str(port), "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, "--num_workers", "1", "--telemetry", "False"],
        env={**environ, "PATH": f"{binaries}{os.pathsep}{environ['PATH']}"},
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
    )

    def answers() -> bool | None:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health/liveliness", timeout=5).status_code == 200 or None
        except httpx.TransportError:
            return None

    _until(answers, process, log)
    return process, port, "/v1/chat/completions"


def _until(ask: Any, process: subprocess.Popen[bytes], log: Path) -> Any:
    deadline = time.monotonic() + _START_WITHIN_S
    while (answer := ask()) is None:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"did not start:\n{log.read_text()[-2000:]}")
        time.sleep(0.1)
    return answer


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
