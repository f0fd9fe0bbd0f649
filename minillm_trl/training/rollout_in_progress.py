"""`RolloutInProgress`: what a rollout keeps between the methods that GRPO calls one after another."""

from dataclasses import dataclass, field

import torch

from ..rollouts.sampler import ScoredRows


@dataclass
class RolloutInProgress:
    """The state of one rollout, from its prompts to its batch.

    GRPO samples, asks for log-probs and computes rewards in methods of its own, which the trainer overrides. What one
    of them finds out for the next is here, and is dropped with the rollout.

    Args:
        counts (`torch.Tensor` of shape `(B,)`, bool): rows of this process that count: all but those that fill up the
            last batch of an evaluation.
        wants_old_logps (`bool`): whether GRPO's next call for log-probs is for the policy that sampled this rollout.
        turn (`int`): calls of the sampler so far; tools make it several.
        scores ([`ScoredRows`]): scores of the completions that are known already.
        empty_rows (`list[int]`): rows that the rollout function left empty.
        rewards (`torch.Tensor` of shape `(B_all, F)`): of each reward function, for the rows of all processes; an
            infinite one is replaced by the mean of its group.
        infinite_rewards (`torch.Tensor` of shape `(B_all, F)`, bool): where they were infinite.
    """

    counts: torch.Tensor
    wants_old_logps: bool = False
    turn: int = 0
    scores: ScoredRows = field(default_factory=ScoredRows)
    empty_rows: list[int] = field(default_factory=list)
    rewards: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    infinite_rewards: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
