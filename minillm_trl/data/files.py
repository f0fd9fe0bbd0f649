"""Read one file of examples, remembering the line or row of each example for error messages."""

import csv
import gzip
import json
import re
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset

from ..files.json_files import parse_json
from ..files.messages import DataError, listing, shortened

EXTENSIONS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
TEXT_EXTENSIONS = (".txt", ".txt.gz")

# The csv module's default limit, 128 KiB per cell, is too small for long texts; this one fits a C long everywhere
_MAX_CELL = 2**31 - 1
# `datasets` recurses over nested types and cannot read back more levels
_MAX_LEVELS = 32
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Table:
    """The unchecked columns of a source.

    Attributes:
        source (`str`): the source as the user named it.
        columns (`Mapping[str, Sequence]`): the values of each column, `None` where a row lacks the field.
        place (`Callable[[int], str]`): maps a row index to its place in the source, for error messages.
        dataset (`Dataset`, *optional*): the same rows, if they were read as Arrow.
    """

    source: str
    columns: Mapping[str, Sequence]
    place: Callable[[int], str]
    dataset: Dataset | None = None

    @classmethod
    def from_dataset(cls, source: str, dataset: Dataset, max_rows: int | None = None) -> "Table":
        """Wrap Arrow rows; their places are row numbers.

        Raises:
            DataError: if there are no rows.
        """
        if max_rows is not None:
            dataset = dataset.select(range(min(max_rows, len(dataset))))
        if len(dataset) == 0:
            raise DataError(f"{source}: has no rows. Check that it was written completely.")
        columns = {name: dataset[name] for name in dataset.column_names}
        return cls(source, columns, lambda index: f"{source}, row {index} (counting from 0)", dataset)

    @classmethod
    def from_records(cls, source: str, records: list[dict[str, Any]], place: Callable[[int], str]) -> "Table":
        """Turn JSON objects, whose keys may differ, into columns.

        Raises:
            DataError: if there are no records.
        """
        if not records:
            raise DataError(f"{source}: has no rows. Check that it was written completely.")
        names = dict.fromkeys(name for record in records for name in record)
        return cls(source, {name: [record.get(name) for record in records] for name in names}, place)

    def select(self, rows: Sequence[int]) -> "Table":
        """Return the given rows, which keep their places in the source."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        dataset = None if self.dataset is None else self.dataset.select(rows)
        return Table(self.source, columns, lambda index: self.place(rows[index]), dataset)

    def to_dataset(self, without: str | None = None) -> Dataset:
        """Return the rows as a [`~datasets.Dataset`], dropping the column `without`.

        Raises:
            DataError: naming the first row whose value does not fit the type of the earlier rows, or a field name that
                Arrow cannot hold.
        """
        if self.dataset is not None:
            return self.dataset.remove_columns([without] if without else [])
        columns = {name: values for name, values in self.columns.items() if name != without}
        for name, values in columns.items():
            if "\0" in name:  # Arrow would cut the name there
                raise DataError(f"{self.place(0)}: the name of field {name[:60]!r} has a null character. Rename it.")
            if reason := _misfit(values):
                row = _first_misfit(values)
                raise DataError(
                    f"{self.place(row)}: field {name!r} is {shortened(values[row])}, which does not fit its column "
                    f"({reason}). Use one type in all rows of the column, or remove it."
                )
        return Dataset.from_dict(columns)


def plain_texts(table: Table, column: str) -> Dataset:
    """Return the non-empty texts of a column as a dataset of this one column.

    Raises:
        DataError: if a value is not text, or all texts are empty.
    """
    texts = []
    for index, text in enumerate(table.columns[column]):
        if not isinstance(text, str):
            raise DataError(
                f"{table.place(index)}: field {column!r} is {shortened(text)}. Make it text or drop the row."
            )
        if text.strip():
            texts.append(text)
    if not texts:
        raise DataError(f"{table.source}: all texts of the field {column!r} are empty. Check the file.")
    return Dataset.from_dict({column: texts})


def _misfit(values: Sequence) -> str | None:
    """Return why the values cannot form an Arrow column, or None if they can."""
    try:
        found = pa.array(values).type
    except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
        return str(error)
    inside, levels = [found], 0
    while inside and levels <= _MAX_LEVELS:
        inside = [kind.field(number).type for kind in inside for number in range(kind.num_fields)]
        levels += 1
    return f"it is nested in more than {_MAX_LEVELS} levels" if inside else None


def _first_misfit(values: Sequence) -> int:
    """Return the first row whose value does not fit the rows before it, given that there is one."""

    def prefix_misfits(last: int) -> bool:
        return _misfit(values[: last + 1]) is not None

    return bisect_left(range(len(values)), True, key=prefix_misfits)


def read_file(path: Path, max_rows: int | None = None) -> Table:
    """Read a file of examples, or its first `max_rows` examples.

    - `.jsonl`, `.jsonl.gz`: one JSON object per line; blank lines are skipped.
    - `.json`: one array of objects.
    - `.csv`: a header and comma-separated text; an empty cell is a missing value, blank lines are skipped.
    - `.parquet`.

    Text is UTF-8, with or without a byte order mark.

    Raises:
        DataError: if the extension is unknown, or the file cannot be read or has no rows. Names the line or row.
    """
    match next((extension for extension in EXTENSIONS if path.name.lower().endswith(extension)), None):
        case ".jsonl" | ".jsonl.gz":
            return _read_json_lines(path, max_rows)
        case ".json":
            return _read_json_array(path, max_rows)
        case ".csv":
            return _read_csv(path, max_rows)
        case ".parquet":
            return _read_parquet(path, max_rows)
        case _:
            raise DataError(f"{path}: unknown extension {path.suffix!r}. Known are {listing(EXTENSIONS)}.")


def read_text_file(path: Path, max_rows: int | None = None) -> Table:
    """Read a `.txt` or `.txt.gz` file with one document per line as a column `text`; blank lines are skipped.

    Raises:
        DataError: if the file cannot be read or has no text. Names the line.
    """
    filled = [(number, line.rstrip("\r\n")) for number, line in _lines(path) if line.strip()][:max_rows]
    return Table.from_records(
        str(path), [{"text": text} for _, text in filled], lambda row: f"{path}:{filled[row][0]}"
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line numbers, from 1, and the decoded lines with their line ends."""
    open_file = gzip.open if path.name.lower().endswith(".gz") else open
    number = 0
    try:
        with open_file(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{number}: byte {error.start + 1} of the line (0x{error.object[error.start]:02x}) is not UTF-8. "
            "Save the file as UTF-8."
        ) from error
    except (OSError, EOFError, zlib.error) as error:  # EOFError and zlib.error come from damaged gzip files
        raise DataError(f"{path}:{number + 1}: cannot be read ({error}). Copy or write the file again.") from error


