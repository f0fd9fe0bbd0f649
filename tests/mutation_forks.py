"""Work in forks of this process: each starts with what has been imported and collected, and leaves nothing behind."""

import gc
import importlib.machinery
import inspect
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from mutants import Mutant, apply


@dataclass(frozen=True)
class Job:
    """Work for a fork: `work` returns what JSON can hold, within `seconds`."""

    name: str
    work: Callable[[], Any]
    seconds: float


def in_forks(jobs: Iterable[Job], processes: int) -> Iterator[tuple[str, Any]]:
    """Yield the name and the result of each job as it ends; the result is None if the fork died or took too long.

    A job is taken from `jobs` when a process is free for it. Each fork has a folder of its own for temporary files.

    Raises:
        RuntimeError: with the traceback, if the work of a job raises an exception.
    """
    waiting = iter(jobs)
    running: dict[int, tuple[Job, Path, float]] = {}
    while True:
        while len(running) < processes and (job := next(waiting, None)) is not None:
            folder = Path(tempfile.mkdtemp(prefix="fork-"))
            running[_fork(job, folder)] = (job, folder, time.monotonic() + job.seconds)
        if not running:
            return
        ended = _first_end(running)
        job, folder, _ = running.pop(ended)
        answer = folder / "answer.json"
        result = json.loads(answer.read_text()) if answer.is_file() else {"result": None}
        shutil.rmtree(folder, ignore_errors=True)
        if "error" in result:
            raise RuntimeError(f"{job.name}: {result['error']}")
        yield job.name, result["result"]


def _fork(job: Job, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        os.setpgid(0, 0)
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        (folder / "tmp").mkdir()
        tempfile.tempdir = os.environ["TMPDIR"] = os.environ["PYTEST_DEBUG_TEMPROOT"] = str(folder / "tmp")
        written = folder / "answer.part"
        try:
            result = {"result": job.work()}
        except Exception:
            result = {"error": traceback.format_exc()}
        written.write_text(json.dumps(result))
        os.replace(written, folder / "answer.json")
        os._exit(0)
    finally:
        os._exit(1)


def _first_end(running: dict[int, tuple[Job, Path, float]]) -> int:
    while True:
        ended, _ = os.waitpid(-1, os.WNOHANG)
        if ended:
            return ended
        for child, (_, _, deadline) in running.items():
            if time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
        time.sleep(0.005)


def change_imports(path: Path, mutant: Mutant) -> None:
    """Make imports of `path` find the mutant."""
    original = importlib.machinery.SourceFileLoader.get_code

    def get_code(self: importlib.machinery.SourceFileLoader, fullname: str) -> Any:
        if Path(self.path) != path:
            return original(self, fullname)
        return compile(apply(path.read_text(), mutant), str(path), "exec")

    importlib.machinery.SourceFileLoader.get_code = get_code


class LoadedFunctions:
    """The functions of modules that are imported, by file, so that a fork can give them other code."""

    def __init__(self, files: Iterable[Path]):
        names = {str(path) for path in files}
        gc.unfreeze()  # frozen objects are not listed
        self._of_file: dict[str, list[FunctionType]] = {name: [] for name in names}
        self._caches = []
        for each in gc.get_objects():
            if type(each) is FunctionType and _file(each) in names:
                self._of_file[_file(each)].append(each)
            elif type(each) is type(cache(abs)) and _file(each.__wrapped__) in names:
                self._caches.append(each)
        gc.freeze()

    def change(self, path: Path, mutant: Mutant) -> None:
        """Give the function of the mutant its code, and forget what functions have cached.

        Only for a mutant in the body of a function: the rest of a module was computed at its import.
        """
        source = path.read_text()
        before = _functions(compile(source, str(path), "exec"))
        after = _functions(compile(apply(source, mutant), str(path), "exec"))
        (place,) = (place for place in before if before[place] != after[place])
        for function in self._of_file[str(path)]:
            if _place(function.__code__) == place:
                function.__code__ = after[place]
        for cached in self._caches:
            cached.cache_clear()


def _file(function: Callable) -> str:
    return function.__code__.co_filename if isinstance(function, FunctionType) else ""


def _functions(code: CodeType) -> dict[tuple[str, int], CodeType]:
    """Return the code of the functions and methods of a module, without those inside other functions."""
    found = {}
    for part in code.co_consts:
        if isinstance(part, CodeType):
            is_function = part.co_flags & inspect.CO_OPTIMIZED  # bodies of classes are not
            found |= {_place(part): part} if is_function else _functions(part)
    return found


def _place(code: CodeType) -> tuple[str, int]:
    return code.co_qualname, code.co_firstlineno


def flush(*words: object) -> None:
    """Print although pytest captures the output."""
    print(*words, file=sys.__stdout__, flush=True)
