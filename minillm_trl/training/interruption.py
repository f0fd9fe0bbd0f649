"""SIGTERM, with which schedulers announce that they will kill a process: saves a checkpoint after the current step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_STATUS = 128 + signal.SIGTERM  # 143, the status that shells report for SIGTERM


class Terminated(SystemExit):
    """End the process with [`EXIT_STATUS`] after saving a checkpoint.

    Args:
        checkpoint (`str`): folder of the checkpoint.
    """

    def __init__(self, checkpoint: str):
        super().__init__(EXIT_STATUS)
        self.checkpoint = checkpoint


@contextmanager
def note_sigterm() -> Iterator[threading.Event]:
    """Make SIGTERM set the yielded event and do nothing else. Only works in the main thread."""
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)
