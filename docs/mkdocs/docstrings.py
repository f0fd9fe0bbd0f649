"""A griffe extension that makes Markdown of this package's docstrings.

Their sections (`Args:`, `Returns:`, ...) are in the style of Hugging Face's: types in backticks, which griffe's own
parsers take for annotations, and references as [`Name`].
"""

import re
from collections.abc import Callable
from textwrap import dedent
from typing import Any

from griffe import Extension, Module, NameResolutionError, Object

_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example):\n((?:[ ]{4}.*\n|\n)+)", flags=re.MULTILINE)
_ITEM = re.compile(r"^(?P<names>[\w., `*]+?)(?: \((?P<type>.+?)\))?:(?:\s+|$)(?P<text>.*)", flags=re.DOTALL)
_REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![\[(])")


def to_markdown(docstring: str, path_of: Callable[[str], str]) -> str:
    """The docstring with its sections as bold titles over lists, and its references as optional links of autorefs.

    Args:
        docstring (`str`): text without indentation.
        path_of (`Callable`): the full path of a name that stands in a reference.
    """
    text = _SECTION.sub(lambda found: f"**{found[1]}**\n\n{_section(found[1], dedent(found[2]))}\n", docstring + "\n")

    def refer(found: re.Match) -> str:
        shown = found[2].rsplit(".", 1)[-1] if found[1] else found[2]
        return f'<autoref identifier="{path_of(found[2])}" optional><code>{shown}</code></autoref>'

    return _REFERENCE.sub(refer, text).strip()


def _section(title: str, body: str) -> str:
    if title in ("Returns", "Yields", "Example"):
        return body
    body = body.strip().replace("\n(*optional*)", " (*optional*)")  # names that fill a line, with what they are below
    items = re.split(r"\n(?=\S)", body)
    return "\n".join(f"- {_item(item)}" for item in items) + "\n"


def _item(item: str) -> str:
    found = _ITEM.match(item)
    if found is None:
        return item
    names = ", ".join(f"`{each}`" for each in found["names"].split(", "))
    kind = f" ({found['type']})" if found["type"] else ""
    return f"{names}{kind}: {found['text'].strip()}"


class MarkdownDocstrings(Extension):
    """Rewrites every docstring once griffe has loaded the package."""

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        _rewrite(pkg)


def _rewrite(obj: Object) -> None:
    if obj.docstring is not None:
        obj.docstring.value = to_markdown(obj.docstring.value, lambda name: _path(obj, name))
    for member in obj.members.values():
        if not member.is_alias:
            _rewrite(member)


def _path(obj: Object, name: str) -> str:
    try:
        return obj.resolve(name)
    except NameResolutionError:  # of another package, or not imported there
        return name
