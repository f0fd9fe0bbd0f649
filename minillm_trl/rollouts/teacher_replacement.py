r"""Speculative knowledge distillation (SKD): the student proposes each token, and the teacher corrects it.

A token of the student that is not among the teacher's K likeliest tokens is replaced by a sample of the teacher (arXiv
2410.11325, Algorithm 1). So a token follows

$$ \mu(y) = q(y)\,[y \in K_p] + \Big( \sum_{v \notin K_p} q(v) \Big)\, p(y) $$

where $K_p$ are these K tokens. The student drafts several tokens at a time, and one pass of the teacher judges them.
What it drafted after a replaced token is thrown away, so the law is that of judging each token in turn.

These texts are neither the student's nor the mixture's of Eq. 4, so the loss is an expectation over other texts than
the reverse KL asks for. The paper's abstract does not say whether the teacher samples from its whole distribution;
here it does.
"""

from collections.abc import Callable, Sequence

import torch

from .keyed_random import keyed_uniforms
from .rollout_teacher import RolloutTeacher
from .sampling import draw_tokens, left_pad
from .scores import RolloutScorer

# Tokens of a draft: a longer one saves passes of the teacher, and wastes more tokens behind a replaced one
DRAFT_TOKENS = 16

Key = tuple[int, ...]
Texts = Sequence[Sequence[int]]


def sample_with_replacement(
    draft: Callable[[Texts, Sequence[Key], int], list[list[int]]],
    teacher: RolloutTeacher,
    scorer: RolloutScorer,
    prompt_ids: Texts,
    keys: Sequence[Key],
    *,
    top_k: int,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
) -> list[list[int]]:
    """Sample one completion for each prompt, with the student's improbable tokens replaced by the teacher's.

    Args:
        draft (`Callable`): samples completions of texts from the student, given their keys and a length limit.
        teacher ([`RolloutTeacher`]): the teacher; not sharded, as each process calls it by its own drafts.
        scorer ([`RolloutScorer`]): has the sampling temperature, also of the teacher's tokens, and the vocabulary.
        prompt_ids (`Sequence[Sequence[int]]`): prompts without padding.
        keys (`Sequence[tuple[int, ...]]`): key of each prompt's random numbers.
        top_k (`int`): K, >= 1. From the size of the vocabulary on, all samples are the student's.
        max_new_tokens (`int`): length limit.
        eos_token_ids, pad_token_id: ids that end a completion, and the id that pads texts.
    """
    completions: list[list[int]] = [[] for _ in prompt_ids]
    open_rows = list(range(len(completions)))
    while open_rows:
        limits = [min(DRAFT_TOKENS, max_new_tokens - len(completions[row])) for row in open_rows]
        texts = [[*prompt_ids[row], *completions[row]] for row in open_rows]
        # a key for each place in a completion, so that no number is used twice
        places = [(*keys[row], len(completions[row]) + 1) for row in open_rows]
        drafts = [ids[:limit] for ids, limit in zip(draft(texts, places, max(limits)), limits, strict=True)]
        outside = _first_outside(teacher, scorer, texts, drafts, places, top_k, pad_token_id)
        for row, tokens, found in zip(open_rows, drafts, outside, strict=True):
            completions[row] += tokens if found is None else [*tokens[: found[0]], found[1]]
        open_rows = [
            row
            for row in open_rows
            if len(completions[row]) < max_new_tokens and completions[row][-1] not in eos_token_ids
        ]
    return completions


@torch.no_grad()
def _first_outside(
    teacher: RolloutTeacher,
    scorer: RolloutScorer,
    texts: Texts,
    drafts: Sequence[list[int]],
    keys: Sequence[Key],
    top_k: int,
    pad_token_id: int,
) -> list[tuple[int, int] | None]:
    """Return the place of each draft's first token outside the teacher's top K, and the token that replaces it."""
    length = max(map(len, drafts))
    ids, mask = left_pad(texts, pad_token_id)
    padding = [length - len(draft) for draft in drafts]
    padded = [[*draft, *[pad_token_id] * count] for draft, count in zip(drafts, padding, strict=True)]
    real = [[True] * len(draft) + [False] * count for draft, count in zip(drafts, padding, strict=True)]
    device = teacher.head.weight.device
    ids = torch.cat([ids, torch.tensor(padded)], dim=1).to(device)
    states = teacher.hidden_states(ids, torch.cat([mask, torch.tensor(real)], dim=1).to(device), length)
    found: list[tuple[int, int] | None] = []
    for row, (draft, key) in enumerate(zip(drafts, keys, strict=True)):
        logits = teacher.head.logits(states[row, : len(draft)], scorer.vocab_size)
        proposed = logits.gather(1, torch.tensor(draft, device=device)[:, None])
        outside = ((logits > proposed).sum(dim=1) >= top_k).nonzero().flatten().tolist()
        if not outside:
            found.append(None)
            continue
        place = outside[0]
        # numbers of their own, since the student's proposals have used those of `key`
        uniforms = torch.from_numpy(keyed_uniforms(len(draft), *key, 1))[place : place + 1].to(device)
        found.append((place, int(draw_tokens(logits[place : place + 1], uniforms, scorer.temperature))))
    return found
