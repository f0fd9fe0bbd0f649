"""Rows of local files, each with its place, so that an error can name it."""

import csv
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet

from .errors import DataError, shortened

Row = dict[str, Any]
PlacedRow = tuple[str, Row]  # ("file.jsonl:3", {...})


def read_rows(path: Path) -> list[PlacedRow]:
    """Read a `.jsonl`, `.json`, `.csv` or `.parquet` file; the text formats may be gzipped (`.jsonl.gz`).

    Raises:
        DataError: for a missing or empty file, an unknown ending, text that is not UTF-8, broken JSON, and rows that are
            no objects; with file and line (or row).
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    name = path.name.removesuffix(".gz")
    reader = _READERS.get(Path(name).suffix)
    if reader is None:
        endings = ", ".join(sorted(_READERS))
        raise DataError(
            f"{path}: unknown ending {Path(name).suffix!r}. Known: {endings} (text formats also with .gz)."
        )
    rows = list(reader(path))
    if not rows:
        raise DataError(f"{path}: no rows. Check that the file was written completely.")
    return rows


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise DataError(f"{path}: broken gzip file ({error}). Write it again.") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 (byte {data[error.start]:#04x} at offset {error.start}). Convert the file to UTF-8."
        ) from error


def _read_jsonl(path: Path) -> Iterator[PlacedRow]:
    # not splitlines(): JSON strings may hold U+2028 and its like
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{place}: broken JSON at column {error.colno} ({error.msg}): {shortened(line)}. Each line must be one "
                "JSON object."
            ) from error
        yield place, _object(row, place)


def _read_json(path: Path) -> Iterator[PlacedRow]:
    try:
        rows = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: broken JSON at column {error.colno} ({error.msg}). A .json file holds one array of "
            "objects; name it .jsonl if each line is an object."
        ) from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected an array of objects, got {shortened(rows)}.")
    for number, row in enumerate(rows, start=1):
        place = f"{path}: row {number}"
        yield place, _object(row, place)


def _read_csv(path: Path) -> Iterator[PlacedRow]:
    reader = csv.DictReader(_read_text(path).splitlines(keepends=True))
    for row in reader:
        place = f"{path}:{reader.line_num}"
        if None in row or None in row.values():
            raise DataError(
                f"{place}: the number of fields differs from the header's {len(reader.fieldnames or [])}. Quote fields "
                "that hold commas or line breaks."
            )
        yield place, dict(row)


def _read_parquet(path: Path) -> Iterator[PlacedRow]:
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}).") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}: row {number}", row


def _object(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object with named fields, got {shortened(row)}.")
    return row


_READERS: dict[str, Callable[[Path], Iterator[PlacedRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
