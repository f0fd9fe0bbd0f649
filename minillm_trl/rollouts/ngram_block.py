"""Decoding without repeated n-grams, as in the evaluation of the authors' code."""

from collections.abc import Sequence

import torch


class NgramBlock:
    """Exclude the tokens that would repeat an n-gram of their row, prompt included.

    This is the rule of `no_repeat_ngram_size` in `generate`. The n-grams are updated at each step, not recomputed.

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
        """Return a copy of `logits` `(R, V)`, of these rows, with -inf for tokens that would repeat an n-gram."""
        excluded = logits.clone()
        for index, row in enumerate(rows):
            if (banned := self._followers[row].get(self._context(row))) is not None:
                excluded[index, [token for token in banned if token < logits.shape[1]]] = -torch.inf
        return excluded

    def append(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Append the next token of each of these rows."""
        for row, token in zip(rows, tokens, strict=True):
            self._append(row, token)

    def _append(self, row: int, token: int) -> None:
        if len(self._tokens[row]) >= self.size - 1:
            self._followers[row].setdefault(self._context(row), []).append(token)
        self._tokens[row].append(token)

    def _context(self, row: int) -> tuple[int, ...]:
        tokens = self._tokens[row]
        return tuple(tokens[len(tokens) - self.size + 1 :])
