"""Kills its whole process group as soon as the process that started it is gone, in whatever way that ended.

Standard input is a pipe whose other end only that process holds. Run as a plain file, so that it starts at once.
"""

import os
import signal

if __name__ == "__main__":
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)
