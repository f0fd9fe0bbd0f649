"""Examples to train on and to evaluate with: formats, checks with file and line, and the E2E NLG data."""

from .corpus import load_corpus
from .e2e import load_e2e
from .errors import DataError
from .load import check_prompt_lengths, load_examples, unique_prompts

__all__ = ["DataError", "check_prompt_lengths", "load_corpus", "load_e2e", "load_examples", "unique_prompts"]
