from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sentinel_limits_sync.settings import Settings as SyncSettings
from sentinel_proxy.settings import QuotaMode, RedisFailMode
from sentinel_proxy.settings import Settings as ProxySettings
from sentinel_shared.errors import RedisRefused, SettingsError
from sentinel_shared.settings import CommonSettings, LogLevel, Secret, run_service
from sentinel_usage_worker.settings import Settings as WorkerSettings

ZION = {"ZION_API_URL": "https://zion.example.com/", "ZION_API_KEY": "zion-key-canary"}
PROXY = {**ZION, "VERCEL_AI_GATEWAY_API_KEY": "gateway-key-canary"}


def refusal(environ: dict[str, str], settings: type[CommonSettings] = ProxySettings) -> str:
    with pytest.raises(SettingsError) as refused:
        settings.from_env(environ)
    line = str(refused.value)
    assert "\n" not in line
    return line


def test_the_required_ones_alone_give_every_default_of_the_specification():
    settings = ProxySettings.from_env(PROXY)
    assert settings.zion_api_url == "https://zion.example.com"
    assert settings.zion_api_key.reveal() == "zion-key-canary"
    assert settings.gateway_url == "https://gateway.ai.vercel.com/v1"
    assert settings.redis_url == "redis://localhost:6379"
    assert (settings.host, settings.port, settings.workers) == ("0.0.0.0", 8080, 1)
    assert (settings.cache_ttl_s, settings.jwt_cache_ttl_s, settings.limits_max_stale_s) == (300, 300, 86_400)
    assert (settings.rate_limit_requests, settings.rate_limit_tokens, settings.rate_limit_window_s) == (100, 0, 60)
    assert settings.log_level is LogLevel.INFO
    assert settings.quota_mode is QuotaMode.STRICT
    assert settings.redis_fail_mode is RedisFailMode.LOCAL
    assert settings.spool_dir.is_absolute()
    assert (settings.upstream_connect_timeout_s, settings.upstream_idle_timeout_s) == (5, 120)
    assert (settings.max_body_bytes, settings.shutdown_grace_s, settings.disconnect_drain_s) == (20_971_520, 30, 30)
    assert (settings.upstream_max_connections, settings.max_inflight_requests) == (1000, 1000)
    assert settings.token_calibration is True
    assert (settings.webhook_secret, settings.admin_api_key, settings.cors_allow_origins) == (None, None, None)
    assert (settings.zion_max_concurrency, settings.redis_wait_replicas) == (16, 0)


@pytest.mark.parametrize(
    ("settings", "environ", "port"),
    [(ProxySettings, PROXY, 8080), (WorkerSettings, ZION, 8081), (SyncSettings, ZION, 8082)],
)
def test_each_service_has_its_own_port(settings, environ, port):
    assert settings.from_env(environ).port == port
    assert settings.from_env({**environ, "SENTINEL_PORT": "9000"}).port == 9000


def test_the_worker_and_the_sync_do_not_ask_for_the_gateways_key():
    assert WorkerSettings.from_env(ZION).usage_batch_items == 1000
    assert WorkerSettings.from_env(ZION).usage_flush_s == 2
    assert SyncSettings.from_env(ZION).cache_ttl_s == 300


def test_a_wrong_value_is_one_line_with_the_variable_and_what_it_takes():
    line = refusal({**PROXY, "CACHE_TTL_SECONDS": "abc"})
    assert line == "CACHE_TTL_SECONDS must be a whole number of seconds from 1 to 86400, not 'abc'"


def test_a_missing_one_is_one_line_with_what_it_takes():
    environ = {name: value for name, value in PROXY.items() if name != "VERCEL_AI_GATEWAY_API_KEY"}
    assert refusal(environ) == (
        "VERCEL_AI_GATEWAY_API_KEY is not set; it must be a key: printable ASCII without spaces"
    )


def test_of_several_the_first_is_explained_and_the_others_are_named():
    line = refusal({**ZION, "SENTINEL_PORT": "0", "QUOTA_MODE": "lax"})
    assert line.startswith("SENTINEL_PORT must be")
    assert line.endswith("(and 2 more to put right: VERCEL_AI_GATEWAY_API_KEY, QUOTA_MODE)")


