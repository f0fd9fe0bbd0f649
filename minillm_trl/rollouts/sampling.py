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
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..errors import UserError
from ..models.attention import grouped_attention, without_cudnn_attention
from ..models.context import check_longrope
from ..models.packed_weights import packed_weights
from .coins import Coins, given_coins, row_coin_keys, tossed_coins
from .compiled_sampling import CompiledSampling
from .compiled_steps import CompiledDecoding, StepPlan
from .decoding import LazyDecoder
from .draws import draw_tokens
from .engine_drafts import EngineDrafts, EngineSampling
from .keyed_random import keyed_uniforms
from .ngram_block import NgramBlock
from .slot_sampling import FinishedRow, SlotSampling
from .slots import Slots
from .speculative import SpeculativeSampling, speculative_numbers

__all__ = ["Completions", "draw_tokens", "left_pad", "sample_completions", "sample_prompts"]


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


@without_cudnn_attention()
@grouped_attention()
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
        compiled ([`CompiledDecoding`], *optional*): runs the steps of its models compiled.
        no_repeat_ngram_size (`int`, *optional*, defaults to `0`): size of the n-grams that no row may repeat, its
            prompt included, see [`NgramBlock`]; 0 allows all.

    Returns:
        [`Completions`].

    Raises:
        ValueError: if a completion can cross the length up to which a model with LongRoPE can be sampled from, or
            `teacher_coins` are given without a teacher.
    """
    prompts = [row[keep].tolist() for row, keep in zip(prompt_ids.cpu(), prompt_mask.bool().cpu(), strict=True)]
    coins = None
    if teacher_coins is not None:
        if teacher is None:
            raise ValueError("teacher_coins choose the steps of a teacher, but teacher is None. Pass both or neither.")
        coins = given_coins(teacher_coins, shared=len(teacher_coins) == 1)
    packable = _packable(student, None if coins is None else teacher, on_every_process, compiled)
    finished = _decode(
        student,
        prompts,
        slots=len(prompts),
        uniforms=None if uniforms is None else uniforms.cpu().numpy(),
        coins=coins,
        teacher=teacher,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids,
        pad_token_id=pad_token_id,
        temperature=temperature,
        vocab_size=vocab_size,
        keep_states=keep_states,
        on_every_process=on_every_process,
        compiled=compiled,
        no_repeat_ngram_size=no_repeat_ngram_size,
    )
    with packed_weights(packable, max_new_tokens):  # `_decode` is a generator, which samples here
        rows = sorted(finished, key=lambda row: row.row)
    return _pad_rows(rows, pad_token_id)


def _packable(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    on_every_process: Callable[[bool], bool] | None,
    compiled: CompiledDecoding | None,
) -> list[PreTrainedModel]:
    """Return the models whose weights may be packed: those that are not sharded, and whose steps are not compiled."""
    if on_every_process is not None:
        return []
    of_compiled = [] if compiled is None else compiled.models
    models = [model for model in (student, teacher) if model is not None]
    return [model for model in models if all(model is not own for own in of_compiled)]


def _decode(
    student: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    slots: int,
    uniforms: np.ndarray | None,
    coins: Coins | None,
    teacher: PreTrainedModel | None,
    max_new_tokens: int,
    vocab_size: int | None,
    keep_states: bool,
    compiled: CompiledDecoding | None,
    no_repeat_ngram_size: int,
    speculation: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[FinishedRow]:
    """Yield the completions of prompts as they leave their slots.

    Unless all prompts fit into the slots, the longest come first. Tokens are mixed by `coins`, or by `speculation`:
    arguments of [`SpeculativeSampling`] or [`EngineSampling`].
    """
    mixes = coins is not None or speculation is not None
    models = [student, cast(PreTrainedModel, teacher)] if mixes else [student]
    for model in models:
        check_longrope(model, max(map(len, prompts)), max_new_tokens)
    vocab_size = vocab_size or student.get_output_embeddings().weight.shape[0]
    options |= {"uniforms": uniforms, "coins": coins}
    if compiled is not None:
        if no_repeat_ngram_size:
            raise UserError(
                f"no_repeat_ngram_size={no_repeat_ngram_size} does not work with compiled steps, which cannot look up "
                "the n-grams of a row. Drop one of them."
            )
        ends, pad = options.pop("eos_token_ids"), options.pop("pad_token_id")
        plan = StepPlan(1, False, True, uniforms is None, keep_states, vocab_size, tuple(ends), pad)
        yield from CompiledSampling(compiled, models, prompts, max_new_tokens, plan, **options).run()
        return
    grid = Slots(slots, student.get_output_embeddings().weight.device, max(map(len, prompts)) + max_new_tokens)
    decoders = [LazyDecoder(model, vocab_size, grid, keep_states or speculation is not None) for model in models]
    options["block"] = NgramBlock(no_repeat_ngram_size, prompts) if no_repeat_ngram_size else None
    if speculation is None:
        yield from SlotSampling(decoders, grid, prompts, max_new_tokens, **options).run()
        return
    sampling = EngineSampling if "drafts" in speculation else SpeculativeSampling
    for row in sampling(decoders, grid, prompts, max_new_tokens, **options, **speculation).run():
        yield row if keep_states else row._replace(states=[])


def _pad_rows(rows: Sequence[FinishedRow], pad_token_id: int) -> Completions:
    """Pad completions to the length of the longest."""
    mask = pad_sequence([torch.ones_like(row.tokens, dtype=torch.bool) for row in rows], batch_first=True)
    ids = pad_sequence([row.tokens for row in rows], batch_first=True, padding_value=pad_token_id)
    states = [pad_sequence(list(parts), batch_first=True) for parts in zip(*(row.states for row in rows), strict=True)]
    return Completions(ids, mask, *states)


@without_cudnn_attention()
@grouped_attention()
@torch.no_grad()
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
    mixing: str = "coins",
    vocab_size: int | None = None,
    on_every_process: Callable[[bool], bool] | None = None,
    keep_states: bool = False,
    compiled: CompiledDecoding | None = None,
    no_repeat_ngram_size: int = 0,
    drafts: EngineDrafts | None = None,
    on_batch: Callable[[list[int], Completions], object] | None = None,
) -> list[list[int]]:
    """Sample one completion for each prompt. A row that ends gives its slot to the next prompt, the longest first.

    Rows that share their coins decode in batches of prompts of similar length instead, and so do rows of compiled
    decoding, and of processes that sample together.

    Processes that sample together (`on_every_process`) may have different numbers of prompts, or none.

    Args:
        student ([`~transformers.PreTrainedModel`]): an unwrapped model in eval mode.
        prompt_ids (`Sequence[Sequence[int]]`): prompts without padding, at least one token each.
        keys (`Sequence[tuple[int, ...]]`, *optional*): key of each prompt's random numbers, see [`keyed_uniforms`].
            None decodes greedily.
        batch_size (`int`, *optional*): rows decoded together, the number of slots; all by default.
        alpha (`float`, *optional*, defaults to `0.0`): share of `teacher` in the mixture.
        coin_key (`tuple[int, ...]`, *optional*): key of the coins, to which the number of the batch is appended, or
            the key of the row if each row has coins of its own. None derives the coins from `keys`, independently of
            the numbers that draw the tokens; without `keys` they come from torch's generator. Unused with
            `mixing="speculative"`, which always derives its numbers from `keys`.
        shared_coins (`bool`, *optional*, defaults to `True`): whether rows decoded together share their coins, so that
            only one of the models runs at a step. `False` makes all rows independent, and a completion a function of
            its key alone.
        mixing (`str`, *optional*, defaults to `"coins"`): `"coins"` tosses a coin before each token. `"speculative"`
            lets the student draft blocks of tokens that the teacher corrects, see [`speculative`]; a completion is a
            function of its key alone, and `shared_coins` has no influence.
        drafts ([`EngineDrafts`], *optional*): with `mixing="speculative"`, an engine drafts in the student's place.
        on_batch (`Callable[[list[int], Completions], object]`, *optional*): called with the numbers of prompts and
            their [`Completions`], as soon as `batch_size` of them are complete.
        max_new_tokens, eos_token_ids, pad_token_id, temperature, teacher, vocab_size, on_every_process, keep_states,
            compiled, no_repeat_ngram_size: see [`sample_completions`].

    Returns:
        `list[list[int]]`: token ids of each completion in the order of the prompts, the end-of-sequence token
        included.
    """
    if mixing not in ("coins", "speculative") and alpha > 0:
        raise UserError(f"mixing must be 'coins' or 'speculative', got {mixing!r}.")
    if mixing == "speculative" and alpha > 0:
        _check_speculation(teacher, keys, on_every_process, compiled, no_repeat_ngram_size)
    elif drafts is not None:
        raise UserError(f"mixing={mixing!r} does not use drafts of an engine. Set mixing='speculative' and alpha > 0.")
    order = sorted(range(len(prompt_ids)), key=lambda row: -len(prompt_ids[row]))
    size = batch_size or max(len(order), 1)
    # Batches follow one another where their rows are tied: shared coins belong to the steps of a batch, compiled code
    # computes all rows of its shape, and processes that sample together make the same calls.
    shares = alpha > 0 and mixing == "coins" and shared_coins
    refills = compiled is None and on_every_process is None and not shares
    batches = iter([order] if order else []) if refills else _batches(order, size, on_every_process)
    completions: list[list[int]] = [[] for _ in order]
    packable = _packable(student, teacher if alpha > 0 else None, on_every_process, compiled)
    with packed_weights(packable, max_new_tokens):
        for number, rows in enumerate(batches):
            own_keys = [None if keys is None else keys[row] for row in rows]
            coins = speculation = None
            if alpha > 0 and mixing == "speculative":
                tosses, replacements = speculative_numbers(row_coin_keys(None, number, own_keys), max_new_tokens)
                speculation = {"alpha": alpha, "tosses": tosses, "replacements": replacements}
                speculation |= {} if drafts is None else {"drafts": drafts, "keys": own_keys}
            elif alpha > 0:
                coins = tossed_coins(alpha, coin_key, number, own_keys, shared_coins, max_new_tokens)
            finished = _decode(
                student,
                [prompt_ids[row] for row in rows] or [[]],
                slots=min(size, len(rows)) or 1,
                uniforms=_row_numbers(keys, rows, max_new_tokens),
                coins=coins,
                teacher=teacher,
                max_new_tokens=max_new_tokens,
                eos_token_ids=eos_token_ids,
                pad_token_id=pad_token_id,
                temperature=temperature,
                vocab_size=vocab_size,
                keep_states=keep_states,
                on_every_process=on_every_process,
                compiled=compiled,
                no_repeat_ngram_size=no_repeat_ngram_size,
                speculation=speculation,
            )
            for group in _groups(finished, size):
                if not rows:  # of a process that only took part in the calls of others
                    continue
                numbers = [rows[row.row] for row in group]
                for row, found in zip(numbers, group, strict=True):
                    completions[row] = found.tokens.tolist()
                if on_batch is not None:
                    on_batch(numbers, _pad_rows(group, pad_token_id))
    return completions


def _check_speculation(
    teacher: PreTrainedModel | None,
    keys: Sequence[tuple[int, ...]] | None,
    on_every_process: Callable[[bool], bool] | None,
    compiled: CompiledDecoding | None,
    no_repeat_ngram_size: int,
) -> None:
    """Check that completions can be sampled with `mixing="speculative"`.

    Raises:
        ValueError: naming the argument.
    """
    reasons = {
        "teacher=None": (teacher is None, "there is no teacher to mix with"),
        "keys=None": (keys is None, "greedy decoding has no distribution to mix"),
        "on_every_process": (on_every_process is not None, "processes need the teacher after different tokens"),
        "compiled": (compiled is not None, "dropped drafts cannot be taken out of a compiled cache"),
        f"no_repeat_ngram_size={no_repeat_ngram_size}": (
            no_repeat_ngram_size > 0,
            "the n-grams of a draft are unknown to the teacher's pass",
        ),
    }
    for name, (is_set, reason) in reasons.items():
        if is_set:
            raise UserError(f"mixing='speculative' does not work with {name}: {reason}. Use mixing='coins'.")


def _groups(finished: Iterator[FinishedRow], size: int) -> Iterator[list[FinishedRow]]:
    """Collect rows in groups of `size`, in the order of their prompts."""
    group: list[FinishedRow] = []
    for row in finished:
        group.append(row)
        if len(group) == size:
            yield sorted(group, key=lambda row: row.row)
            group = []
    if group:
        yield sorted(group, key=lambda row: row.row)


def _row_numbers(
    keys: Sequence[tuple[int, ...]] | None, rows: Sequence[int], max_new_tokens: int
) -> np.ndarray | None:
    """Return the numbers `(R, N)` that draw the tokens of rows."""
    if keys is None or not rows:
        return None
    return np.stack([keyed_uniforms(max_new_tokens, *keys[row]) for row in rows])


def _batches(
    order: Sequence[int], batch_size: int, on_every_process: Callable[[bool], bool] | None
) -> Iterator[list[int]]:
    """Split `order` into batches; if processes sample together, empty ones follow until the last process is done."""
    for start in count(0, batch_size):
        rows = list(order[start : start + batch_size])
        if not rows if on_every_process is None else on_every_process(not rows):
            return
        yield rows


def left_pad(sequences: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return left-padded token ids and their bool mask `(B, L)`."""
    width = max(1, max(map(len, sequences)))
    ids = torch.full((len(sequences), width), pad_token_id)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = True
    return ids, mask
