r"""Speculative mixing with drafts of an inference engine, whose probabilities are not exactly the student's.

The engine continues each row by a segment of tokens. It draws a token y from its own distribution q', which differs
from the student's q by rounding and by other kernels, and reports q'(y). One pass of the student and one of the
teacher over the segment compute q and p. With a margin m, y is kept with probability

$$ \min\Big(1, \frac{g(y)}{q'(y)}\Big), \qquad g = e^{-m} \big((1-\alpha)\, q + \alpha \min(p, q)\big) $$

Otherwise a token from the normalised $\mu - g$ replaces it, and the rest of the segment is dropped. So a token, given
those before it, follows $\mu = \alpha p + (1-\alpha) q$ exactly if g <= q' everywhere, which holds if no token has a
log-prob under q' that is more than m below the one under q. The rule needs q' at the drafted tokens alone.

In general, the law of a token is at most $\sum_v (g - q')^+(v)$ away from $\mu$ in total variation. This is the
expectation of $(g(y)/q'(y) - 1)^+$ over drafts y, so drafts estimate how exact they are. A token that is hardly ever
drafted does not show. The margin costs rejections, of a
share $1 - e^{-m}$ of the tokens. With m = 0 and q' = q, these are the rules of [`speculative`].
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from ..models.fused_head import token_chunks
from .draws import invert_cdf
from .keyed_random import digest
from .speculative import SpeculativeSampling

# m, in nats: several times the rounding of bfloat16, which is below 0.01 for most tokens
MARGIN = 0.02


class Draft(NamedTuple):
    """A segment that an engine has drawn.

    Attributes:
        tokens (`list[int]`): token ids, up to the length asked for, or up to the first one that ends a completion.
        logps (`list[float]`): the engine's log-probs of the tokens, at the sampling temperature.
    """

    tokens: list[int]
    logps: list[float]


# Maps texts, the number of tokens to draw for each, and a seed for each to drafts
Engine = Callable[[list[list[int]], list[int], list[int]], list[Draft]]


class Verdicts(NamedTuple):
    """What becomes of drafted tokens.

    Attributes:
        kept (`torch.Tensor` of shape `(K,)`, bool): whether the token is kept.
        tokens (`torch.Tensor` of shape `(K,)`): the token or its replacement.
        excess (`torch.Tensor` of shape `(K,)`, float64): $(g(y)/q'(y) - 1)^+$.
        gaps (`torch.Tensor` of shape `(K,)`, float64): $|\\log q'(y) - \\log q(y)|$, nats.
    """

    kept: torch.Tensor
    tokens: torch.Tensor
    excess: torch.Tensor
    gaps: torch.Tensor


def judge_engine_drafts(
    teacher_logits: torch.Tensor,
    student_logits: torch.Tensor,
    drafts: torch.Tensor,
    draft_logps: torch.Tensor,
    verdicts: torch.Tensor,
    replacements: torch.Tensor,
    *,
    alpha: float,
    temperature: float,
    margin: float,
) -> Verdicts:
    r"""Keep or replace the tokens that an engine drafted, so that they follow $\alpha p + (1-\alpha) q$.

    Args:
        teacher_logits, student_logits (`torch.Tensor` of shape `(K, V)`): logits of p and q.
        drafts (`torch.Tensor` of shape `(K,)`): tokens y drawn from q'.
        draft_logps (`torch.Tensor` of shape `(K,)`): log q'(y). Infinity has a token replaced.
        verdicts, replacements (`torch.Tensor` of shape `(K,)`, float64): independent uniform numbers in [0, 1).
        alpha (`float`): the teacher's share, in [0, 1].
        temperature (`float`): > 0, of both models and of q'.
        margin (`float`): m, > 0 nats.
    """
    teacher, student = (
        torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=-1)
        for logits in (teacher_logits, student_logits)
    )
    mixture = alpha * teacher + (1 - alpha) * student
    common = math.exp(-margin) * ((1 - alpha) * student + alpha * torch.minimum(teacher, student))
    of_draft, of_student = (probs.gather(1, drafts[:, None]).squeeze(1).double() for probs in (common, student))
    ratio = of_draft / draft_logps.double().exp()
    kept = verdicts < ratio
    replaced = invert_cdf((mixture - common).clamp(min=0.0), replacements)
    gaps = (draft_logps.double() - of_student.log()).abs()
    return Verdicts(kept, torch.where(kept, drafts, replaced), (ratio - 1).clamp(min=0.0), gaps)


@dataclass
class EngineDrafts:
    """An engine that drafts, and what judging its drafts has shown since the last [`take_totals`].

    Args:
        engine (`Callable`): draws segments, see [`Engine`].
    """

    engine: Engine
    _sums: dict[str, float] = field(default_factory=dict)

    def note(self, found: Verdicts) -> None:
        """Add the verdicts on tokens whose texts are those of the samples."""
        scored = found.gaps[found.gaps.isfinite()]
        sums = {
            "judged": float(len(found.kept)),
            "kept": float(found.kept.sum()),
            "excess": float(found.excess.sum()),
            "scored": float(len(scored)),
            "gaps": float(scored.sum()),
        }
        largest = max(self._sums.get("largest", 0.0), float(scored.max()) if len(scored) else 0.0)
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in sums.items()} | {"largest": largest}

    def take_totals(self) -> dict[str, tuple[float, float]]:
        """Return numerators and denominators of metrics since the last call."""
        sums, self._sums = self._sums, {}
        judged, scored, largest = (sums.get(name, 0.0) for name in ("judged", "scored", "largest"))
        return {
            "rollout/kept_drafts": (sums.get("kept", 0.0), judged),
            "rollout/mixture_distance": (sums.get("excess", 0.0), judged),
            "sampling/sampling_logp_difference/mean": (sums.get("gaps", 0.0), scored),
            "sampling/sampling_logp_difference/max": (largest, scored),
        }


@dataclass
class EngineSampling(SpeculativeSampling):
    """Decode prompts in slots, with a segment of an engine for each row at each step.

    Args:
        drafts ([`EngineDrafts`]): the engine.
        keys (`Sequence[tuple[int, ...]]`): key of each row, from which the engine's seeds are derived.
    """

    drafts: EngineDrafts | None = None
    keys: Sequence[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        # both models judge; the engine reads the student's weights for each token
        self._costs[1] += self._costs[0]

    def _asked(self, tosses: np.ndarray) -> np.ndarray:
        return np.ones(tosses.shape, dtype=bool)  # each token can be rejected

    def _draw_step(self) -> None:
        """Get a segment for each row, and let both models judge it."""
        slots = self.slots
        length = self._block_length()
        slots.reserve(length)  # from here on, columns keep their numbers
        start, before, was_unfinished = slots.end, slots.sampled[: slots.count].copy(), slots.unfinished
        wanted = np.flatnonzero(was_unfinished)
        drafts = self._request(wanted, length)
        tokens = np.full((slots.count, max(len(draft.tokens) for draft in drafts)), self.pad_token_id)
        for slot, draft in zip(wanted, drafts, strict=True):
            tokens[slot, : len(draft.tokens)] = draft.tokens
        for column in torch.from_numpy(tokens).to(slots.ids.device).unbind(dim=1):
            self.append(column)
        for decoder in self.decoders:
            decoder.feed(slots.end - 1)
        numbers = np.repeat(wanted, [len(draft.tokens) for draft in drafts])
        offsets = np.concatenate([np.arange(len(draft.tokens)) for draft in drafts])
        found = self._judge(
            numbers, start, offsets, before[numbers] + offsets, [p for draft in drafts for p in draft.logps]
        )
        judged = self._settle(numbers, offsets, found.kept, found.tokens, start, before, was_unfinished)
        assert self.drafts is not None
        self.drafts.note(Verdicts(*(part[torch.from_numpy(judged).to(part.device)] for part in found)))
        self._is_verified = True

    def _request(self, wanted: np.ndarray, length: int) -> list[Draft]:
        """Return the engine's segments for slots, without tokens outside the shared vocabulary."""
        slots, vocab_size = self.slots, self.decoders[0].vocab_size
        ids, mask = slots.ids.cpu(), slots.mask.cpu()
        texts = [ids[slot][mask[slot]].tolist() for slot in wanted]
        limits = np.minimum(length, self.max_new_tokens - slots.sampled[wanted]).tolist()
        seeds = [
            digest(["draft", *self.keys[row], sampled]) % 2**63
            for row, sampled in zip(slots.row[wanted], slots.sampled[wanted], strict=True)
        ]
        assert self.drafts is not None
        drafts = self.drafts.engine(texts, limits, seeds)
        # neither model can read such a token, and the mixture never draws it: another one stands for it until both
        # have judged, and its infinite log-prob has it replaced
        return [
            Draft(
                [token if token < vocab_size else 0 for token in draft.tokens],
                [logp if token < vocab_size else math.inf for token, logp in zip(*draft, strict=True)],
            )
            for draft in drafts
        ]

    def _judge(
        self, numbers: np.ndarray, start: int, offsets: np.ndarray, steps: np.ndarray, draft_logps: list[float]
    ) -> Verdicts:
        """Judge tokens at these offsets of segments from column `start` on, each the `steps`-th of its row."""
        slots, device = self.slots, self.slots.ids.device
        drafts = slots.ids[torch.from_numpy(numbers), torch.from_numpy(start - slots.base + offsets)]
        rows, logps = slots.row[numbers], torch.tensor(draft_logps, dtype=torch.float64, device=device)
        assert self.tosses is not None
        assert self.replacements is not None
        verdicts, replacements = (
            torch.from_numpy(found[rows, steps]).to(device) for found in (self.tosses, self.replacements)
        )
        student, teacher = self.decoders
        parts = [
            judge_engine_drafts(
                teacher.logits_at(numbers[part], start - 1 + offsets[part]),
                student.logits_at(numbers[part], start - 1 + offsets[part]),
                drafts[part],
                logps[part],
                verdicts[part],
                replacements[part],
                alpha=self.alpha,
                temperature=self.temperature,
                margin=MARGIN,
            )
            for part in token_chunks(len(numbers), self.decoders[0].vocab_size)
        ]
        return Verdicts(*(torch.cat(found) for found in zip(*parts, strict=True)))
