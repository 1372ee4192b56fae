from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sentinel_shared.logging import STORM_KEYS_MAX, JsonFormatter, StormGuard, configure_logging
from tests.unit.shared.clocks import ManualClock

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJjYW5hcnkifQ.c2lnbmF0dXJlLWNhbmFyeQ"


def formatted(message: Any = "hello", *args: object, secrets: tuple[str, ...] = (), **extra: Any) -> dict[str, Any]:
    record = logging.getLogger("test").makeRecord("test", logging.INFO, __file__, 1, message, args, None, extra=extra)
    line = JsonFormatter("sentinel-proxy", secrets=secrets).format(record)
    assert "\n" not in line
    parsed: dict[str, Any] = json.loads(line)
    return parsed


@pytest.fixture
def output() -> Iterator[io.StringIO]:
    """What a configured process writes; the loggers are put back as they were."""
    names = ("", "httpx", "httpcore", "uvicorn", "uvicorn.error", "uvicorn.access", "arq", "arq.worker", "asyncio")
    loggers = [logging.getLogger(name) for name in names]
    before = [(a_logger.level, a_logger.handlers[:], a_logger.propagate) for a_logger in loggers]
    raised = logging.raiseExceptions
    stream = io.StringIO()
    configure_logging("sentinel-proxy", "info", secrets=["own-secret"], stream=stream)
    yield stream
    logging.captureWarnings(capture=False)
    logging.raiseExceptions = raised
    for a_logger, (level, handlers, propagate) in zip(loggers, before, strict=True):
        a_logger.setLevel(level)
        a_logger.handlers[:] = handlers
        a_logger.propagate = propagate


def lines(output: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.getvalue().splitlines()]


def test_a_record_is_one_json_object_with_what_was_passed_along():
    line = formatted("admitted %d", 3, request_id="r1", external_id="u1", input_tokens=12, decision="admit")
    at = datetime.fromisoformat(line.pop("timestamp"))
    assert at.utcoffset() == timedelta(0)
    assert line == {
        "level": "info",
        "service": "sentinel-proxy",
        "logger": "test",
        "message": "admitted 3",
        "request_id": "r1",
        "external_id": "u1",
        "input_tokens": 12,
        "decision": "admit",
    }


def test_a_message_of_several_lines_stays_one_line():
    assert formatted("one\ntwo\r\n\u2028three")["message"] == "one\ntwo\r\n\u2028three"


def test_an_exception_is_in_the_line_with_its_traceback(output):
    try:
        int("what went wrong")
    except ValueError:
        logging.getLogger("sentinel").exception("failed")
    (line,) = lines(output)
    assert line["level"] == "error"
    assert "Traceback" in line["exception"]
    assert "what went wrong" in line["exception"]


def test_a_message_whose_arguments_do_not_fit_is_written_as_it_is():
    assert formatted("%d of %d", 1)["message"] == "%d of %d"


@pytest.mark.parametrize("value", [object(), {1: {2, 3}}, b"bytes", float("inf"), 10**30, "\ud800", {"deep": object()}])
def test_a_value_that_is_not_json_is_written_all_the_same(value):
    assert formatted("hello", value=value)["message"] == "hello"


def test_extra_never_replaces_the_fixed_fields():
    line = formatted("hello", service="another", level="none", timestamp="never", logger="no")
    assert (line["service"], line["level"], line["logger"]) == ("sentinel-proxy", "info", "test")


@pytest.mark.parametrize(
    "text",
    [
        f"Authorization: Bearer {JWT}",
        f"authorization={JWT}",
        f"token {JWT} was refused",
        "Authorization: Bearer opaque-canary-token",
        "Authorization: Basic Y2FuYXJ5OmNhbmFyeQ==",
        "x-api-key: zion-canary",
        "{'x-api-key': 'zion-canary'}",
        "{'authorization': b'Bearer canary-token'}",
        "api_key=canary&x=1",
        "ZION_API_KEY=canary-key",
        "WEBHOOK_SECRET: canary",
        "password = canary",
        "sk-proj-canary_canary1234",
        "redis://:canary@localhost:6379/0",
        "rediss://user:canary@redis.example.com",
        "Cookie: session=canary",
    ],
)
def test_what_looks_like_a_secret_is_blotted_out_wherever_it_stands(text):
    nested = formatted(text, detail=text, headers={"h": [text]})
    assert "canary" not in json.dumps(nested)
    assert "[redacted]" in nested["message"]
    assert JWT not in json.dumps(nested)


