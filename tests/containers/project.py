"""The engine's and compose's commands, as tests use them."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self
from uuid import uuid4

import httpx

from tests.support.redis_server import free_port
from tests.support.system import eventually

REPO: Final = Path(__file__).parents[2]
PYTHON_IMAGE: Final = os.environ.get("PYTHON_IMAGE", "python:3.13-slim")
REDIS_IMAGE: Final = os.environ.get("REDIS_IMAGE", "redis:7-alpine")
MONITORING: Final = Path(__file__).parent / "prometheus.Dockerfile"
PORTS: Final = {"proxy": 8080, "usage-worker": 8081, "limits-sync": 8082, "dev": 8080}
_BUILD_WITHIN_S: Final = 600
_COMMAND_WITHIN_S: Final = 180
_READY_WITHIN_S: Final = 90


def run(*command: str, within_s: float = _COMMAND_WITHIN_S, environ: Mapping[str, str] | None = None) -> str:
    """What the command says on stdout; fails with what it complains of."""
    told = subprocess.run(
        command, cwd=REPO, env=environ, capture_output=True, text=True, timeout=within_s, check=False, errors="replace"
    )
    assert told.returncode == 0, f"{' '.join(command)}:\n{told.stdout[-2000:]}\n{told.stderr[-4000:]}"
    return told.stdout


def docker(*arguments: str, within_s: float = _COMMAND_WITHIN_S) -> str:
    """A command of the engine's client."""
    return run("docker", *arguments, within_s=within_s)


def why_not() -> str | None:
    """Why no container can be run here; None when one can."""
    if shutil.which("docker") is None:
        return "docker is not installed"
    if _fails("docker", "info"):
        return "no container engine runs"
    if not compose_command():
        return "neither docker compose nor docker-compose is installed"
    for image in (PYTHON_IMAGE, REDIS_IMAGE):
        if _fails("docker", "image", "inspect", image) and _fails("docker", "pull", "--quiet", image):
            return f"the image {image} is not here and cannot be pulled"
    return None


@functools.cache
def compose_command() -> tuple[str, ...]:
    """The plugin where there is one, else the program of its own."""
    if not _fails("docker", "compose", "version"):
        return ("docker", "compose")
    return ("docker-compose",) if shutil.which("docker-compose") else ()


def build(service: str, tag: str) -> None:
    """An image of the Dockerfile. With the machine's network, for registries that only the machine reaches."""
    mirror = [option for name in ("PIP_INDEX_URL",) if name in os.environ for option in ("--build-arg", name)]
    docker(
        *("build", "--quiet", "--network=host", "--file=deploy/Dockerfile", f"--tag={tag}"),
        *(f"--build-arg=SERVICE={service}", f"--build-arg=PORT={PORTS[service]}"),
        *(f"--build-arg=PYTHON_IMAGE={PYTHON_IMAGE}", *mirror, "."),
        within_s=_BUILD_WITHIN_S,
    )


@functools.cache
def prometheus_image() -> str | None:
    """What docker-compose.yml names, else an image of this machine's own Prometheus; None where neither is."""
    compose = (REPO / "docker-compose.yml").read_text(encoding="utf-8")
    found = re.search(r"\$\{PROMETHEUS_IMAGE:-(\S+)\}", compose)
    assert found is not None
    named = os.environ.get("PROMETHEUS_IMAGE", found[1])
    if not _fails("docker", "image", "inspect", named) or not _fails("docker", "pull", "--quiet", named):
        return named
    binary = shutil.which("prometheus")
    if binary is None:
        return None
    made = "sentinel-test-prometheus"
    with tempfile.TemporaryDirectory() as context:
        shutil.copy(binary, f"{context}/prometheus")
        docker("build", "--quiet", f"--file={MONITORING}", f"--tag={made}", f"--build-arg=BASE={PYTHON_IMAGE}", context)
    return None if _fails("docker", "run", "--rm", made, "--version") else made


def _fails(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode != 0
    except subprocess.TimeoutExpired:
        return True


class Project:
    """docker-compose.yml under a name and on ports of its own; taken down, with its volumes, at the end."""

    def __init__(self, **environ: str) -> None:
        self.name = f"sentinel-test-{uuid4().hex[:8]}"
        self.port, self.zion_port, self.prometheus_port = free_port(), free_port(), free_port()
        self._environ = {
            **os.environ,
            "SENTINEL_PUBLISHED_PORT": str(self.port),
            "ZION_PUBLISHED_PORT": str(self.zion_port),
            "PROMETHEUS_PUBLISHED_PORT": str(self.prometheus_port),
            **environ,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.compose("--profile", "demo", "down", "--volumes", "--timeout", "10")

    def compose(self, *arguments: str) -> str:
        """A command of compose for this project."""
        command = [*compose_command(), "-p", self.name, "-f", "docker-compose.yml", *arguments]
        return run(*command, environ=self._environ)

    def up(self, *services: str, **scale: int) -> None:
        """Until all that have a health check are healthy. Images are never built nor pulled by it."""
        scaled = [part for name, count in scale.items() for part in ("--scale", f"{name.replace('_', '-')}={count}")]
        waits = ["--wait"] if compose_command() == ("docker", "compose") else []  # what docker-compose 1 does not know
        try:
            self.compose("up", "-d", "--no-build", *waits, *scaled, *services)
            eventually(self.unhealthy, within_s=_READY_WITHIN_S, until=lambda names: not names)
        except AssertionError as error:
            raise AssertionError(
                f"{error}\n{self.unhealthy()}\n{self.compose('logs', '--no-color', '--tail=30')}"
            ) from None

    def containers(self, service: str) -> list[str]:
        """Ids of the service's containers, also of those that have ended."""
        return self._listed(service).split()

    def unhealthy(self) -> list[str]:
        """Names of containers that do not run, or whose health check does not pass (yet)."""
        ids = docker("ps", "--all", "--quiet", f"--filter=label=com.docker.compose.project={self.name}").split()
        states = {told["Name"]: told["State"] for told in map(inspected, ids)}
        return [
            f"{name}: {state['Status']}, {state.get('Health', {}).get('Log', [])[-1:]}"
            for name, state in states.items()
            if state["Status"] != "running" or state.get("Health", {}).get("Status", "healthy") != "healthy"
        ]

    def measured(self, expression: str, path: str = "query", **options: float) -> list[dict[str, Any]]:
        """The series that Prometheus has for an expression."""
        url = f"http://127.0.0.1:{self.prometheus_port}/api/v1/{path}"
        answer = httpx.get(url, params={"query": expression, **options}, timeout=30)
        assert answer.status_code == 200, (expression, answer.text)
        series: list[dict[str, Any]] = answer.json()["data"]["result"]
        return series

    def _listed(self, service: str) -> str:
        return docker(
            *("ps", "--all", "--quiet", f"--filter=label=com.docker.compose.project={self.name}"),
            f"--filter=label=com.docker.compose.service={service}",
        )


def inspected(container: str) -> Any:
    """What the engine knows of a container or an image."""
    return json.loads(docker("inspect", container))[0]
