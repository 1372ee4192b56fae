"""Starts the parts of the system as processes, watches them, and leaves none behind.

All of them are in one process group of their own, together with a keeper (`keeper.py`) that kills the group when this
process is gone. So a Ctrl-C in the terminal reaches sentinel-dev alone, which stops the parts in order; and a SIGKILL
of sentinel-dev, which it cannot see coming, ends them all the same, their own children included.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

_KEEPER: Final = Path(__file__).with_name("keeper.py")
_READY_WITHIN_S: Final = 60.0
_POLL_S: Final = 0.03
_TAIL_LINES: Final = 12
_LINE_MOST_BYTES: Final = 1024 * 1024
_LAST_WORDS_S: Final = 0.5


@dataclass(frozen=True, kw_only=True)
class Part:
    """A process of the system. `ready` asks it, and may raise OSError while it does not listen yet."""

    name: str
    command: Sequence[str]
    environ: Mapping[str, str]
    ready: Callable[[], Awaitable[bool]]
    where: str
    """What the console says of it when it is ready."""
    inherited_fds: Sequence[int] = ()


class PartFailed(Exception):
    """A part ended by itself, or did not become ready; `last_lines` are what it said before, the latest last."""

    def __init__(self, part: str, what: str, *, last_lines: Iterable[str]) -> None:
        super().__init__(f"{part} {what}")
        self.last_lines = list(last_lines)


@dataclass(eq=False)
class _Child:
    part: Part
    process: asyncio.subprocess.Process
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=_TAIL_LINES))
    reading: asyncio.Task[None] | None = None


class Supervisor:
    """As a context manager: within it parts can run; when it is left none does. `hear` gets each line of each part."""

    def __init__(self, hear: Callable[[str, str], None]) -> None:
        self._hear = hear
        self._children: list[_Child] = []
        self._watching: set[asyncio.Task[None]] = set()
        self._keeper: asyncio.subprocess.Process | None = None
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> Self:
        # Isolated and without site-packages it takes ten milliseconds.
        self._keeper = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", str(_KEEPER), stdin=asyncio.subprocess.PIPE, process_group=0
        )
        self._watching.add(asyncio.create_task(self._until_ended("keeper", self._keeper)))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.kill()
        processes = [child.process for child in self._children]
        if self._keeper is not None:
            processes.append(self._keeper)
        await asyncio.gather(*(process.wait() for process in processes))
        tasks = [*self._watching, *(child.reading for child in self._children if child.reading is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def start(self, parts: Sequence[Part], on_ready: Callable[[Part], None]) -> None:
        """Starts the parts, and returns when all are ready. Raises PartFailed."""
        children = [await self._spawn(part) for part in parts]
        ready = asyncio.gather(*(self._until_ready(child, on_ready) for child in children))
        either: set[asyncio.Future[Any]] = {ready, self._failed}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done():
                self._failed.result()
            await ready
        finally:
            ready.cancel()
            await asyncio.gather(ready, return_exceptions=True)

    async def watch(self) -> None:
        """Until a part ends by itself: raises PartFailed."""
        await asyncio.shield(self._failed)

    async def stop(self, *, grace_s: float) -> None:
        """SIGTERM to one part after the other, the last started first; SIGKILL for one that takes too long."""
        for child in reversed(self._children):
            with contextlib.suppress(ProcessLookupError):
                child.process.terminate()
            try:
                async with asyncio.timeout(grace_s):
                    await child.process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    child.process.kill()

    def kill(self) -> None:
        """SIGKILL to all at once, by way of the keeper."""
        if self._keeper is not None and self._keeper.stdin is not None:
            self._keeper.stdin.close()

    async def _spawn(self, part: Part) -> _Child:
        if self._keeper is None:
            raise RuntimeError("not entered")
        process = await asyncio.create_subprocess_exec(
            *part.command,
            env=dict(part.environ),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=_LINE_MOST_BYTES,
            pass_fds=tuple(part.inherited_fds),
            process_group=self._keeper.pid,
        )
        child = _Child(part, process)
        child.reading = asyncio.create_task(self._read(child))
        self._children.append(child)
        self._watching.add(asyncio.create_task(self._until_ended(part.name, process, child)))
        return child

    async def _read(self, child: _Child) -> None:
        stdout = child.process.stdout
        while stdout is not None:
            try:
                line = await stdout.readline()
            except ValueError:
                continue  # longer than any line of ours; it has been dropped
            if not line:
                return
            text = line.decode("utf-8", "replace").rstrip()
            child.tail.append(text)
            self._hear(child.part.name, text)

    async def _until_ready(self, child: _Child, on_ready: Callable[[Part], None]) -> None:
        try:
            async with asyncio.timeout(_READY_WITHIN_S):
                while not await _is_ready(child.part):  # noqa: ASYNC110  it is another process that is waited for
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            what = f"is not ready after {_READY_WITHIN_S:g} s"
            raise PartFailed(child.part.name, what, last_lines=child.tail) from None
        on_ready(child.part)

    async def _until_ended(self, name: str, process: asyncio.subprocess.Process, child: _Child | None = None) -> None:
        code = await process.wait()
        if child is not None and child.reading is not None:
            await asyncio.wait({child.reading}, timeout=_LAST_WORDS_S)
        failure = PartFailed(name, _ending(code), last_lines=child.tail if child is not None else ())
        if not self._failed.done():
            self._failed.set_exception(failure)
            self._failed.exception()  # a stop that nobody waits for is no error


async def _is_ready(part: Part) -> bool:
    try:
        return await part.ready()
    except OSError:
        return False


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
