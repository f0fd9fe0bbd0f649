"""Random numbers and what they decide: tokens by the inverse CDF, keys, and coins, against slow references."""

import hashlib
import zlib

import numpy as np
import pytest
import torch

from minillm_trl.rollouts.coins import row_coin_keys, tossed_coins
from minillm_trl.rollouts.draws import draw_tokens, invert_cdf
from minillm_trl.rollouts.keyed_random import (
    EVAL_TOKENS,
    TRAIN_TOKENS,
    draw_seed,
    evaluation_key,
    keyed_uniforms,
    sample_key,
    toss_coins,
    turn_keys,
)

BELOW_ONE = 1.0 - 2**-53  # the largest number that is drawn


class TestInvertCdf:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("size", [1, 3, 511, 512, 513, 1024, 1300])
    def test_each_token_has_as_many_of_the_numbers_as_its_weight(self, size: int, dtype):
        """With integer weights that add up to a power of two, all sums and thresholds are exact."""
        total = 2048
        generator = torch.Generator().manual_seed(size)
        weights = torch.randint(3, (size,), generator=generator)
        weights[-1] += total - weights.sum()
        uniforms = torch.arange(total, dtype=torch.float64) / total
        found = invert_cdf(weights.to(dtype).expand(total, -1), uniforms)
        assert torch.equal(found, torch.arange(size).repeat_interleave(weights))

    def test_rows_have_weights_and_numbers_of_their_own(self):
        generator = torch.Generator().manual_seed(0)
        weights = torch.rand(40, 1100, generator=generator, dtype=torch.float64).pow(4)
        uniforms = torch.rand(40, generator=generator, dtype=torch.float64)
        sums = weights.cumsum(1)
        expected = [int((row <= u * row[-1]).sum()) for row, u in zip(sums, uniforms, strict=True)]
        assert invert_cdf(weights, uniforms).tolist() == expected

    @pytest.mark.parametrize("positive", [[600], [600, 1000], [0, 1599], [511, 512, 1024], [0], [1599]])
    def test_token_of_weight_zero_is_never_returned(self, positive: list[int]):
        """Not even by a number that rounding takes to the sum of all weights."""
        weights = torch.zeros(3, 1600)
        weights[:, positive] = 0.1
        uniforms = torch.tensor([0.0, BELOW_ONE, 0.5], dtype=torch.float64)
        first, last, middle = invert_cdf(weights, uniforms).tolist()
        assert (first, last) == (positive[0], positive[-1])
        assert middle in positive

    @pytest.mark.parametrize("places", [[0, 1, 2], [0, 600, 1500]], ids=["within a block", "between blocks"])
    def test_small_weights_count_next_to_a_large_one(self, places: list[int]):
        """In float32 2^24 + 1 is 2^24: the sums need float64."""
        weights = torch.zeros(1, 1600)
        weights[0, places] = torch.tensor([2.0**24, 1.0, 3.0])
        uniforms = torch.tensor([(2.0**24 + 0.5) / (2**24 + 4)], dtype=torch.float64)
        assert invert_cdf(weights, uniforms).item() == places[1]


class TestDrawTokens:
    def test_most_likely_token_without_numbers(self):
        assert draw_tokens(torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]]), None, 0.5).tolist() == [1, 0]

    def test_half_precision_logits_have_float32_probabilities(self):
        """In bfloat16 the cumulative sums of a large vocabulary are wrong by far."""
        logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(0)).bfloat16()
        uniforms = torch.linspace(0.0, BELOW_ONE, 64, dtype=torch.float64)
        for temperature in (1.0, 0.7):
            found = draw_tokens(logits, uniforms, temperature)
            assert torch.equal(found, draw_tokens(logits.float(), uniforms, temperature))

    @pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
    def test_temperature_divides_the_logits(self, temperature: float):
        logits = torch.randn(1, 700, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        sums = torch.softmax(logits / temperature, -1).cumsum(-1)[0]
        uniforms = torch.cat([sums[:-1] - 1e-9, sums[:-1] + 1e-9])
        expected = [*range(699), *range(1, 700)]
        assert draw_tokens(logits.expand(len(uniforms), -1), uniforms, temperature).tolist() == expected


def numbers_of(*words: int) -> list[float]:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words))).random(3).tolist()


