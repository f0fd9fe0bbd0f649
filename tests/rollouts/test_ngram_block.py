"""`NgramBlock` step by step against the rule of transformers, which looks at whole rows again at each step."""

import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor

from minillm_trl.rollouts.ngram_block import NgramBlock

VOCAB = 4
PROMPTS = [[], [2], [0, 1], [0, 1, 2, 0], [3, 3, 3, 3, 3, 3]]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_excluded_tokens_are_those_of_generate(size: int):
    """Only some of the rows take a token at a step, which may be one that is excluded."""
    generator = torch.Generator().manual_seed(size)
    block, rows = NgramBlock(size, PROMPTS), [list(prompt) for prompt in PROMPTS]
    reference, banned = NoRepeatNGramLogitsProcessor(size), 0
    for step in range(12):
        logits = torch.randn(len(rows), VOCAB, generator=generator)
        numbers = [row for row in range(len(rows)) if (row + step) % 3]
        own = logits[numbers]
        found = block.exclude(own, numbers)
        assert torch.equal(own, logits[numbers])  # a copy has the exclusions
        for row, excluded in zip(numbers, found, strict=True):
            # one row at a time, as rows have no padding
            expected = reference(torch.tensor([rows[row]], dtype=torch.long), logits[row : row + 1])[0]
            assert torch.equal(excluded, expected)
            banned += int(excluded.isinf().sum())
        tokens = torch.randint(2, (len(numbers),), generator=generator).tolist()
        block.append(numbers, tokens)
        for row, token in zip(numbers, tokens, strict=True):
            rows[row].append(token)
    assert banned > 4


def test_tokens_outside_the_shared_vocabulary_are_no_index():
    block = NgramBlock(1, [[5, 3, 1]])
    assert block.exclude(torch.zeros(1, 3), [0]).tolist() == [[0.0, -torch.inf, 0.0]]
