"""Which prompts are counted exactly though a bound would do."""

from __future__ import annotations

import pytest

from sentinel_proxy.calibration import Samples


def taken(samples, prompt_bytes, *, of):
    return [number for number in range(of) if samples.take(prompt_bytes)]


def test_short_prompts_are_counted_every_sixteenth_time_from_the_first_on():
    assert taken(Samples(), 1_000, of=50) == [0, 16, 32, 48]


@pytest.mark.parametrize("prompt_bytes", [10_000, 100_000, 250_000])
def test_long_ones_as_seldom_as_their_bytes_demand(prompt_bytes):
    samples = Samples()
    counted_bytes = prompt_bytes * len(taken(samples, prompt_bytes, of=5_000))
    assert 0.7 * 256 * 5_000 <= counted_bytes <= 256 * 5_000 + 64 * 1024


def test_one_that_the_ratios_would_not_weigh_in_full_never():
    assert not taken(Samples(), 300_000, of=5_000)


def test_a_long_one_that_waits_for_its_turn_does_not_keep_short_ones_from_theirs():
    samples = Samples()
    assert [samples.take(200_000 if number % 2 else 1_000) for number in range(40)].count(True) >= 2
