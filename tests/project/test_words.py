"""The lint of the prose finds banned phrases where a reader sees them, and nothing else; the project has none."""

from pathlib import Path

import pytest
import words

GUIDE = words.ROOT / "CONTRIBUTING.md"
EXAMPLES = {
    "anew": "Sample anew.",
    "lest": "Lest it fails.",
    "alike": "both alike",
    "of like": "rows of like length",
    "come by": "states that sampling comes by",
    "stands": "the word stands before it",
    "go on": "a run goes on",
    "spoilt": "spoilt runs",
    "beside": "beside the loss",
    "in its own turn": "each in its own turn",
    "for good": "cast for good.",
    "mend": "how to mend it",
    "lend": "to lend a machine",
    "what it has": "leave what it has",
    "whatever the": "whatever the start",
    "none that": "none that fits",
    "at hand": "no GPU was at hand",
    "left alone": "a run left alone",
    "tell apart": "told them apart",
    "some thousand": "some thousand rows",
    "say of": "says nothing of it",
    "Of ... (at the start of a sentence)": "Of the runs none failed.",
}


def found(text: str) -> list[tuple[int, str]]:
    return [(hit.line, hit.banned.name) for hit in words.hits(text)]


@pytest.mark.parametrize("banned", words.BANNED, ids=lambda banned: banned.name)
def test_each_phrase_is_found_in_its_example_and_listed_in_the_guide(banned: words.Banned):
    assert found(f"First line.\n{EXAMPLES[banned.name]}\n") == [(2, banned.name)]
    assert f"\n| {banned.name} | {banned.instead} |\n" in GUIDE.read_text()


@pytest.mark.parametrize(
    "text",
    [
        "`TEACHER` stands for a name. Stand-ins stand in for others and stand out.",
        "Of course it blends; besides, the calendar is in good order, for good reason.",
        "It has been going; what it has to do is clear. The amendment mentions length.",
        "the turn of the tool; in turn; the forest is unlike a mall",
        "`goes on` and\n```bash\necho goes on anew  # for good\n```\n[a link](docs/at%20hand/anew.md) https://x.y/anew",
    ],
)
def test_other_meanings_and_code_are_let_through(text: str):
    assert found(text) == []


def test_phrases_are_found_across_line_breaks_and_at_the_line_where_they_start():
    assert found("A run\ngoes\non and is told\napart.") == [(2, "go on"), (3, "tell apart")]


def test_allow_concerns_its_line_and_off_all_up_to_on():
    assert found("anew <!-- words: allow -->\nanew") == [(2, "anew")]
    assert found("lest\n<!-- words: off -->\nanew\nmend <!-- words: on -->\nalike") == [(1, "lest"), (5, "alike")]


def test_of_python_only_comments_and_strings_are_read(tmp_path: Path):
    path = tmp_path / "code.py"
    code = [
        '"""Say what goes',
        'on."""',
        "",
        "beside = lend(spoilt)  # computed",
        "# anew",
        'x = f"{beside}"',
        '"at hand"',
    ]
    path.write_text("\n".join(code))
    assert found(words.prose(path)) == [(5, "anew"), (1, "go on"), (7, "at hand")]


def test_phrases_are_found_across_the_strings_of_one_message(tmp_path: Path):
    path = tmp_path / "code.py"
    path.write_text('raise ValueError(\n    f"The run {x} goes "\n    f"on from {y}, at "\n    "hand"\n)\n')
    assert found(words.prose(path)) == [(2, "go on"), (3, "at hand")]


def test_of_a_notebook_the_markdown_is_read(tmp_path: Path):
    path = tmp_path / "notebook.ipynb"
    cells = '[{"cell_type": "code", "source": ["lest"]}, {"cell_type": "markdown", "source": ["# A\\n", "go on"]}]'
    path.write_text(f'{{"cells": {cells}}}')
    assert found(words.prose(path)) == [(2, "go on")]


def test_command_prints_the_hits_of_the_files_and_fails_on_any(tmp_path: Path, capsys):
    path = tmp_path / "page.md"
    path.write_text("fine\nA run\ngoes on.\n")
    assert words.main([str(path)]) == 1
    assert capsys.readouterr().out == f"{path}:3: 'goes on': write continue, resume\n"
    path.write_text("A run resumes.\n")
    assert words.main([str(path)]) == 0


def test_covered_files_have_none():
    paths = words.covered()
    assert {words.ROOT / "README.md", GUIDE, words.ROOT / "docs/faq.md"} <= set(paths)
    assert [(path, hit) for path in paths for hit in words.hits(words.prose(path))] == []
