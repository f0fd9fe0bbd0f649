"""A report as one self-contained HTML page."""

import html
import re
from collections.abc import Sequence

from .plots import plot_svg
from .report import Report, Sample, Section, Table, best_students, format_cells, shown_outputs
from .style import STYLE


def html_page(report: Report) -> str:
    """The report as HTML: figures inside, nothing to load, with a table of contents if there is more than one part."""
    facts = "".join(f"<div><dt>{_h(name)}</dt><dd>{_h(value)}</dd></div>" for name, value in report.facts)
    anchors = _anchors([section.heading for section in report.sections])
    sections = "".join(_section(section, anchor) for section, anchor in zip(report.sections, anchors, strict=True))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # the browser itself then refuses any load, so the file stays self-contained whatever a model wrote into it
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{_h(report.title)}</title><style>{STYLE}</style></head><body><main>"
        f'<h1>{_h(report.title)}</h1><p class="summary">{_h(report.summary)}</p><dl>{facts}</dl>'
        f"{_contents(report.sections, anchors)}{sections}</main></body></html>\n"
    )


def _anchors(headings: Sequence[str]) -> list[str]:
    """A name for each heading, unlike any other in the page."""
    return [f"part-{number}-{re.sub(r'[^a-z0-9]+', '-', each.lower())}" for number, each in enumerate(headings)]


def _contents(sections: Sequence[Section], anchors: Sequence[str]) -> str:
    if len(sections) < 2:
        return ""
    links = "".join(
        f'<li><a href="#{anchor}">{_h(section.heading)}</a></li>'
        for section, anchor in zip(sections, anchors, strict=True)
    )
    return f'<nav aria-label="Contents"><ul>{links}</ul></nav>'


def _section(section: Section, anchor: str) -> str:
    parts = [f'<section id="{anchor}"><h2>{_h(section.heading)}</h2>']
    for heading, table in section.tables.items():
        parts += [f"<h3>{_h(heading)}</h3>" if heading else "", _table(table)]
    if section.notes:
        parts.append(f'<ul class="notes">{"".join(f"<li>{_h(note)}</li>" for note in section.notes)}</ul>')
    if section.figures:
        figures = "".join(
            f"<figure><figcaption>{_h(plot.title)}</figcaption>{plot_svg(plot, f'{anchor}-figure-{number}')}</figure>"
            for number, plot in enumerate(section.figures)
        )
        parts.append(f'<div class="figures">{figures}</div>')
    for heading, samples in section.samples.items():
        parts += [f"<h3>{_h(heading)}</h3>" if heading else "", *map(_sample, samples)]
    return "".join(parts) + "</section>"


def _table(table: Table) -> str:
    best = best_students(table)
    head = "".join(f'<th scope="col">{_heading(column.heading)}</th>' for column in table.columns)
    body = ""
    for row in table.rows:
        cells = ""
        for text, column in zip(format_cells(row, table), table.columns, strict=True):
            kind = ' class="best"' if (row.name, column.key) in best else ""
            mark = f'<span class="mark">{_h(row.marks[column.key])}</span>' if row.marks.get(column.key) else ""
            cells += f"<td{kind}>{_h(text)}{mark}</td>"
        kind = ' class="teacher"' if row.is_teacher else ""
        body += f'<tr{kind}><th scope="row">{_h(row.name)}</th>{cells}</tr>'
    note = f'<p class="note">{_h(table.note)}</p>' if table.note else ""
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{note}"
    )


def _heading(text: str) -> str:
    """Folded between its words alone, and not at the hyphen of Rouge-L."""
    return " ".join(f"<span>{_h(word)}</span>" for word in text.split(" "))


def _sample(sample: Sample) -> str:
    references = "".join(f'<p class="reference text">A reference: {_h(text)}</p>' for text in sample.references[:1])
    answers = ""
    for name, text in shown_outputs(sample):
        scores = f'<p class="scores">{_h(sample.scores[name])}</p>' if sample.scores.get(name) else ""
        answers += f'<div><h4>{_h(name)}</h4>{scores}<p class="text" tabindex="0">{_h(text)}</p></div>'
    return (
        f'<article><p class="prompt text" tabindex="0">{_h(sample.prompt)}</p>{references}'
        f'<div class="answers">{answers}</div></article>'
    )


def _h(text: str) -> str:
    return html.escape(text.strip())
