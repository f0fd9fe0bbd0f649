"""Reads one file of examples and remembers the line or row that each example came from."""

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

# the csv module's own limit is 128 KiB a cell, which a long text exceeds; this one fits a C long everywhere
_MAX_CELL = 2**31 - 1
# what `datasets` reads back: it recurses
_MOST_LEVELS = 32
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Table:
    """The columns of a source, before anything is checked.

    Attributes:
        source (`str`): what the user called it.
        columns (`Mapping[str, Sequence]`): the values of each column, `None` where a row has none.
        place (`Callable[[int], str]`): maps a row index to the place that an error names.
        dataset (`Dataset`, *optional*): the same rows, where they came as Arrow.
    """

    source: str
    columns: Mapping[str, Sequence]
    place: Callable[[int], str]
    dataset: Dataset | None = None

    @classmethod
    def from_dataset(cls, source: str, dataset: Dataset, max_rows: int | None = None) -> "Table":
        """Wrap Arrow rows, which have row numbers only.

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
        """Turn a list of JSON-like objects, which may have different keys, into columns.

        Raises:
            DataError: if there are no records.
        """
        if not records:
            raise DataError(f"{source}: has no rows. Check that it was written completely.")
        names = dict.fromkeys(name for record in records for name in record)
        return cls(source, {name: [record.get(name) for record in records] for name in names}, place)

    def select(self, rows: Sequence[int]) -> "Table":
        """Some of the rows, with the places that they have in the source."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        dataset = None if self.dataset is None else self.dataset.select(rows)
        return Table(self.source, columns, lambda index: self.place(rows[index]), dataset)

    def to_dataset(self, without: str | None = None) -> Dataset:
        """The rows as a [`~datasets.Dataset`], leaving out the column `without`.

        Raises:
            DataError: naming the first row whose value does not fit the type of the rows above it, or a field whose
                name Arrow cannot hold.
        """
        if self.dataset is not None:
            return self.dataset.remove_columns([without] if without else [])
        columns = {name: values for name, values in self.columns.items() if name != without}
        for name, values in columns.items():
            if "\0" in name:  # where Arrow ends it
                raise DataError(f"{self.place(0)}: the name of field {name[:60]!r} has a null character. Rename it.")
            reason = _misfit(values)
            if reason:
                row = bisect_left(
                    range(len(values)), True, key=lambda last, cells=values: bool(_misfit(cells[: last + 1]))
                )
                raise DataError(
                    f"{self.place(row)}: field {name!r} is {shortened(values[row])}, which does not fit its column "
                    f"({reason}). Give the column values of one type in all rows, or remove it."
                )
        return Dataset.from_dict(columns)


def plain_texts(table: Table, column: str) -> Dataset:
    """Return a column of texts alone, without those that are empty.

    Raises:
        DataError: if a value is no text, or all are empty.
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
    """Why the values cannot be one Arrow column, or None if they can."""
    try:
        found = pa.array(values).type
    except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
        return str(error)
    inside, levels = [found], 0
    while inside and levels <= _MOST_LEVELS:
        inside = [each.field(number).type for each in inside for number in range(each.num_fields)]
        levels += 1
    return f"it is nested in more than {_MOST_LEVELS} levels" if inside else None


def read_file(path: Path, max_rows: int | None = None) -> Table:
    """Read a file of examples, at most the first `max_rows` of them.

    - `.jsonl`, `.jsonl.gz`: one JSON object a line; blank lines are skipped.
    - `.json`: one array of objects.
    - `.csv`: a header and comma-separated text; an empty cell is a missing value, blank lines are skipped.
    - `.parquet`.

    Text is UTF-8, with or without a byte order mark.

    Raises:
        DataError: if the extension is another, the file cannot be read or has no rows, with the line or row.
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
    """Read a `.txt` or `.txt.gz` file, one document a line, as a column `text`; blank lines are skipped.

    Raises:
        DataError: if the file cannot be read or has no text, with the line.
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
    """Whether JSON that was decoded from UTF-8 has surrogates, which can only be escaped ones: two a character."""
    return _SURROGATE.search(text) is not None


def check_characters(record: dict[str, Any], place: str) -> None:
    """Refuse half a surrogate pair, which JSON can escape but UTF-8 cannot write.

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
    """With the column; a number of thousands of digits and deep nesting have none."""
    if isinstance(error, json.JSONDecodeError):
        return f"column {error.colno}: not valid JSON ({error.msg})"
    return f"not JSON that can be read ({error})"


def _read_json_lines(path: Path, max_rows: int | None) -> Table:
    records, numbers = [], []
    filled = ((number, line) for number, line in _lines(path) if line.strip())
    for number, line in islice(filled, max_rows):
        try:
            record = parse_json(line.rstrip())
        except ValueError as error:
            raise DataError(
                f"{path}:{number}: {_json_problem(error)}; the line is {shortened(line.rstrip())}. Write one JSON "
                "object a line."
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"{path}:{number}: the line is {shortened(record)}, no JSON object. Write one object a line, like "
                '{"prompt": "..."}; a file that is one JSON array is named .json.'
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
            f"{path}:{getattr(error, 'lineno', 1)}: {_json_problem(error)}. A .json file is one array of objects; a "
            "file with one object a line is named .jsonl."
        ) from error
    if not isinstance(records, list):
        raise DataError(
            f"{path}:1: the file is {shortened(records)}, no JSON array. Write a list of objects, like "
            '[{"prompt": "..."}]; a file with one object a line is named .jsonl.'
        )

    def place(index: int) -> str:
        return f"{path}, row {index} (counting from 0)"

    records = records[:max_rows]
    to_check = has_surrogates(text)
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(
                f'{place(index)}: is {shortened(record)}, no object. Write objects, like {{"prompt": "..."}}.'
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
            raise DataError(f"{path}:1: the header has a name twice: {listing(header)}. Rename or drop a column.")
        # a quoted cell may span lines, so a row starts on the line after the one that the reader reached before it
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
    except (pa.ArrowException, OSError, RecursionError, ValueError) as error:  # the latter two for the schema
        raise DataError(f"{path}: cannot be read as Parquet ({error}). Copy or write the file again.") from error
    return Table.from_dataset(str(path), dataset, max_rows)
