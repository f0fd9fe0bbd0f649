"""Training and evaluation data: file formats, checks that name file and line, and the E2E NLG data.

- `load`: examples from a file, folder or hub dataset; `corpus`: plain text for the language-modelling loss.
- `files`: one reader per format, each remembering the line of every example.
- `examples`, `conversations`: the checks of prompts, completions and references; whole conversations.
- `prepare`, `rows`, `instructions`, `templates`: what `prepare-data` reads, filters, splits and writes.
- `e2e`: the data set that ships with the package.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..files.messages import DataError

__all__ = ["DataError", "check_prompt_lengths", "load_corpus", "load_e2e", "load_examples", "unique_prompts"]

_EXPORTS = {
    "check_prompt_lengths": ".load",
    "load_corpus": ".corpus",
    "load_e2e": ".e2e",
    "load_examples": ".load",
    "unique_prompts": ".load",
}

if TYPE_CHECKING:
    from .corpus import load_corpus
    from .e2e import load_e2e
    from .load import check_prompt_lengths, load_examples, unique_prompts


def __getattr__(name: str) -> Any:
    # importing `datasets` takes a second, and many importers of this package never read examples
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
