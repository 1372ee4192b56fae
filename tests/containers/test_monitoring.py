"""Prometheus as docker-compose.yml runs it, over three proxies, two workers and a limits-sync in a busy minute."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import httpx
import openai
import pytest
import yaml

from tests.containers.project import REPO, docker
from tests.support.system import LIMITS, eventually

ASK: dict[str, Any] = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}
SCALE = {"sentinel-proxy": 3, "sentinel-usage-worker": 2, "sentinel-limits-sync": 1}
QUIET = {"Lengths that stood in for counts"}  # only a queue full of huge prompts makes them


def add_user(system, external_id, **limits):
    told = {"externalId": external_id, "limits": dict.fromkeys(LIMITS, 100_000_000) | limits}
    return httpx.post(f"http://127.0.0.1:{system.zion_port}/admin/users", json=told, timeout=5).json()["token"]


@pytest.fixture(scope="module")
def monitored(system):
    """The system, with a Prometheus that has seen it work, refuse, and do without Redis and one proxy for a while."""
    if not system.containers("prometheus"):
        pytest.skip("no image of Prometheus can be had, and prometheus is not installed")
    eventually(lambda: jobs(system), within_s=60, until=lambda found: found == SCALE)
    started_s = time.time()
    plenty, little = add_user(system, "monitored"), add_user(system, "refused", ai_requests=1)
    work(system, plenty, little, for_s=15)
    redis, proxy = system.containers("redis")[0], system.containers("proxy")[-1]
    docker("pause", redis)
    try:
        eventually(lambda: ask(system, plenty) and admitted_without_redis(system), within_s=60)
    finally:
        docker("unpause", redis)
    docker("pause", proxy)
    try:
        eventually(lambda: system.measured('up{job="sentinel-proxy"} == 0'), within_s=60)
    finally:
        docker("unpause", proxy)
    eventually(system.unhealthy, within_s=60, until=lambda names: not names)
    work(system, plenty, little, for_s=15)
    return system, started_s


def work(system, *tokens, for_s):
    deadline = time.monotonic() + for_s
    while time.monotonic() < deadline:
        for token in (*tokens, "made-up"):
            ask(system, token)


def ask(system, token):
    """A JSON answer, a stream and a list of models, on a connection of its own; whether all were had."""
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{system.port}/v1", api_key=token, max_retries=0, timeout=30
    ) as client:
        try:
            client.chat.completions.create(**ASK)
            for _ in client.chat.completions.create(**ASK, stream=True):
                pass
            client.models.list()
        except openai.OpenAIError:
            return False
    return True


def admitted_without_redis(system):
    return system.measured("sum(increase(sentinel_admissions_without_redis_total[1m])) > 0")


def jobs(system):
    return Counter(one["metric"]["job"] for one in system.measured("up == 1"))


def expressions():
    for path in sorted((REPO / "deploy/grafana/dashboards").glob("*.json")):
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            for target in panel["targets"]:
                yield f"{path.stem}: {panel['title']}", target["expr"]


def test_every_process_is_scraped_and_says_that_it_is_ready(monitored):
    system, _ = monitored
    eventually(lambda: jobs(system), within_s=60, until=lambda found: found == SCALE)
    assert len(eventually(lambda: system.measured("sentinel_ready == 1"), within_s=60)) == sum(SCALE.values())


def test_every_rule_is_loaded_and_its_expression_evaluated(monitored):
    system, _ = monitored
    told = httpx.get(f"http://127.0.0.1:{system.prometheus_port}/api/v1/rules", timeout=10).json()["data"]["groups"]
    written = yaml.safe_load((REPO / "deploy/prometheus/rules/sentinel.yml").read_text(encoding="utf-8"))["groups"]
    names = {rule.get("alert", rule.get("record")) for group in written for rule in group["rules"]}
    loaded = {rule["name"]: rule for group in told for rule in group["rules"]}
    assert set(loaded) == names
    for name, rule in loaded.items():
        assert (rule["health"], rule.get("lastError", "")) == ("ok", ""), name
        assert not rule["lastEvaluation"].startswith("0001"), name


def test_every_panel_has_data(monitored):
    system, started_s = monitored
    empty = []
    for panel, expression in expressions():
        asked = expression.replace("$__rate_interval", "30s").replace("$__range", "5m")
        series = system.measured(asked, "query_range", start=started_s, end=time.time(), step=2)
        numbers = [value for one in series for _, value in one["values"] if value != "NaN"]
        if not numbers and panel.partition(": ")[2] not in QUIET:
            empty.append(f"{panel}: {expression}")
    assert not empty, "\n".join(empty)


def test_what_was_short_and_is_over_wakes_nobody(monitored):
    system, _ = monitored
    assert not system.measured('ALERTS{alertstate="firing", severity="critical"}')
