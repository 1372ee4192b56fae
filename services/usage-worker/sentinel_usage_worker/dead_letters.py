"""`sentinel-usage-worker dead-letters ...`: what Zion refused for good, in an operator's hands."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sentinel_shared.usage_queue import DeadLetter, UsageQueue


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(prog="sentinel-usage-worker")
    commands = root.add_subparsers(dest="command")
    letters = commands.add_parser("dead-letters", help="usage that Zion refused for good")
    actions = letters.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="one line each").add_argument("--json", action="store_true")
    actions.add_parser("show", help="one, whole").add_argument("id")
    replay = actions.add_parser("replay", help="owed again, in a new batch")
    replay.add_argument("ids", nargs="*", metavar="ID")
    replay.add_argument("--all", action="store_true")
    actions.add_parser("drop", help="forgotten").add_argument("ids", nargs="+", metavar="ID")
    return root


async def run(queue: UsageQueue, options: argparse.Namespace) -> int:
    """Carry out one command; 1 when a letter that was named is not there."""
    letters = {letter.letter_id: letter for letter in await queue.dead_letters()}
    if options.action == "list":
        for letter in letters.values():
            text = json.dumps(asdict(letter)) if options.json else _line(letter)
            sys.stdout.write(text + "\n")
        return 0
    if options.action == "show":
        if options.id not in letters:
            return _missing([options.id])
        sys.stdout.write(json.dumps(asdict(letters[options.id]), indent=2) + "\n")
        return 0
    wanted: Sequence[str] = list(letters) if options.action == "replay" and options.all else options.ids
    if not wanted and not (options.action == "replay" and options.all):
        sys.stderr.write("dead-letters replay takes ids, or --all\n")
        return 2
    missing = [name for name in wanted if name not in letters]
    done = 0
    for name in wanted:
        if name in letters:
            letter = letters[name]
            done += await (queue.replay(letter) if options.action == "replay" else queue.drop(letter))
    sys.stdout.write(f"{done} {'replayed' if options.action == 'replay' else 'dropped'}" + "\n")
    return _missing(missing) if missing else 0


def _line(letter: DeadLetter) -> str:
    age_s = max(0, int(time.time() - letter.since_ms / 1000))
    return "\t".join(
        (letter.letter_id, letter.external_id, letter.limit_name, str(letter.amount), f"{age_s}s", letter.reason)
    )


def _missing(names: Sequence[str]) -> int:
    sys.stderr.write(f"no such dead letter: {', '.join(names)}\n")
    return 1
