from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sentinel_shared.contracts import ResetPeriod
from sentinel_shared.units import (
    format_openai_duration,
    format_rfc3339,
    next_period_end_s,
    parse_period_end_s,
    parse_period_start_s,
    parse_rfc3339,
    period_end_s,
    period_start_s,
)

RESETTING = [ResetPeriod.DAILY, ResetPeriod.WEEKLY, ResetPeriod.MONTHLY]
instants = st.datetimes(min_value=datetime(1971, 1, 1), max_value=datetime(2200, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 -- hypothesis wants them without


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


@pytest.mark.parametrize(
    ("text", "instant"),
    [
        ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00"),
        ("2026-01-01t00:00:00z", "2026-01-01T00:00:00"),
        ("2026-01-01 00:00:00Z", "2026-01-01T00:00:00"),
        ("2026-01-01T02:00:00+02:00", "2026-01-01T00:00:00"),
        ("2025-12-31T18:30:00-05:30", "2026-01-01T00:00:00"),
        ("2026-01-01T00:00:00-00:00", "2026-01-01T00:00:00"),
        ("2024-02-29T12:00:00Z", "2024-02-29T12:00:00"),
        ("2016-12-31T23:59:60Z", "2017-01-01T00:00:00"),
    ],
)
def test_rfc_3339_in_its_forms_is_one_instant(text, instant):
    assert parse_rfc3339(text) == at(instant)


def test_fractions_of_any_length_count():
    assert parse_rfc3339("2026-01-01T00:00:00.25Z") == at("2026-01-01T00:00:00") + 0.25
    assert parse_rfc3339("2026-01-01T00:00:00.123456789Z") == pytest.approx(at("2026-01-01T00:00:00") + 0.123456789)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2026-01-01",
        "2026-01-01T00:00:00",
        "2026-01-01T00:00Z",
        "2025-02-29T00:00:00Z",
        "2026-13-01T00:00:00Z",
        "2026-01-01T24:00:00Z",
        "2026-01-01T00:00:61Z",
        "2026-01-01T00:00:00+25:00",
        "1767225600",
        "2026-01-01T00:00:00Z\n",
        "٢٠٢٦-01-01T00:00:00Z",
    ],
)
def test_what_leaves_open_when_it_is_is_refused(text):
    with pytest.raises(ValueError, match=r".+"):
        parse_rfc3339(text)


@given(instants, st.integers(-14 * 60, 14 * 60))
def test_parsing_agrees_with_datetime_at_any_offset(instant, offset_minutes):
    written = instant.astimezone(timezone(timedelta(minutes=offset_minutes))).isoformat()
    assert parse_rfc3339(written) == pytest.approx(instant.timestamp(), abs=2e-6)


@given(st.integers(0, 7_000_000_000_000))
def test_what_is_written_reads_back_to_the_millisecond(unix_ms):
    assert parse_rfc3339(format_rfc3339(unix_ms / 1000)) == pytest.approx(unix_ms / 1000, abs=0.0011)


def test_an_instant_is_written_in_utc_with_milliseconds():
    assert format_rfc3339(at("2026-02-28T23:59:59") + 0.5) == "2026-02-28T23:59:59.500Z"


@pytest.mark.parametrize(
    "text",
    [
        "2026-01-31T23:59:59Z",
        "2026-01-31T23:59:59.999Z",
        "2026-01-31T23:59:59.000Z",
        "2026-02-01T00:00:00Z",
        "2026-01-31T23:59:60Z",
        "2026-02-01T01:59:59.9+02:00",
        "2026-01-31T18:59:59-05:00",
        "2026-02-01T02:00:00+02:00",
    ],
)
def test_the_last_second_of_a_day_means_the_next_midnight(text):
    assert parse_period_end_s(text) == at("2026-02-01T00:00:00")


def test_the_last_second_of_a_day_elsewhere_means_the_midnight_there():
    assert parse_period_end_s("2026-01-31T23:59:59+02:00") == at("2026-01-31T22:00:00")


def test_other_ends_stay_where_they_are():
    assert parse_period_end_s("2026-01-31T12:00:00Z") == at("2026-01-31T12:00:00")
    assert parse_period_end_s("2026-01-31T12:30:59Z") == at("2026-01-31T12:30:59")
    assert parse_period_end_s("2026-01-31T12:30:59.1Z") == at("2026-01-31T12:31:00")


def test_a_start_is_the_whole_second_it_falls_in():
    assert parse_period_start_s("2026-01-31T12:30:59.9Z") == at("2026-01-31T12:30:59")


