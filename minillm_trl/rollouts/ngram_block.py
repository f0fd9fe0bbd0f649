"""Decoding without repeated n-grams, as the evaluation of the original code has it."""

from collections.abc import Sequence

import torch


class NgramBlock:
    """Excludes the tokens that would repeat an n-gram of their row, those of the prompt included.

    The rule of `no_repeat_ngram_size` in `generate`; n-grams are kept from step to step instead of gathered anew.

    Args:
        size (`int`): length n of the n-grams, at least 1.
        prompts (`Sequence[Sequence[int]]`): token ids of each row without padding.
    """

    def __init__(self, size: int, prompts: Sequence[Sequence[int]]):
        self.size = size
        self._tokens: list[list[int]] = [[] for _ in prompts]
        # tokens that followed each (n - 1)-gram of a row
        self._followers: list[dict[tuple[int, ...], list[int]]] = [{} for _ in prompts]
        for row, prompt in enumerate(prompts):
            for token in prompt:
                self._append(row, token)

    def exclude(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """A copy of `logits`, `(R, V)`, with -inf at what would repeat an n-gram of the rows with these numbers."""
        excluded = logits.clone()
        for index, row in enumerate(rows):
            if (banned := self._followers[row].get(self._context(row))) is not None:
                excluded[index, [token for token in banned if token < logits.shape[1]]] = -torch.inf
        return excluded

    def append(self, tokens: Sequence[int]) -> None:
        """Note the token that each row was given."""
        for row, token in enumerate(tokens):
            self._append(row, token)

    def _append(self, row: int, token: int) -> None:
        if len(self._tokens[row]) >= self.size - 1:
            self._followers[row].setdefault(self._context(row), []).append(token)
        self._tokens[row].append(token)

    def _context(self, row: int) -> tuple[int, ...]:
        tokens = self._tokens[row]
        return tuple(tokens[len(tokens) - self.size + 1 :])
