r"""Sampling completions from the student or from the teacher-student mixture.

Sampling from $\mu = \alpha p + (1-\alpha) q$ (Eq. 4) is a coin toss, then a draw from one of the two models. The coin
comes first, so a model runs only at the steps that it won, over the tokens since its last call. If the rows of a batch
share their coins, N tokens take N model calls in all. Mixing the two distributions at every step would take 2 N.

Randomness is stateless: a token is the inverse CDF at a uniform number that is a pure function of a key (seed, round,
row, ...). So a sample does not depend on the other rows of the batch, on the number of processes, or on other users of
random numbers, and an interrupted run resumes with the samples it would have drawn.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from ..masking import completion_mask
from ..models.attention import without_cudnn_attention
from ..models.context import check_longrope
from .decoding import CompiledDecoding, LazyDecoder
from .keyed_random import digest, draw_seed, keyed_uniforms, toss_coins
from .ngram_block import NgramBlock


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
            last hidden states that predict each token; arbitrary outside the mask. None unless `keep_states`; the
            teacher's also without `teacher_coins`.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    student_hidden_states: torch.Tensor | None = None
    teacher_hidden_states: torch.Tensor | None = None


class _GrowingRows:
    """Prompts with the tokens sampled so far.

    Attributes:
        ids, mask (`torch.Tensor` of shape `(B, L)`): L grows by one a step; the mask is False on left padding.
        prompt_length (`int`): padded length P of the prompts.
        finished (`np.ndarray` of shape `(B,)`, bool): rows that have ended, and rows without a prompt.
        last (`np.ndarray` of shape `(B,)`): index in `ids` of each row's last token; the length limit until it ends.
    """

    def __init__(self, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, max_new_tokens: int):
        self.ids, self.mask = prompt_ids, prompt_mask.bool()
        self.prompt_length = prompt_ids.shape[1]
        self.finished = ~self.mask.any(dim=1).cpu().numpy()
        self.last = np.full(len(prompt_ids), self.prompt_length + max_new_tokens - 1)

    def tokens(self) -> list[list[int]]:
        """Return the tokens of each row without padding."""
        return [row[keep].tolist() for row, keep in zip(self.ids.cpu(), self.mask.cpu(), strict=True)]

    def append(self, tokens: torch.Tensor, eos: torch.Tensor) -> None:
        """Append a token `(B,)` to every row, and mark the rows that end with it as finished."""
        ends = torch.isin(tokens, eos).cpu().numpy() & ~self.finished
        self.last[ends] = self.ids.shape[1]
        self.finished |= ends
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)

    def completions(self) -> torch.Tensor:
        """Return the sampled tokens `(B, T)`, T being the length of the longest completion."""
        return self.ids[:, self.prompt_length : int(self.last.max()) + 1]


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
    """Sample one completion for each row, each token from the student or, where its coin says so, from the teacher.

    If the coins are tossed with probability alpha (see [`toss_coins`]), each row follows the mixture exactly. Rows
    that share their coins depend on each other, but need one model a step; with a coin for each row, most steps need
    both models. Nothing else reshapes the distributions unless n-grams are blocked: generation configs are not read.

    Args:
        student ([`~transformers.PreTrainedModel`]): an unwrapped model in eval mode.
        prompt_ids (`torch.Tensor` of shape `(B, P)`): left-padded prompts of at least one real token.
        prompt_mask (`torch.Tensor` of shape `(B, P)`): non-zero on real tokens. A row without real tokens is finished
            from the start. A process without prompts uses one to take part in the calls of a sharded model.
        max_new_tokens (`int`): length limit N, the end-of-sequence token included.
        eos_token_ids (`Sequence[int]`): ids that end a completion.
        pad_token_id (`int`): pads finished rows.
        uniforms (`torch.Tensor` of shape `(B, N)`, float64, *optional*): a number for each token, see
            [`keyed_uniforms`]. None decodes greedily.
        temperature (`float`, *optional*, defaults to `1.0`): sampling temperature of both models, > 0.
        teacher ([`~transformers.PreTrainedModel`], *optional*): required with `teacher_coins`.
        teacher_coins (`np.ndarray` of shape `(B, N)` or `(1, N)`, bool, *optional*): where the teacher samples; all
            rows share a single row of coins. None samples from the student alone.
        vocab_size (`int`, *optional*): number of leading vocabulary rows that may be sampled; all by default.
        keep_states (`bool`, *optional*, defaults to `False`): whether to return the hidden states that predict each
            token. Sampling computes all of them but the last few, which one more call adds, so that neither model has
            to run again to score the completions. Requires heads that [`~lm_head.check_head`] accepts.
        on_every_process (`Callable[[bool], bool]`, *optional*): returns whether its argument is True on every process.
            Required if a model is sharded over processes, which then have to make the same calls: a model that one
            process needs at a step is called by all, and all continue until the rows of all have finished. Shared
            coins that are the same on all processes save calls. All processes must call this function equally often,
            with the same `max_new_tokens`.
        compiled ([`CompiledDecoding`], *optional*): runs the student's steps compiled.
        no_repeat_ngram_size (`int`, *optional*, defaults to `0`): size of the n-grams that no row may repeat, its
            prompt included, see [`NgramBlock`]; 0 allows all.

    Returns:
        [`Completions`].

    Raises:
        ValueError: if a completion can cross the length up to which a model with LongRoPE can be sampled from, or
            `teacher_coins` are given without a teacher.
    """
    models = [student]
    if teacher_coins is not None:
        if teacher is None:
            raise ValueError("teacher_coins choose the steps of a teacher, but teacher is None. Pass both or neither.")
        models.append(teacher)
    for model in models:
        check_longrope(model, prompt_mask, max_new_tokens)
    rows = _GrowingRows(prompt_ids, prompt_mask, max_new_tokens)
    vocab_size = vocab_size or student.get_output_embeddings().weight.shape[0]
    keep_from = rows.prompt_length - 1 if keep_states else None  # the last prompt token predicts the first sampled one
    length = rows.prompt_length + max_new_tokens
    decoders = [
        LazyDecoder(model, vocab_size, len(prompt_ids), keep_from, None if index else compiled, length)
        for index, model in enumerate(models)
    ]
    coins = np.array([[False]]) if teacher_coins is None else teacher_coins
    coins = np.broadcast_to(coins, (len(coins), max_new_tokens))
    eos = torch.tensor(list(eos_token_ids), device=prompt_ids.device)
    block = NgramBlock(no_repeat_ngram_size, rows.tokens()) if no_repeat_ngram_size else None

    for step in range(max_new_tokens):
        tokens = torch.full((len(prompt_ids),), pad_token_id, device=prompt_ids.device)
        for decoder, chosen in zip(decoders, (~coins[:, step], coins[:, step]), strict=False):
            idle = not (chosen & ~rows.finished).any()
            if teacher_coins is not None:
                idle = _everywhere(idle, on_every_process)  # either all processes call a sharded model, or none
            if not idle:
                at_step = None if uniforms is None else uniforms[:, step]
                _draw_chosen(decoder, chosen, rows, tokens, at_step, temperature, block)
        tokens = tokens.masked_fill(torch.from_numpy(rows.finished).to(tokens.device), pad_token_id)
        if block is not None:
            block.append(tokens.tolist())
        rows.append(tokens, eos)
        if _everywhere(bool(rows.finished.all()), on_every_process):
            break

    sampled = rows.completions()
    states = _kept_states(decoders, rows, sampled.shape[1], on_every_process) if keep_states else []
    return Completions(sampled, completion_mask(sampled, eos_token_ids), *states)


def _everywhere(flag: bool, on_every_process: Callable[[bool], bool] | None) -> bool:
    return flag if on_every_process is None else on_every_process(flag)


def _draw_chosen(
    decoder: LazyDecoder,
    chosen: np.ndarray,
    rows: _GrowingRows,
    tokens: torch.Tensor,
    uniforms: torch.Tensor | None,
    temperature: float,
    block: NgramBlock | None,
) -> None:
    """Write the next token of the rows in which `chosen`, `(B,)` or `(1,)`, is True to `tokens` `(B,)`."""
    decoder.drop(rows.finished, rows.last)
    logits = decoder.next_logits(rows.ids, rows.mask)
    if block is not None:
        logits = block.exclude(logits, decoder.rows.tolist())
    numbers = torch.from_numpy(decoder.rows).to(tokens.device)
    drawn = draw_tokens(logits, None if uniforms is None else uniforms[numbers], temperature)
    is_chosen = torch.from_numpy(np.broadcast_to(chosen, len(tokens))[decoder.rows]).to(tokens.device)
    tokens[numbers] = torch.where(is_chosen, drawn, tokens[numbers])


def _kept_states(
    decoders: Sequence[LazyDecoder],
    rows: _GrowingRows,
    length: int,
    on_every_process: Callable[[bool], bool] | None,
) -> list[torch.Tensor]:
    """Return the hidden states `(B, length, H)` of each decoder, with those of the tokens since its last call."""
    states = []
    for decoder in decoders:
        # processes cannot know whether another one needs the call, so with a sharded model all make it
        if (rows.last[decoder.rows] > decoder.fed).any() or on_every_process is not None:
            decoder.next_logits(rows.ids, rows.mask)
        states.append(decoder.kept_states(len(rows.ids), length))
    return states


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
    on_batch: Callable[[list[int], Completions], object] | None = None,
) -> list[list[int]]:
    """Sample one completion for each prompt, in batches of prompts of similar length to save padding.

    Processes that sample together (`on_every_process`) may have different numbers of prompts, or none.

    Args:
        student ([`~transformers.PreTrainedModel`]): an unwrapped model in eval mode.
        prompt_ids (`Sequence[Sequence[int]]`): prompts without padding, at least one token each.
        keys (`Sequence[tuple[int, ...]]`, *optional*): key of each prompt's random numbers, see [`keyed_uniforms`].
            None decodes greedily.
        batch_size (`int`, *optional*): rows decoded together; all by default.
        alpha (`float`, *optional*, defaults to `0.0`): share of `teacher` in the mixture.
        coin_key (`tuple[int, ...]`, *optional*): key of the coins, to which the number of the batch is appended, or
            the key of the row if each row has coins of its own. None derives the coins from `keys`, independently of
            the numbers that draw the tokens; without `keys` they come from torch's generator.
        shared_coins (`bool`, *optional*, defaults to `True`): whether rows decoded together share their coins, so that
            only one of the models runs at a step. `False` makes all rows independent, and a completion a function of
            its key alone.
        on_batch (`Callable[[list[int], Completions], object]`, *optional*): called after each batch with the numbers
            of its prompts and their [`Completions`].
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
) -> Iterator[list[int]]:
    """Split `order` into batches; if processes sample together, empty ones follow until the last process is done."""
    for start in count(0, batch_size):
        rows = list(order[start : start + batch_size])
        if _everywhere(not rows, on_every_process):
            return
        yield rows


