"""Datasets: loading with validation that names file, line and field, and the E2E data that ships with the package."""

from .e2e import load_e2e
from .errors import DataError
from .load import check_prompt_lengths, load_examples, unique_prompts

__all__ = ["DataError", "check_prompt_lengths", "load_e2e", "load_examples", "unique_prompts"]
