r"""Sampling completions from the student or from the teacher-student mixture.

Sampling from $\mu = \alpha p + (1-\alpha) q$ (Eq. 4) is a coin toss, then a draw from one of the two models. The coin
is drawn first, so each model runs only at its own steps, over the tokens since its last call: with coins shared by the
rows that are decoded together N calls in all for N tokens, where mixing the two distributions at every step takes 2 N.

Randomness is stateless: a token is the inverse CDF at a uniform number that is a pure function of a key (seed, round,
row, ...). So a sample does not depend on the rows beside it, on the number of processes, or on what else drew random
numbers, and an interrupted run resumes with the samples it would have drawn.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from ..masking import completion_mask
from ..models.attention import without_cudnn_attention
from ..models.context import check_longrope
from .decoding import CompiledDecoding, LazyDecoder
from .ngram_block import NgramBlock


def keyed_uniforms(length: int, *key: int) -> np.ndarray:
    """Return `length` uniform numbers in [0, 1), float64, a pure function of the non-negative integers in `key`.

    Different keys give independent numbers, also where one is the other followed by zeros.

    Raises:
        ValueError: if a number of the key is negative.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(_entropy(key)))).random(length)


def _entropy(key: Sequence[int]) -> Sequence[int]:
    """Return what seeds the numbers of a key, different for different keys.

    `SeedSequence` cuts large numbers into words of 32 bits and fills up to four words with zeros. So that no two keys
    have the same words, only keys of two numbers may end in 0 or be filled up; of others the digest is taken.
    """
    if any(number < 0 for number in key):
        raise ValueError(f"A key of random numbers must be of non-negative integers, got {tuple(key)}.")
    unique = len(key) == 2 or len(key) > 4 or (len(key) > 2 and key[-1] != 0)
    return key if unique and all(number < 2**32 for number in key) else (_digest(key),)


def _digest(key: Iterable[object]) -> int:
    return int.from_bytes(hashlib.sha256(repr(list(map(str, key))).encode()).digest())


def draw_seed() -> int:
    """Draw a seed from torch's generator: what is not told a seed does not repeat its random numbers."""
    return int(torch.randint(2**63 - 1, ()))


# Second element of the keys of the noise, after the seed: what it is for
TRAIN_TOKENS, EVAL_TOKENS, COINS, ROLLOUT_ORDER = range(4)


def evaluation_key(seed: int, prompt_ids: Sequence[int], sample: int = 0, turn: int = 0) -> tuple[int, ...]:
    """Key of the noise of a completion in evaluation: the same at every evaluation and for every trainer, so that
    their curves differ by the student alone."""
    return seed, EVAL_TOKENS, zlib.crc32(repr(list(prompt_ids)).encode()), sample, turn


def sample_key(seed: int, prompt: int, sample: int = 0) -> tuple[int, ...]:
    """Key of the noise of a completion outside training, by the numbers of its prompt and of the prompt's sample."""
    return (seed, prompt, sample) if sample else (seed, prompt)


def toss_coins(length: int, alpha: float, *key: int) -> np.ndarray:
    """Toss the coin of every step: True (with probability `alpha`) where the teacher samples."""
    return keyed_uniforms(length, *key) < alpha


def draw_tokens(logits: torch.Tensor, uniforms: torch.Tensor | None, temperature: float) -> torch.Tensor:
    """Draw one token a row: the inverse CDF of softmax(logits / temperature) at `uniforms`.

    Args:
        logits (`torch.Tensor` of shape `(B, V)`): unnormalised log-probs; -inf excludes a token.
        uniforms (`torch.Tensor` of shape `(B,)`, float64, *optional*): numbers in [0, 1). None takes the most likely
            token instead.
        temperature (`float`): > 0; unused when `uniforms` is None.

    Returns:
        `torch.Tensor` of shape `(B,)`, int64.
    """
    if uniforms is None:
        return logits.argmax(dim=-1)
    cumulative = torch.softmax(logits.double() / temperature, dim=-1).cumsum(dim=-1)
    threshold = uniforms[:, None] * cumulative[:, -1:]  # the last entry is 1 up to rounding
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)


