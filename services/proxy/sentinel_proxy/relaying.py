"""A stream on its way to the client: every event out as it comes, whoever leaves or breaks off on the way."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

from sentinel_proxy.errors import render_event
from sentinel_proxy.toolbox import as_answer
from sentinel_proxy.upstream import UpstreamError

if TYPE_CHECKING:
    from sentinel_proxy.exchange import Exchange, Headers
    from sentinel_proxy.meter import Running
    from sentinel_proxy.sse import SseRelay
    from sentinel_proxy.toolbox import Toolbox
    from sentinel_proxy.upstream import Stream

_DRAIN_MAX_BYTES: Final = 16 * 1024 * 1024


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
        self, tools: Toolbox, running: Running, exchange: Exchange, *, status: int, headers: Headers, began_s: float
    ) -> None:
        self.running = running
        self.exchange = exchange
        self.abandonment = Abandonment(tools.settings.disconnect_drain_s)
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
    """The client has left: the stream is read on for its usage, up to a bound of time and bytes. 0 s: not at all."""

    def __init__(self, drain_s: float) -> None:
        self.begun = False
        self._drain_s = drain_s
        self._task = asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None
        self._expired = False
        self._most_bytes: int | None = None

    def begin(self) -> None:
        self.begun = True
        self._timer = asyncio.get_running_loop().call_later(self._drain_s, self._expire)

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def exceeds(self, read_bytes: int) -> bool:
        if self._most_bytes is None:
            self._most_bytes = read_bytes + _DRAIN_MAX_BYTES
        return read_bytes > self._most_bytes

    def take_back_cancellation(self) -> bool:
        """Whether it was this that cancelled the task, and nobody else."""
        return self._expired and self._task is not None and self._task.uncancel() == 0

    def _expire(self) -> None:
        self._expired = True
        if self._task is not None:
            self._task.cancel()
