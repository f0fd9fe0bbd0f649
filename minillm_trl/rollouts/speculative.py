r"""Speculative mixing: the student drafts a block of tokens, and one pass of the teacher over the block corrects it.

A drafted token y is kept with probability $\min(1, (1-\alpha) + \alpha\, p(y)/q(y))$. Otherwise a token from the
normalised $(p-q)^+$ replaces it, and the rest of the draft is dropped. Each token then follows
$\mu = \alpha p + (1-\alpha) q$ exactly, independently of other rows, and a token is rejected with probability
$\alpha\, \mathrm{TV}(p, q)$.

The number that decides is drawn before the models run. Below $\alpha$, with probability $\alpha$, it asks for the
teacher's verdict; otherwise the token is kept for every p. So it is known beforehand at which tokens a draft can end,
and blocks are as long as these numbers, and the share of kept tokens up to now, make worthwhile. What is sampled does
not depend on the blocks: token, verdict and replacement are functions of the row's key and the tokens before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .draws import draw_tokens, invert_cdf
from .keyed_random import digest, keyed_uniforms
from .slot_sampling import SlotSampling

_LONGEST_BLOCK = 32

# Columns without a token of their row, from dropped drafts, are removed beyond this share: removing copies the caches.
_HOLE_SHARE = 0.25

# Verdicts that the share of kept tokens starts with
_KEPT_BEFORE, _ASKED_BEFORE = 7, 10

# Tokens that a forward pass computes in the time in which it reads the weights: about the ratio of arithmetic to
# memory bandwidth. It only decides the length of blocks.
_TOKENS_PER_READ = {"cpu": 16, "cuda": 128}


def judge_drafts(
    teacher_logits: torch.Tensor,
    student_logits: torch.Tensor,
    drafts: torch.Tensor,
    verdicts: torch.Tensor,
    replacements: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Keep or replace the tokens that the student drafted where the teacher's distribution is asked for.

    Keeps y with probability $\min(1, p(y)/q(y))$, and otherwise draws from the normalised $(p-q)^+$, so that the token
    follows p if y follows q.

    Args:
        teacher_logits, student_logits (`torch.Tensor` of shape `(K, V)`): logits of p and q.
        drafts (`torch.Tensor` of shape `(K,)`): tokens y drawn from q.
        verdicts, replacements (`torch.Tensor` of shape `(K,)`, float64): independent uniform numbers in [0, 1).
        temperature (`float`): > 0, of both models.

    Returns:
        Whether y is kept `(K,)`, and y or its replacement `(K,)`.
    """
    teacher, student = (
        torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=-1)
        for logits in (teacher_logits, student_logits)
    )
    of_draft = [probs.gather(1, drafts[:, None]).squeeze(1).double() for probs in (teacher, student)]
    residual = (teacher - student).clamp(min=0.0)
    # without a residual, p and q are the same up to rounding
    kept = (verdicts * of_draft[1] < of_draft[0]) | (residual.sum(dim=-1) <= 0.0)
    return kept, torch.where(kept, drafts, invert_cdf(residual, replacements))


def block_length(
    asked: np.ndarray, kept_share: float, student_cost: float, teacher_cost: float, per_token: float
) -> int:
    """Return the number of tokens to draft: the most expected tokens per cost.

    Args:
        asked (`np.ndarray` of shape `(R, M)`): for the next M tokens of each row: 1 where the teacher is asked, 0
            where the student's token is kept anyway, -1 beyond the row's length limit.
        kept_share (`float`): expected share of kept tokens where the teacher is asked.
        student_cost, teacher_cost (`float`): cost of reading the models' weights once.
        per_token (`float`): cost of a token, relative to reading the weights of its model.
    """
    verdicts = (asked == 1).cumsum(axis=1)
    before = np.pad(verdicts, ((0, 0), (1, 0)))[:, :-1]
    expected = np.where(asked >= 0, kept_share**before, 0.0).sum(axis=0).cumsum()
    lengths = np.arange(1, asked.shape[1] + 1)
    tokens = len(asked) * per_token
    cost = student_cost * lengths * (1 + tokens)
    cost = cost + np.where(verdicts.any(axis=0), teacher_cost * (1 + tokens * lengths), 0.0)
    return asked.shape[1] - int(np.argmax((expected / cost)[::-1]))  # the longest of equally good ones


