"""Write a report: `report.html` (self-contained), `report.md` with figures, and `comparison.csv`.

The pages are jinja templates in `templates/`; edit these to change the layout.
"""

import csv
import html
import io
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..files.whole_files import make_folder, write_whole
from .plots import plot_png, plot_svg
from .report import Record, Report, best_students, format_cells

_TEMPLATES = FileSystemLoader(Path(__file__).parent / "templates")


def write_report(folder: Path, report: Report) -> None:
    """Write the files of a report; every file is written atomically.

    Args:
        folder (`Path`): folder for `report.html`, `report.md`, `figures/` and, if the report has records,
            `comparison.csv`.
        report ([`~evaluation.report.Report`]): report to write.
    """
    make_folder(folder / "figures")
    for number, section in enumerate(report.sections):
        for figure, plot in enumerate(section.figures):
            write_whole(folder / _figure_path(number, figure), plot_png(plot))
    if report.records:
        write_whole(folder / "comparison.csv", _csv(report.records).encode())
    write_whole(folder / "report.md", markdown_page(report).encode())
    write_whole(folder / "report.html", html_page(report).encode())


def html_page(report: Report) -> str:
    """Return the report as HTML, with a table of contents if it has more than one section."""
    pages = _environment(autoescape=True, finalize=_stripped)
    headings = [re.sub(r"[^a-z0-9]+", "-", section.heading.lower()) for section in report.sections]
    anchors = [f"part-{number}-{heading}" for number, heading in enumerate(headings)]  # unique within the page
    return pages.get_template("report.html.jinja").render(report=report, anchors=anchors, plot_svg=plot_svg)


def markdown_page(report: Report) -> str:
    """Return the report as Markdown, which refers to the figures that [`write_report`] writes."""
    pages = _environment(finalize=_escape_markdown)
    return pages.get_template("report.md.jinja").render(report=report, figure_path=_figure_path)


def _environment(**options: Any) -> Environment:
    environment = Environment(loader=_TEMPLATES, undefined=StrictUndefined, keep_trailing_newline=True, **options)
    environment.globals.update(best_students=best_students, format_cells=format_cells)
    return environment


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def _escape_markdown(value: Any) -> Any:
    """Escape a text so that Markdown shows it literally and on one line; `Markup` is not escaped."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    escaped = re.sub(r"([\\`*_~$|\[\]])", r"\\\1", html.escape(value.strip(), quote=False))
    return "<br>".join(escaped.splitlines())


def _figure_path(section: int, figure: int) -> str:
    return f"figures/figure_{section}_{figure}.png"


def _csv(records: list[Record]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(Record._fields)
    writer.writerows(records)
    return buffer.getvalue()
