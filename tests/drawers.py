"""What the tests let a plotter's background processes draw; imports nothing heavy."""

import os
import signal
import sys
import time
from pathlib import Path


def write(part: Path, text: str) -> None:
    part.write_text(text)


def fail(part: Path) -> None:
    part.touch()
    raise ValueError("no ink")


def die(part: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def signal_oneself(part: Path, number: int) -> None:
    os.kill(os.getpid(), number)
    part.touch()


def name_modules(part: Path) -> None:
    part.write_text(" ".join(sys.modules))


def hang(part: Path, *arguments) -> None:
    part.touch()
    time.sleep(60)
