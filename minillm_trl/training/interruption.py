"""A scheduler's warning (SIGTERM): noted when it comes, heeded at the end of the optimizer step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_STATUS = 128 + signal.SIGTERM  # 143, what shells report of a process that SIGTERM ended


class Terminated(SystemExit):
    """Ends the process with [`EXIT_STATUS`] after a checkpoint was saved.

    Args:
        checkpoint (`str`): folder of the checkpoint.
    """

    def __init__(self, checkpoint: str):
        super().__init__(EXIT_STATUS)
        self.checkpoint = checkpoint


@contextmanager
def note_sigterm() -> Iterator[threading.Event]:
    """Within it, SIGTERM sets the event and does nothing else. Threads other than the main one cannot listen."""
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)
