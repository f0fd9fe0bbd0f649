"""The report's files: complete, self-contained, escaped; its table to the character."""

import csv
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minillm_trl.evaluation.plots import COLOURS, Curve
from minillm_trl.evaluation.report import (
    Column,
    Record,
    Report,
    Row,
    Sample,
    Section,
    Table,
    best_students,
    format_cell,
    format_sections,
    format_table,
)
from minillm_trl.evaluation.report_files import write_report
from minillm_trl.evaluation.statistics import MeanInterval

ATTACK = "<script>alert(1)</script>"
TEXTS = (
    *("Title", "Summary", "E2E", "Results", "Quality", "Note"),
    *("Chosen", "prompt", "reference", "sft", "score", "Second"),
)
VOID = {"meta", "br", "link", "img"}


class Page(HTMLParser):
    """Checks nesting while parsing and collects tags, attributes and the text outside of style sheets."""

    @property
    def ids(self) -> list[str]:
        return [value for name, value in self.attributes if name == "id"]

    @property
    def links(self) -> list[str]:
        """What the page refers to."""
        return [value for name, value in self.attributes if name in ("src", "href", "xlink:href", "clip-path")]

    def __init__(self, source: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def interval(mean: float, low: float, high: float) -> MeanInterval:
    return MeanInterval(mean, low, high, 100, None)


@pytest.fixture(scope="module")
def table() -> Table:
    columns = [
        Column("rouge_l", "Rouge-L", "higher"),
        Column("reverse_kl", "Reverse KL", "lower"),
        Column("length", "Length", "teacher"),
    ]
    rows = [
        Row("Teacher", {"rouge_l": interval(54.8, 54.4, 55.2), "length": 26.9}, is_teacher=True),
        Row("SFT", {"rouge_l": interval(50.1, 49.7, 50.5), "reverse_kl": interval(12.7, 12.1, 14.0), "length": 29.6}),
        Row("MiniLLM", {"rouge_l": interval(53.5, 53.1, 53.9), "reverse_kl": 7.0, "length": 26.8}),
    ]
    return Table(columns, rows)


@pytest.fixture(scope="module")
def report(table) -> Report:
    curves = [
        Curve(title, "update", "nats", {"MiniLLM": ([0, 10, 20], [12.7, 9, 7])}, {"Teacher": 1.0})
        for title in ("Reverse KL", f"Second {ATTACK}")
    ]
    outputs = {"SFT": f"sft {ATTACK}", "MiniLLM": "a | b\nc"}
    sample = Sample(f"prompt {ATTACK}", [f"reference {ATTACK}"], outputs, {"SFT": f"score {ATTACK}"})
    sections = [
        Section(f"Results {ATTACK}", {f"Quality {ATTACK}": table}, notes=[f"Note {ATTACK}"]),
        Section("Training", figures=curves),
        Section("Answers", samples={f"Chosen {ATTACK}": [sample]}),
    ]
    return Report(f"Title {ATTACK}", f"Summary {ATTACK}", [("Data", f"E2E {ATTACK}")], sections)


@pytest.fixture(scope="module")
def written(report, tmp_path_factory) -> Path:
    """The folder with the report's files."""
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, report)
    return folder


def with_sections(report: Report, **changes) -> Report:
    """The report with one section of these parts."""
    return replace(report, sections=[Section("Results", **changes)])


@pytest.mark.parametrize(
    ("cell", "digits", "expected"),
    [
        (interval(53.5, 53.1, 53.9), 1, "53.5 ± 0.4"),
        (interval(12.7, 12.1, 14.0), 1, "12.7 [12.1, 14.0]"),
        (interval(0.5, 0.5, 0.5), 2, "0.50 ± 0.00"),
        (26.94, 1, "26.9"),
        ("–", 1, "–"),
    ],
)
def test_format_cell_shows_mean_and_interval(cell, digits, expected):
    assert format_cell(cell, digits) == expected


def test_format_table_aligns_names_left_and_numbers_right(table):
    lines = format_table(table).split("\n")
    assert len({len(line) for line in lines}) == 1
    assert lines[2].startswith("Teacher ")
    assert lines[3].split("  ")[0].strip() == "SFT"
    assert "53.5 ± 0.4" in lines[4]
    assert "–" in lines[2]  # the teacher's reverse KL to itself is not measured
    assert lines[4].index("7.0") + len("7.0") == lines[3].index("14.0]") + len("14.0]")


def test_best_students_leaves_the_teacher_out(table):
    assert best_students(table) == {("MiniLLM", "rouge_l"), ("MiniLLM", "reverse_kl")}


