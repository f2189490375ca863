"""For PYTHONPATH: every process raises in its main thread at one signal, and hangs at another.

So a test breaks a rank of a real engine from outside, at any point of whatever it is doing.
"""

import signal
import time
from types import FrameType

RAISE, HANG = signal.SIGUSR2, signal.SIGRTMIN


def _raise(number: int, frame: FrameType | None) -> None:
    raise RuntimeError("told to raise")


def _hang(number: int, frame: FrameType | None) -> None:
    while True:
        time.sleep(1)


signal.signal(RAISE, _raise)
signal.signal(HANG, _hang)