@pytest.mark.parametrize("blank", ["", "  ", "\n"])
def test_a_blank_value_counts_as_not_set(blank):
    assert ProxySettings.from_env({**PROXY, "CACHE_TTL_SECONDS": blank, "WEBHOOK_SECRET": blank}).cache_ttl_s == 300
    assert refusal({**PROXY, "ZION_API_URL": blank}).startswith("ZION_API_URL is not set")


def test_the_line_break_at_the_end_of_a_secret_file_does_no_harm():
    assert ProxySettings.from_env({**PROXY, "ZION_API_KEY": "key-from-file\n"}).zion_api_key == Secret("key-from-file")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ZION_API_URL", "zion.example.com"),
        ("ZION_API_URL", "ftp://zion.example.com"),
        ("ZION_API_URL", "https://"),
        ("ZION_API_URL", "https://zion.example.com:99999"),
        ("ZION_API_URL", "https://zion.example.com?a=b"),
        ("ZION_API_KEY", "two words"),
        ("ZION_API_KEY", "schlüssel"),
        ("REDIS_URL", "localhost:6379"),
        ("REDIS_URL", "http://localhost:6379"),
        ("REDIS_URL", "redis://"),
        ("REDIS_URL", "redis://host:port"),
        ("REDIS_URL", "redis://one:1,two:2"),
        ("REDIS_URL", "unix://"),
        ("SENTINEL_HOST", "a host"),
        ("SENTINEL_PORT", "65536"),
        ("SENTINEL_PORT", "-1"),
        ("CACHE_TTL_SECONDS", "0"),
        ("CACHE_TTL_SECONDS", "1.5"),
        ("CACHE_TTL_SECONDS", "٣"),
        ("RATE_LIMIT_REQUESTS", "-1"),
        ("RATE_LIMIT_WINDOW_SECONDS", "0"),
        ("LOG_LEVEL", "loud"),
        ("QUOTA_MODE", "lax"),
        ("REDIS_FAIL_MODE", "shut"),
        ("TOKEN_CALIBRATION", "maybe"),
        ("UPSTREAM_CONNECT_TIMEOUT_SECONDS", "0"),
        ("UPSTREAM_CONNECT_TIMEOUT_SECONDS", "nan"),
        ("UPSTREAM_CONNECT_TIMEOUT_SECONDS", "1e3"),
        ("MAX_BODY_BYTES", "20MB"),
        ("CORS_ALLOW_ORIGINS", "app.example.com"),
        ("CORS_ALLOW_ORIGINS", "https://a.example.com,,"),
        ("REDIS_CA_FILE", "/nowhere/ca.pem"),
    ],
)
def test_what_a_variable_cannot_take_is_refused_under_its_name(name, value):
    assert refusal({**PROXY, name: value}).startswith(f"{name} must be ")


@pytest.mark.parametrize(
    "url",
    [
        "rediss://user:pass@redis.example.com:6380/2",
        "redis://[::1]:6379",
        "unix:///run/redis.sock",
        "redis+sentinel://:pw@one:26379,two:26379/main/0",
        "redis+cluster://one:6379,two:6379",
    ],
)
def test_every_kind_of_redis_url_is_taken(url):
    assert ProxySettings.from_env({**PROXY, "REDIS_URL": url}).redis_url == url


def test_words_are_taken_in_any_case():
    settings = ProxySettings.from_env(
        {**PROXY, "LOG_LEVEL": "WARNING", "QUOTA_MODE": "Soft", "TOKEN_CALIBRATION": "OFF"}
    )
    assert settings.log_level is LogLevel.WARNING
    assert settings.quota_mode is QuotaMode.SOFT
    assert settings.token_calibration is False


def test_origins_come_as_a_list():
    settings = ProxySettings.from_env({**PROXY, "CORS_ALLOW_ORIGINS": "https://a.example.com, http://localhost:3000"})
    assert settings.cors_allow_origins == ("https://a.example.com", "http://localhost:3000")