def test_write_report_writes_complete_files_only(report, tmp_path):
    write_report(tmp_path / "run", report)
    files = sorted(path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*.*"))
    assert len(files) == 4
    assert {"report.html", "report.md"} < set(files)
    assert [file for file in files if file.startswith("figures/") and file.endswith(".png")] == files[:2]


def test_write_report_twice_writes_the_same_bytes(report, tmp_path):
    for folder in ("a", "b"):
        write_report(tmp_path / folder, report)
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_report_html_is_well_formed_and_complete(written):
    page = Page((written / "report.html").read_text())
    assert page.tags.count("svg") == 2
    assert page.tags.count("table") == 1
    for text in ("53.5 ± 0.4", "12.7 [12.1, 14.0]", "Reverse KL", "update", "nats", "MiniLLM", "Teacher"):
        assert text in page.text


def test_report_html_escapes_every_text(written):
    source = (written / "report.html").read_text()
    page = Page(source)
    assert "script" not in page.tags
    for text in TEXTS:
        assert f"{text} {ATTACK}" in page.text, text


def test_report_html_loads_nothing(written):
    source = (written / "report.html").read_text()
    page = Page(source)
    assert not {"link", "img", "iframe", "script", "object"} & set(page.tags)
    assert all(link.startswith(("#", "url(#")) for link in page.links)
    assert "http://" not in source
    assert "https://" not in source
    assert "@import" not in source


def test_report_html_follows_the_colour_scheme(written):
    source = (written / "report.html").read_text()
    assert "@media (prefers-color-scheme: dark)" in source
    assert "currentColor" in source
    assert "#010203" not in source
    svg = source[source.index("<svg") : source.index("</svg>")]
    assert not re.search(r"fill: (#000000|black|white|#ffffff)", svg)
    assert "width=device-width" in source


def test_report_md_links_resolve_to_images(written):
    links = re.findall(r"!\[.*?\]\(([^)]+)\)", (written / "report.md").read_text())
    assert len(links) == 2
    for link in links:
        assert (written / link).read_bytes().startswith(b"\x89PNG")


def test_report_md_shows_the_best_student_in_bold(written):
    source = (written / "report.md").read_text()
    assert "| MiniLLM | **53.5 ± 0.4** | **7.0** | 26.8 |" in source
    assert "| Teacher | 54.8 ± 0.4 | – | 26.9 |" in source


def test_report_without_curves_and_samples_has_no_empty_sections(table, tmp_path):
    write_report(tmp_path, Report("Title", "Summary", [], [Section("Results", {"": table})]))
    page = Page((tmp_path / "report.html").read_text())
    assert not {"svg", "figure", "article", "nav", "h3"} & set(page.tags)
    assert "53.5 ± 0.4" in page.text


@pytest.mark.parametrize(
    ("cell", "digits", "expected"),
    [
        (interval(0.0, 0.0, 0.01), 2, "0.00 [0.00, 0.01]"),  # ± 0.01 would reach below zero
        (interval(53.5, 53.06, 53.96), 1, "53.5 ± 0.5"),  # halves 0.44 and 0.46: as good as equal
        (-0.04, 1, "0.0"),
    ],
)
def test_format_cell_at_the_edges_stays_honest(cell, digits, expected):
    assert format_cell(cell, digits) == expected


def test_best_students_takes_integers_skips_nan_and_keeps_ties():
    rows = [Row("nan", {"x": float("nan")}), Row("a", {"x": 7}), Row("b", {"x": 7.04}), Row("c", {"x": 6.0})]
    assert best_students(Table([Column("x", "X", "higher")], rows)) == {("a", "x"), ("b", "x")}


def test_table_with_a_cell_that_no_column_shows_is_refused():
    with pytest.raises(ValueError, match=r"Row 'SFT' has cells \['rouge'\] .* \['rouge_l'\]"):
        Table([Column("rouge_l", "Rouge-L", "higher")], [Row("SFT", {"rouge": 50.0})])


def test_report_with_dollar_signs_in_names_shows_them(report, tmp_path):
    curve = Curve("Cost", "x", r"$\nosuchcommand$", {"$5 student": ([0.0], [0.0])})
    write_report(tmp_path, with_sections(report, figures=[curve]))
    text = Page((tmp_path / "report.html").read_text()).text
    assert r"$\nosuchcommand$" in text
    assert "$5 student" in text


def test_report_html_ids_are_unique_and_resolve(written):
    page = Page((written / "report.html").read_text())
    assert len(page.ids) == len(set(page.ids))
    assert page.links
    assert {re.search(r"#([^)]+)", link).group(1) for link in page.links} <= set(page.ids)


def test_report_html_has_a_table_of_contents_of_its_parts(report, tmp_path):
    headings = ["dolly", "dolly", "Dolly!", "日本"]  # that would have one name
    write_report(tmp_path, replace(report, sections=[Section(heading) for heading in headings]))
    source = (tmp_path / "report.html").read_text()
    links = re.findall(r'<li><a href="#([^"]+)">([^<]+)</a></li>', source)
    assert [text for _, text in links] == headings
    for anchor, text in links:
        assert source.count(f'id="{anchor}"') == 1
        assert f'<section id="{anchor}"><h2>{text}</h2>' in source


def test_report_html_line_colours_are_defined_for_both_schemes(written):
    source = (written / "report.html").read_text()
    assert "var(--series-0)" in source
    for number in range(len(COLOURS)):
        assert source.count(f"--series-{number}: #") == 2
        assert f"--series-{number}: {COLOURS[number]}" in source


def test_report_html_forbids_loads_to_the_browser(written):
    assert "default-src 'none'" in (written / "report.html").read_text()


def test_report_shows_an_empty_output_as_such(report, tmp_path):
    write_report(tmp_path, with_sections(report, samples={"": [Sample("prompt", [], {"SFT": " \n"})]}))
    assert "(empty)" in Page((tmp_path / "report.html").read_text()).text
    assert "| SFT | (empty) |" in (tmp_path / "report.md").read_text()


def test_report_md_escapes_every_text(written):
    source = (written / "report.md").read_text()
    assert "<script" not in source
    for text in TEXTS:
        assert f"{text} &lt;script&gt;" in source, text
    assert r"| MiniLLM | a \| b<br>c |" in source
    assert "| SFT<br>*score &lt;script&gt;" in source


def test_report_md_shows_markup_of_outputs_as_text(report, tmp_path):
    sample = Sample("p", [], {"SFT": "*x* `y` [z](http://a) $k$ \\"})
    write_report(tmp_path, with_sections(report, samples={"": [sample]}))
    assert r"| SFT | \*x\* \`y\` \[z\](http://a) \$k\$ \\ |" in (tmp_path / "report.md").read_text()


@pytest.fixture
def marked() -> Table:
    columns = [Column("rouge_l", "Rouge-L", "higher"), Column("p", "p (Holm)", None)]
    rows = [
        Row("SFT", {"rouge_l": interval(50.1, 49.7, 50.5)}),
        Row("MiniLLM", {"rouge_l": interval(53.5, 53.1, 53.9), "p": "< 0.001"}, marks={"rouge_l": "*"}),
    ]
    return Table(columns, rows, note="* differs from SFT")


def test_marks_stand_behind_the_numbers_and_are_explained(report, marked, tmp_path):
    lines = format_table(marked).split("\n")
    assert lines[-1] == "* differs from SFT"
    assert lines[3].startswith("MiniLLM  53.5 ± 0.4*")
    assert lines[2].index("0.4") == lines[3].index("0.4")  # numbers stay below each other
    write_report(tmp_path, with_sections(report, tables={"": marked}))
    assert "| MiniLLM | **53.5 ± 0.4**\\* | < 0.001 |".replace("<", "&lt;") in (tmp_path / "report.md").read_text()
    source = (tmp_path / "report.html").read_text()
    assert '<td class="best">53.5 ± 0.4<span class="mark">*</span></td>' in source
    assert '<p class="note">* differs from SFT</p>' in source


def test_columns_have_an_arrow_to_what_is_better(table):
    headings = [column.heading for column in (*table.columns, Column("p", "p", None))]
    assert headings == ["Rouge-L\u00a0↑", "Reverse KL\u00a0↓", "Length\u00a0≈", "p"]


def test_headings_of_the_page_are_folded_between_words_alone(report, tmp_path):
    table = Table([Column("x", "dolly: Rouge-L", "higher")], [Row("SFT", {"x": 1.0})])
    write_report(tmp_path, with_sections(report, tables={"": table}))
    source = (tmp_path / "report.html").read_text()
    assert '<th scope="col"><span>dolly:</span> <span>Rouge-L\u00a0↑</span></th>' in source
    assert "thead span { white-space: nowrap; }" in source


def test_long_headings_are_folded_in_a_terminal():
    column = Column("kl", "Reverse KL of whole completions (nats)", None)
    assert format_table(Table([column], [Row("SFT", {"kl": 12.0})])).split("\n") == [
        "      Reverse KL",
        "        of whole",
        "     completions",
        "          (nats)",
        "───  ───────────",
        "SFT         12.0",
    ]


def test_format_sections_puts_each_table_below_its_heading(table):
    sections = [Section("All", {"": table}), Section("dolly", {"Quality": table}), Section("Training")]
    text = format_sections(sections)
    assert text == f"All\n{format_table(table)}\n\ndolly: Quality\n{format_table(table)}"


def test_records_are_written_as_they_are(report, tmp_path):
    records = [
        Record("a, b", "dolly", "rouge_l", 0.1 + 0.2, 0.0, 1.0, 0.25, 3, -1.0, -2.0, 0.5, 0.03, 0.06, "greedy"),
        Record("c", "dolly", "ece", 0.5),
    ]
    write_report(tmp_path, replace(report, records=records))
    with open(tmp_path / "comparison.csv", newline="") as file:
        header, first, second = csv.reader(file)
    assert header == list(Record._fields)
    assert header[:9] == ["model", "task", "measure", "mean", "low", "high", "standard_error", "n", "difference"]
    assert first[:3] == ["a, b", "dolly", "rouge_l"]
    assert [float(value) for value in first[3:-1]] == list(records[0][3:-1])  # to the last digit
    assert first[-1] == "greedy"
    assert second == ["c", "dolly", "ece", "0.5", *[""] * 10]


@pytest.mark.cli
@pytest.mark.smoke  # imports little more than matplotlib
def test_import_leaves_the_backend_of_matplotlib_alone():
    program = (
        "import matplotlib; matplotlib.use('svg'); import minillm_trl.evaluation.report_files; "
        "print(matplotlib.get_backend())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip().lower() == "svg"
