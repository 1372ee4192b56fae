"""What docs/capacity.md says of a cluster's shards is what the keys do."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from sentinel_shared import keys
from sentinel_shared.redis_lane.cluster import SLOTS, slot_of


@pytest.fixture(scope="module")
def told(repo):
    return (repo / "docs/capacity.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def slots():
    return sorted(slot_of(keys.shard_prefix(shard)) for shard in range(keys.SHARDS))


def test_masters_of_equal_ranges_get_the_shards_that_are_written_down(told, slots):
    rows = re.findall(r"^\| (\d+) \| ([\d ]+) \|$", told, re.MULTILINE)
    assert rows
    for masters, shards in rows:
        found = Counter(slot * int(masters) // SLOTS for slot in slots)
        assert [found[master] for master in range(int(masters))] == [int(share) for share in shards.split()]


def test_each_shard_lies_in_a_sixteenth_of_its_own(slots):
    assert [slot * keys.SHARDS // SLOTS for slot in slots] == list(range(keys.SHARDS))
