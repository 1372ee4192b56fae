"""A stream on its way to the client: every event out as it comes, whoever leaves or breaks off on the way."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final, Self

from sentinel_proxy.errors import render_event
from sentinel_proxy.exchange import ClientGone
from sentinel_proxy.toolbox import as_answer
from sentinel_proxy.upstream import UpstreamError

if TYPE_CHECKING:
    from sentinel_proxy.exchange import Exchange, Headers
    from sentinel_proxy.meter import Running
    from sentinel_proxy.sse import SseRelay
    from sentinel_proxy.toolbox import Toolbox
    from sentinel_proxy.upstream import Stream

_DRAIN_MAX_BYTES: Final = 16 * 1024 * 1024
_STREAM_HEADERS: Final = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))


def of_a_stream(headers: Headers) -> Headers:
    """These, and what they lack to keep everybody on the way from holding events back."""
    names = {name for name, _ in headers}
    return headers + [own for own in _STREAM_HEADERS if own[0] not in names]


async def relay_stream(stream: Stream, relay: SseRelay, outlet: Outlet) -> None:
    """Every event out as it comes; the client gone, read on for the usage within the drain's bounds."""
    running, abandonment = outlet.running, outlet.abandonment
    try:
        while (chunk := await stream.read()) is not None:
            out = relay.feed(chunk)
            running.output_tokens_seen += chunk.count(b"data:")
            if abandonment.begun:
                if abandonment.exceeds(relay.read_bytes):
                    return
            elif out:
                await outlet.send(out)
        tail = relay.flush()
    except UpstreamError as error:
        if not outlet.exchange.started and not abandonment.begun:
            raise
        tail = relay.interrupt() + outlet.broken(error)
    except asyncio.CancelledError:
        if not abandonment.take_back_cancellation():
            raise
        return
    await outlet.finish(tail)


class Outlet:
    """The client's end of a stream. Its answer starts with its first bytes: an early failure has its own status."""

    def __init__(
        self,
        tools: Toolbox,
        running: Running,
        exchange: Exchange,
        abandonment: Abandonment,
        *,
        status: int,
        headers: Headers,
        began_s: float,
    ) -> None:
        self.running = running
        self.exchange = exchange
        self.abandonment = abandonment
        self._metrics = tools.metrics
        self._status = status
        self._headers = headers
        self._began_s = began_s

    async def send(self, piece: bytes) -> None:
        if not self.exchange.started:
            self._metrics.first_token(self.running.endpoint).observe(time.perf_counter() - self._began_s)
            await self.exchange.start(self._status, self._headers)
        await self.exchange.send(piece)

    async def finish(self, tail: bytes) -> None:
        if not self.exchange.started:
            await self.exchange.start(self._status, self._headers)
        if tail:
            await self.exchange.send(tail)
        await self.exchange.end()

    def broken(self, error: UpstreamError) -> bytes:
        """The event that tells the client; counted."""
        self._metrics.upstream_errors.labels("mid_stream").inc()
        answer = as_answer(error)
        answer.message = "The AI gateway's answer broke off."
        return render_event(answer, named=self.running.endpoint == "/responses")


class Abandonment:
    """Within it the client's leaving is noticed, from `watch` on. Its answer is read on then, for its usage.

    What is awaited when it leaves goes on for `drain_s` (0: not at all), and then ends with ClientGone.
    """

    __slots__ = ("_drain_s", "_exchange", "_most_bytes", "_task", "_timer", "begun", "given_up")

    def __init__(self, exchange: Exchange, drain_s: float) -> None:
        self.begun = False
        self.given_up = False
        """The time was up before the answer's end."""
        self._exchange = exchange
        self._drain_s = drain_s
        self._task = asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None
        self._most_bytes: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.end()
        if kind is asyncio.CancelledError and self.take_back_cancellation():
            raise ClientGone from None

    def watch(self) -> None:
        """From now on; the request must have been read."""
        self._exchange.when_gone(self._begin)

    def end(self) -> None:
        """What becomes of the client does not matter any more."""
        self._exchange.forget_client()
        if self._timer is not None:
            self._timer.cancel()

    def exceeds(self, read_bytes: int) -> bool:
        """Whether more has been read since the client left than is worth its usage."""
        if self._most_bytes is None:
            self._most_bytes = read_bytes + _DRAIN_MAX_BYTES
        return read_bytes > self._most_bytes

    def take_back_cancellation(self) -> bool:
        """Whether it was this that cancelled the task, and nobody else."""
        return self.given_up and self._task is not None and self._task.uncancel() == 0

    def _begin(self) -> None:
        self.begun = True
        self._timer = asyncio.get_running_loop().call_later(self._drain_s, self._give_up)

    def _give_up(self) -> None:
        self.given_up = True
        if self._task is not None:
            self._task.cancel()
