from __future__ import annotations

import os
import subprocess
import sys

from prometheus_client import Counter

from sentinel_shared.metrics import BoundedLabel, exposition, metrics_of_several_processes, new_registry

WORKER = """
import os, sys
from prometheus_client import Counter, Gauge
from sentinel_shared.metrics import exposition, new_registry
registry = new_registry()
counter = Counter("sentinel_requests", "Requests", ["status"], registry=registry)
gauge = Gauge("sentinel_inflight", "In flight", registry=registry, multiprocess_mode="livesum")
counter.labels("200").inc(int(sys.argv[1]))
gauge.set(int(sys.argv[1]))
print("counted", flush=True)
sys.stdin.readline()
sys.stdout.write(exposition(registry, os.environ).decode())
"""


def start(amount: int, environ: dict[str, str]) -> subprocess.Popen[str]:
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(amount)],
        env=environ,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == "counted\n"
    return worker


def test_known_values_stay_and_all_others_are_other():
    label = BoundedLabel(["gpt-4o"])
    assert [label("gpt-4o"), label("gpt-4o-mini"), label("")] == ["gpt-4o", "other", "other"]
    label.learn(["gpt-4o-mini"])
    assert label("gpt-4o-mini") == "gpt-4o-mini"


def test_a_label_never_has_more_values_than_its_bound():
    label = BoundedLabel(["known"], most=10)
    label.learn(f"model-{number}" for number in range(10_000))
    values = {label(f"model-{number}") for number in range(10_000)} | {label("known")}
    assert len(values) == 11
    assert "known" in values


def test_one_process_shows_its_metrics_and_its_own_figures_and_no_created_series():
    registry = new_registry()
    Counter("sentinel_requests", "Requests", ["status"], registry=registry).labels("200").inc(3)
    text = exposition(registry, {}).decode()
    assert 'sentinel_requests_total{status="200"} 3.0' in text
    assert "process_cpu_seconds_total" in text
    assert "_created" not in text


def test_registries_of_one_process_know_nothing_of_each_other():
    first, second = new_registry(), new_registry()
    Counter("sentinel_requests", "Requests", registry=first).inc()
    Counter("sentinel_requests", "Requests", registry=second)
    assert "sentinel_requests_total 1.0" in exposition(first, {}).decode()
    assert "sentinel_requests_total 0.0" in exposition(second, {}).decode()


def test_any_of_several_processes_answers_for_all_and_the_dead_keep_their_counts():
    environ = {**os.environ, "PYTHONPATH": ":".join(path for path in sys.path if path)}
    with metrics_of_several_processes(environ) as folder:
        workers = [start(amount, environ) for amount in (1, 10, 100)]
        workers[2].kill()
        workers[2].wait()
        scraped, _ = workers[0].communicate("\n", timeout=30)
        workers[1].communicate("\n", timeout=30)
        assert 'sentinel_requests_total{status="200"} 111.0' in scraped
        assert "sentinel_inflight 11.0" in scraped
        for worker in workers:
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.close()
            worker.stdout.close()
    assert not folder.exists()
    assert "PROMETHEUS_MULTIPROC_DIR" not in environ
