"""A short storm in every run of the tests; `make chaos` has longer ones."""

from __future__ import annotations

from tests.chaos.storm import storm


async def test_the_books_balance_after_a_storm(tmp_path):
    report = await storm(tmp_path / "storm", seed=20_261, seconds=45)
    assert report.problems == [], "\n".join(report.lines())
    assert report.complete > 100
