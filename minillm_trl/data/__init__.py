"""Examples to train on and to evaluate with: formats, checks with file and line, and the E2E NLG data."""

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
    # `datasets` takes a second to import, and much of what imports from this package reads no examples
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
