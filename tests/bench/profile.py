"""`python -m tests.bench.profile`: where a request's time goes, by py-spy while the plain load runs.

Prints the functions that were most often at work, themselves and with all they called, and writes the raw samples to
`build/profile.txt` (one stack a line, for flame graphs).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

from tests.bench.__main__ import SCENARIOS, USERS, Contestant, measure
from tests.support.system import System, script

SECONDS = 8
ROWS = 30


def main() -> int:
    build = Path("build")
    build.mkdir(exist_ok=True)
    raw = build / "profile.txt"
    with System(Path(tempfile.mkdtemp(prefix="sentinel-profile-"))) as system:
        (proxy,) = system.start_all("proxy", RATE_LIMIT_REQUESTS="1000000000")
        tokens = [system.add_user().token for _ in range(USERS)]
        contestant = Contestant("Sentinel", int(proxy.url.rpartition(":")[2]), (proxy.pid,))
        measure(contestant, SCENARIOS[0], tokens, 1)
        load = threading.Thread(target=measure, args=(contestant, SCENARIOS[0], tokens, SECONDS + 1))
        load.start()
        command = [script("py-spy"), "record", "-p", str(proxy.pid), "-d", str(SECONDS), "-r", "300", "-f", "raw"]
        subprocess.run([*command, "-o", str(raw)], check=True, capture_output=True)
        load.join()
    _print(raw)
    return 0


def _print(raw: Path) -> None:
    own: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    for line in raw.read_text().splitlines():
        stack, _, samples = line.rpartition(" ")
        frames = [frame.rpartition(":")[0] or frame for frame in stack.split(";")]
        own[frames[-1]] += int(samples)
        whole.update(dict.fromkeys(frames, int(samples)))
    total = max(1, own.total())
    for title, counted in (("itself", own), ("with what it called", whole)):
        print(f"--- {title}")
        for frame, count in counted.most_common(ROWS):
            print(f"{100 * count / total:5.1f} %  {frame}")


if __name__ == "__main__":
    sys.exit(main())
