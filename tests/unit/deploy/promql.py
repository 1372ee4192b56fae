"""Which metrics and labels the services have, and which a PromQL expression asks for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from prometheus_client.metrics import MetricWrapperBase

from sentinel_limits_sync.metrics import SyncMetrics
from sentinel_proxy.metrics import ProxyMetrics
from sentinel_shared.metrics import new_registry
from sentinel_usage_worker.metrics import WorkerMetrics

_OF_PROMETHEUS: Final = {"up": set(), "ALERTS": {"alertname", "alertstate", "severity", "job", "dependency", "kind"}}
_OF_THE_TARGET: Final = {"job", "instance"}
_SUFFIXES: Final = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
_WORDS: Final = {
    *("sum", "max", "min", "count", "by", "without", "on", "group_left", "and", "or", "unless"),
    *("rate", "increase", "histogram_quantile", "absent", "abs", "topk", "vector"),
}
_RANGE_OR_STRING: Final = re.compile(r'\[[^\]]*\]|"[^"]*"')
_SELECTOR: Final = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\s*\{([^}]*)\}")
_GROUPING: Final = re.compile(r"\b(?:by|on|without|ignoring|group_left)\s*\(([^)]*)\)")
_NAME: Final = re.compile(r"(?<![\w.$])[a-zA-Z_:][a-zA-Z0-9_:]*")


def served() -> dict[str, set[str]]:
    """Every series that the three services can have, with its labels: from their own metrics, none by hand."""
    registries = [new_registry() for _ in range(3)]
    ProxyMetrics(registries[0], models=())
    WorkerMetrics(registries[1])
    SyncMetrics(registries[2])
    names: dict[str, set[str]] = {}
    for registry in registries:
        for name, labels in _of(registry):
            names.setdefault(name, set()).update(labels)
    return names


def _of(registry: Any) -> Iterator[tuple[str, set[str]]]:
    for collector in registry._collector_to_names:
        labels = set(collector._labelnames) if isinstance(collector, MetricWrapperBase) else set()
        for family in collector.describe() if isinstance(collector, MetricWrapperBase) else collector.collect():
            for suffix in _SUFFIXES[family.type]:
                yield family.name + suffix, labels | ({"le"} if suffix == "_bucket" else set())


def asked(expression: str) -> tuple[set[str], set[str]]:
    """The metrics and the labels that an expression names."""
    bare = _RANGE_OR_STRING.sub("", expression)
    labels: set[str] = set()
    for _, matchers in _SELECTOR.findall(bare):
        labels.update(re.findall(r"(\w+)\s*[=!]", matchers))
    for grouped in _GROUPING.findall(bare):
        labels.update(re.findall(r"\w+", grouped))
    without = _GROUPING.sub(" ", re.sub(r"\{[^}]*\}", "", bare))
    return set(_NAME.findall(without)) - _WORDS, labels


def unknown(expression: str, known: dict[str, set[str]]) -> set[str]:
    """What an expression asks for that is never served; `known` is by metric."""
    everything = {**known, **_OF_PROMETHEUS}
    metrics, labels = asked(expression)
    possible = _OF_THE_TARGET.union(*(everything.get(metric, set()) for metric in metrics))
    return (metrics - everything.keys()) | (labels - possible)