class Completions(NamedTuple):
    """Sampled completions.

    Attributes:
        ids (`torch.Tensor` of shape `(B, T)`): right-padded; T is the length of the longest.
        mask (`torch.Tensor` of shape `(B, T)`): True on real tokens, the end-of-sequence token included.
        student_hidden_states, teacher_hidden_states (`torch.Tensor` of shape `(B, T, H)`, *optional*): the models'
            last hidden states that predict each token; arbitrary outside the mask. None unless asked for, and for a
            teacher without coins.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    student_hidden_states: torch.Tensor | None = None
    teacher_hidden_states: torch.Tensor | None = None


@without_cudnn_attention()
@torch.no_grad()
def sample_completions(
    student: PreTrainedModel,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    uniforms: torch.Tensor | None,
    temperature: float = 1.0,
    teacher: PreTrainedModel | None = None,
    teacher_coins: np.ndarray | None = None,
    vocab_size: int | None = None,
    keep_states: bool = False,
    on_every_process: Callable[[bool], bool] | None = None,
    compiled: CompiledDecoding | None = None,
    no_repeat_ngram_size: int = 0,
) -> Completions:
    """Sample one completion a row, each token from the student or, where its coin says so, from the teacher.

    With coins tossed at probability alpha (see [`toss_coins`]) every row follows the mixture exactly. Rows that share
    their coins are dependent, but need one model a step; with a coin for each row most steps need both. Nothing else
    reshapes the distributions, unless n-grams are blocked: generation configs are not read.

    Args:
        student ([`~transformers.PreTrainedModel`]): an unwrapped model in eval mode.
        prompt_ids (`torch.Tensor` of shape `(B, P)`): left-padded prompts, P >= 1 real token each.
        prompt_mask (`torch.Tensor` of shape `(B, P)`): non-zero on real tokens. A row without any is finished from the
            start: with it, a process that has no prompts takes part in the calls of a sharded model.
        max_new_tokens (`int`): length limit N, the end-of-sequence token included.
        eos_token_ids (`Sequence[int]`): ids that end a completion.
        pad_token_id (`int`): fills up finished rows.
        uniforms (`torch.Tensor` of shape `(B, N)`, float64, *optional*): one number a token, see [`keyed_uniforms`].
            None decodes greedily.
        temperature (`float`, *optional*, defaults to `1.0`): sampling temperature of both models, > 0.
        teacher ([`~transformers.PreTrainedModel`], *optional*): needed where a coin is True.
        teacher_coins (`np.ndarray` of shape `(B, N)` or `(1, N)`, bool, *optional*): where the teacher samples; a
            single row is shared by all. None means student alone.
        vocab_size (`int`, *optional*): number of leading vocabulary rows that may be sampled; all by default.
        keep_states (`bool`, *optional*, defaults to `False`): whether to return the hidden states that predict each
            token. All but those of the last few tokens come up in sampling anyway; one call adds the rest, so that
            neither model has to run again to score the completions. Needs heads that [`~lm_head.check_head`]
            accepts.
        on_every_process (`Callable[[bool], bool]`, *optional*): whether its argument is True on every process. To be
            given where a model is sharded over processes, whose calls are then the same on all: a model that one
            process needs at a step is called by all, and all continue until the rows of all have finished. Shared
            coins that are the same on all spare calls. The number of calls of this function and `max_new_tokens` must
            be the same on all.
        compiled ([`CompiledDecoding`], *optional*): of the student, whose steps then run compiled.
        no_repeat_ngram_size (`int`, *optional*, defaults to `0`): n for which no row may repeat an n-gram of its own
            or of its prompt, see [`NgramBlock`]; 0 for none.

    Returns:
        [`Completions`].

    Raises:
        ValueError: if a completion can cross the length up to which a model with LongRoPE can be sampled from.
    """
    for model in (student,) if teacher_coins is None else (student, teacher):
        check_longrope(model, prompt_mask, max_new_tokens)
    device, (batch_size, prompt_length) = prompt_ids.device, prompt_ids.shape
    vocab_size = vocab_size or student.get_output_embeddings().weight.shape[0]
    eos = torch.tensor(list(eos_token_ids), device=device)
    keep_from = prompt_length - 1 if keep_states else None  # the prompt's last token predicts the first sampled one
    length = prompt_length + max_new_tokens
    decoders = [LazyDecoder(student, vocab_size, batch_size, keep_from, compiled, length)]
    if teacher_coins is not None:
        decoders.append(LazyDecoder(teacher, vocab_size, batch_size, keep_from))
    coins = np.array([[False]]) if teacher_coins is None else teacher_coins
    coins = np.broadcast_to(coins, (len(coins), max_new_tokens))
    ids, mask = prompt_ids, prompt_mask.bool()
    block = None
    if no_repeat_ngram_size:
        prompts = [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]
        block = NgramBlock(no_repeat_ngram_size, prompts)
    finished = ~mask.any(dim=1).cpu().numpy()
    last = np.full(batch_size, prompt_length + max_new_tokens - 1)  # index of each row's last token

    for step in range(max_new_tokens):
        tokens = torch.full((batch_size,), pad_token_id, device=device)
        for decoder, chosen in zip(decoders, (~coins[:, step], coins[:, step]), strict=False):
            idle = not (chosen & ~finished).any()
            if on_every_process is not None and teacher_coins is not None:
                idle = on_every_process(idle)  # a sharded model is called by all processes or by none
            if idle:
                continue
            decoder.drop(finished, last)
            logits = decoder.next_logits(ids, mask)
            if block is not None:
                logits = block.exclude(logits, decoder.rows)
            rows = torch.from_numpy(decoder.rows).to(device)
            drawn = draw_tokens(logits, None if uniforms is None else uniforms[rows, step], temperature)
            chosen = torch.from_numpy(np.broadcast_to(chosen, batch_size)[decoder.rows]).to(device)
            tokens[rows] = torch.where(chosen, drawn, tokens[rows])
        tokens = tokens.masked_fill(torch.from_numpy(finished).to(device), pad_token_id)
        ids = torch.cat([ids, tokens[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        if block is not None:
            block.append(tokens.tolist())
        ends = torch.isin(tokens, eos).cpu().numpy() & ~finished
        last[ends] = prompt_length + step
        finished |= ends
        done = bool(finished.all())
        if done if on_every_process is None else on_every_process(done):
            break

    length = min(int(last.max()), ids.shape[1] - 1) + 1 - prompt_length
    sampled = ids[:, prompt_length : prompt_length + length]
    states = []
    for decoder in decoders if keep_states else ():
        if (last[decoder.rows] > decoder.fed).any() or on_every_process is not None:
            decoder.next_logits(ids, mask)
        states.append(decoder.kept_states(batch_size, length))
    return Completions(sampled, completion_mask(sampled, eos_token_ids), *states)


def sample_prompts(
    student: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    *,
    keys: Sequence[tuple[int, ...]] | None,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    temperature: float = 1.0,
    batch_size: int | None = None,
    teacher: PreTrainedModel | None = None,
    alpha: float = 0.0,
    coin_key: tuple[int, ...] | None = None,
    shared_coins: bool = True,
    vocab_size: int | None = None,
    on_every_process: Callable[[bool], bool] | None = None,
    keep_states: bool = False,
    compiled: CompiledDecoding | None = None,
    no_repeat_ngram_size: int = 0,
    on_batch: Callable[[list[int], Completions], None] | None = None,
) -> list[list[int]]:
    """Sample one completion for each prompt, in batches of neighbours in length so that little padding is decoded.

    Where processes sample together (`on_every_process`) they may have different numbers of prompts, or none.

    Args:
        student ([`~transformers.PreTrainedModel`]): an unwrapped model in eval mode.
        prompt_ids (`Sequence[Sequence[int]]`): prompts without padding, at least one token each.
        keys (`Sequence[tuple[int, ...]]`, *optional*): key of each prompt's random numbers, see [`keyed_uniforms`].
            None decodes greedily.
        batch_size (`int`, *optional*): rows decoded together; all by default.
        alpha (`float`, *optional*, defaults to `0.0`): share of `teacher` in the mixture.
        coin_key (`tuple[int, ...]`, *optional*): key of the coins; the number of the batch is added to it, or with a
            coin for each row the row's key. None derives the coins from `keys`, apart from the numbers that draw the
            tokens; without `keys` they come from torch's generator.
        shared_coins (`bool`, *optional*, defaults to `True`): whether rows decoded together share their coins, so that
            only one of the models runs at a step. `False` makes all rows independent, and a completion a function of
            its key alone.
        on_batch (`Callable[[list[int], Completions], None]`, *optional*): called after each batch with the numbers of
            its prompts and their [`Completions`].
        max_new_tokens, eos_token_ids, pad_token_id, temperature, teacher, vocab_size, on_every_process, keep_states,
            compiled, no_repeat_ngram_size: see [`sample_completions`].

    Returns:
        `list[list[int]]`: token ids of each completion in the order of the prompts, the end-of-sequence token
        included.
    """
    device = student.get_output_embeddings().weight.device
    order = sorted(range(len(prompt_ids)), key=lambda row: -len(prompt_ids[row]))  # the largest batch comes first
    batch_size = batch_size or max(len(order), 1)
    completions: list[list[int]] = [[] for _ in order]
    for number, rows in enumerate(_batches(order, batch_size, on_every_process)):
        ids, mask = left_pad([prompt_ids[row] for row in rows] or [[]], pad_token_id)
        uniforms = None
        if keys is not None and rows:
            noise = np.stack([keyed_uniforms(max_new_tokens, *keys[row]) for row in rows])
            uniforms = torch.from_numpy(noise).to(device)
        coins = None
        if alpha > 0:
            own_keys = [None if keys is None else keys[row] for row in rows]
            coin_keys = _coin_keys(coin_key, number, own_keys, shared_coins)
            tossed = [toss_coins(max_new_tokens, alpha, *key) for key in coin_keys]
            coins = np.stack(tossed) if tossed else np.zeros((1, max_new_tokens), dtype=bool)
        sampled = sample_completions(
            student,
            ids.to(device),
            mask.to(device),
            max_new_tokens=max_new_tokens,
            eos_token_ids=eos_token_ids,
            pad_token_id=pad_token_id,
            uniforms=uniforms,
            temperature=temperature,
            teacher=teacher,
            teacher_coins=coins,
            vocab_size=vocab_size,
            keep_states=keep_states,
            on_every_process=on_every_process,
            compiled=compiled,
            no_repeat_ngram_size=no_repeat_ngram_size,
        )
        if not rows:
            continue
        for row, length, tokens in zip(rows, sampled.mask.sum(dim=1).tolist(), sampled.ids.tolist(), strict=True):
            completions[row] = tokens[:length]
        if on_batch is not None:
            on_batch(rows, sampled)
    return completions


def _batches(
    order: Sequence[int], batch_size: int, on_every_process: Callable[[bool], bool] | None
) -> Iterator[Sequence[int]]:
    """Cut `order` into batches; where processes sample together, empty ones follow until the last has no more."""
    for start in count(0, batch_size):
        rows = order[start : start + batch_size]
        done = not rows
        if done if on_every_process is None else on_every_process(done):
            return
        yield rows


def _coin_keys(
    coin_key: tuple[int, ...] | None, batch: int, keys: Sequence[tuple[int, ...] | None], shared: bool
) -> list[tuple[int, ...]]:
    """Return the key of the coins that the rows of a batch share, or of each row's.

    Args:
        coin_key (`tuple[int, ...]`, *optional*): what the caller gave.
        batch (`int`): number of the batch.
        keys (`Sequence[tuple[int, ...] | None]`): key of each row's tokens; None for greedy decoding.
        shared (`bool`): whether the rows share their coins.
    """
    if coin_key and shared:
        return [(*coin_key, batch)]
    if coin_key:
        return [(*coin_key, batch, row) if key is None else (*coin_key, *key) for row, key in enumerate(keys)]
    tossed_for = [keys] if shared else [[key] for key in keys]
    # a digest, so that no coin ever has the number that draws a token
    return [
        (draw_seed() if None in group else _digest(["coins", *(tuple(map(int, key)) for key in group)]),)
        for group in tossed_for
    ]


def left_pad(sequences: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and bool mask `(B, L)` of sequences of unequal length."""
    width = max(1, max(map(len, sequences)))
    ids = torch.full((len(sequences), width), pad_token_id)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = True
    return ids, mask