def speculative_numbers(keys: Sequence[tuple[int, ...]], max_new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers that decide, and those that draw replacements, `(R, N)`, of rows with these coin keys."""
    tosses = [keyed_uniforms(max_new_tokens, *key) for key in keys]
    replacements = [keyed_uniforms(max_new_tokens, digest(["replacement", *key])) for key in keys]
    return np.stack(tosses), np.stack(replacements)


@dataclass
class SpeculativeSampling(SlotSampling):
    """Decode prompts in slots, with a block of drafted tokens for each row at each step.

    The decoders of student and teacher keep their hidden states.

    Args:
        alpha (`float`): the teacher's share, in (0, 1].
        tosses, replacements (`np.ndarray` of shape `(R, N)`): see [`speculative_numbers`].
    """

    alpha: float = 1.0
    tosses: np.ndarray | None = None
    replacements: np.ndarray | None = None
    kept: int = 0
    asked: int = 0
    _is_verified: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        models = [decoder.model for decoder in self.decoders]
        self._costs = [float(model.num_parameters()) for model in models]
        self._per_token = 1 / _TOKENS_PER_READ.get(models[0].device.type, 128)
        # windows, and positions that the architecture counts itself, are distances between columns
        self._needs_no_holes = any(
            decoder.cache.has_windows or not decoder.takes_positions for decoder in self.decoders
        )

    def _draw_step(self) -> None:
        """Draft a block, and let the teacher judge it."""
        slots = self.slots
        length = self._block_length()
        slots.reserve(length)  # from here on, columns keep their numbers
        start, before = slots.end, slots.sampled[: slots.count].copy()
        was_unfinished = slots.unfinished
        parts = []  # slots, offset and student logits of the tokens that the teacher is asked for
        for offset in range(length):
            wanted = np.flatnonzero(slots.unfinished)
            if not len(wanted):
                break
            logits = self.decoders[0].next_logits(wanted)
            tokens = torch.full((slots.count,), self.pad_token_id, device=slots.ids.device)
            numbers = torch.from_numpy(wanted).to(tokens.device)
            tokens[numbers] = draw_tokens(logits, self.numbers(self.uniforms, wanted), self.temperature)
            is_asked = self._asked(self._tosses(wanted))
            if is_asked.any():
                parts.append((wanted[is_asked], offset, logits[torch.from_numpy(is_asked)]))
            self.append(tokens)
        self._is_verified = bool(parts)
        if parts:
            self._verify(parts, start, before, was_unfinished)

    def _tosses(self, wanted: np.ndarray) -> np.ndarray:
        assert self.tosses is not None
        return self.tosses[self.slots.row[wanted], self.slots.sampled[wanted]]

    def _asked(self, tosses: np.ndarray) -> np.ndarray:
        """Return at which of the tokens with these tosses a draft can end."""
        return tosses < self.alpha

    def _block_length(self) -> int:
        slots = self.slots
        unfinished = np.flatnonzero(slots.unfinished)
        steps = slots.sampled[unfinished, None] + np.arange(_LONGEST_BLOCK)
        assert self.tosses is not None
        tosses = self.tosses[slots.row[unfinished, None], np.minimum(steps, self.max_new_tokens - 1)]
        asked = np.where(steps < self.max_new_tokens, self._asked(tosses), -1)
        share = (_KEPT_BEFORE + self.kept) / (_ASKED_BEFORE + self.asked)
        return block_length(asked, share, self._costs[0], self._costs[1], self._per_token)

    def _verify(
        self,
        parts: list[tuple[np.ndarray, int, torch.Tensor]],
        start: int,
        before: np.ndarray,
        was_unfinished: np.ndarray,
    ) -> None:
        """Judge the drafts in the columns from `start` on, of rows that had `before` tokens, and drop what follows."""
        slots, teacher = self.slots, self.decoders[1]
        numbers = np.concatenate([part[0] for part in parts])
        offsets = np.concatenate([np.full(len(part[0]), part[1]) for part in parts])
        rows, steps = slots.row[numbers], before[numbers] + offsets
        teacher.feed(slots.end - 1)
        device = slots.ids.device
        drafts = slots.ids[torch.from_numpy(numbers), torch.from_numpy(start - slots.base + offsets)]
        assert self.tosses is not None
        assert self.replacements is not None
        verdicts, replacements = (
            torch.from_numpy(found[rows, steps]).to(device) for found in (self.tosses, self.replacements)
        )
        kept, tokens = judge_drafts(
            teacher.logits_at(numbers, start - 1 + offsets),
            torch.cat([part[2] for part in parts]),
            drafts,
            verdicts / self.alpha,
            replacements,
            self.temperature,
        )
        self._settle(numbers, offsets, kept, tokens, start, before, was_unfinished)

    def _settle(
        self,
        numbers: np.ndarray,
        offsets: np.ndarray,
        kept: torch.Tensor,
        tokens: torch.Tensor,
        start: int,
        before: np.ndarray,
        was_unfinished: np.ndarray,
    ) -> np.ndarray:
        """Replace each row's first token that is not kept, and drop what follows.

        Args:
            numbers, offsets (`np.ndarray` of shape `(K,)`): slots of judged tokens, and their places in the block.
            kept, tokens (`torch.Tensor` of shape `(K,)`): whether they are kept; they or their replacements.
            start (`int`): first column of the block.
            before (`np.ndarray` of shape `(count,)`): tokens of each row before the block.
            was_unfinished (`np.ndarray` of shape `(count,)`, bool): rows that had not finished before the block.

        Returns:
            `np.ndarray` of shape `(K,)`, bool: tokens up to the first one of their row that is not kept.
        """
        slots = self.slots
        is_kept = kept.cpu().numpy()
        drafted = slots.sampled[: slots.count] - before
        cut = np.full(slots.count, _LONGEST_BLOCK)  # offset of each row's first rejected token
        np.minimum.at(cut, numbers[~is_kept], offsets[~is_kept])
        judged = offsets <= cut[numbers]
        self.asked += int(judged.sum())
        self.kept += int((judged & is_kept).sum())
        rejected = {
            int(slot): token
            for slot, offset, token in zip(numbers, offsets, tokens.tolist(), strict=True)
            if cut[slot] == offset
        }
        remaining = np.where(cut < _LONGEST_BLOCK, cut + 1, drafted)
        end = start + int(remaining[was_unfinished].max())
        for slot, token in rejected.items():
            sampled = int(before[slot] + cut[slot] + 1)
            finishes = token in self.eos_token_ids or sampled == self.max_new_tokens
            slots.replace(slot, start + int(cut[slot]), token, sampled, finishes, end)
        slots.cut(end)
        return judged

    def _refill(self) -> None:
        slots = self.slots
        if self._is_verified and slots.count:  # both caches end at the same column, and all rows continue
            holes = slots.holes
            if holes.any() and (self._needs_no_holes or holes.mean() > _HOLE_SHARE * (slots.end - slots.base)):
                slots.align()
        super()._refill()