@pytest.mark.parametrize(
    ("period", "now", "start", "end", "next_end"),
    [
        (ResetPeriod.DAILY, "2024-02-28T12:00:00", "2024-02-28T00:00:00", "2024-02-29T00:00:00", "2024-03-01T00:00:00"),
        (ResetPeriod.DAILY, "2025-12-31T23:59:59", "2025-12-31T00:00:00", "2026-01-01T00:00:00", "2026-01-02T00:00:00"),
        (ResetPeriod.DAILY, "2026-01-01T00:00:00", "2026-01-01T00:00:00", "2026-01-02T00:00:00", "2026-01-03T00:00:00"),
        (
            ResetPeriod.WEEKLY,
            "2026-01-04T23:59:59",
            "2025-12-29T00:00:00",
            "2026-01-05T00:00:00",
            "2026-01-12T00:00:00",
        ),
        (
            ResetPeriod.WEEKLY,
            "2026-01-05T00:00:00",
            "2026-01-05T00:00:00",
            "2026-01-12T00:00:00",
            "2026-01-19T00:00:00",
        ),
        (
            ResetPeriod.MONTHLY,
            "2024-02-29T23:59:59",
            "2024-02-01T00:00:00",
            "2024-03-01T00:00:00",
            "2024-04-01T00:00:00",
        ),
        (
            ResetPeriod.MONTHLY,
            "2025-12-31T23:59:59",
            "2025-12-01T00:00:00",
            "2026-01-01T00:00:00",
            "2026-02-01T00:00:00",
        ),
        (
            ResetPeriod.MONTHLY,
            "2026-01-31T00:00:00",
            "2026-01-01T00:00:00",
            "2026-02-01T00:00:00",
            "2026-03-01T00:00:00",
        ),
    ],
)
def test_periods_turn_at_midnight_utc(period, now, start, end, next_end):
    assert period_start_s(period, at(now)) == at(start)
    assert period_end_s(period, at(now)) == at(end)
    assert next_period_end_s(period, at(end)) == at(next_end)


@pytest.mark.parametrize("period", [ResetPeriod.NEVER, None])
def test_what_never_resets_has_no_period(period):
    assert period_start_s(period, 0) is period_end_s(period, 0) is next_period_end_s(period, 0) is None


@given(instants, st.sampled_from(RESETTING))
def test_every_instant_lies_in_its_period_and_periods_meet_without_a_gap(instant, period):
    now_s = instant.timestamp()
    start_s, end_s = period_start_s(period, now_s), period_end_s(period, now_s)
    assert start_s is not None
    assert end_s is not None
    assert start_s <= now_s < end_s
    assert period_end_s(period, start_s) == end_s
    assert period_start_s(period, end_s) == end_s
    assert period_start_s(period, end_s - 1) == start_s


@given(instants, st.sampled_from(RESETTING))
def test_starts_agree_with_the_calendar(instant, period):
    midnight = instant.replace(hour=0, minute=0, second=0, microsecond=0)
    expected = {
        ResetPeriod.DAILY: midnight,
        ResetPeriod.WEEKLY: midnight - timedelta(days=instant.weekday()),
        ResetPeriod.MONTHLY: midnight.replace(day=1),
    }[period]
    assert period_start_s(period, instant.timestamp()) == expected.timestamp()


@pytest.mark.parametrize(
    ("duration_s", "written"),
    [
        (0, "0s"),
        (-5, "0s"),
        (0.0001, "1ms"),
        (0.12, "120ms"),
        (0.9995, "1s"),
        (1, "1s"),
        (1.2, "2s"),
        (59.5, "1m0s"),
        (360, "6m0s"),
        (3723, "1h2m3s"),
        (3600, "1h0m0s"),
        (90_000, "25h0m0s"),
    ],
)
def test_durations_are_written_as_openai_does(duration_s, written):
    assert format_openai_duration(duration_s) == written


@given(st.floats(0, 10**7))
def test_a_written_duration_is_never_shorter_than_the_real_one(duration_s):
    units_s = {"ms": 0.001, "h": 3600, "m": 60, "s": 1}
    total_s, number = 0.0, ""
    rest = format_openai_duration(duration_s)
    while rest:
        if rest[0].isdigit():
            number, rest = number + rest[0], rest[1:]
        else:
            unit = "ms" if rest.startswith("ms") else rest[0]
            total_s, number, rest = total_s + int(number) * units_s[unit], "", rest[len(unit) :]
    assert duration_s - 1e-9 <= total_s < duration_s + 1.001
