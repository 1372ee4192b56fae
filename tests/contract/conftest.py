"""One system for the contract tests of a worker: a proxy in front of the simulated gateway, and the gateway itself."""

from __future__ import annotations

import openai
import pytest

from tests.support.system import GATEWAY_KEY, System


@pytest.fixture(scope="session")
def system(tmp_path_factory):
    with System(tmp_path_factory.mktemp("contract") / "system", UPSTREAM_IDLE_TIMEOUT_SECONDS="3") as running:
        running.start_all("proxy", "usage-worker", "limits-sync")
        yield running


@pytest.fixture
def user(system):
    return system.add_user()


@pytest.fixture
def through(system, user):
    """The SDK as a user of Sentinel has it."""
    return system.client(user)


@pytest.fixture
def direct(system):
    """The SDK in front of the gateway itself."""
    return openai.OpenAI(base_url=f"{system.gateway.url}/v1", api_key=GATEWAY_KEY, max_retries=0)
