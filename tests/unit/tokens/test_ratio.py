"""The running ratio shrinks the error of estimates, and no answer can throw it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sentinel_proxy.tokens import Ratios, Sums, lookup
from sentinel_proxy.tokens.ratio import RATIO_MAX, RATIO_MIN, corrected, merge, observed

CLAUDE, OPENAI = lookup("claude-sonnet-4.5"), lookup("gpt-4o")
COUNTS = st.integers(-10, 10**12)
SUMS = st.builds(Sums, COUNTS, COUNTS)


def test_before_anything_was_observed_the_count_stands() -> None:
    assert Ratios().corrected(1_000, CLAUDE) == 1_000


def test_the_error_shrinks_with_use() -> None:
    ratios = Ratios()
    errors = []
    for _ in range(200):
        errors.append(abs(1_250 - ratios.corrected(1_000, CLAUDE)))
        ratios.observe(CLAUDE, local_tokens=1_000, upstream_tokens=1_250)
    assert errors[0] == 250
    assert errors[-1] <= 5
    assert errors == sorted(errors, reverse=True)


def test_openais_own_models_are_never_corrected() -> None:
    ratios = Ratios()
    ratios.observe(OPENAI, local_tokens=10_000, upstream_tokens=20_000)
    assert ratios.corrected(1_000, OPENAI) == 1_000
    assert corrected(1_000, OPENAI, Sums(10, 20_000)) == 1_000


def test_a_changed_tokenizer_is_followed() -> None:
    sums = Sums()
    for _ in range(2_000):
        sums = merge(sums, observed(1_000, 1_100))
    for _ in range(3_000):
        sums = merge(sums, observed(1_000, 1_400))
    assert abs(sums.ratio - 1.4) < 0.03


@given(SUMS, SUMS)
def test_sums_stay_small_and_ratios_within_their_bounds(left: Sums, right: Sums) -> None:
    both = merge(left, right)
    assert 0 <= both.local_tokens <= 1_000_000
    assert RATIO_MIN <= both.ratio <= RATIO_MAX
    assert merge(right, left) == both


@given(st.integers(0, 10**9), COUNTS, COUNTS)
def test_one_answer_moves_the_ratio_only_within_bounds(known: int, local: int, upstream: int) -> None:
    one = observed(local, upstream)
    assert 0 <= one.local_tokens <= 20_000
    assert RATIO_MIN * one.local_tokens - 1 <= one.upstream_tokens <= RATIO_MAX * one.local_tokens + 1
    if local <= 0 or upstream <= 0:
        assert one == Sums()


def test_what_was_taken_for_sharing_is_neither_lost_nor_taken_twice() -> None:
    ratios = Ratios()
    ratios.observe(CLAUDE, local_tokens=1_000, upstream_tokens=1_500)
    before = ratios.sums(CLAUDE)
    assert ratios.take_fresh() == {"claude": Sums(1_000, 1_500)}
    assert ratios.take_fresh() == {}
    assert ratios.sums(CLAUDE) == before
    ratios.put_shared({"claude": Sums(100_000, 150_000)})
    ratios.observe(CLAUDE, local_tokens=1_000, upstream_tokens=1_500)
    assert ratios.sums(CLAUDE) == Sums(101_000, 151_500)
