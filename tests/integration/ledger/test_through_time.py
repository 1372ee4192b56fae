"""The ledger through days of a clock of ours: periods that end, windows, leases, snapshots that race with all else.

What the actors do and what must hold after each of their steps stands in `tests.support.ledger_world`. The second half
proves that the proof can fail: with any of the ledger's rules taken out, some seed among the first few hundred notices.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.support.ledger_world import Scripts, World, live

EXAMPLES = int(os.environ.get("LEDGER_EXAMPLES", "500"))
STEPS = 50
SEEDS = 600
"""How many seeds a rule that was taken out is given to be noticed."""


def examples(count):
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@examples(EXAMPLES)
@given(seed=st.integers(0, 2**62))
def test_through_days_the_account_agrees_with_the_truth(runner, lane, seed):
    runner.run(live(World(lane, seed, Scripts.load()), steps=STEPS))


@pytest.mark.soak
@examples(20 * EXAMPLES)
@given(seed=st.integers(0, 2**62))
def test_it_also_does_in_a_much_longer_run(runner, lane, seed):
    runner.run(live(World(lane, seed, Scripts.load()), steps=4 * STEPS))


TAKEN_OUT = {
    "only the newest answer counts": ("refresh_commit", "a[EPOCH] ~= tonumber(ARGV[2])", "false"),
    "what was confirmed during a refresh is added": ("refresh_commit", "since > 0 and", "false and"),
    "a period that is over starts anew at 0": (
        "admit",
        "if a[at + PERIOD_END] > 0 and now_s >=",
        "if false and now_s >=",
    ),
    "one batch in flight per user": ("claim", "if f[1] and not f[2] then", "if f[1] then"),
    "an ack puts its user back on the queue": ("ack", "if owed then", "if false then"),
    "a settlement puts its user on the queue": ("settle", "if owed then", "if false then"),
    "a reap puts its user on the queue": ("reap", "redis.call('ZADD', KEYS[2], 'LT', now_ms, ext)", ""),
    "a batch is acknowledged once": ("ack", "redis.call('DEL', KEYS[3])", ""),
    "after a roll-over acks still add to base": (
        "ack",
        "a[at + BASE] = a[at + BASE] + amount",
        "a[at + BASE] = a[at + BASE] + (tonumber(claimed_ms) >= a[at + PERIOD_START] * 1000 and amount or 0)",
    ),
    "a figure of Zion's waits for a snapshot of the period": ("ack", "a[at + WAITING] == 0 and", ""),
    "a figure of Zion's is of the period that its batch was claimed in": (
        "ack",
        "and tonumber(claimed_ms) >= a[at + PERIOD_START] * 1000",
        "",
    ),
    "a settled reservation is remembered": (
        "settle",
        "redis.call('SET', KEYS[6], '1', 'EX', outcome == 3 and ARGV[9] + 3600 or ARGV[9], 'NX')",
        "true",
    ),
    "what was settled without its reservation is remembered until that is reaped": (
        "settle",
        "outcome == 3 and ARGV[9] + 3600 or ARGV[9]",
        "ARGV[9]",
    ),
    "what was settled before its admission came is not settled again": (
        "settle",
        "'NX') then",
        "'NX') and false then",
    ),
    "nor reaped": ("reap", "local settled = redis.call('EXISTS', ARGV[6] .. rid) == 1", "local settled = false"),
    "but its promise is taken back": ("settle", "math.max(0, a[at + RESERVED] - promised[i])", "a[at + RESERVED]"),
    "a settlement too old to tell is taken for settled": ("settle", "tonumber(ARGV[8]) >= ARGV[9] * 1000", "false"),
    "what was reaped leaves a tombstone": (
        "reap",
        "redis.call('SET', ARGV[2] .. rid, struct.pack('<ddd', unpack(charge)), 'EX', ARGV[3])",
        "",
    ),
    "a reap charges the output last seen": ("reap", "{1, input, seen}", "{1, input, 0}"),
    "a sign of life renews the lease": (
        "extend",
        "redis.call('ZADD', KEYS[2], deadline_ms",
        "redis.call('ZADD', KEYS[2], 'NX', deadline_ms",
    ),
    "reserved counts": ("admit", "left - a[at + RESERVED] < least", "left < least"),
    "inflight counts": ("admit", "a[at + PENDING] + a[at + INFLIGHT] + a[at + DEAD]", "a[at + PENDING] + a[at + DEAD]"),
    "dead letters count": (
        "admit",
        "a[at + PENDING] + a[at + INFLIGHT] + a[at + DEAD]",
        "a[at + PENDING] + a[at + INFLIGHT]",
    ),
    "the oldest bucket counts in full": (
        "admit",
        "a[W + 1] + a[W + 3] + 1 > window_requests",
        "a[W + 1] + a[W + 3] / 2 + 1 > window_requests",
    ),
    "the ring forgets no bucket early": ("admit", "h[i + 2 * gone] or 0", "h[i + 2 * gone + 2] or 0"),
    "the token window is corrected in the bucket of the reservation": (
        "settle",
        "local age = a[W] - bucket",
        "local age = 0",
    ),
    "whoever has something running or owed does not expire": ("admit", "redis.call('PERSIST', account)", ""),
    "a note does not bring back a batch that is gone": (
        "note",
        "if redis.call('EXISTS', KEYS[1]) == 0 then",
        "if false then",
    ),
    "a replayed dead letter goes onto the queue": (
        "bury",
        "redis.call('ZADD', KEYS[3], 'LT', now_ms, letter.external_id)",
        "",
    ),
    "a dropped dead letter counts no more": ("bury", "math.max(0, a[at + DEAD] - letter.amount)", "a[at + DEAD]"),
}


# A seed that shows it; where the scripts have changed since, another one is looked for.
SHOWN_BY = {
    "what was confirmed during a refresh is added": 398,
    "a period that is over starts anew at 0": 525,
    "a figure of Zion's waits for a snapshot of the period": 719,
    "a figure of Zion's is of the period that its batch was claimed in": 150,
    "after a roll-over acks still add to base": 25,
    "the ring forgets no bucket early": 116,
    "the oldest bucket counts in full": 112,
    "dead letters count": 170,
    "a note does not bring back a batch that is gone": 92,
    "a reap puts its user on the queue": 52,
    "a sign of life renews the lease": 67,
    "what was settled before its admission came is not settled again": 61,
    "what was settled without its reservation is remembered until that is reaped": 85,
}


@pytest.mark.parametrize("rule", TAKEN_OUT)
def test_the_proof_notices_when_a_rule_is_taken_out(runner, lane, rule):
    scripts = Scripts.load(taken_out=TAKEN_OUT[rule])
    with pytest.raises(AssertionError):  # noqa: PT012 - which of the seeds shows it is open
        for seed in (SHOWN_BY.get(rule, 0), *range(SEEDS)):
            runner.run(live(World(lane, seed, scripts), steps=STEPS))
