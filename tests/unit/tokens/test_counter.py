"""Long texts are counted in a thread exactly as short ones are at once; nothing crashes, stalls or piles up."""

from __future__ import annotations

import asyncio
import inspect
import os
import random
import string
import sys
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from sentinel_proxy.tokens import EncodingCorrupt, TokenCounter
from sentinel_proxy.tokens import counter as counter_module
from sentinel_proxy.tokens.tally import PIECE_CHARS_MAX, estimate_by_length, pieces
from tests.unit.tokens.bodies import Chat, Completions, Embeddings, count, count_now, user

_random = random.Random(7)
_ENGLISH = "The quick brown fox jumps over the lazy dog; nobody knows why it doesn't stop (or how). "
NASTY_TEXTS = {
    "english": _ENGLISH * 24_000,
    "one letter": "a" * 2_000_000,
    "random letters": "".join(_random.choices(string.ascii_letters, k=2_000_000)),
    "spaces": " " * 2_000_000,
    "newlines": "\n" * 2_000_000,
    "mixed whitespace": "".join(_random.choices(" \t\r\n\u3000\xa0", k=2_000_000)),
    "emoji": "😀👩‍👩‍👧🎉" * 70_000,
    "cjk": "".join(chr(_random.randrange(0x4E00, 0x9FA5)) for _ in range(670_000)),
    "digits": "7" * 2_000_000,
    "punctuation": "!?" * 1_000_000,
    "marks": "e" + "\u0301" * 1_000_000,
    "nul": "\x00" * 2_000_000,
    "lone surrogates": "a\ud800" * 300_000,
}


