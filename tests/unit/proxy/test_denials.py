"""Whose next request is refused unasked, and for how long."""

from __future__ import annotations

import pytest

from sentinel_proxy.denials import ANY_REQUEST, WITH_INPUT, WITH_OUTPUT, Denials, Denied
from sentinel_proxy.errors import invalid_request
from sentinel_shared.accounts import Binding, Decision

UNLIMITED = (-1, 0, 0, 0)


class Clock:
    now_s = 1_000.0

    def monotonic_s(self):
        return self.now_s


def refused(binding, *, limit=(10, 10, 0, 0), wait_ms=60_000):
    limits = [UNLIMITED] * 3
    if binding % 10 <= 3:
        limits[binding % 10 - 1] = limit
    return Decision([0, 0, binding, wait_ms, 0, 0, 0, *(number for each in limits for number in each), 0, 0])


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def denials(clock):
    return Denials(clock)


def remember(denials, decision, user="u"):
    denials.remember(user, decision, Denied(invalid_request("no"), [(b"a", b"b")], decision.binding))


def is_refused(denials, needs, user="u"):
    try:
        denials.check(user, needs)
    except Denied as denied:
        return denied.headers == [(b"a", b"b")]
    return False


@pytest.mark.parametrize(
    ("binding", "any_request", "with_input", "with_output"),
    [
        (Binding.REQUESTS, True, True, True),
        (Binding.WINDOW_REQUESTS, True, True, True),
        (Binding.INPUT_TOKENS, False, True, True),
        (Binding.OUTPUT_TOKENS, False, False, True),
        (Binding.WINDOW_TOKENS, False, False, False),
    ],
)
def test_only_what_needs_something_of_the_limit_is_refused(denials, binding, any_request, with_input, with_output):
    remember(denials, refused(binding))
    told = [is_refused(denials, needs) for needs in (ANY_REQUEST, WITH_INPUT, WITH_OUTPUT)]
    assert told == [any_request, with_input, with_output]
    assert not is_refused(denials, WITH_OUTPUT, user="another")


@pytest.mark.parametrize("limit", [(10, 9, 0, 0), (10, 4, 6, 0)])
def test_a_limit_of_which_something_is_left_is_asked_again(denials, limit):
    """Refused was a request that needed more; the next may need less."""
    remember(denials, refused(Binding.INPUT_TOKENS, limit=limit))
    assert not is_refused(denials, WITH_OUTPUT)


@pytest.mark.parametrize("binding", [Binding.BUSY_REQUESTS, Binding.BUSY_INPUT_TOKENS, Binding.BUSY_OUTPUT_TOKENS])
def test_what_is_only_promised_to_others_may_come_free_at_any_moment(denials, binding):
    remember(denials, refused(binding, wait_ms=1_000))
    assert not is_refused(denials, WITH_OUTPUT)


def test_a_tenth_of_a_second_later_the_account_is_asked(denials, clock):
    remember(denials, refused(Binding.REQUESTS, wait_ms=-1))
    clock.now_s += 0.09
    assert is_refused(denials, ANY_REQUEST)
    clock.now_s += 0.02
    assert not is_refused(denials, ANY_REQUEST)


def test_or_when_the_wait_is_over_that_the_account_told(denials, clock):
    remember(denials, refused(Binding.WINDOW_REQUESTS, wait_ms=20))
    clock.now_s += 0.019
    assert is_refused(denials, ANY_REQUEST)
    clock.now_s += 0.002
    assert not is_refused(denials, ANY_REQUEST)


def test_or_at_once_when_something_about_the_user_has_changed(denials):
    remember(denials, refused(Binding.REQUESTS))
    denials.forget("u")
    assert not is_refused(denials, ANY_REQUEST)


def test_memory_is_bounded(denials):
    for number in range(20_001):
        remember(denials, refused(Binding.REQUESTS), user=f"u{number}")
    assert is_refused(denials, ANY_REQUEST, user="u20000")
    assert sum(is_refused(denials, ANY_REQUEST, user=f"u{number}") for number in range(20_001)) <= 10_000
