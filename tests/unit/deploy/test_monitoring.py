"""Alert rules and dashboards: their syntax by promtool, and that they ask for nothing that no service serves."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from prometheus_client import generate_latest

from sentinel_proxy.metrics import ProxyMetrics
from sentinel_shared.metrics import new_registry
from tests.unit.deploy import promql

DASHBOARDS = {"traffic", "tokens", "cache", "usage", "faults"}


@pytest.fixture(scope="module")
def alerts(rules):
    return {rule["alert"]: rule for group in rules.values() for rule in group if "alert" in rule}


@pytest.fixture(scope="module")
def known(rules):
    """Metrics with their labels: the services' own, and what rules record."""
    recorded: dict[str, set[str]] = {
        rule["record"]: set() for group in rules.values() for rule in group if "record" in rule
    }
    return promql.served() | recorded


@pytest.fixture(scope="module")
def dashboards(repo):
    folder = repo / "deploy/grafana/dashboards"
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def queries(dashboard):
    return [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel["targets"]]


def test_prometheus_accepts_its_configuration(tool):
    told = tool("promtool", "check", "config", "deploy/prometheus/prometheus.yml")
    assert told.returncode == 0, told.stdout + told.stderr


def test_alerts_are_heard_when_they_must_and_silent_when_all_is_well(tool):
    told = tool("promtool", "test", "rules", "deploy/prometheus/tests/sentinel_test.yml")
    assert told.returncode == 0, told.stdout + told.stderr


def test_every_alert_is_heard_in_a_test(repo, alerts):
    tests = yaml.safe_load((repo / "deploy/prometheus/tests/sentinel_test.yml").read_text(encoding="utf-8"))["tests"]
    heard = {
        found
        for test in tests
        for asked in test["promql_expr_test"]
        for sample in asked.get("exp_samples", [])
        for found in re.findall(r'alertname="(\w+)"', sample["labels"])
    }
    assert heard == set(alerts)


def test_an_alert_says_what_it_means_and_how_bad_it_is(alerts):
    for name, alert in alerts.items():
        assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}, name
        assert alert["labels"]["severity"] in {"warning", "critical"}, name


def test_a_series_that_wakes_people_is_there_before_its_first_event():
    registry = new_registry()
    ProxyMetrics(registry, models=())
    there = set(generate_latest(registry).decode().splitlines())
    for kind in ("rejected_401", "rejected_402", "rejected_403"):
        assert f'sentinel_upstream_errors_total{{kind="{kind}"}} 0.0' in there
    assert 'sentinel_usage_events_total{outcome="reservation_lost"} 0.0' in there


def test_every_alert_has_its_section_in_the_runbook_and_every_section_its_alert(repo, alerts):
    text = (repo / "docs/operations.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^#)", text, re.MULTILINE | re.DOTALL))
    assert list(sections) == list(alerts)
    for name, section in sections.items():
        assert re.findall(r"^\*\*(\w+)\.\*\* \S", section, re.MULTILINE) == ["Meaning", "Check", "Cure"], name
        assert alerts[name]["annotations"]["runbook_url"] == f"docs/operations.md#{name.lower()}"


def test_the_runbook_speaks_of_metrics_and_variables_that_there_are(repo, known):
    text = (repo / "docs/operations.md").read_text(encoding="utf-8")
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in known}
    assert set(re.findall(r"`(sentinel_\w+)", text)) <= families
    variables = (repo / ".env.example").read_text(encoding="utf-8") + (repo / "docker-compose.yml").read_text()
    for name in set(re.findall(r"`([A-Z]+_[A-Z_]+)[`=]", text)):
        assert name in variables, name


def test_no_rule_asks_for_what_no_service_serves(rules, known):
    for group in rules.values():
        for rule in group:
            assert not promql.unknown(rule["expr"], known), rule


def test_there_is_a_dashboard_for_each_subject(dashboards):
    assert set(dashboards) == DASHBOARDS
    assert len({dashboard["uid"] for dashboard in dashboards.values()}) == len(DASHBOARDS)


@pytest.mark.parametrize("name", sorted(DASHBOARDS))
def test_no_panel_asks_for_what_no_service_serves(dashboards, known, name):
    asked = queries(dashboards[name])
    assert asked
    for title, expression in asked:
        assert not promql.unknown(expression, known), (title, expression)


@pytest.mark.parametrize("name", sorted(DASHBOARDS))
def test_panels_have_a_place_of_their_own(dashboards, name):
    taken: set[tuple[int, int]] = set()
    for panel in dashboards[name]["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_prometheus_can_read_every_query(dashboards, tool, tmp_path):
    recording = [
        {"record": f"panel:{number}", "expr": re.sub(r"\$__(rate_interval|range)", "5m", expression)}
        for number, (_, expression) in enumerate(query for board in dashboards.values() for query in queries(board))
    ]
    file = tmp_path / "panels.yml"
    file.write_text(json.dumps({"groups": [{"name": "panels", "rules": recording}]}), encoding="utf-8")
    told = tool("promtool", "check", "rules", str(file))
    assert told.returncode == 0, told.stdout + told.stderr


def test_every_metric_of_sentinel_is_seen_somewhere(dashboards, rules):
    expressions = [expression for board in dashboards.values() for _, expression in queries(board)]
    expressions += [rule["expr"] for group in rules.values() for rule in group]
    seen = set().union(*(promql.asked(expression)[0] for expression in expressions))
    for name in promql.served():
        family = re.sub("_(bucket|sum|count)$", "", name)
        if name.startswith("sentinel_"):
            assert any(metric.startswith(family) for metric in seen), name


def test_the_check_itself_notices_what_is_not_served():
    known = {"sentinel_requests_total": {"status"}}
    assert not promql.unknown('sum by (status) (rate(sentinel_requests_total{status=~"5.."}[5m])) / 2', known)
    assert promql.unknown("rate(sentinel_request_total[5m])", known) == {"sentinel_request_total"}
    assert promql.unknown('sentinel_requests_total{code="200"}', known) == {"code"}
    assert promql.unknown("sum by (pod, status) (sentinel_requests_total)", known) == {"pod"}
