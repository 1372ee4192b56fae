"""A short storm in every run of the tests; `make chaos` has longer ones."""

from __future__ import annotations

import pytest

from tests.chaos.storm import storm


async def test_the_books_balance_after_a_storm(tmp_path):
    report = await storm(tmp_path / "storm", seed=20_261, seconds=45)
    assert report.problems == [], "\n".join(report.lines())
    assert report.complete > 100


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
async def test_nothing_is_lost_at_a_zion_that_does_not_honour_keys_and_doubling_is_bounded(tmp_path, seed):
    report = await storm(tmp_path / "storm", seed=seed, seconds=45, idempotent=False)
    assert report.problems == [], "\n".join(report.lines())
    print("\n".join(report.lines()))
