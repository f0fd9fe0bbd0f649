"""The coins of teacher-mixed sampling: of each row, or of the steps that all rows share."""

from collections.abc import Callable, Sequence

import numpy as np

from .keyed_random import digest, draw_seed, toss_coins

# Maps the rows in the slots, the numbers of tokens that they have sampled, and the number of the step to coins
Coins = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


def given_coins(coins: np.ndarray, shared: bool) -> Coins:
    """Return coins `(R, N)`, or `(1, N)` that all rows share, as a function of rows and steps."""
    if shared:
        return lambda rows, steps, clock: coins[0, clock : clock + 1]
    return lambda rows, steps, clock: coins[rows, steps]


def tossed_coins(
    alpha: float,
    coin_key: tuple[int, ...] | None,
    batch: int,
    keys: Sequence[tuple[int, ...] | None],
    shared: bool,
    max_new_tokens: int,
) -> Coins:
    """Return the coins of a batch of rows with these keys; the key of shared coins has the number of the batch."""
    if not keys:  # of a process that only takes part in the calls of others
        return given_coins(np.zeros((1, max_new_tokens), dtype=bool), shared=True)
    if shared:
        coin_keys = [(*coin_key, batch) if coin_key else _derive_coin_key(keys)]
    else:
        coin_keys = row_coin_keys(coin_key, batch, keys)
    return given_coins(np.stack([toss_coins(max_new_tokens, alpha, *key) for key in coin_keys]), shared)


def row_coin_keys(
    coin_key: tuple[int, ...] | None, batch: int, keys: Sequence[tuple[int, ...] | None]
) -> list[tuple[int, ...]]:
    """Return the key of the coins of each row, whose tokens have these keys; None for greedy decoding."""
    if coin_key:
        return [(*coin_key, batch, row) if key is None else (*coin_key, *key) for row, key in enumerate(keys)]
    return [_derive_coin_key([key]) for key in keys]


def _derive_coin_key(keys: Sequence[tuple[int, ...] | None]) -> tuple[int]:
    """Return a key for the coins of rows whose tokens have these keys."""
    if None in keys:
        return (draw_seed(),)
    # a digest, so that no coin reuses a number that draws a token
    return (digest(["coins", *(tuple(map(int, key)) for key in keys if key is not None)]),)
