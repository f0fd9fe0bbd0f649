"""Random numbers that are pure functions of a key: of a token, a coin, or the order of rows.

A key is a tuple of non-negative integers such as (seed, use, step, row). Nothing else has an influence on the numbers:
not the batch, the number of processes, or other users of random numbers.
"""

import hashlib
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch


def keyed_uniforms(length: int, *key: int) -> np.ndarray:
    """Return `length` uniform numbers in [0, 1), float64, a pure function of the non-negative integers in `key`.

    Different keys give independent numbers, even if one key is the other followed by zeros.

    Raises:
        ValueError: if a number of the key is negative.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(_entropy(key)))).random(length)


def _entropy(key: Sequence[int]) -> Sequence[int]:
    """Return the entropy that seeds the numbers of a key, different for different keys.

    `SeedSequence` splits large numbers into words of 32 bits, and pads with zeros to four words. To keep any two keys
    from getting the same words, only keys of two numbers may end in 0 or need padding; other such keys are hashed.
    """
    if any(number < 0 for number in key):
        raise ValueError(f"A key of random numbers must hold non-negative integers, got {tuple(key)}.")
    unique = len(key) == 2 or len(key) > 4 or (len(key) > 2 and key[-1] != 0)
    return key if unique and all(number < 2**32 for number in key) else (digest(key),)


def digest(key: Iterable[object]) -> int:
    """Return the SHA-256 of the items' texts as an integer."""
    return int.from_bytes(hashlib.sha256(repr(list(map(str, key))).encode()).digest())


def draw_seed() -> int:
    """Draw a seed from torch's generator, so that calls without a seed do not repeat their random numbers."""
    return int(torch.randint(2**63 - 1, ()))


# Second element of a key, after the seed: the use of its random numbers
TRAIN_TOKENS, EVAL_TOKENS, COINS, ROLLOUT_ORDER, GIVEN = range(5)


def evaluation_key(seed: int, prompt_ids: Sequence[int], sample: int = 0, turn: int = 0) -> tuple[int, ...]:
    """Return the key of a completion's random numbers in evaluation.

    The key is the same at every evaluation and for every trainer, so curves differ by the student alone.
    """
    return seed, EVAL_TOKENS, zlib.crc32(repr(list(prompt_ids)).encode()), sample, turn


def turn_keys(
    prompt_ids: Sequence[Sequence[int]], seed: int, step: int, turn: int, first_row: int, group: int | None
) -> list[tuple[int, ...]]:
    """Return the keys of the tokens of each row of a rollout.

    Args:
        prompt_ids (`Sequence[Sequence[int]]`): prompts of this process.
        seed, step, turn (`int`): seed of the run, optimizer steps so far, and number of the turn.
        first_row (`int`): number of the first row in the rollouts of all processes.
        group (`int`, *optional*): completions of each prompt, in evaluation; None in training.
    """
    if group is None:
        return [(seed, TRAIN_TOKENS, step, first_row + row, turn) for row in range(len(prompt_ids))]
    return [evaluation_key(seed, ids, (first_row + row) % group, turn) for row, ids in enumerate(prompt_ids)]


def sample_key(seed: int, prompt: int, sample: int = 0) -> tuple[int, ...]:
    """Return the key of a completion's random numbers outside training: of one sample of a prompt, by its number."""
    return (seed, prompt, sample) if sample else (seed, prompt)


def toss_coins(length: int, alpha: float, *key: int) -> np.ndarray:
    """Toss the coin of every step: True (with probability `alpha`) where the teacher samples."""
    return keyed_uniforms(length, *key) < alpha
