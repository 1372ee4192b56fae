from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


@pytest.fixture(scope="session")
def tool() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command-line tool in the repository's folder; where there is none the test is skipped, and says so."""

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        beside = Path(sys.executable).parent / name
        found = str(beside) if beside.exists() else shutil.which(name)
        if found is None:
            pytest.skip(f"{name} is not installed")
        command = [found, *arguments]
        return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120, check=False)

    return run


@pytest.fixture(scope="session")
def rules() -> dict[str, list[dict[str, str]]]:
    """The alert and recording rules by group."""
    text = (REPO / "deploy/prometheus/rules/sentinel.yml").read_text(encoding="utf-8")
    return {group["name"]: group["rules"] for group in yaml.safe_load(text)["groups"]}
