"""A report as Markdown, with figures as files."""

import html
import re
from collections.abc import Callable, Sequence

from .report import Report, Sample, Section, Table, best_students, format_cells, shown_outputs


def markdown_page(report: Report, figure_path: Callable[[int, int], str]) -> str:
    """The report as Markdown.

    Args:
        report ([`~evaluation.report.Report`]): what to write.
        figure_path (`Callable[[int, int], str]`): where the figure lies, by the numbers of its section and of the
            figure in it.
    """
    lines = [f"# {_md(report.title)}", "", _md(report.summary), "", "| | |", "|---|---|"]
    lines += [f"| {_md(name)} | {_md(value)} |" for name, value in report.facts]
    for number, section in enumerate(report.sections):
        paths = [figure_path(number, figure) for figure in range(len(section.figures))]
        lines += ["", f"## {_md(section.heading)}", *_section(section, paths)]
    return "\n".join(lines) + "\n"


def _section(section: Section, paths: Sequence[str]) -> list[str]:
    lines = []
    for heading, table in section.tables.items():
        lines += (["", f"### {_md(heading)}"] if heading else []) + ["", *_table(table)]
    if section.notes:
        lines += ["", *(f"- {_md(note)}" for note in section.notes)]
    if section.figures:
        lines += [""]
        lines += [f"![{_md(plot.title)}]({path})" for plot, path in zip(section.figures, paths, strict=True)]
    for heading, samples in section.samples.items():
        lines += ["", f"### {_md(heading)}"] if heading else []
        for sample in samples:
            lines += ["", *_sample(sample)]
    return lines


def _table(table: Table) -> list[str]:
    best = best_students(table)
    lines = ["| model | " + " | ".join(_md(column.heading) for column in table.columns) + " |"]
    lines += ["|---|" + "---:|" * len(table.columns)]
    for row in table.rows:
        texts = []
        for text, column in zip(format_cells(row, table), table.columns, strict=True):
            texts.append(f"**{_md(text)}**" if (row.name, column.key) in best else _md(text))
            texts[-1] += _md(row.marks.get(column.key, ""))
        lines.append(f"| {_md(row.name)} | " + " | ".join(texts) + " |")
    return lines + (["", _md(table.note)] if table.note else [])


def _sample(sample: Sample) -> list[str]:
    lines = [f"#### {_md(sample.prompt)}", "", "| | |", "|---|---|"]
    lines += [f"| *a reference* | *{_md(text)}* |" for text in sample.references[:1]]
    for name, text in shown_outputs(sample):
        scores = f"<br>*{_md(sample.scores[name])}*" if sample.scores.get(name) else ""
        lines.append(f"| {_md(name)}{scores} | {_md(text)} |")
    return lines


def _md(text: str) -> str:
    escaped = re.sub(r"([\\`*_~$|\[\]])", r"\\\1", html.escape(text.strip(), quote=False))
    return "<br>".join(escaped.splitlines())
