"""Report of a comparison: `report.html` (one self-contained file), `report.md` with figures, and a terminal table."""

import html
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .metrics import MeanInterval
from .plots import Curve, curve_png, curve_svg
from .style import STYLE

Cell = MeanInterval | float | str


@dataclass(frozen=True)
class Column:
    """A measure: its key in the rows, its heading, which direction is better, and the number of decimals."""

    key: str
    label: str
    better: Literal["higher", "lower", "teacher"]
    digits: int = 1


@dataclass(frozen=True)
class Row:
    """A model: its name and a cell for each column's key; `is_teacher` marks the one that students learn from."""

    name: str
    cells: dict[str, Cell]
    is_teacher: bool = False


@dataclass(frozen=True)
class Table:
    """Models by measures.

    Raises:
        ValueError: if a row has a cell that no column shows.
    """

    columns: list[Column]
    rows: list[Row]

    def __post_init__(self) -> None:
        keys = [column.key for column in self.columns]
        for row in self.rows:
            if unknown := sorted(set(row.cells) - set(keys)):
                raise ValueError(f"Row {row.name!r} has cells {unknown} that no column shows; the columns are {keys}.")


@dataclass(frozen=True)
class Sample:
    """One prompt with its references and each model's answer."""

    prompt: str
    references: list[str]
    outputs: dict[str, str]


@dataclass(frozen=True)
class Report:
    """What [`write_report`] writes.

    Attributes:
        title, summary (`str`): heading and the result in one or two sentences.
        facts (`list[tuple[str, str]]`): what was trained, on what, for how long.
        table ([`Table`]): the comparison.
        curves (`list[Curve]`): small multiples over training.
        samples (`list[Sample]`): answers side by side.
        notes (`list[str]`): how to read the numbers.
        details (`dict[str, Table]`): further tables by their headings.
    """

    title: str
    summary: str
    facts: list[tuple[str, str]]
    table: Table
    curves: list[Curve] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Table] = field(default_factory=dict)


