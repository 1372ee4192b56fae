"""The README's configuration table is what the services really read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sentinel_limits_sync.settings import Settings as LimitsSyncSettings
from sentinel_proxy.settings import Settings as ProxySettings
from sentinel_shared.settings import CommonSettings
from sentinel_usage_worker.settings import Settings as UsageWorkerSettings

README = Path(__file__).parents[2] / "README.md"
ROW = re.compile(r"^\| `(?P<name>[A-Z_]+)` \| (?P<default>.*?) \| (?P<readers>[PWS ]+) \|", re.MULTILINE)
READERS: dict[str, type[CommonSettings]] = {"P": ProxySettings, "W": UsageWorkerSettings, "S": LimitsSyncSettings}


def rows():
    return {row["name"]: row for row in ROW.finditer(README.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("letter", READERS)
def test_every_variable_stands_in_the_table_with_its_default(letter):
    table = rows()
    for variable in READERS[letter].describe():
        row = table[variable.name]
        assert letter in row["readers"].split(), variable.name
        shown = row["default"].replace("`", "")
        expected = "required" if variable.required else variable.default or "-"
        assert expected in shown or variable.name == "ARQ_REDIS_URL", variable.name


@pytest.mark.parametrize("letter", READERS)
def test_the_table_promises_nothing_that_is_not_read(letter):
    read = {variable.name for variable in READERS[letter].describe()}
    promised = {name for name, row in rows().items() if letter in row["readers"].split()}
    assert promised <= read
