from __future__ import annotations

import pytest

from tests.support.dev_run import DevRun
from tests.support.system import System

_SYSTEM = pytest.StashKey[System]()


@pytest.fixture(scope="session")
def system(tmp_path_factory, request):
    """Three proxies, two workers, one limits-sync on one Redis. Tests make users of their own."""
    with System(tmp_path_factory.mktemp("system"), USAGE_FLUSH_SECONDS="0.5") as running:
        running.start_all("proxy", "proxy", "proxy", "usage-worker", "usage-worker", "limits-sync")
        request.config.stash[_SYSTEM] = running
        yield running


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    """One sentinel-dev for the tests that only use it."""
    with DevRun(tmp_path_factory.mktemp("dev")) as running:
        yield running.until_ready()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failed test shows where the logs are, and what the processes complained of."""
    report = yield
    running = item.config.stash.get(_SYSTEM, None)
    if report.failed and running is not None:
        complaints = [
            f"{process.name}: {line}"
            for process in running.processes
            for line in process.said.splitlines()[-2000:]
            if '"level":"info"' not in line
        ]
        report.sections.append((f"logs in {running.folder}", "\n".join(complaints[-40:])))
    return report
