"""The token counter of a process: short texts at once, long ones in threads, never a raise, never a stall."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, Self

import tiktoken

from sentinel_proxy.tokens.encodings import EncodingCorrupt, load_encoding
from sentinel_proxy.tokens.families import ModelFamily, lookup
from sentinel_proxy.tokens.outputs import tally_outputs
from sentinel_proxy.tokens.prompts import Kind, tally_chat, tally_completions, tally_embeddings, tally_responses
from sentinel_proxy.tokens.tally import Tally, WalkTooLong, estimate_by_length, turns

MIB: Final = 1024 * 1024

# A request with fewer parts than this is walked on the loop (under 1 ms) ...
NODES_INLINE_MAX: Final = 500
# ... and a text shorter than this is tokenised there (English 0.1 ms, the worst texts 0.7 ms); a thread costs 0.1 ms.
CHARS_INLINE_MAX: Final = 4_096
EVENTS_BYTES_INLINE_MAX: Final = 16_384
# One stay in a thread: after it the next request has its turn, so a huge prompt does not hold up a merely long one.
_TURN_CHARS_MAX: Final = 262_144
_TURN_TEXTS_MAX: Final = 1_000
# How long a thread may keep the interpreter from the event loop while it counts. Python's usual 5 ms double the p99 of
# small requests beside huge ones; all the time, so short an interval costs those at one connection 8 %.
_SWITCH_S: Final = 0.0001
_NICENESS: Final = 10
# Loaded before the process is ready; the retired models of the other two load theirs on first use.
_LOADED_AT_START: Final = ("o200k_base", "cl100k_base")

_TALLY_PROMPT: Final[dict[Kind, Callable[[Any, ModelFamily, Tally], None]]] = {
    "chat": tally_chat,
    "completions": tally_completions,
    "embeddings": tally_embeddings,
    "responses": tally_responses,
}


def _yield_to_others() -> None:
    # Where cores are short, whoever waits for the loop comes first. Only on Linux have threads priorities of their own.
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def _ignore(reason: str) -> None:
    del reason


class TokenCounter:
    """Counts the tokens of requests and answers; one per process, used from one event loop.

    `on_fallback` is told, from any thread, each time a length had to stand in for a count, with the reason:
    `queue_full`, `panic` (the tokenizer failed) or `encoding` (a shipped file is broken).
    """

    def __init__(
        self,
        encodings: dict[str, tiktoken.Encoding],
        *,
        threads: int = 1,
        queued_bytes_max: int = 64 * MIB,
        on_fallback: Callable[[str], None] = _ignore,
    ) -> None:
        self._encodings = encodings
        self._loading = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokens", initializer=_yield_to_others)
        self._queued_bytes = 0
        self._queued_bytes_max = queued_bytes_max
        self._usual_switch_s = sys.getswitchinterval()
        self._on_fallback = on_fallback

    @classmethod
    def load(
        cls,
        *,
        threads: int = 1,
        queued_bytes_max: int = 64 * MIB,
        on_fallback: Callable[[str], None] = _ignore,
    ) -> Self:
        """Loads and checks both large encodings: blocks for 0.3 s, takes 70 MB, raises EncodingCorrupt."""
        encodings = {name: load_encoding(name) for name in _LOADED_AT_START}
        return cls(encodings, threads=threads, queued_bytes_max=queued_bytes_max, on_fallback=on_fallback)

    def close(self) -> None:
        """Lets the threads end; what is queued is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def queued_bytes(self) -> int:
        """The bodies and answers that wait for a thread, or are in one."""
        return self._queued_bytes

    def input_tokens(
        self, kind: Kind, body: Any, model: str, *, body_bytes: int, spare_tokens: int = 0
    ) -> int | Awaitable[int]:
        """The input tokens of a request: at once where it is short, else an awaitable that counts in a thread.

        `body` is the decoded request, with the attributes of ChatBody, CompletionsBody, EmbeddingsBody or
        ResponsesBody after `kind`; `body_bytes` the length of its JSON. A bound on the count stands in for it where
        the bound is within `spare_tokens`, what the caller has left for certain. Nothing in the body makes it raise;
        with `queued_bytes_max` waiting already, the length estimates.
        """
        family = lookup(model)
        tally = Tally(nodes_max=NODES_INLINE_MAX)
        try:
            _TALLY_PROMPT[kind](body, family, tally)
        except WalkTooLong:
            return self._walk_and_count(
                lambda whole: _TALLY_PROMPT[kind](body, family, whole), family, queued_bytes=body_bytes
            )
        if spare_tokens and (bound := tally.upper_bound()) <= spare_tokens:
            return bound
        if tally.chars <= CHARS_INLINE_MAX and (encoding := self._encodings.get(family.encoding)):
            return tally.fixed_tokens + self._count(tally.texts, encoding)
        return self._count_in_turns(tally, family)

    async def count_output(self, kind: Kind, events: Iterable[object], model: str, *, events_bytes: int) -> int:
        """The tokens of what was produced, all choices together, for an answer that came without usage.

        `events` are the decoded events of a stream, or one whole answer; a lazy iterable is read where the counting
        is done, so decoding can be left to it. `events_bytes` is their length on the wire.
        """
        family = lookup(model)
        if events_bytes <= EVENTS_BYTES_INLINE_MAX and (encoding := self._encodings.get(family.encoding)):
            tally = Tally()
            tally_outputs(kind, events, tally)
            return tally.fixed_tokens + self._count(tally.texts, encoding)
        return await self._walk_and_count(
            lambda whole: tally_outputs(kind, events, whole), family, queued_bytes=events_bytes
        )

    async def _walk_and_count(self, walk: Callable[[Tally], None], family: ModelFamily, *, queued_bytes: int) -> int:
        if not self._has_room(queued_bytes):
            return -(-queued_bytes // 3)
        tally = Tally()
        with self._threads_busy(queued_bytes):
            await asyncio.wrap_future(self._pool.submit(walk, tally))
        return await self._count_in_turns(tally, family)

    async def _count_in_turns(self, tally: Tally, family: ModelFamily) -> int:
        # Four bytes a character at most is what a text takes in memory.
        queued_bytes = 4 * tally.chars
        if not self._has_room(queued_bytes):
            return tally.estimate_by_length()
        tokens = tally.fixed_tokens
        waiting = turns(tally.texts, chars_max=_TURN_CHARS_MAX, texts_max=_TURN_TEXTS_MAX)
        with self._threads_busy(queued_bytes):
            while (counted := await asyncio.wrap_future(self._pool.submit(self._turn, waiting, family))) is not None:
                tokens += counted
        return tokens

    @contextmanager
    def _threads_busy(self, queued_bytes: int) -> Iterator[None]:
        if not self._queued_bytes:
            sys.setswitchinterval(_SWITCH_S)
        self._queued_bytes += queued_bytes
        try:
            yield
        finally:
            self._queued_bytes -= queued_bytes
            if not self._queued_bytes:
                sys.setswitchinterval(self._usual_switch_s)

    def _has_room(self, queued_bytes: int) -> bool:
        if self._queued_bytes + queued_bytes <= self._queued_bytes_max:
            return True
        self._on_fallback("queue_full")
        return False

    def _turn(self, waiting: Iterator[list[str]], family: ModelFamily) -> int | None:
        texts = next(waiting, None)
        if texts is None:
            return None
        try:
            encoding = self._encoding(family.encoding)
        except EncodingCorrupt:
            self._on_fallback("encoding")
            return sum(map(estimate_by_length, texts))
        return self._count(texts, encoding)

    def _encoding(self, name: str) -> tiktoken.Encoding:
        with self._loading:
            if name not in self._encodings:
                self._encodings[name] = load_encoding(name)
            return self._encodings[name]

    def _count(self, texts: list[str], encoding: tiktoken.Encoding) -> int:
        tokens = 0
        for text in texts:
            try:
                tokens += len(encoding.encode_ordinary(text))
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException:  # noqa: BLE001 - a panic of the tokenizer derives from nothing narrower
                self._on_fallback("panic")
                tokens += estimate_by_length(text)
        return tokens
