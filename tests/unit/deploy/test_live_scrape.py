"""A Prometheus that scrapes a running system answers every panel, and the panels that every system feeds have data."""

from __future__ import annotations

import json
import shutil
import subprocess

import httpx
import pytest
import yaml

from tests.support.redis_server import free_port
from tests.support.system import System, User, bare_environ, chat_body, eventually

SERVICES = ("proxy", "usage-worker", "limits-sync")
QUIET = {
    # What a system without faults does not have: its series begin with the first of them.
    "Admitted while Redis was away",
    "Lengths that stood in for counts",
    "Refusals by the limit that bound",
    "Alerts",
    "Processes that do not answer or are not ready",
}

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory, repo):
    """The URL of one that has scraped a system under some load for a while."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not installed")
    folder = tmp_path_factory.mktemp("scrape")
    with System(folder / "system", USAGE_FLUSH_SECONDS="0.2", CACHE_TTL_SECONDS="2") as system:
        targets = dict(zip(SERVICES, system.start_all(*SERVICES), strict=True))
        port = free_port()
        configuration = {
            "global": {"scrape_interval": "250ms", "evaluation_interval": "250ms"},
            "rule_files": [str(repo / "deploy/prometheus/rules/sentinel.yml")],
            "scrape_configs": [
                {
                    "job_name": f"sentinel-{service}",
                    "static_configs": [{"targets": [server.url.removeprefix("http://")]}],
                }
                for service, server in targets.items()
            ],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration), encoding="utf-8")
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            env=bare_environ(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            eventually(lambda: len(query(url, "up == 1")) == 3, within_s=30)
            load(system, url)
            yield url
        finally:
            process.terminate()
            process.wait(timeout=20)


def load(system, url):
    """Requests until every service's counters have been seen to grow."""
    user = system.add_user()
    assert system.post(User("somebody", "made-up"), chat_body(user)).status_code == 401

    def grew():
        system.post(user, chat_body(user)).raise_for_status()
        system.post(user, chat_body(user, stream=True)).raise_for_status()
        system.http.get(f"{system.proxies[0].url}/v1/models", headers=user.headers).raise_for_status()
        grown = (
            "sentinel_time_to_first_token_seconds_count",
            "sentinel_usage_flushes_total",
            'sentinel_limits_refreshes_total{job="sentinel-limits-sync"}',
        )
        return all(query(url, f"increase({series}[10s]) > 0") for series in grown)

    eventually(grew, within_s=40)


def query(url, expression):
    """The series of an answer; fails when Prometheus does not take the question."""
    try:
        answer = httpx.get(f"{url}/api/v1/query", params={"query": expression}, timeout=10)
    except httpx.TransportError:
        return []
    assert answer.status_code in {200, 503}, answer.text
    return answer.json()["data"]["result"] if answer.status_code == 200 else []


def with_numbers(series):
    return [one for one in series if one["value"][1] != "NaN"]


def test_panels_show_what_the_system_does(prometheus, repo):
    empty = []
    for path in sorted((repo / "deploy/grafana/dashboards").glob("*.json")):
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            for target in panel["targets"]:
                expression = target["expr"].replace("$__rate_interval", "30s").replace("$__range", "1m")
                if not with_numbers(query(prometheus, expression)) and panel["title"] not in QUIET:
                    empty.append(f"{path.stem}: {panel['title']}: {expression}")
    assert not empty, "\n".join(empty)


def test_no_alert_is_pending_for_a_system_that_is_well(prometheus):
    eventually(lambda: query(prometheus, "ALERTS"), within_s=20, until=lambda heard: not heard)