def format_cell(cell: Cell, digits: int) -> str:
    """`53.5 ± 0.4` where the interval is about symmetric, `53.5 [52.9, 53.9]` where it is not.

    About symmetric: its two halves round to the same, or differ by at most a quarter of the larger, which is shown.
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


def format_table(table: Table) -> str:
    """The table as aligned plain text for a terminal."""
    lines = [["", *(column.label for column in table.columns)]]
    lines += [[row.name, *_cells(row, table)] for row in table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def align(line: list[str]) -> str:
        return "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()

    return "\n".join([align(lines[0]), "  ".join("─" * width for width in widths), *map(align, lines[1:])])


def best_students(table: Table) -> set[tuple[str, str]]:
    """(row name, column key) of the best student in each column with a better direction; all that round alike."""
    best = set()
    for column in table.columns:
        values = {
            row.name: round(value, column.digits)
            for row in table.rows
            if not row.is_teacher and math.isfinite(value := _value(row.cells.get(column.key)))
        }
        if values and column.better != "teacher":
            target = (max if column.better == "higher" else min)(values.values())
            best |= {(name, column.key) for name, value in values.items() if value == target}
    return best


def write_report(folder: Path, report: Report) -> None:
    """Write `report.html`, `report.md` and `figures/` into `folder`; each file appears complete or not at all."""
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for number, curve in enumerate(report.curves):
        _write(figures / f"curve_{number}.png", curve_png(curve))
    _write(folder / "report.md", _markdown(report).encode())
    _write(folder / "report.html", _html(report).encode())


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _value(cell: Cell | None) -> float:
    if cell is None or isinstance(cell, str):
        return math.nan
    return cell.mean if isinstance(cell, MeanInterval) else float(cell)


def _cells(row: Row, table: Table) -> list[str]:
    return [format_cell(row.cells.get(column.key, "–"), column.digits) for column in table.columns]


def _markdown(report: Report) -> str:
    lines = [f"# {_md(report.title)}", "", _md(report.summary), "", "| | |", "|---|---|"]
    lines += [f"| {_md(name)} | {_md(value)} |" for name, value in report.facts]
    lines += ["", "## Results", "", *_table_markdown(report.table)]
    for heading, table in report.details.items():
        lines += ["", f"### {_md(heading)}", "", *_table_markdown(table)]
    lines += ["", *(f"- {_md(note)}" for note in report.notes)]
    if report.curves:
        lines += ["", "## Training", ""]
        lines += [f"![{_md(curve.title)}](figures/curve_{number}.png)" for number, curve in enumerate(report.curves)]
    if report.samples:
        lines += ["", "## Answers side by side", ""]
    for sample in report.samples:
        lines += [f"### {_md(sample.prompt.strip())}", "", "| | |", "|---|---|"]
        lines += [f"| {_md(name)} | {_md(text)} |" for name, text in _outputs(sample)]
        lines += [f"| *a reference* | *{_md(text)}* |" for text in sample.references[:1]] + [""]
    return "\n".join(lines) + "\n"


def _table_markdown(table: Table) -> list[str]:
    best = best_students(table)
    lines = ["| model | " + " | ".join(_md(column.label) for column in table.columns) + " |"]
    lines += ["|---|" + "---:|" * len(table.columns)]
    for row in table.rows:
        texts = [
            f"**{_md(text)}**" if (row.name, column.key) in best else _md(text)
            for text, column in zip(_cells(row, table), table.columns, strict=True)
        ]
        lines.append(f"| {_md(row.name)} | " + " | ".join(texts) + " |")
    return lines


def _md(text: str) -> str:
    escaped = re.sub(r"([\\`*_~$|\[\]])", r"\\\1", html.escape(text.strip(), quote=False))
    return "<br>".join(escaped.splitlines())


def _outputs(sample: Sample) -> list[tuple[str, str]]:
    return [(name, text if text.strip() else "(empty)") for name, text in sample.outputs.items()]


def _html(report: Report) -> str:
    facts = "".join(f"<div><dt>{_h(name)}</dt><dd>{_h(value)}</dd></div>" for name, value in report.facts)
    details = "".join(
        f'<h3 class="task">{_h(heading)}</h3>{_table_html(table)}' for heading, table in report.details.items()
    )
    notes = "".join(f"<li>{_h(note)}</li>" for note in report.notes)
    figures = "".join(
        f"<figure><figcaption>{_h(curve.title)}</figcaption>{curve_svg(curve, f'curve-{number}')}</figure>"
        for number, curve in enumerate(report.curves)
    )
    sections = [f'<h2>Training</h2><div class="figures">{figures}</div>'] if report.curves else []
    if report.samples:
        sections.append("<h2>Answers side by side</h2>" + "".join(map(_sample_html, report.samples)))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # the browser itself then refuses any load, so the file stays self-contained whatever a model wrote into it
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{_h(report.title)}</title><style>{STYLE}</style></head><body><main>"
        f'<h1>{_h(report.title)}</h1><p class="summary">{_h(report.summary)}</p><dl>{facts}</dl>'
        f"<h2>Results</h2>{_table_html(report.table)}{details}"
        f'<ul class="notes">{notes}</ul>{"".join(sections)}</main></body></html>\n'
    )


def _table_html(table: Table) -> str:
    best = best_students(table)
    head = "".join(f"<th>{_h(column.label)}{_arrow(column)}</th>" for column in table.columns)
    body = ""
    for row in table.rows:
        cells = "".join(
            f'<td class="best">{_h(text)}</td>' if (row.name, column.key) in best else f"<td>{_h(text)}</td>"
            for text, column in zip(_cells(row, table), table.columns, strict=True)
        )
        kind = ' class="teacher"' if row.is_teacher else ""
        body += f"<tr{kind}><th>{_h(row.name)}</th>{cells}</tr>"
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _sample_html(sample: Sample) -> str:
    answers = "".join(f"<div><h4>{_h(name)}</h4><p>{_h(text)}</p></div>" for name, text in _outputs(sample))
    reference = "".join(f'<p class="reference">A reference: {_h(text)}</p>' for text in sample.references[:1])
    return f'<article><h3>{_h(sample.prompt.strip())}</h3><div class="answers">{answers}</div>{reference}</article>'


def _arrow(column: Column) -> str:
    arrow, title = {
        "higher": ("↑", "higher is better"),
        "lower": ("↓", "lower is better"),
        "teacher": ("≈", "closer to the teacher is better"),
    }[column.better]
    return f'&nbsp;<span title="{title}">{arrow}</span>'


def _h(text: str) -> str:
    return html.escape(text.strip())
