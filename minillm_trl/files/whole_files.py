"""Atomic writes: a file is complete or absent."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import FileError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically. Several processes may write the same file.

    Raises:
        FileError: if the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path):
        try:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)  # left over only after an error, such as a full disk


def make_folder(path: Path) -> None:
    """Make a folder and its parents, unless they exist.

    Raises:
        FileError: if the folder cannot be made.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` inside the block into an error that names the file and the fix.

    Raises:
        FileError: for an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise FileError(
            f"{path} cannot be written: {error}. Make room, make its folder writable, or name another place."
        ) from error


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """Yield a folder next to `output` that takes its place once the block has ended without an error.

    Raises:
        FileError: if it cannot be written.
    """
    partial, previous = (output.with_name(f".{output.name}.{state}") for state in ("partial", "previous"))
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    make_folder(partial)
    try:
        yield partial
        if output.is_dir():
            shutil.rmtree(previous, ignore_errors=True)
            os.replace(output, previous)
        try:
            os.replace(partial, output)
        except OSError:
            if previous.is_dir():
                os.replace(previous, output)
            raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(previous, ignore_errors=True)
