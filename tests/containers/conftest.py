from __future__ import annotations

import re

import openai
import pytest

from tests.containers import project
from tests.containers.project import Project, build


def pytest_collection_modifyitems(items):
    """One worker runs them all: they share images and the engine."""
    for item in items:
        if "tests/containers/" in item.path.as_posix():
            item.add_marker(pytest.mark.containers)
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.xdist_group("containers"))


@pytest.fixture(scope="session")
def images():
    """The four images, by service, under the tags that docker-compose.yml names."""
    reason = project.why_not()
    if reason is not None:
        pytest.skip(reason)
    tags = {service: f"sentinel-{service}" for service in project.PORTS}
    for service, tag in tags.items():
        build(service, tag)
    return tags


@pytest.fixture(scope="module")
def system(images):
    """Three proxies, two workers, and Prometheus where its image can be had."""
    image = project.prometheus_image()
    told = {"RATE_LIMIT_REQUESTS": "0", "USAGE_FLUSH_SECONDS": "0.5", "CACHE_TTL_SECONDS": "5"}
    with Project(**told, **({"PROMETHEUS_IMAGE": image} if image else {})) as running:
        monitoring = ["prometheus"] if image else []
        running.up("proxy", "usage-worker", "limits-sync", *monitoring, proxy=3, usage_worker=2)
        yield running


@pytest.fixture(scope="module")
def demo(system):
    """What `docker compose run --rm demo` prints: a token, and the line to paste."""
    told = system.compose("run", "--rm", "-T", "demo")
    found = re.search(r"^TOKEN=(\S+)$", told, re.MULTILINE)
    assert found, told
    return found[1], told


@pytest.fixture
def client(system, demo):
    """A new client, and so a new connection, for each call of it."""
    opened = []

    def make(**options):
        told = {"api_key": demo[0], "max_retries": 0, "timeout": 30, **options}
        made = openai.OpenAI(base_url=f"http://127.0.0.1:{system.port}/v1", **told)
        opened.append(made)
        return made

    yield make
    for one in opened:
        one.close()
