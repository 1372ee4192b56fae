from __future__ import annotations

import re

import pytest
import yaml

from sentinel_limits_sync.settings import Settings as LimitsSyncSettings
from sentinel_proxy.settings import Settings as ProxySettings
from sentinel_shared.settings import CommonSettings
from sentinel_usage_worker.settings import Settings as UsageWorkerSettings

SETTINGS: dict[str, type[CommonSettings]] = {
    "proxy": ProxySettings,
    "usage-worker": UsageWorkerSettings,
    "limits-sync": LimitsSyncSettings,
}
OF_THE_IMAGE = {"SENTINEL_HOST", "SENTINEL_PORT", "SPOOL_DIR"}
EVERYBODYS = {"HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE"}


@pytest.fixture(scope="module")
def compose(repo):
    return yaml.safe_load((repo / "docker-compose.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def told(repo):
    """The variables that .env.example names."""
    text = (repo / ".env.example").read_text(encoding="utf-8")
    return set(re.findall(r"^# ([A-Z_]+)=", text, re.MULTILINE))


def read_by(service):
    return {variable.name for variable in SETTINGS[service].describe()}


@pytest.mark.parametrize("service", SETTINGS)
def test_every_setting_of_a_service_reaches_its_container(compose, service):
    assert set(compose["services"][service]["environment"]) == read_by(service) - OF_THE_IMAGE | EVERYBODYS


def test_the_example_names_every_setting_and_every_variable_of_the_compose_file(repo, told):
    text = (repo / "docker-compose.yml").read_text(encoding="utf-8")
    used = set(re.findall(r"\$\{([A-Z_]+)", text))
    settings = set().union(*(read_by(service) for service in SETTINGS))
    assert settings | used | EVERYBODYS <= told
    assert told <= settings | used | EVERYBODYS | {"PIP_INDEX_URL", "PIP_CERT"}


def test_the_example_shows_the_defaults_of_the_compose_file(repo):
    compose = (repo / "docker-compose.yml").read_text(encoding="utf-8")
    example = (repo / ".env.example").read_text(encoding="utf-8")
    simulated = {"ZION_API_URL", "ZION_API_KEY", "VERCEL_AI_GATEWAY_URL", "VERCEL_AI_GATEWAY_API_KEY"}
    for name, default in re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", compose):
        if name not in simulated:
            assert f"\n# {name}={default}\n" in example, name


def test_the_example_shows_the_defaults_of_the_services(repo):
    example = (repo / ".env.example").read_text(encoding="utf-8")
    for variable in ProxySettings.describe() + UsageWorkerSettings.describe():
        if variable.default and variable.name not in {"REDIS_URL", *OF_THE_IMAGE}:
            assert f"# {variable.name}={variable.default}\n" in example, variable.name


@pytest.mark.parametrize("service", SETTINGS)
def test_a_service_that_may_be_scaled_holds_no_port_of_the_machine(compose, service):
    assert "ports" not in compose["services"][service]
    assert "container_name" not in compose["services"][service]


def test_a_container_of_ours_can_write_nothing_but_its_folders(compose):
    for name, service in compose["services"].items():
        if name not in {"redis", "prometheus", "grafana"}:
            assert service["read_only"], name


def test_whatever_runs_on_starts_again_by_itself(compose):
    for name, service in compose["services"].items():
        assert service.get("restart") == "unless-stopped" or name == "demo", name


def test_ports_are_open_to_this_machine_alone_unless_told_otherwise(compose):
    published = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert published
    for port in published:
        assert port.startswith("${PUBLISH_ADDRESS:-127.0.0.1}:"), port


def test_redis_throws_nothing_away_and_writes_everything_down(compose):
    command = " ".join(compose["services"]["redis"]["command"])
    assert "--maxmemory-policy noeviction" in command
    assert "--appendonly yes" in command


def test_containers_are_given_the_time_that_a_drain_takes(compose):
    grace_s = next(int(v.default) for v in ProxySettings.describe() if v.name == "SHUTDOWN_GRACE_SECONDS")
    for service in SETTINGS:
        assert compose["services"][service]["stop_grace_period"] == "${STOP_GRACE_PERIOD:-50s}"
    assert grace_s + 15 <= 50


@pytest.mark.parametrize("name", ["docker-compose", "docker"])
def test_compose_itself_accepts_the_file(tool, name):
    if name == "docker" and tool("docker", "compose", "version").returncode != 0:
        pytest.skip("docker has no compose plugin")
    told = tool(name, *(["compose"] if name == "docker" else []), "-f", "docker-compose.yml", "config", "-q")
    assert told.returncode == 0, told.stderr