def test_a_value_that_holds_itself_is_written_to_a_bounded_depth():
    endless: dict[str, Any] = {"password": "canary"}
    endless["itself"] = endless
    assert "canary" not in json.dumps(formatted("hello", value=endless))


@pytest.mark.parametrize(
    "name", ["authorization", "x-api-key", "api_key", "jwt", "password", "webhook_secret", "cookie"]
)
def test_a_field_with_a_secrets_name_is_blotted_out(name):
    fields: dict[str, Any] = {name: "canary one", "headers": {name: ["canary two"]}}
    line = formatted("hello", **fields)
    assert "canary" not in json.dumps(line)


def test_the_processs_own_secrets_are_blotted_out_whatever_they_look_like():
    line = formatted('was "odd"secret\\ here', secrets=('"odd"secret\\', "x"), note='"odd"secret\\')
    assert line["message"] == "was [redacted] here"
    assert line["note"] == "[redacted]"


def test_ordinary_words_and_numbers_stay_as_they_are():
    text = "input_tokens: 12, key dictionary, basic plan; bearer of news https://example.com/a@b task-force"
    line = formatted(text, input_tokens=12, token_count=3, limit_name="ai_input_tokens", tokens={"output_tokens": 4})
    assert line["message"] == text
    assert (line["input_tokens"], line["token_count"], line["tokens"]) == (12, 3, {"output_tokens": 4})


@given(
    st.text()
    | st.sampled_from(["Bearer ", "password=", "://a", '"', "\\", "api_key: '", JWT]).flatmap(
        lambda head: st.text().map(lambda tail: head + tail)
    )
)
def test_blotting_never_breaks_the_json(text):
    assert set(formatted("%s", text, value={"inner": [text]})) >= {"timestamp", "level", "service", "message", "value"}


def test_every_logger_goes_through_the_one_handler(output):
    logging.getLogger("uvicorn").addHandler(logging.StreamHandler(io.StringIO()))
    configure_logging("sentinel-sync", "warning", stream=output)
    logging.getLogger("uvicorn.error").warning("from uvicorn", extra={"color_message": "\x1b[1m"})
    logging.getLogger("arq.worker").warning("from arq")
    logging.getLogger("anything").info("below the level")
    assert [line["message"] for line in lines(output)] == ["from uvicorn", "from arq"]
    assert "color_message" not in output.getvalue()


@pytest.mark.parametrize("name", ["httpx", "httpcore.http11", "uvicorn.access", "arq.worker"])
def test_what_others_say_about_every_request_or_tick_is_not_written(output, name):
    logging.getLogger(name).info("HTTP Request: GET https://zion.example.com")
    assert output.getvalue() == ""


def test_the_level_is_kept_and_warnings_are_logged(output):
    logging.getLogger("sentinel").debug("too fine")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old ways of own-secret", stacklevel=1)
    (line,) = lines(output)
    assert line["level"] == "warning"
    assert "old ways of [redacted]" in line["message"]


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def storm() -> tuple[StormGuard, ManualClock, list[logging.LogRecord]]:
    clock, kept = ManualClock(), Kept()
    a_logger = logging.Logger("storm")  # noqa: LOG001 -- one that no other test sees
    a_logger.addHandler(kept)
    return StormGuard(a_logger, clock.monotonic_s), clock, kept.records


def test_a_storm_is_one_line_a_second_that_counts_the_rest(storm):
    guard, clock, records = storm
    for _ in range(100):
        guard.log_once_per_s(logging.WARNING, "redis", "Redis is away")
        clock.advance(0.0625)
    assert [vars(record).get("suppressed") for record in records] == [None, 15, 15, 15, 15, 15, 15]


def test_each_key_has_its_own_second_and_its_own_count(storm):
    guard, clock, records = storm
    for key in ("redis", "zion", "redis", "redis"):
        guard.log_once_per_s(logging.WARNING, key, key, request_id="r1")
    clock.advance(1)
    guard.log_once_per_s(logging.WARNING, "redis", "redis")
    guard.log_once_per_s(logging.WARNING, "zion", "zion")
    assert [record.getMessage() for record in records] == ["redis", "zion", "redis", "zion"]
    assert [vars(record).get("suppressed") for record in records] == [None, None, 2, None]
    assert vars(records[0])["request_id"] == "r1"


def test_too_many_keys_share_one_and_take_no_more_memory(storm):
    guard, _, records = storm
    for number in range(10 * STORM_KEYS_MAX):
        guard.log_once_per_s(logging.WARNING, f"user {number}", "odd")
    assert len(records) == STORM_KEYS_MAX + 1