def test_secrets_are_in_no_text_of_the_settings_nor_of_a_refusal():
    environ = {
        **PROXY,
        "REDIS_URL": "redis://:redis-canary@localhost",
        "WEBHOOK_SECRET": "webhook-canary",
        "ADMIN_API_KEY": "admin-canary",
    }
    settings = ProxySettings.from_env(environ)
    assert "canary" not in repr(settings) + str(settings) + f"{settings.zion_api_key!s} {settings.zion_api_key!r}"
    for name in ("ZION_API_KEY", "REDIS_URL", "ZION_API_URL", "WEBHOOK_SECRET"):
        assert "canary" not in refusal({**environ, name: "a canary with spaces"})


def test_settings_cannot_be_changed():
    with pytest.raises(AttributeError):
        ProxySettings.from_env(PROXY).port = 1  # type: ignore[misc]  # that is the point


def test_a_long_wrong_value_is_shortened():
    assert len(refusal({**PROXY, "LOG_LEVEL": "x" * 10_000})) < 200


def test_arqs_redis_is_redis_unless_it_has_one_of_its_own():
    assert WorkerSettings.from_env({**ZION, "REDIS_URL": "redis://a"}).arq_redis_url == "redis://a"
    environ = {**ZION, "REDIS_URL": "redis+cluster://a:1", "ARQ_REDIS_URL": "redis://b"}
    assert WorkerSettings.from_env(environ).arq_redis_url == "redis://b"


@pytest.mark.parametrize("own", [{}, {"ARQ_REDIS_URL": "redis+cluster://b:1"}])
def test_arq_on_a_cluster_is_refused(own):
    line = refusal({**ZION, "REDIS_URL": "redis+cluster://a:1", **own}, WorkerSettings)
    assert line.startswith("ARQ_REDIS_URL ")
    assert "redis+cluster://" in line


@pytest.mark.parametrize("settings", [ProxySettings, WorkerSettings, SyncSettings])
def test_the_described_table_is_what_from_env_does(settings):
    table = settings.describe()
    names = [variable.name for variable in table]
    assert len(names) == len(set(names))
    stated = {
        variable.name: variable.default for variable in table if variable.default and variable.name != "SPOOL_DIR"
    }
    assert settings.from_env({**PROXY, **stated}) == settings.from_env(PROXY)
    for variable in table:
        assert variable.takes
        assert variable.required == (variable.name in PROXY)


def test_the_described_table_has_each_services_own_lines():
    assert {"QUOTA_MODE", "SPOOL_DIR"} <= {variable.name for variable in ProxySettings.describe()}
    own = {variable.name for variable in WorkerSettings.describe()} - {v.name for v in CommonSettings.describe()}
    assert own == {"USAGE_FLUSH_SECONDS", "USAGE_BATCH_ITEMS", "ARQ_REDIS_URL", "ZION_IDEMPOTENCY"}
    assert {v.name for v in SyncSettings.describe()} == {v.name for v in CommonSettings.describe()}


def test_a_wrong_setting_ends_the_service_with_one_line_and_exit_2(capsys):
    with pytest.raises(SystemExit) as ended:
        run_service(lambda: ProxySettings.from_env({}).port)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("ZION_API_URL is not set; it must be an http:// or https:// URL")


def test_what_else_was_foreseen_is_one_line_and_exit_1(capsys):
    def main() -> int:
        raise RedisRefused("no permission to run scripts")

    with pytest.raises(SystemExit) as ended:
        run_service(main)
    assert ended.value.code == 1
    assert capsys.readouterr().err == "no permission to run scripts\n"


def test_a_service_that_returns_ends_with_exit_0():
    with pytest.raises(SystemExit) as ended:
        run_service(lambda: None)
    assert ended.value.code == 0


def test_reading_settings_loads_no_framework():
    script = (
        "import sys, sentinel_proxy.settings; print([m for m in ('pydantic', 'fastapi', 'httpx') if m in sys.modules])"
    )
    environ = {"PYTHONPATH": ":".join(path for path in sys.path if path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environ)
    assert done.stdout.strip() == "[]"


def test_a_ca_file_that_exists_is_taken(tmp_path: Path):
    (tmp_path / "ca.pem").write_text("certificate")
    settings = ProxySettings.from_env({**PROXY, "UPSTREAM_CA_FILE": str(tmp_path / "ca.pem")})
    assert settings.upstream_ca_file == tmp_path / "ca.pem"
