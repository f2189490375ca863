"""For PYTHONPATH: every process raises in its main thread at one signal, and hangs at another.

So a test breaks a rank of a real engine from outside, at any point of whatever it is doing.
"""

import signal
import time
from types import FrameType

RAISE, HANG = signal.SIGUSR2, signal.SIGRTMIN
BETWEEN = ("advance", "all_reduce", "add_all_reduced", "all_gather_last", "broadcast")
"""Functions of headrace.worker.parallel, and what they call."""


def _raise(number: int, frame: FrameType | None) -> None:
    raise RuntimeError("told to raise")


def _hang(number: int, frame: FrameType | None) -> None:
    # Between saying that it comes to a collective operation and beginning it a rank is like those that wait
    # for it, and cannot be told from them. That is a millionth of a second: a bit later.
    if frame is not None and frame.f_code.co_name in BETWEEN:
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        return
    while True:
        time.sleep(1)


signal.signal(RAISE, _raise)
signal.signal(HANG, _hang)
signal.signal(signal.SIGALRM, _hang)
