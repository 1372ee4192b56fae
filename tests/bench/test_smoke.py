"""The benchmarks run and report; what they report is nobody's to judge here."""

from __future__ import annotations

import asyncio

from tests.bench import ledger_cost
from tests.bench.__main__ import SCENARIOS, run, table


def test_a_short_run_reports_every_scenario():
    report = run(rounds=1, seconds=0.3)
    assert set(report["results"]) == {scenario.name for scenario in SCENARIOS}
    for scenario in SCENARIOS:
        told = report["results"][scenario.name]["Sentinel, everything on"]
        assert set(told["statuses"]) == {"429" if scenario.refused else "200"}
        assert scenario.name in table(report)


def test_the_cost_of_the_ledger_is_reported():
    told = asyncio.run(ledger_cost.measure(pairs=200, rounds=1))
    assert told["account_bytes"] < 1_500
    assert len(ledger_cost.lines(told)) == 3
