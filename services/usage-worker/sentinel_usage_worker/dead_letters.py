"""`sentinel-usage-worker dead-letters ...`: what Zion refused for good, in an operator's hands."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sentinel_shared.usage_queue import DeadLetter, UsageQueue


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(
        prog="sentinel-usage-worker", description="Without a command: the service, until SIGTERM."
    )
    commands = root.add_subparsers(dest="command")
    letters = commands.add_parser("dead-letters", help="usage that Zion refused for good")
    actions = letters.add_subparsers(dest="action", required=True)
    listing = actions.add_parser(
        "list", help="one line each, oldest first: id, external id, limit, amount, age, reason"
    )
    listing.add_argument("--json", action="store_true", help="one JSON object a line")
    actions.add_parser("show", help="one, as JSON").add_argument("ids", nargs=1, metavar="ID")
    replay = actions.add_parser("replay", help="owed again, to go out in a new batch")
    chosen = replay.add_mutually_exclusive_group(required=True)
    chosen.add_argument("ids", nargs="*", default=[], metavar="ID")
    chosen.add_argument("--all", action="store_true")
    actions.add_parser("drop", help="forgotten").add_argument("ids", nargs="+", metavar="ID")
    return root


async def run(queue: UsageQueue, options: argparse.Namespace, *, now_s: float) -> int:
    """Carry out one command, on those letters that are there; 1 when one that was named is not.

    Each letter is decided in one step: a command that is cut short, and given again, does the rest.
    Raises RedisUnavailable, RedisRefused.
    """
    letters = {letter.letter_id: letter for letter in await queue.dead_letters()}
    if options.action == "list":
        for letter in letters.values():
            sys.stdout.write((json.dumps(asdict(letter)) if options.json else _line(letter, now_s)) + "\n")
        return 0
    names = list(letters) if options.action == "replay" and options.all else list(dict.fromkeys(options.ids))
    missing = [name for name in names if name not in letters]
    named = [letters[name] for name in names if name in letters]
    if options.action == "show":
        for letter in named:
            sys.stdout.write(json.dumps(asdict(letter), indent=2) + "\n")
    else:
        decide, done = (queue.replay, "replayed") if options.action == "replay" else (queue.drop, "dropped")
        missing += [letter.letter_id for letter in named if not await decide(letter)]
        sys.stdout.write(f"{len(names) - len(missing)} {done}\n")
    return _missing(missing) if missing else 0


def _line(letter: DeadLetter, now_s: float) -> str:
    age_s = max(0, int(now_s - letter.since_ms / 1000))
    fields = (letter.letter_id, letter.external_id, letter.limit_name, str(letter.amount), f"{age_s}s", letter.reason)
    # A name or a reason of Zion's may hold anything, a line break or a terminal's control characters too.
    return "\t".join("".join(c if c.isprintable() else ascii(c)[1:-1] for c in field) for field in fields)


def _missing(names: Sequence[str]) -> int:
    sys.stderr.write(f"no such dead letter: {', '.join(names)}\n")
    return 1
