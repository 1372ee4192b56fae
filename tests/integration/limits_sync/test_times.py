"""When limits are refreshed, how long users are leased, and how long one in trouble is left alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sentinel_limits_sync.rounds import ROUND_S, lease_s, pause_s
from sentinel_shared.refresh import next_refresh_s, smoothed_s

unit = st.floats(0, 1, exclude_max=True)


@given(unit)
def test_with_a_quick_zion_limits_are_refreshed_at_80_percent_of_their_life_give_or_take_a_tenth(uniform):
    assert 0.7 * 300 <= next_refresh_s(300, latency_s=0.05, uniform=uniform) <= 0.9 * 300


@given(unit, st.floats(0.5, 3))
def test_the_answer_of_a_slow_zion_still_comes_in_time(uniform, latency_s):
    assert next_refresh_s(4, latency_s=latency_s, uniform=uniform) + ROUND_S + latency_s <= 4


@given(st.floats(1.3, 3), st.integers(10, 50))
def test_a_slow_zion_is_asked_once_a_ttl_and_a_tenth_at_most(latency_s, users):
    cycles = [next_refresh_s(4, latency_s=latency_s, uniform=n / users) + ROUND_S / 2 + latency_s for n in range(users)]
    assert 4 / (sum(cycles) / users) <= 1.1


def test_a_zion_slower_than_the_ttl_is_still_given_a_moment():
    assert next_refresh_s(4, latency_s=9, uniform=0.5) == pytest.approx(0.4)


def test_the_first_answer_says_how_slow_zion_is_and_later_ones_count_more_when_they_are_slower():
    assert smoothed_s(None, 2.0) == 2.0
    assert smoothed_s(1.0, 2.0) - 1.0 > 2.0 - smoothed_s(2.0, 1.0) > 0


def test_a_lease_lasts_a_tenth_of_the_ttl_within_bounds():
    assert [lease_s(ttl) for ttl in (4, 20, 300)] == [1.0, 2.0, 5.0]


@given(st.integers(1, 10_000), unit, st.floats(2, 86_400))
def test_a_user_in_trouble_is_asked_about_ever_less_but_once_a_ttl(strikes, uniform, fresh_s):
    assert 1.5 <= pause_s(strikes, fresh_s=fresh_s, uniform=uniform) <= max(2.0, fresh_s)
    later = pause_s(strikes + 1, fresh_s=fresh_s, uniform=uniform)
    assert later >= pause_s(strikes, fresh_s=fresh_s, uniform=uniform)
