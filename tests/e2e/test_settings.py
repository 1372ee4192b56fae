"""A missing or malformed setting stops a service at once: exit 2, one line that names it, never a traceback."""

from __future__ import annotations

import subprocess

import pytest

from tests.support.redis_server import free_port
from tests.support.system import bare_environ, script

_GOOD = {
    "ZION_API_URL": "http://127.0.0.1:9",
    "ZION_API_KEY": "key",
    "VERCEL_AI_GATEWAY_API_KEY": "key",
    "VERCEL_AI_GATEWAY_URL": "http://127.0.0.1:9/v1",
    "SENTINEL_HOST": "127.0.0.1",
}


def run(service: str, environ: dict[str, str | None]) -> subprocess.CompletedProcess[str]:
    told = {name: value for name, value in {**_GOOD, **environ}.items() if value is not None}
    command = [script(f"sentinel-{service}")]
    return subprocess.run(command, env=bare_environ(**told), capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize(
    ("service", "variable", "value"),
    [
        ("proxy", "ZION_API_URL", None),
        ("proxy", "ZION_API_URL", "ftp://zion"),
        ("proxy", "ZION_API_KEY", None),
        ("proxy", "ZION_API_KEY", "a key with-s3cret"),
        ("proxy", "VERCEL_AI_GATEWAY_API_KEY", " "),
        ("proxy", "VERCEL_AI_GATEWAY_URL", "gateway"),
        ("proxy", "REDIS_URL", "http://:s3cret@redis"),
        ("proxy", "SENTINEL_PORT", "eighty"),
        ("proxy", "SENTINEL_PORT", "70000"),
        ("proxy", "SENTINEL_WORKERS", "0"),
        ("proxy", "LOG_LEVEL", "chatty"),
        ("proxy", "QUOTA_MODE", "loose"),
        ("proxy", "REDIS_FAIL_MODE", "hope"),
        ("proxy", "RATE_LIMIT_REQUESTS", "-1"),
        ("proxy", "MAX_BODY_BYTES", "20 MB"),
        ("proxy", "WEBHOOK_SECRET", "two w0rds s3cret"),
        ("proxy", "OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318"),
        ("proxy", "OTEL_EXPORTER_OTLP_HEADERS", "s3cret"),
        ("proxy", "OTEL_TRACES_SAMPLER", "often"),
        ("proxy", "OTEL_TRACES_SAMPLER_ARG", "1.5"),
        ("usage-worker", "ZION_API_URL", None),
        ("usage-worker", "ZION_API_KEY", None),
        ("usage-worker", "USAGE_FLUSH_SECONDS", "soon"),
        ("usage-worker", "USAGE_BATCH_ITEMS", "1001"),
        ("usage-worker", "ARQ_REDIS_URL", "redis+cluster://a:1"),
        ("limits-sync", "ZION_API_KEY", None),
        ("limits-sync", "CACHE_TTL_SECONDS", "0"),
        ("limits-sync", "LIMITS_MAX_STALE_SECONDS", "-1"),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_2(service, variable, value):
    ended = run(service, {variable: value})
    said = (ended.stdout + ended.stderr).strip()
    assert ended.returncode == 2, said
    assert variable in said
    assert len(said.splitlines()) == 1
    assert "s3cret" not in said


@pytest.mark.parametrize("service", ["proxy", "usage-worker", "limits-sync"])
def test_a_redis_that_is_not_there_is_one_line_and_exit_1(service):
    url = f"redis://:s3cret@127.0.0.1:{free_port()}"
    ended = run(service, {"REDIS_URL": url, "SENTINEL_PORT": str(free_port())})
    said = (ended.stdout + ended.stderr).strip()
    assert ended.returncode == 1, said
    assert "Traceback" not in said
    assert "s3cret" not in said
    assert len(ended.stderr.strip().splitlines()) == 1