class Stuck:
    """An encoding that waits until it is let go; for any text it finds one token."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.entered = threading.Event()

    def encode_ordinary(self, text: str) -> list[int]:
        self.entered.set()
        assert self.let_go.wait(timeout=30)
        return [0]


class Panicking:
    """An encoding that fails as a panic of tiktoken does: with something that is no Exception."""

    def encode_ordinary(self, text: str) -> list[int]:
        class PanicException(BaseException): ...

        raise PanicException("called `Result::unwrap()` on an `Err` value")


def made_of(encoding: Any, **options: Any) -> TokenCounter:
    return TokenCounter({"o200k_base": cast(tiktoken.Encoding, encoding)}, **options)


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    stuck = Stuck()
    yield stuck
    stuck.let_go.set()


@settings(max_examples=40, deadline=None)
@given(text=st.one_of(st.text(max_size=300), st.lists(st.sampled_from([_ENGLISH, "日本語。", "x=1\n"])).map("".join)))
async def test_a_thread_counts_what_the_loop_counts(counter: TokenCounter, text: str) -> None:
    here = count_now(counter, Completions(prompt=text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counter_module, "CHARS_INLINE_MAX", -1)
        there = counter.input_tokens("completions", Completions(prompt=text), "gpt-4o", body_bytes=len(text))
        assert inspect.isawaitable(there)
        assert await there == here


async def test_a_walk_in_a_thread_counts_what_a_walk_on_the_loop_counts(counter: TokenCounter) -> None:
    body = Chat(messages=[{"role": "user", "content": "hello", "name": "me"}] * 100)
    here = count_now(counter, body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counter_module, "NODES_INLINE_MAX", 10)
        assert await count(counter, body) == here


async def test_a_hundred_thousand_small_texts_are_not_walked_on_the_loop(counter: TokenCounter) -> None:
    tokens = counter.input_tokens("embeddings", Embeddings(input=["a b"] * 100_000), "gpt-4o", body_bytes=600_000)
    assert inspect.isawaitable(tokens)
    assert await tokens == 200_000


async def test_a_long_prose_counts_exactly_as_in_one_piece(counter: TokenCounter) -> None:
    text = _ENGLISH * 2_000
    whole = len(counter._encoding("o200k_base").encode_ordinary(text))
    assert await count(counter, Completions(prompt=text), body_bytes=len(text)) == whole


@pytest.mark.parametrize("name", NASTY_TEXTS)
async def test_two_megabytes_of_anything_are_counted(name: str) -> None:
    fallbacks: list[str] = []
    text = NASTY_TEXTS[name]
    counter = TokenCounter({}, on_fallback=fallbacks.append)
    try:
        tokens = await count(counter, user(text), body_bytes=len(text))
    finally:
        counter.close()
    assert fallbacks == []
    assert 100 < tokens <= 7 + 4 * len(text)


def test_the_tokenizer_never_sees_a_run_that_it_would_panic_on() -> None:
    for text in NASTY_TEXTS.values():
        cut = list(pieces(text))
        assert "".join(cut) == text
        assert max(map(len, cut)) <= PIECE_CHARS_MAX


async def test_a_panic_of_the_tokenizer_becomes_an_estimate_and_is_told() -> None:
    fallbacks: list[str] = []
    counter = made_of(Panicking(), on_fallback=fallbacks.append)
    try:
        assert count_now(counter, Completions(prompt="a" * 300)) == 100
        assert await count(counter, Completions(prompt="a" * 6_000), body_bytes=6_000) == 2_000
        assert await counter.count_output("completions", [{"choices": [{"text": "aaa"}]}], "x", events_bytes=9) == 1
    finally:
        counter.close()
    assert fallbacks == ["panic"] * 3


async def test_a_broken_file_of_a_rare_encoding_becomes_an_estimate_and_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(name: str) -> tiktoken.Encoding:
        raise EncodingCorrupt(name)

    monkeypatch.setattr(counter_module, "load_encoding", refuse)
    fallbacks: list[str] = []
    counter = made_of(Panicking(), on_fallback=fallbacks.append)
    try:
        tokens = await count(counter, Completions(prompt="a" * 300), "text-davinci-003")
    finally:
        counter.close()
    assert (tokens, fallbacks) == (100, ["encoding"])


async def test_a_rare_encoding_is_loaded_on_first_use_in_a_thread(counter: TokenCounter) -> None:
    assert await count(counter, Completions(prompt="hello world"), "text-davinci-003") == 2
    assert count_now(counter, Completions(prompt="hello world"), "text-davinci-003") == 2


async def test_beyond_the_bound_on_queued_bytes_the_length_estimates(stuck: Stuck) -> None:
    fallbacks: list[str] = []
    counter = made_of(stuck, queued_bytes_max=25_000, on_fallback=fallbacks.append)
    text = "a" * 5_000
    try:
        first = asyncio.ensure_future(count(counter, Completions(prompt=text)))
        while not stuck.entered.is_set():
            await asyncio.sleep(0.001)
        assert counter.queued_bytes == 20_000
        assert await count(counter, Completions(prompt=text)) == estimate_by_length(text)
        assert await count(counter, Embeddings(input=["a"] * 9_000), body_bytes=36_000) == 12_000
        assert await counter.count_output("chat", [], "x", events_bytes=36_000) == 12_000
        assert fallbacks == ["queue_full"] * 3
        stuck.let_go.set()
        assert await first == 1
        assert counter.queued_bytes == 0
        assert await count(counter, Completions(prompt=text)) == 1
    finally:
        counter.close()


async def test_threads_give_the_loop_its_turn_at_once_for_as_long_as_they_count(stuck: Stuck) -> None:
    counter = made_of(stuck)
    usual_s = sys.getswitchinterval()
    try:
        counts = [asyncio.ensure_future(count(counter, Completions(prompt="a" * 5_000))) for _ in range(3)]
        while not stuck.entered.is_set():
            await asyncio.sleep(0.001)
        assert sys.getswitchinterval() < usual_s / 10
        if sys.platform == "linux":
            counting = [one.native_id or 0 for one in threading.enumerate() if one.name.startswith("tokens")]
            assert {os.getpriority(os.PRIO_PROCESS, number) for number in counting} == {10}
        stuck.let_go.set()
        await asyncio.gather(*counts)
        assert sys.getswitchinterval() == usual_s
    finally:
        counter.close()


async def test_a_cancelled_count_leaves_the_queue(stuck: Stuck) -> None:
    counter = made_of(stuck)
    try:
        waiting = [asyncio.ensure_future(count(counter, Completions(prompt="a" * 5_000))) for _ in range(5)]
        while not stuck.entered.is_set():
            await asyncio.sleep(0.001)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert all(task.cancelled() for task in waiting)
        assert counter.queued_bytes == 0
        stuck.let_go.set()
        assert await count(counter, Completions(prompt="a" * 5_000)) == 1
    finally:
        counter.close()


async def test_a_huge_prompt_lets_a_merely_long_one_pass() -> None:
    done: list[str] = []
    counter = TokenCounter.load()

    async def run(name: str, text: str) -> None:
        await count(counter, Completions(prompt=text), body_bytes=len(text))
        done.append(name)

    try:
        await asyncio.gather(run("huge", _ENGLISH * 40_000), run("long", _ENGLISH * 100))
    finally:
        counter.close()
    assert done == ["long", "huge"]


def test_an_upper_bound_stands_in_where_the_caller_has_more_than_that_left() -> None:
    counter = made_of(Panicking(), on_fallback=lambda reason: pytest.fail("the text was tokenised"))
    text = "é" * 50_000
    try:
        assert count_now(counter, user(text), spare_tokens=100_007) == 100_007
        beyond = counter.input_tokens("chat", user(text), "x", body_bytes=9, spare_tokens=100_006)
        assert inspect.iscoroutine(beyond)
        beyond.close()
    finally:
        counter.close()
