"""The benchmarks run and report; what they report is nobody's to judge here."""

from __future__ import annotations

import asyncio

from tests.bench import beside, ledger_cost
from tests.bench.__main__ import SCENARIOS, SENTINEL, TWO_WORKERS, run, table


def test_a_short_run_reports_every_scenario():
    report = run(rounds=1, seconds=0.2)
    assert set(report["results"]) == {scenario.name for scenario in SCENARIOS}
    for scenario in SCENARIOS:
        told = report["results"][scenario.name][SENTINEL]
        assert set(told["statuses"]) == {"429" if scenario.refused else "200"}
        assert scenario.name in table(report)
    assert report["results"][SCENARIOS[0].name][TWO_WORKERS]["statuses"].keys() == {"200"}


def test_the_cost_of_the_ledger_is_reported():
    told = asyncio.run(ledger_cost.measure(pairs=200, rounds=1))
    assert told["account_bytes"] < 1_500
    assert len(ledger_cost.lines(told)) == 3


def test_what_small_requests_feel_of_others_is_reported():
    felt = beside.measure(rounds=1, seconds=0.2, kinds=["English"])
    assert list(felt) == [beside.ALONE, "2 MB of English", beside.PLENTY, beside.REFUSED]
    for name, row in felt.items():
        assert (row.others_per_s > 0) == (name != beside.ALONE)
        assert f"| {name} |" in "\n".join(beside.lines(felt))