def has_surrogates(text: str) -> bool:
    """Return whether JSON text has escaped surrogates (two per character), the only kind that UTF-8 files can hold."""
    return _SURROGATE.search(text) is not None


def check_characters(record: dict[str, Any], place: str) -> None:
    """Refuse unpaired surrogates, which JSON can escape but UTF-8 cannot encode.

    Raises:
        DataError: naming the field.
    """
    for name, value in record.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place}: field {name!r} is {shortened(value)}, which has half a surrogate pair "
                f"({error.object[error.start]!a}) and cannot be written as UTF-8. Write the whole character, or "
                "drop the row."
            ) from error


def _json_problem(error: ValueError) -> str:
    """Describe the error, with the column if it has one (huge numbers and deep nesting do not)."""
    if isinstance(error, json.JSONDecodeError):
        return f"column {error.colno}: not valid JSON ({error.msg})"
    return f"not readable JSON ({error})"


def _read_json_lines(path: Path, max_rows: int | None) -> Table:
    records, numbers = [], []
    filled = ((number, line) for number, line in _lines(path) if line.strip())
    for number, line in islice(filled, max_rows):
        try:
            record = parse_json(line.rstrip())
        except ValueError as error:
            raise DataError(
                f"{path}:{number}: {_json_problem(error)}; the line is {shortened(line.rstrip())}. Write one JSON "
                "object per line."
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"{path}:{number}: the line is {shortened(record)}, not a JSON object. Write one object per line, "
                'like {"prompt": "..."}, or rename a file that is one JSON array to .json.'
            )
        if has_surrogates(line):
            check_characters(record, f"{path}:{number}")
        records.append(record)
        numbers.append(number)
    return Table.from_records(str(path), records, lambda index: f"{path}:{numbers[index]}")


def _read_json_array(path: Path, max_rows: int | None) -> Table:
    text = "".join(line for _, line in _lines(path))
    if not text.strip():
        return Table.from_records(str(path), [], str)
    try:
        records = parse_json(text)
    except ValueError as error:
        raise DataError(
            f"{path}:{getattr(error, 'lineno', 1)}: {_json_problem(error)}. A .json file is one array of objects; "
            "rename a file with one object per line to .jsonl."
        ) from error
    if not isinstance(records, list):
        raise DataError(
            f"{path}:1: the file is {shortened(records)}, not a JSON array. Write a list of objects, like "
            '[{"prompt": "..."}], or rename a file with one object per line to .jsonl.'
        )

    def place(index: int) -> str:
        return f"{path}, row {index} (counting from 0)"

    records = records[:max_rows]
    to_check = has_surrogates(text)
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(
                f'{place(index)}: is {shortened(record)}, not an object. Write objects, like {{"prompt": "..."}}.'
            )
        if to_check:
            check_characters(record, place(index))
    return Table.from_records(str(path), records, place)


def _read_csv(path: Path, max_rows: int | None) -> Table:
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    records, numbers = [], []
    limit = csv.field_size_limit(_MAX_CELL)
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise DataError(f"{path}:1: the header repeats a name: {listing(header)}. Rename or drop a column.")
        # a quoted cell may span lines, so a row starts on the line after the end of the row before it
        number = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{path}:{number}: {len(cells)} cells under a header of {len(header)} ({listing(header)}); the "
                    f"row is {shortened(cells)}. Put quotes around a cell that holds a comma or a line break."
                )
            if cells:
                records.append({name: cell or None for name, cell in zip(header, cells, strict=True)})
                numbers.append(number)
            if len(records) == max_rows:
                break
            number = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not valid CSV ({error}). Check its quotes.") from error
    finally:
        csv.field_size_limit(limit)
    return Table.from_records(str(path), records, lambda index: f"{path}:{numbers[index]}")


def _read_parquet(path: Path, max_rows: int | None) -> Table:
    try:
        table = pyarrow.parquet.read_table(path)
        table.validate(full=True)
        dataset = Dataset(table)
    except (pa.ArrowException, OSError, RecursionError, ValueError) as error:  # a damaged schema raises the last two
        raise DataError(f"{path}: cannot be read as Parquet ({error}). Copy or write the file again.") from error
    return Table.from_dataset(str(path), dataset, max_rows)