class TestKeys:
    @pytest.mark.parametrize("key", [(5,), (), (1, 2, 0), (3, 2**32), (1, 2, 3, 0), (2**64, 0, 0, 0, 0)])
    def test_keys_that_could_collide_are_hashed(self, key: tuple[int, ...]):
        """The numbers are part of what a seed promises, so they stay the same in later versions."""
        text = repr([str(number) for number in key])
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
        assert keyed_uniforms(3, *key).tolist() == numbers_of(digest)

    @pytest.mark.parametrize("key", [(0, 0), (5, 2**32 - 1), (1, 2, 3), (0, 0, 1), (1, 2, 3, 4), (1, 2, 3, 4, 0)])
    def test_others_seed_as_they_are(self, key: tuple[int, ...]):
        assert keyed_uniforms(3, *key).tolist() == numbers_of(*key)

    def test_of_completions_have_seed_use_place_and_sample(self):
        prompt = zlib.crc32(b"[5, 6]")
        assert evaluation_key(3, [5, 6], 2, 1) == (3, EVAL_TOKENS, prompt, 2, 1)
        assert evaluation_key(3, [5, 6]) == (3, EVAL_TOKENS, prompt, 0, 0)
        assert turn_keys([[5], [6]], 3, 4, 1, 10, None) == [(3, TRAIN_TOKENS, 4, 10, 1), (3, TRAIN_TOKENS, 4, 11, 1)]
        found = turn_keys([[5, 6]] * 3, 3, 4, 1, 7, 4)
        assert found == [evaluation_key(3, [5, 6], sample, 1) for sample in (3, 0, 1)]
        assert (sample_key(3, 5), sample_key(3, 5, 0), sample_key(3, 5, 2)) == ((3, 5), (3, 5), (3, 5, 2))

    def test_drawn_seeds_follow_the_generator_of_torch(self):
        torch.manual_seed(0)
        seeds = [draw_seed() for _ in range(8)]
        torch.manual_seed(0)
        assert [draw_seed() for _ in range(8)] == seeds
        assert len(set(seeds)) == 8
        assert all(0 <= seed < 2**63 for seed in seeds)
        assert max(seeds) > 2**62


ROWS, STEPS = np.array([2, 0, 1]), np.array([4, 0, 7])
KEYS = [(1, 5), (1, 6), (1, 7)]


class TestTossedCoins:
    def test_rows_that_share_them_have_the_coin_of_the_step(self):
        coins = tossed_coins(0.4, (3, 2), 6, KEYS, True, 9)
        expected = toss_coins(9, 0.4, 3, 2, 6)
        assert [coins(ROWS, STEPS, clock).tolist() for clock in range(9)] == [[coin] for coin in expected]

    @pytest.mark.parametrize("keys", [KEYS, [None] * 3])
    def test_rows_with_their_own_have_the_coin_of_their_token(self, keys: list):
        coins = tossed_coins(0.4, (3, 2), 6, keys, False, 9)
        of_row = [(3, 2, 6, row) if key is None else (3, 2, *key) for row, key in enumerate(keys)]
        assert row_coin_keys((3, 2), 6, keys) == of_row
        expected = [toss_coins(9, 0.4, *of_row[row])[step] for row, step in zip(ROWS, STEPS, strict=True)]
        assert coins(ROWS, STEPS, 3).tolist() == expected

    @pytest.mark.parametrize("shared", [True, False])
    def test_without_a_key_of_their_own_they_follow_those_of_the_tokens(self, shared: bool):
        def key_of(keys: list[tuple[int, ...]]) -> int:
            text = repr(["coins", *map(str, keys)])
            return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")

        coins = tossed_coins(0.4, None, 6, KEYS, shared, 9)
        if shared:
            expected = toss_coins(9, 0.4, key_of(KEYS))
            assert [coins(ROWS, STEPS, clock).tolist() for clock in range(9)] == [[coin] for coin in expected]
        else:
            expected = [toss_coins(9, 0.4, key_of([KEYS[row]]))[step] for row, step in zip(ROWS, STEPS, strict=True)]
            assert coins(ROWS, STEPS, 0).tolist() == expected

    def test_process_without_rows_has_coins_for_every_step(self):
        coins = tossed_coins(0.9, (3, 2), 0, [], True, 4)
        assert [coins(ROWS[:0], STEPS[:0], clock).tolist() for clock in range(4)] == [[False]] * 4
