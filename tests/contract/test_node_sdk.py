"""The official Node SDK gets the same from Sentinel as from the gateway itself."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.system import GATEWAY_KEY

SOURCE = Path(__file__).parent / "node"


@pytest.fixture(scope="session")
def node(tmp_path_factory):
    """A folder with the SDK installed, and the calls."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("no node and npm on this machine")
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "calls.mjs"):
        shutil.copy(SOURCE / name, folder / name)
    install = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        pytest.skip(f"the Node SDK cannot be installed here: {done.stderr.strip().splitlines()[-1:]}")
    return folder


def told(node, base_url, key):
    done = subprocess.run(
        ["node", "calls.mjs", base_url, key], cwd=node, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_same_as_from_the_gateway_itself(system, user, node):
    ours = told(node, f"{system.proxies[0].url}/v1", user.token)
    theirs = told(node, f"{system.gateway.url}/v1", GATEWAY_KEY)
    assert ours == theirs
    assert ours["badRequest"]["name"] == "BadRequestError"
