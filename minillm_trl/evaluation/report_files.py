"""Writes a report: `report.html` (one self-contained file), `report.md` with figures, and `comparison.csv`."""

import csv
import io
from pathlib import Path

from ..whole_files import make_folder, write_whole
from .plots import plot_png
from .report import Record, Report
from .report_html import html_page
from .report_markdown import markdown_page


def write_report(folder: Path, report: Report) -> None:
    """Write the files into `folder`; each appears complete or not at all.

    Args:
        folder (`Path`): gets `report.html`, `report.md`, `figures/` and, if the report has records, `comparison.csv`.
        report ([`~evaluation.report.Report`]): what to write.
    """
    make_folder(folder / "figures")
    for number, section in enumerate(report.sections):
        for figure, plot in enumerate(section.figures):
            write_whole(folder / _figure_path(number, figure), plot_png(plot))
    if report.records:
        write_whole(folder / "comparison.csv", _csv(report.records).encode())
    write_whole(folder / "report.md", markdown_page(report, _figure_path).encode())
    write_whole(folder / "report.html", html_page(report).encode())


def _figure_path(section: int, figure: int) -> str:
    return f"figures/figure_{section}_{figure}.png"


def _csv(records: list[Record]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(Record._fields)
    writer.writerows(records)
    return buffer.getvalue()
