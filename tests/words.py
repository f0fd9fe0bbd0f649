"""Lint the project's prose against the ban list of CONTRIBUTING.md.

    python tests/words.py            # all covered files
    python tests/words.py FILE ...   # these files

Prints `FILE:LINE: 'phrase': write INSTEAD` for each hit and exits with 1 if there is one. Where a banned phrase is
right (a quotation, another meaning), put `words: allow` into a comment on its line. Nothing is checked between the
comments `words: off` and `words: on`.
"""

import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

# The files to check: in .py their docstrings, comments and strings, in .ipynb their Markdown cells.
COVERED = (
    "*.md",
    "docs/**/*.md",
    "recipes/**/*.md",
    "notebooks/**/*.md",
    "notebooks/**/*.ipynb",
    "benchmarks/**/*.md",
    "benchmarks/*.py",
    ".github/**/*.md",
    ".github/**/*.yml",
    "minillm_trl/**/*.py",
)


class Banned(NamedTuple):
    """A phrase of the ban list.

    Args:
        name (`str`): the phrase as CONTRIBUTING.md lists it.
        pattern (`str`): regular expression of its forms; a space matches any white space, so that line breaks count.
        instead (`str`): what to write.
    """

    name: str
    pattern: str
    instead: str


BANNED = (
    Banned("anew", "anew", "again, or the exact verb: resample, recompute, restart"),
    Banned("lest", "lest", "so that ... not"),
    Banned("alike", "alike", "the same, equally, both"),
    Banned("of like", "of like", "of similar"),
    Banned("come by", "(?:come|comes|came|coming) by", "get, compute"),
    Banned("stands", "(?:stands?|stood|standing)(?! for| out| in for|-|alone)", "is, appears"),
    Banned("go on", "(?:go|goes|going|gone|went) on", "continue, resume"),
    Banned("spoilt", "spoil(?:t|s|ed|ing)?", "broken, degenerate"),
    Banned("beside", "beside", "next to, as well as, besides"),
    Banned("in its own turn", "in (?:its|their) (?:own )?turn", "one after another, or nothing"),
    Banned("for good", "for good(?! measure| reasons?| results)", "permanently"),
    Banned("mend", "mend(?:s|ed|ing)?", "fix"),
    Banned("lend", "(?:lend|lends|lending|lent)", "give, share"),
    Banned("what it has", "what (?:it|they) (?:has|have)(?! to| been)", "the name of the thing"),
    Banned("whatever the", "whatever (?:the|its|their|your)", "for any, regardless of"),
    Banned("none that", "none that", "the noun again: no run that"),
    Banned("at hand", "at hand", "available, or: we had no ..."),
    Banned("left alone", "left alone", "uninterrupted, unattended"),
    Banned("tell apart", r"(?:tell|tells|told|telling) (?:\w+ )?apart", "distinguish"),
    Banned("some thousand", r"some (?:dozens?|hundreds?|thousands?|\d+)", "a few thousand, about 80"),
    Banned("say of", r"sa(?:y|ys|id) (?:\w+ )?of", "say about"),
    Banned("Of ... (at the start of a sentence)", "(?-i:Of)(?! course)", "the subject first"),
)
_PATTERNS = [
    (banned, re.compile(rf"\b(?:{banned.pattern})\b".replace(" ", r"\s+"), re.IGNORECASE)) for banned in BANNED
]
_OFF = re.compile(r"words: off.*?(?:words: on|\Z)", re.DOTALL)
_NOT_PROSE = re.compile(
    r"```.*?```"  # blocks of code
    r"|`[^`\n]*(?:\n[^`\n]+)?`"  # code in a line, or broken over two
    r"|(?<=\])\([^)\s]*\)"  # targets of links
    r"|https?://\S+",
    re.DOTALL,
)


class Hit(NamedTuple):
    """A banned phrase in a file: its first line, its words, and its entry in the list."""

    line: int
    text: str
    banned: Banned


def hits(text: str) -> Iterator[Hit]:
    """Yield the banned phrases in prose, except within backticks, in the order of the list."""
    lines = text.splitlines()
    text = _NOT_PROSE.sub(_blank, _OFF.sub(_blank, text))
    for banned, pattern in _PATTERNS:
        for match in pattern.finditer(text):
            line = text.count("\n", 0, match.start())
            if "words: allow" not in lines[line]:
                yield Hit(line + 1, " ".join(match[0].split()), banned)


def prose(path: Path) -> str:
    """Return the prose of a file with its line numbers kept; for a notebook, its Markdown cells."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return _comments_and_strings(source)
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(source)["cells"] if cell["cell_type"] == "markdown"]
        return "\n\n".join("".join(cell["source"]) for cell in cells)
    return source


def covered() -> list[Path]:
    """Return the files that COVERED names."""
    return sorted({path for glob in COVERED for path in ROOT.glob(glob)})


def main(paths: list[str]) -> int:
    """Print the hits in the given files, or in all covered ones; return the exit status."""
    found = [(path, hit) for path in map(Path, paths or covered()) for hit in hits(prose(path))]
    for path, hit in sorted(found, key=lambda place: (place[0], place[1].line)):
        print(f"{path}:{hit.line}: '{hit.text}': write {hit.banned.instead}")
    return 1 if found else 0


def _blank(match: re.Match) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def _comments_and_strings(source: str) -> str:
    lines = source.splitlines()
    kept = [" " * len(line) for line in lines]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", None)):
            continue
        (first, start), (last, end) = token.start, token.end
        for row in range(first - 1, last):
            left, right = start if row == first - 1 else 0, end if row == last - 1 else len(lines[row])
            kept[row] = kept[row][:left] + lines[row][left:right] + kept[row][right:]
    text = re.sub(r"\{[^{}\n]*\}", _blank, "\n".join(kept))  # fields of f-strings
    text = re.sub(r'"(\s*\n\s*)f?"(?=\w)', r" \1 ", text)  # a sentence may run over several strings
    return re.sub(r"(?m)^(\s*)#", r"\1 ", text)  # a sentence may run over several comments


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
