"""Training runs as jobs of several processes: each takes the first job that no other one holds or has finished."""

import fcntl
import json
import re
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

NUMBERS = re.compile(r"\[[-+.,\de\s]+\]")  # a list of numbers in JSON
Job = tuple[str, Callable[[], None]]  # name and function


class Run(NamedTuple):
    """One training run."""

    method: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.learning_rate:g}-{self.seed}"


def read_record(path: Path) -> dict[str, Any]:
    """Return a JSON file's content, or an empty record if there is no such file."""
    return json.loads(path.read_text()) if path.is_file() else {}


def write_record_of_run(path: Path, record: dict[str, Any]) -> None:
    """Write the file as a whole or not at all, each list of numbers on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(".partial")
    text = NUMBERS.sub(lambda found: " ".join(found[0].split()), json.dumps(record, indent=1))
    partial_path.write_text(text + "\n")
    partial_path.rename(path)


def work(list_jobs: Callable[[], Iterable[Job]], locks: Path) -> None:
    """Take jobs until none is left; wait while other processes hold all that can start.

    Args:
        list_jobs: returns the jobs that can start and are not finished, the most urgent first.
        locks: a folder that all processes share.

    Raises:
        SystemExit: at the end, if jobs failed. The other jobs are done.
    """
    locks.mkdir(parents=True, exist_ok=True)
    failed: set[str] = set()
    while todo := [name for name, _ in list_jobs() if name not in failed]:
        if not any(_take(locks, name, list_jobs, failed) for name in todo):
            time.sleep(5)
    if failed:
        raise SystemExit(f"failed: {', '.join(sorted(failed))}; see the tracebacks above")


def _take(locks: Path, name: str, list_jobs: Callable[[], Iterable[Job]], failed: set[str]) -> bool:
    """Run a job unless another process holds or has finished it; return whether it ran.

    If it fails, its name is added to `failed`.
    """
    with (locks / name).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        function = dict(list_jobs()).get(name)
        if function is None:  # finished since the jobs were listed
            return False
        start = time.process_time()
        try:
            function()
        except Exception:
            traceback.print_exc()
            failed.add(name)
        print(f"{time.strftime('%H:%M')} {name} {time.process_time() - start:.0f} CPU-s", flush=True)
        return True
