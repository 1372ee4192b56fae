"""`python -m tests.chaos --seconds 60 [--seed N]`: a storm, and what the books say after it; exit 1 if they differ."""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
import tempfile
from pathlib import Path

from tests.chaos.storm import storm


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--idempotency", choices=["on", "off"], default="on", help="whether Zion honours keys")
    parser.add_argument(
        "--replica", choices=["on", "off"], default="off", help="whether Redis has one, which fails too"
    )
    options = parser.parse_args()
    seed = secrets.randbelow(1_000_000) if options.seed is None else options.seed
    folder = Path(tempfile.mkdtemp(prefix="sentinel-chaos-"))
    print(f"seed {seed}, logs in {folder}", flush=True)
    idempotent = options.idempotency == "on"
    with_replica = options.replica == "on"
    running = storm(folder, seed=seed, seconds=options.seconds, idempotent=idempotent, with_replica=with_replica)
    report = asyncio.run(running)
    print("\n".join(report.lines()))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
