"""Admission without Redis never exceeds the share of what was last seen to be left."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sentinel_proxy.local_share import LocalShare
from sentinel_shared.accounts import Cost, Decision, WindowPolicy

OFF = WindowPolicy(60_000, 0, 0)


def seen(requests=-1, input_tokens=-1, output_tokens=-1):
    limits = [number for limit in (requests, input_tokens, output_tokens) for number in (limit, 0, 0, 0)]
    return Decision([1, -1, 0, 0, 0, 0, 0, *limits, 0, 0])


def a_share(decision, window=OFF):
    share = LocalShare(window)
    share.see("alice", decision)
    return share


def test_a_user_never_seen_is_not_admitted():
    assert LocalShare(OFF).admit("alice", Cost(1, 1, 1), now_s=0) is None


def test_unlimited_is_admitted_uncapped():
    assert a_share(seen()).admit("alice", Cost(10, -1, 4_096), now_s=0) == -1


def test_a_tenth_of_the_requests_left_is_admitted():
    share = a_share(seen(requests=50))
    admitted = [share.admit("alice", Cost(1, 0, 0), now_s=0) for _ in range(20)]
    assert sum(granted is not None for granted in admitted) == 5


def test_the_window_is_shared_out_too_and_opens_again():
    share = a_share(seen(), WindowPolicy(60_000, 30, 0))
    assert [share.admit("alice", Cost(1, 0, 0), now_s=1) is None for _ in range(4)] == [False, False, False, True]
    assert share.admit("alice", Cost(1, 0, 0), now_s=61.5) is not None


def test_what_redis_says_again_replaces_what_was_admitted_without_it():
    share = a_share(seen(requests=10))
    assert share.admit("alice", Cost(5, 0, 0), now_s=0) is not None
    assert share.admit("alice", Cost(5, 0, 0), now_s=0) is None
    assert share.spent_tokens == 5
    share.see("alice", seen(requests=10))
    assert share.spent_tokens == 0
    assert share.admit("alice", Cost(5, 0, 0), now_s=0) is not None


def test_what_was_not_used_can_be_admitted_again():
    share = a_share(seen(output_tokens=1_000))
    assert share.admit("alice", Cost(0, 100, 100), now_s=0) == 100
    assert share.admit("alice", Cost(0, 100, 100), now_s=0) is None
    share.correct("alice", input_tokens=0, output_tokens=-60)
    assert share.spent_tokens == 40


@given(
    left=st.integers(0, 100_000),
    wishes=st.lists(st.tuples(st.integers(0, 500), st.integers(-1, 5_000), st.integers(1, 4)), max_size=60),
)
def test_however_it_is_asked_no_more_than_a_tenth_is_admitted(left, wishes):
    share = a_share(seen(requests=left, input_tokens=left, output_tokens=left))
    spent_input = spent_output = requests = 0
    for input_tokens, wanted, choices in wishes:
        cost = Cost(input_tokens, wanted if wanted <= 0 else wanted * choices, 4_096 * choices, choices)
        granted = share.admit("alice", cost, now_s=0)
        if granted is not None:
            assert granted % choices == 0
            requests, spent_input, spent_output = requests + 1, spent_input + input_tokens, spent_output + granted
    assert max(requests, spent_input, spent_output) <= left / 10


def test_memory_is_bounded():
    share = LocalShare(OFF)
    for number in range(10_050):
        share.see(f"user-{number}", seen())
    assert share.spare_input_tokens("user-0") == 0
    assert share.spare_input_tokens("user-10049") > 0