def _coin_keys(
    coin_key: tuple[int, ...] | None, batch: int, keys: Sequence[tuple[int, ...] | None], shared: bool
) -> list[tuple[int, ...]]:
    """Return the key of the coins that the rows of a batch share, or one key for each row.

    Args:
        coin_key (`tuple[int, ...]`, *optional*): the caller's key of the coins.
        batch (`int`): number of the batch.
        keys (`Sequence[tuple[int, ...] | None]`): key of each row's tokens; None for greedy decoding.
        shared (`bool`): whether the rows share their coins.
    """
    if coin_key and shared:
        return [(*coin_key, batch)]
    if coin_key:
        return [(*coin_key, batch, row) if key is None else (*coin_key, *key) for row, key in enumerate(keys)]
    return [_derive_coin_key(keys)] if shared else [_derive_coin_key([key]) for key in keys]


def _derive_coin_key(keys: Sequence[tuple[int, ...] | None]) -> tuple[int]:
    """Return a key for the coins of rows whose tokens have these keys."""
    if None in keys:
        return (draw_seed(),)
    # a digest, so that no coin reuses a number that draws a token
    return (digest(["coins", *(tuple(map(int, key)) for key in keys if key is not None)]),)


def left_pad(sequences: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return left-padded token ids and their bool mask `(B, L)`."""
    width = max(1, max(map(len, sequences)))
    ids = torch.full((len(sequences), width), pad_token_id)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = True
    return ids, mask
