"""deploy/start.sh, process 1 of a container."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

START = Path(__file__).parents[3] / "deploy/start.sh"
SLOW_TO_END = """
import os, signal, sys, time
def end(number, frame):
    os.write(1, b"ending %d\\n" % number)  # print may be what the signal interrupts
    time.sleep(0.3)  # what a drain takes
    sys.exit(7)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
print("ready", flush=True)
while True:
    time.sleep(30)
"""


def start(*command: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(["sh", str(START), *command], stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_handed_on_and_the_end_waited_for(number):
    with start(sys.executable, "-c", SLOW_TO_END) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "ready\n"
        started.send_signal(number)
        said, complaints = started.communicate(timeout=10)
    assert (said, complaints, started.returncode) == (f"ending {number:d}\n", "", 7)


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_exit_code_is_the_commands(code):
    with start("sh", "-c", f"exit {code}") as started:
        assert started.wait(timeout=10) == code


def test_a_command_that_has_no_handler_yet_ends_at_once():
    with start("sh", "-c", "echo ready; exec sleep 60") as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "ready\n"
        started.send_signal(signal.SIGTERM)
        assert started.wait(timeout=10) == 128 + signal.SIGTERM


def test_what_is_said_to_a_container_reaches_the_command():
    with start("cat") as started:
        assert started.communicate("hello", timeout=10)[0] == "hello"
