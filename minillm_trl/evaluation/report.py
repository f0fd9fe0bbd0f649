"""The parts of a report, and its tables as text. `report_files.py` writes reports."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

from .plots import Plot
from .statistics import MeanInterval

Cell = MeanInterval | float | str


@dataclass(frozen=True)
class Column:
    """A measure: its key in the rows, its label, which direction is better (if any), and the number of decimals."""

    key: str
    label: str
    better: Literal["higher", "lower", "teacher"] | None
    digits: int = 1

    @property
    def heading(self) -> str:
        """The label with an arrow in the better direction; ≈ means closer to the teacher."""
        arrow = {"higher": "↑", "lower": "↓", "teacher": "≈", None: ""}[self.better]
        return f"{self.label}\N{NO-BREAK SPACE}{arrow}" if arrow else self.label


@dataclass(frozen=True)
class Row:
    """A model: its name, its cells by column key, and whether it is a teacher.

    `marks` are appended to cells, by key; the table's note explains them.
    """

    name: str
    cells: dict[str, Cell]
    is_teacher: bool = False
    marks: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Models by measures, with a note that explains the marks.

    Raises:
        ValueError: if a row has a cell without a column.
    """

    columns: list[Column]
    rows: list[Row]
    note: str = ""

    def __post_init__(self) -> None:
        keys = [column.key for column in self.columns]
        for row in self.rows:
            if unknown := sorted(set(row.cells) - set(keys)):
                raise ValueError(f"Row {row.name!r} has cells {unknown} without a column. Columns: {keys}.")


@dataclass(frozen=True)
class Sample:
    """One prompt with its references, the answer of each model, and texts with the answers' scores."""

    prompt: str
    references: list[str]
    outputs: dict[str, str]
    scores: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        heading (`str`): heading of the section.
        tables (`dict[str, Table]`): tables by heading; an empty heading is not shown.
        figures (`list[Plot]`): plots.
        samples (`dict[str, list[Sample]]`): answers side by side, by a heading that says how the prompts were chosen.
        notes (`list[str]`): paragraphs.
    """

    heading: str
    tables: dict[str, Table] = field(default_factory=dict)
    figures: list[Plot] = field(default_factory=list)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Record(NamedTuple):
    """One measure of one model on one task: a row of `comparison.csv`. None for values that do not exist.

    `decoding` says how completions were decoded: `temperature_0.7`, `greedy`, the same after `validation/`, or for a
    value of an interpolated curve `entropy_0.29` and `shared_entropies`.
    """

    model: str
    task: str
    measure: str
    mean: float
    low: float | None = None
    high: float | None = None
    standard_error: float | None = None
    n: int | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    decoding: str | None = None


def make_record(model: str, task: str, measure: str, cell: MeanInterval | float, decoding: str | None) -> Record:
    """Return the record of a mean with its interval, or of a number without one."""
    if not isinstance(cell, MeanInterval):
        return Record(model, task, measure, cell, decoding=decoding)
    mean, low, high, n, error = cell
    return Record(model, task, measure, mean, low, high, error, n, decoding=decoding)


@dataclass(frozen=True)
class Report:
    """Contents of a report, for [`~evaluation.report_files.write_report`].

    Attributes:
        title, summary (`str`): title, and the result in one or two sentences.
        facts (`list[tuple[str, str]]`): names and values of settings and data.
        sections (`list[Section]`): sections in order.
        records (`list[Record]`): all numbers, for `comparison.csv`.
    """

    title: str
    summary: str
    facts: list[tuple[str, str]]
    sections: list[Section]
    records: list[Record] = field(default_factory=list)


def format_cell(cell: Cell, digits: int) -> str:
    """Format a cell as `53.5 ± 0.4` if its interval is nearly symmetric, else as `53.5 [52.9, 53.9]`.

    Nearly symmetric: both halves round to the same number, or differ by at most a quarter of the larger half. The
    larger half is shown.
    """
    if isinstance(cell, str):
        return cell
    if not isinstance(cell, MeanInterval):
        return f"{cell:z.{digits}f}"
    mean, low, high = (f"{value:z.{digits}f}" for value in cell[:3])
    smaller, larger = sorted((cell.mean - cell.low, cell.high - cell.mean))
    if f"{smaller:z.{digits}f}" == f"{larger:z.{digits}f}" or smaller >= 0.75 * larger:
        return f"{mean} ± {larger:z.{digits}f}"
    return f"{mean} [{low}, {high}]"


def format_cells(row: Row, table: Table) -> list[str]:
    """Return the row's cells as texts, one per column; a dash for a missing cell."""
    return [format_cell(row.cells.get(column.key, "–"), column.digits) for column in table.columns]


def format_table(table: Table) -> str:
    """Return the table as aligned plain text for a terminal; headings wider than their columns are wrapped."""
    rows = []
    for row in table.rows:
        marks = [row.marks.get(column.key, "") for column in table.columns]
        places = [max(len(other.marks.get(column.key, "")) for other in table.rows) for column in table.columns]
        cells = zip(format_cells(row, table), marks, places, strict=True)
        rows.append([row.name, *(text + mark.ljust(place) for text, mark, place in cells)])
    widest = [max(map(len, texts)) for texts in zip(*rows, strict=True)]
    labels = ["", *(column.heading for column in table.columns)]
    wrap = partial(textwrap.wrap, break_long_words=False, break_on_hyphens=False)
    wrapped = [wrap(label, max(12, width)) for label, width in zip(labels, widest, strict=True)]
    height = max(map(len, wrapped))
    headings = [[""] * (height - len(lines)) + lines for lines in wrapped]
    widths = [max(width, *map(len, lines)) for lines, width in zip(headings, widest, strict=True)]

    def align(line: Sequence[str]) -> str:
        numbers = [text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True)]
        return "  ".join([line[0].ljust(widths[0]), *numbers]).rstrip()

    rule = "  ".join("─" * width for width in widths)
    note = [table.note] if table.note else []
    return "\n".join([*map(align, zip(*headings, strict=True)), rule, *map(align, rows), *note])


def format_sections(sections: list[Section]) -> str:
    """Return all tables of a report as plain text with headings."""
    texts = []
    for section in sections:
        for heading, table in section.tables.items():
            texts.append(f"{section.heading}: {heading}" if heading else section.heading)
            texts[-1] += f"\n{format_table(table)}"
    return "\n\n".join(texts)


def best_students(table: Table) -> set[tuple[str, str]]:
    """Return (row name, column key) of the best student in each directed column, including ties after rounding."""
    best = set()
    for column in table.columns:
        values = {
            row.name: round(value, column.digits)
            for row in table.rows
            if not row.is_teacher and math.isfinite(value := _value(row.cells.get(column.key)))
        }
        if values and column.better in ("higher", "lower"):
            target = (max if column.better == "higher" else min)(values.values())
            best |= {(name, column.key) for name, value in values.items() if value == target}
    return best


def _value(cell: Cell | None) -> float:
    if cell is None or isinstance(cell, str):
        return math.nan
    return cell.mean if isinstance(cell, MeanInterval) else float(cell)
