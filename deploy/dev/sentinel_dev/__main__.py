"""`sentinel-dev`: the whole system on one machine, until Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Final

from sentinel_dev import parts
from sentinel_dev.console import Console, column, last_words, to_paste
from sentinel_dev.embedded import DataFolder, NotPossible, redis_part
from sentinel_dev.options import Options, WrongOption, read_options
from sentinel_dev.supervisor import Part, PartFailed, Supervisor

_EXIT_WRONG_OPTION: Final = 2
_EXIT_KILLED: Final = 130

_STREAMS_GRACE_S: Final = 30.0
_GRACE_MARGIN_S: Final = 5.0
_GRACE_AFTER_FAILURE_S: Final = 3.0

# user: (what the console says, its limits at the simulated Zion)
DEMO_USERS: Final[Mapping[str, tuple[str, Mapping[str, int]]]] = {
    "demo": (
        "1,000 requests and a million tokens a month",
        {"ai_requests": 1_000, "ai_input_tokens": 1_000_000, "ai_output_tokens": 1_000_000},
    ),
    "small": (
        "cut off after 5 requests",
        {"ai_requests": 5, "ai_input_tokens": 10_000, "ai_output_tokens": 10_000},
    ),
}


def main() -> None:
    """The console script. 0 after Ctrl-C or SIGTERM, 1 for what cannot run, 2 for a wrong setting, 130 when killed."""
    console = Console()
    try:
        code = asyncio.run(run(read_options(sys.argv[1:], os.environ), os.environ, console))
    except WrongOption as error:
        console.complain(str(error))
        code = _EXIT_WRONG_OPTION
    except NotPossible as error:
        console.complain(str(error))
        code = 1
    except KeyboardInterrupt:
        code = 0  # so early that nothing had been started
    sys.exit(code)


async def run(options: Options, environ: Mapping[str, str], console: Console) -> int:
    """Runs the system until a signal or a failure; the exit code. Raises NotPossible, with nothing started yet."""
    taken = options.taken()
    if taken:
        raise NotPossible(" ".join(taken))
    folder = DataFolder(options.data)
    folder.lock()
    if options.redis_url is None:
        redis, redis_url = redis_part(folder, environ)
        first = [redis]
    else:
        redis_url, first = options.redis_url, []
        await _try_redis(redis_url, environ)
    told = parts.service_environ(options, environ, redis_url)
    async with Supervisor(console.hear) as supervisor:
        signals = _Signals(kill=supervisor.kill)
        living = asyncio.create_task(_live(supervisor, options, told, console, first))
        stopping = asyncio.create_task(signals.first.wait())
        await asyncio.wait({living, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if signals.first.is_set():
            console.say("Stopping; Ctrl-C again kills.")
            await _end(living)
            await supervisor.stop(grace_s=_grace_s(environ))
            return _EXIT_KILLED if signals.killed else 0
        await _end(stopping)
        _tell(console, living)
        await supervisor.stop(grace_s=_GRACE_AFTER_FAILURE_S)
    return 1


class _Signals:
    """SIGINT, SIGTERM and SIGHUP: the first asks to stop, the second kills."""

    def __init__(self, *, kill: Callable[[], None]) -> None:
        self.first = asyncio.Event()
        self.killed = False
        self._kill = kill
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self.first.is_set():
            self.killed = True
            self._kill()
        self.first.set()


async def _live(
    supervisor: Supervisor, options: Options, environ: Mapping[str, str], console: Console, first: list[Part]
) -> None:
    """Starts everything, says how to use it, and watches it. Raises PartFailed."""
    began_s = time.monotonic()

    def say_ready(part: Part) -> None:
        console.say(column(part.name, f"ready  {part.where}"))

    console.say("Sentinel, the whole system on this machine. Ctrl-C stops it.")
    if options.redis_url is not None:
        console.say(column("redis", "ready  the one of REDIS_URL"))
    simulators = parts.simulator_parts(options, environ)
    # The services want Redis when they start; Zion and the gateway may come a little later.
    await supervisor.start([*first, *simulators], say_ready)
    await supervisor.start(parts.service_parts(options, environ), say_ready)
    tokens = await _demo_tokens(options, environ) if "zion" in options.simulated else {}
    console.say()
    for line in to_paste(parts.base_url(options), tokens, python=shlex.quote(sys.executable)):
        console.say(line)
    console.say()
    console.say(f"Ready in {time.monotonic() - began_s:.1f} s.")
    await supervisor.watch()


async def _demo_tokens(options: Options, environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    tokens = {}
    for user, (may, limits) in DEMO_USERS.items():
        tokens[user] = (await parts.add_user(options, user, limits), may)
        await parts.announce_change(options, user, secret=environ["WEBHOOK_SECRET"], now_s=time.time())
    return tokens


async def _try_redis(url: str, environ: Mapping[str, str]) -> None:
    from sentinel_shared.errors import SentinelError  # noqa: PLC0415  the lane brings redis-py: 0.2 s of start-up
    from sentinel_shared.redis_lane import RedisLane  # noqa: PLC0415

    try:
        lane = await RedisLane.connect(
            url, client_name="sentinel-dev", tls_ca_file=environ.get("REDIS_CA_FILE", "").strip() or None
        )
    except SentinelError as error:
        raise NotPossible(f"REDIS_URL cannot be used: {error}") from error
    await lane.close()


def _tell(console: Console, living: asyncio.Task[None]) -> None:
    failure = living.exception()
    if not isinstance(failure, PartFailed):
        living.result()  # a defect: its traceback, once all has been stopped
        return
    console.complain(f"{failure}, so everything is stopped." + (" It said:" if failure.last_lines else ""))
    for line in failure.last_lines:
        console.complain(last_words(line))


async def _end(task: asyncio.Task[object] | asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _grace_s(environ: Mapping[str, str]) -> float:
    """A little longer than the services take for the streams that run; a wrong one has been refused by them."""
    text = environ.get("SHUTDOWN_GRACE_SECONDS", "").strip()
    return (float(text) if text.isdecimal() else _STREAMS_GRACE_S) + _GRACE_MARGIN_S


if __name__ == "__main__":
    main()
